import copy
import json
import logging

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.data.label_maps import ignore_label, label_map_of_instances, write_label_map
from maskx.detectron2 import MaskXImageMapper, Trainer, image_mapper, register_coco
from maskx.detectron2.image_mapper import training_records

NAMES = ("cat", "dog", "owl", "yak")
SIZE = (12, 16)
TRIANGLE = [[2, 2, 10, 2, 10, 9]]


@pytest.fixture
def write_images(tmp_path):
    """Write and register images: ``write_images([{...}, ...])`` with ids from 1.

    ``labels`` are category ids, ``objects`` annotations, ``label_map`` an array.
    """
    random = np.random.default_rng(0)

    def write(entries, name="mixed", categories=NAMES):
        images, annotations = [], []
        for image_id, entry in enumerate(entries, start=1):
            pixels = random.integers(0, 256, (*SIZE, 3), np.uint8)
            cv2.imwrite(str(tmp_path / f"{image_id}.png"), pixels)
            image = {"id": image_id, "file_name": f"{image_id}.png"}
            image |= {"height": SIZE[0], "width": SIZE[1]}
            if "labels" in entry:
                image["image_labels"] = entry["labels"]
            if "label_map" in entry:
                image["label_map_file_name"] = f"map{image_id}.png"
                path = tmp_path / image["label_map_file_name"]
                write_label_map(path, entry["label_map"], num_classes=len(categories))
            images.append(image)
            for object_ in entry.get("objects", ()):
                box = {"bbox": [2, 2, 8, 7], "image_id": image_id, "id": len(annotations) + 1}
                annotations.append(box | object_)
        names = [{"id": 10 * c + 10, "name": n} for c, n in enumerate(categories)]
        content = {"images": images, "annotations": annotations, "categories": names}
        (tmp_path / "mixed.json").write_text(json.dumps(content))
        register_coco(name, tmp_path / "mixed.json", tmp_path)
        return DatasetCatalog.get(name)

    return write


@pytest.fixture
def label_map():
    label_map = np.random.default_rng(1).integers(0, 5, SIZE).astype(np.uint8)
    label_map[0] = 255
    return label_map


def make_mapper(**kwargs):
    defaults = {"augmentations": [], "image_format": "RGB", "num_classes": 4, "label_maps": True}
    return MaskXImageMapper(**{"is_train": True, **defaults, **kwargs})


def test_images_and_label_maps_are_warped_and_flipped_together(write_images, label_map):
    (record,) = write_images([{"label_map": label_map, "labels": [10, 30]}])
    before = copy.deepcopy(record)
    warp, flip = T.Resize((8, 8)), T.RandomFlip(prob=1.0)
    plain = make_mapper(augmentations=[warp])(record)
    flipped = make_mapper(augmentations=[warp, flip])(record)
    assert record == before
    assert (plain["image"].shape, plain["image"].dtype) == ((3, 8, 8), torch.uint8)
    assert (plain["sem_seg"].shape, plain["sem_seg"].dtype) == ((8, 8), torch.int64)
    assert torch.equal(flipped["image"], plain["image"].flip(2))
    assert torch.equal(flipped["sem_seg"], plain["sem_seg"].flip(1))
    # The nearest pixel of the file, at the centre of each new one.
    rows, columns = ((np.arange(8) + 0.5) * s / 8 for s in SIZE)
    nearest = label_map[rows.astype(int)][:, columns.astype(int)]
    assert np.array_equal(plain["sem_seg"], nearest)
    assert plain["image_labels"] == [0, 2]
    assert (plain["height"], plain["width"], plain["image_id"]) == (*SIZE, 1)
    assert not {"annotations", "label_map_file_name"} & plain.keys()


