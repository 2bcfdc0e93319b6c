import copy
import functools
import json
import logging

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from settings import pairs

from maskx.core.images import warp_image
from maskx.data.images import ImageMapper
from maskx.data.label_maps import label_map_of_instances, write_label_map
from maskx.detectron2 import Trainer, register_coco
from maskx.detectron2.whole_images import allowed_label_map, image_mapper, training_records

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


def make_sample(record, **kwargs):
    mapper = ImageMapper(4, size=None, flip=False, label_maps=True, **kwargs)
    return mapper(record, np.random.RandomState(0))


def sample_of(cfg, record, seed=0):
    return image_mapper(cfg)(record, np.random.RandomState(seed))


def test_the_configuration_decides_on_size_flip_and_label_maps(
    make_classifier_cfg, make_deeplab_cfg, write_images, label_map
):
    (record,) = write_images([{"label_map": label_map}], name="tiny_train")
    never = ("INPUT.RANDOM_FLIP", "none")
    for make_cfg, has_map in ((make_classifier_cfg, False), (make_deeplab_cfg, True)):
        sample = sample_of(make_cfg(*never), record)
        assert sample["image"].shape == (3, 48, 48)
        assert ("sem_seg" in sample) == has_map
    flipped = {
        torch.equal(sample_of(make_deeplab_cfg(), record, seed)["image"], sample["image"].flip(2))
        for seed in range(12)
    }
    assert flipped == {True, False}
    with pytest.raises(ValueError, match=r"INPUT\.RANDOM_FLIP is 'vertical', .* Allowed: horiz"):
        image_mapper(make_deeplab_cfg("INPUT.RANDOM_FLIP", "vertical"))
    with pytest.raises(ValueError, match="size must be at least 1 pixel, or None, got 0"):
        image_mapper(make_deeplab_cfg("INPUT.MASKX.SIZE", 0))


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_loaders_give_the_channel_order_of_the_configuration(
    make_classifier_cfg, write_images, image_format
):
    (record,) = write_images([{"labels": [40]}])
    cfg = make_classifier_cfg(
        *pairs(
            {
                "DATASETS.TRAIN": ("mixed",),
                "DATASETS.TEST": ("mixed",),
                "INPUT.FORMAT": image_format,
                "INPUT.RANDOM_FLIP": "none",
                "INPUT.MASKX.SIZE": 16,
            }
        )
    )
    pixels = cv2.imread(record["file_name"])
    pixels = pixels if image_format == "BGR" else pixels[:, :, ::-1]
    expected = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    ((sample,),) = Trainer.build_test_loader(cfg, "mixed")
    assert torch.equal(sample["image"], expected)
    assert sample["image_labels"] == [3]
    trained = next(iter(Trainer.build_train_loader(cfg)))[0]
    assert torch.equal(trained["image"], warp_image(expected, 16))


def test_masks_of_other_classes_are_withheld(write_images, label_map):
    """In a file they become unknown with the background; of objects only the box is left."""
    other = {"category_id": 30, "bbox": [4, 5, 6, 4], "segmentation": [[4, 5, 10, 5, 10, 9]]}
    objects = [{"category_id": 20, "segmentation": TRIANGLE}, other]
    map_record, objects_record = write_images([{"label_map": label_map}, {"objects": objects}])
    read = functools.partial(allowed_label_map, num_classes=4, allowed={0, 1})
    found = make_sample(map_record, read_label_map=read)["sem_seg"].numpy()
    assert np.array_equal(found, np.where(np.isin(label_map, (1, 2)), label_map, 255))

    found = read(objects_record)
    no_masks = copy.deepcopy(objects_record)
    del no_masks["annotations"][1]["segmentation"]
    assert np.array_equal(found, label_map_of_instances(no_masks, 4))
    moved = copy.deepcopy(objects_record)
    moved["annotations"][1]["segmentation"] = [[4, 5, 7, 5, 7, 9]]
    assert np.array_equal(found, read(moved))
    assert "segmentation" in objects_record["annotations"][1]


def test_background_is_known_where_no_class_is_withheld(write_images):
    label_map = np.zeros(SIZE, np.uint8)
    label_map[2:5] = 1
    (record,) = write_images([{"label_map": label_map}])
    assert np.array_equal(allowed_label_map(record, num_classes=4, allowed={0}), label_map)


def test_the_split_withholds_masks(make_classifier_cfg, make_deeplab_cfg, tiny_train):
    half = ("DATASETS.MASKX.SPLIT", "scenes_half")
    assert image_mapper(make_deeplab_cfg(*half)).read_label_map.keywords["allowed"] == {0, 2}
    assert image_mapper(make_deeplab_cfg()).read_label_map is None
    assert image_mapper(make_classifier_cfg(*half)).read_label_map is None


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
        known = [r["image_id"] for r in records if (sample_of(cfg, r)["sem_seg"] != 255).any()]
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
        sample = sample_of(cfg, kept)
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