@given(seed=st.integers(0, 999), height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_label_maps_of_many_classes_are_warped_as_those_of_few(seed, height, width):
    small = np.random.default_rng(seed).integers(0, 255, (height, width), np.uint8)
    transforms = T.TransformList([T.ResizeTransform(height, width, 5, 7), T.HFlipTransform(7)])
    expected = image_mapper.transform_label_map(small, transforms)
    large = image_mapper.transform_label_map(small.astype(np.int32) * 257, transforms)
    assert large.dtype == np.int32
    assert np.array_equal(large, expected.astype(np.int32) * 257)


def test_objects_are_drawn_where_there_is_no_label_map(write_images):
    (record,) = write_images([{"objects": [{"category_id": 20, "segmentation": TRIANGLE}]}])
    sample = make_mapper()(record)
    expected = label_map_of_instances(record, 4)
    assert np.array_equal(sample["sem_seg"], expected)
    assert set(np.unique(expected)) == {0, 2}
    assert sample["image_labels"] == [1]


def test_the_configuration_decides_on_size_flip_and_label_maps(
    make_classifier_cfg, make_deeplab_cfg, write_images, label_map
):
    (record,) = write_images([{"label_map": label_map}])
    DatasetCatalog.register("tiny_train", lambda: [record])
    MetadataCatalog.get("tiny_train").thing_classes = list(NAMES)
    never = ("INPUT.RANDOM_FLIP", "none")
    for make_cfg, has_map in ((make_classifier_cfg, False), (make_deeplab_cfg, True)):
        sample = MaskXImageMapper(make_cfg(*never), is_train=True)(record)
        assert sample["image"].shape == (3, 48, 48)
        assert ("sem_seg" in sample) == has_map
        assert "sem_seg" not in MaskXImageMapper(make_cfg(), is_train=False)(record)
    mapper = MaskXImageMapper(make_deeplab_cfg(), is_train=True)
    np.random.seed(0)
    seen = [mapper(record)["image"] for _ in range(12)]
    assert {torch.equal(image, sample["image"]) for image in seen} == {True, False}
    assert {torch.equal(image, sample["image"].flip(2)) for image in seen} == {True, False}
    vertical = MaskXImageMapper(make_deeplab_cfg("INPUT.RANDOM_FLIP", "vertical"), is_train=True)
    assert any(torch.equal(vertical(record)["image"], sample["image"].flip(1)) for _ in range(12))
    with pytest.raises(ValueError, match=r"INPUT\.MASKX\.SIZE is 0\. Allowed: a side"):
        MaskXImageMapper(make_deeplab_cfg("INPUT.MASKX.SIZE", 0), is_train=True)


def test_test_images_are_those_of_the_file(write_images, make_classifier_cfg):
    (record,) = write_images([{"labels": [40]}])
    sample = MaskXImageMapper(make_classifier_cfg(), is_train=False)(record)
    pixels = cv2.imread(record["file_name"])[:, :, ::-1]  # RGB, as the configuration says
    assert np.array_equal(sample["image"], pixels.transpose(2, 0, 1))
    assert sample["image_labels"] == [3]


def test_training_on_labels_reads_no_mask(write_images, label_map, monkeypatch):
    """Masks that would be errors do not matter, and no function that reads one is called."""
    objects = [{"category_id": 20, "segmentation": TRIANGLE}]
    with_masks = write_images([{"label_map": label_map, "labels": [10]}, {"objects": objects}])
    monkeypatch.setattr(image_mapper, "semantic_label_map", None)
    mapper = make_mapper(label_maps=False)
    for record, labels in zip(with_masks, ([0], [1]), strict=True):
        before = mapper(record)
        assert before["image_labels"] == labels
        if "label_map_file_name" in record:
            record["label_map_file_name"] = "none.png"
        for annotation in record["annotations"]:
            annotation["segmentation"] = "no mask at all"
        after = mapper(record)
        assert torch.equal(before.pop("image"), after.pop("image"))
        assert before == after


def test_masks_of_other_classes_are_withheld(write_images, label_map):
    """In a file they become unknown with the background; of objects only the box is left."""
    other = {"category_id": 30, "bbox": [4, 5, 6, 4], "segmentation": [[4, 5, 10, 5, 10, 9]]}
    objects = [{"category_id": 20, "segmentation": TRIANGLE}, other]
    map_record, objects_record = write_images([{"label_map": label_map}, {"objects": objects}])
    mapper = make_mapper(classes_with_masks={0, 1})
    found = mapper(map_record)["sem_seg"].numpy()
    assert np.array_equal(found, np.where(np.isin(label_map, (1, 2)), label_map, 255))

    found = mapper(objects_record)["sem_seg"].numpy()
    no_masks = copy.deepcopy(objects_record)
    del no_masks["annotations"][1]["segmentation"]
    assert np.array_equal(found, label_map_of_instances(no_masks, 4))
    moved = copy.deepcopy(objects_record)
    moved["annotations"][1]["segmentation"] = [[4, 5, 7, 5, 7, 9]]
    assert np.array_equal(found, mapper(moved)["sem_seg"])
    assert "segmentation" in objects_record["annotations"][1]


def test_background_is_known_where_no_class_is_withheld(write_images):
    label_map = np.zeros(SIZE, np.uint8)
    label_map[2:5] = 1
    (record,) = write_images([{"label_map": label_map}])
    found = make_mapper(classes_with_masks={0})(record)["sem_seg"]
    assert np.array_equal(found, label_map)


def test_the_split_withholds_masks_in_training_only(make_deeplab_cfg, tiny_train):
    half = ("DATASETS.MASKX.SPLIT", "scenes_half")
    assert MaskXImageMapper(make_deeplab_cfg(*half)).classes_with_masks == {0, 2}
    assert MaskXImageMapper(make_deeplab_cfg(*half), is_train=False).classes_with_masks is None
    assert MaskXImageMapper(make_deeplab_cfg()).classes_with_masks is None


def test_labels_of_more_than_254_classes(write_images):
    label_map = np.random.default_rng(0).integers(0, 301, SIZE)
    label_map[0] = ignore_label(300)
    (record,) = write_images([{"label_map": label_map}], categories=[f"c{i}" for i in range(300)])
    sample = make_mapper(num_classes=300, augmentations=[T.Resize(SIZE)])(record)
    assert np.array_equal(sample["sem_seg"], label_map)


def entries_of_all_kinds(label_map):
    return [
        {"labels": [10]},  # 1: tags
        {"labels": []},  # 2: known to have none
        {"label_map": label_map},  # 3
        {"objects": [{"category_id": 20, "segmentation": TRIANGLE}]},  # 4
        {"objects": [{"category_id": 20}]},  # 5: a box
        {"objects": [{"category_id": 20}], "labels": [10, 20]},  # 6: a box, and a tag without one
        {},  # 7: an image without objects
        {"objects": [{"category_id": 30, "segmentation": TRIANGLE}], "labels": [10]},  # 8
    ]


def ids(records):
    return [record["image_id"] for record in records]


def test_only_images_with_nothing_to_learn_from_are_left_out(
    make_classifier_cfg, make_deeplab_cfg, write_images, label_map, caplog
):
    """Detectron2's filter would leave out all without a box: 1, 2, 3 and 7."""
    write_images(entries_of_all_kinds(label_map))
    mixed = ("DATASETS.TRAIN", ("mixed",))
    with caplog.at_level(logging.WARNING):
        assert ids(training_records(make_classifier_cfg(*mixed))) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert ids(training_records(make_deeplab_cfg(*mixed))) == [2, 3, 4, 5, 7, 8]
    assert caplog.text.count("left out") == 1
    assert "2 of the 8 images of DATASETS.TRAIN are left out" in caplog.text
    # Of image 8 only the mask of owl is known, so it goes where that is withheld.
    split = write_split(make_deeplab_cfg, ["cat", "dog"])
    assert ids(training_records(make_deeplab_cfg(*mixed, *split))) == [2, 3, 4, 5, 7]


def write_split(make_cfg, names):
    path = f"{make_cfg().OUTPUT_DIR}.txt"
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(names))
    return "DATASETS.MASKX.SPLIT", path


def test_what_is_left_out_teaches_nothing(make_deeplab_cfg, write_images, label_map):
    """The rule that looks at records agrees with the label maps themselves."""
    records = write_images(entries_of_all_kinds(label_map))
    for split in ((), write_split(make_deeplab_cfg, ["cat", "dog"])):
        cfg = make_deeplab_cfg("DATASETS.TRAIN", ("mixed",), *split)
        mapper = MaskXImageMapper(cfg, is_train=True)
        known = [r["image_id"] for r in records if (mapper(r)["sem_seg"] != 255).any()]
        assert known == ids(training_records(cfg))


def test_the_loader_takes_what_detectron2_would_leave_out(
    make_classifier_cfg, make_deeplab_cfg, write_images, label_map
):
    write_images([{"labels": [10]}, {"label_map": label_map}])
    for make_cfg, expected in ((make_classifier_cfg, {1, 2}), (make_deeplab_cfg, {2})):
        cfg = make_cfg("DATASETS.TRAIN", ("mixed",))
        batches = iter(Trainer.build_train_loader(cfg))
        assert {s["image_id"] for _ in range(4) for s in next(batches)} == expected


def test_records_of_other_readers(make_classifier_cfg, make_deeplab_cfg, write_images):
    """Detectron2's own form: no image_labels, other boxes; or nothing but the image."""
    (record,) = write_images([{"objects": [{"category_id": 20, "segmentation": TRIANGLE}]}])
    core = {key: record[key] for key in ("file_name", "height", "width", "image_id")}
    box = {"bbox": [2, 2, 8, 7], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    records = [{**core, "annotations": [{**box, "segmentation": TRIANGLE}]}, core]
    DatasetCatalog.register("core", lambda: records)
    MetadataCatalog.get("core").thing_classes = list(NAMES)
    for make_cfg in (make_classifier_cfg, make_deeplab_cfg):
        cfg = make_cfg("DATASETS.TRAIN", ("core",), "INPUT.RANDOM_FLIP", "none")
        (kept,) = training_records(cfg)
        assert kept["annotations"][0]["bbox"] == [2, 2, 10, 9]
        assert (kept["annotations"][0]["class_index"], kept["supervision"]) == (1, "mask")
        sample = MaskXImageMapper(cfg, is_train=True)(kept)
        assert sample["image_labels"] == [1]
    assert sample["sem_seg"].unique().tolist() == [0, 2]


def test_data_that_teach_nothing_are_named(make_classifier_cfg, make_deeplab_cfg, write_images):
    write_images([{"labels": [10]}, {"labels": [20]}])
    words = r"None of the 2 images of mixed \(DATASETS\.TRAIN\) has a label map or a mask, which M"
    with pytest.raises(ValueError, match=words):
        training_records(make_deeplab_cfg("DATASETS.TRAIN", ("mixed",)))
    DatasetCatalog.register("bare", lambda: [{"file_name": "1.png", "image_id": 1}])
    MetadataCatalog.get("bare").thing_classes = list(NAMES)
    with pytest.raises(ValueError, match=r"has image labels, which MaskXImageClassifier learns"):
        training_records(make_classifier_cfg("DATASETS.TRAIN", ("bare",)))
    MetadataCatalog.get("other").thing_classes = list(NAMES[::-1])
    DatasetCatalog.register("other", lambda: [])
    with pytest.raises(ValueError, match=r"'mixed' and 'other' \(DATASETS\.TRAIN\) have d"):
        training_records(make_classifier_cfg("DATASETS.TRAIN", ("mixed", "other")))


def test_an_image_of_another_size_is_named(write_images):
    (record,) = write_images([{"labels": [10]}])
    record["width"] += 1
    with pytest.raises(ValueError, match=r"1\.png.*but its annotations say"):
        make_mapper(label_maps=False)(record)
