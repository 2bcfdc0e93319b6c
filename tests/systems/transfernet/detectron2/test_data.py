import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from settings import pairs

import maskx.data.label_maps
from maskx.data.label_maps import label_map_of_instances, write_label_map
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES, VOC_CLASSES_IN_COCO
from maskx.detectron2 import Trainer, register_all, register_coco
from maskx.detectron2.trainer import check_config
from maskx.supervision import CategorySplit
from maskx.systems.transfernet.detectron2.data import (
    labels_of_dataset,
    transfer_records,
    transfer_split,
)
from maskx.systems.transfernet.samples import source_subset, transfer_sets

ROW = [[0, 0, 16, 0, 16, 24, 0, 24]]  # the left third of an image of 48 x 24 pixels


@pytest.fixture
def write_set(tmp_path):
    """Write and register a data set: ``write_set(name, categories, images, annotations)``."""

    def write(name, categories, images, annotations=()):
        root = tmp_path / name
        root.mkdir()
        entries = []
        for number, extra in enumerate(images, start=1):
            file_name = f"{number}.png"
            maskx.data.label_maps.Image.fromarray(np.full((24, 48, 3), 50, np.uint8)).save(
                root / file_name
            )
            entry = {"id": number, "file_name": file_name, "height": 24, "width": 48}
            entries.append(entry | extra)
        content = {
            "images": entries,
            "annotations": [
                {"id": i, "bbox": [0, 0, 16, 24], "segmentation": ROW, **a}
                for i, a in enumerate(annotations, start=1)
            ],
            "categories": [{"id": i, "name": n} for i, n in enumerate(categories, start=1)],
        }
        (root / "set.json").write_text(json.dumps(content))
        register_coco(name, root / "set.json", root)
        return root

    return write


@pytest.fixture
def two_sets(write_set):
    """Source of zebras and kites with masks; target with tags, VOC's names and a label map."""
    write_set(
        "source",
        ("zebra", "kite"),
        [{}, {}],
        [{"image_id": 1, "category_id": 1}, {"image_id": 2, "category_id": 2}],
    )
    tags = [{"image_labels": [1]}, {"image_labels": [2], "label_map_file_name": "map.png"}]
    label_map = np.zeros((24, 48), np.uint8)
    label_map[:, 24:], label_map[:, 40:] = 2, 255
    root = write_set("target", ("cat", "sofa"), tags)
    write_label_map(root / "map.png", label_map, num_classes=2)
    return root


def mapper_of(cfg):
    """Return the sets, and what makes a training sample: source images come first."""
    dataset = Trainer.build_train_loader(cfg).dataset
    return transfer_records(cfg), lambda index: dataset[index, 0]


TWO = ("DATASETS.TRAIN", ("source", "target"), "DATASETS.TEST", ("target",))
TWO += ("DATASETS.MASKX.SPLIT", "all")


def test_one_data_set_is_divided_by_its_split(make_transfer_cfg, tiny_sparse):
    cfg = make_transfer_cfg()
    split = transfer_split(cfg)
    sets = transfer_records(cfg)
    target = set(split.indices_without_masks)
    assert len(sets.source) > 1
    assert len(sets.source) + len(sets.target) == len(DatasetCatalog.get(tiny_sparse))
    for record in sets.source:
        assert not target & set(record["image_labels"])
        assert all("segmentation" in a for a in record["annotations"])
    for record in sets.target:
        assert set(record["image_labels"]) <= target
        assert (record["annotations"], record["supervision"]) == ([], "image")


def test_two_data_sets_share_a_class_list_by_name(make_transfer_cfg, two_sets):
    cfg = make_transfer_cfg(*TWO)
    split = transfer_split(cfg)
    assert split.class_names == ("cat", "couch", "zebra", "kite")  # target first, in COCO's words
    assert (split.with_masks, split.without_masks) == (("zebra", "kite"), ("cat", "couch"))
    sets = transfer_records(cfg)
    assert [r["image_labels"] for r in sets.source] == [[2], [3]]
    assert [r["annotations"][0]["class_index"] for r in sets.source] == [2, 3]
    assert [r["image_labels"] for r in sets.target] == [[0], [1]]
    assert labels_of_dataset("target", split) == [0, 1]
    assert labels_of_dataset("source", split) == [2, 3]
    check_config(cfg)


def test_the_union_of_coco60_and_voc_has_the_80_classes_of_coco(tmp_path, make_transfer_cfg):
    """With the files that datasets/prepare_*.py write, and as the configurations name them."""
    images = [{"id": 1, "file_name": "1.jpg", "height": 4, "width": 4}]
    for path, names in (
        ("coco/annotations/instances_coco60_train2014.json", COCO_THING_CLASSES),
        ("voc2012/voc2012_trainaug_tags.json", VOC_CLASSES),
    ):
        categories = [{"id": i, "name": n} for i, n in enumerate(names, start=1)]
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(
            json.dumps({"images": images, "annotations": [], "categories": categories})
        )
    register_all(tmp_path)
    train = ("maskx_coco60_train2014", "maskx_voc_2012_trainaug_tags")
    cfg = make_transfer_cfg(*TWO, "DATASETS.TRAIN", train, "DATASETS.TEST", train)
    split = transfer_split(cfg)
    assert sorted(split.class_names) == sorted(COCO_THING_CLASSES)
    assert labels_of_dataset(train[1], split) == list(range(20))
    assert set(split.without_masks) == set(VOC_CLASSES_IN_COCO)
    assert MetadataCatalog.get(train[0]).image_root == str(tmp_path / "coco" / "train2014")


def test_coco60_says_how_to_make_it(tmp_path, make_transfer_cfg):
    register_all(tmp_path)
    train = ("maskx_coco60_train2014", "maskx_voc_2012_trainaug_tags")
    words = r"instances_coco60_train2014\.json.*prepare\.py coco60"
    with pytest.raises(FileNotFoundError, match=words):
        transfer_records(make_transfer_cfg(*TWO, "DATASETS.TRAIN", train))


def test_samples_have_the_masks_of_the_source_and_the_tags_of_the_target(
    make_transfer_cfg, two_sets
):
    cfg = make_transfer_cfg(*TWO, "INPUT.RANDOM_FLIP", "none")
    sets, sample_of = mapper_of(cfg)
    source = sample_of(0)
    assert source["image"].shape == (3, 32, 32)
    expected = torch.zeros(32, 32, dtype=torch.int64)
    expected[:, :11] = 3  # 16 of 48 columns, as 32 columns; nearest
    assert torch.equal(source["sem_seg"], expected)
    assert source["image_labels"] == [2]
    target = sample_of(len(sets.source) + 1)
    assert "sem_seg" not in target
    assert target["image_labels"] == [1]


def test_labels_are_those_of_the_label_map_where_images_have_none(make_transfer_cfg, write_set):
    maps = [{"label_map_file_name": f"{name}.png"} for name in ("first", "second")]
    for name, classes in (("source", ("zebra", "kite")), ("target", ("cat", "sofa"))):
        root = write_set(name, classes, maps)
        for file, label in (("first", 1), ("second", 2)):
            label_map = np.zeros((24, 48), np.uint8)
            label_map[:, 24:], label_map[:, 40:] = label, 255
            write_label_map(root / f"{file}.png", label_map, num_classes=2)
    cfg = make_transfer_cfg(*TWO)
    sets = transfer_records(cfg)
    assert [r["image_labels"] for r in (*sets.source, *sets.target)] == [[2], [3], [0], [1]]
    assert {r["supervision"] for r in sets.source} == {"mask"}
    assert {r["supervision"] for r in sets.target} == {"image"}
    found = [sample["image_labels"] for (sample,) in Trainer.build_test_loader(cfg, "target")]
    assert found == [[0], [1]]


def test_target_masks_are_used_only_where_asked(make_transfer_cfg, two_sets):
    cfg = make_transfer_cfg(
        *TWO, "DATASETS.MASKX.USE_TARGET_MASKS", True, "INPUT.RANDOM_FLIP", "none"
    )
    sets, sample_of = mapper_of(cfg)
    tagged, masked = (sample_of(len(sets.source) + index) for index in range(2))
    assert "sem_seg" not in tagged
    assert masked["sem_seg"].unique().tolist() == [0, 2, 255]  # couch is class 1 in the union
    assert masked["image_labels"] == [1]


def test_target_masks_are_neither_opened_nor_decoded(make_transfer_cfg, two_sets, monkeypatch):
    decoded = []
    original = maskx.data.label_maps.decode_segmentation
    monkeypatch.setattr(
        maskx.data.label_maps,
        "decode_segmentation",
        lambda segmentation, *size: decoded.append(segmentation) or original(segmentation, *size),
    )
    cfg = make_transfer_cfg(*TWO)
    sets, sample_of = mapper_of(cfg)
    (two_sets / "map.png").unlink()  # its presence is checked when the set is read
    for index in range(len(sets.target)):
        sample_of(len(sets.source) + index)
    assert decoded == []
    sample_of(0)
    assert len(decoded) == 1


def test_target_objects_of_one_data_set_are_not_decoded(
    make_transfer_cfg, tiny_sparse, monkeypatch
):
    cfg = make_transfer_cfg()
    sets, sample_of = mapper_of(cfg)
    monkeypatch.setattr(maskx.data.label_maps, "decode_segmentation", None)
    for index in range(len(sets.target)):
        sample_of(len(sets.source) + index)
    with pytest.raises(TypeError, match="NoneType"):
        sample_of(0)


def test_the_classifier_reads_no_mask_at_all(make_transfer_cfg, tiny_sparse, monkeypatch):
    cfg = make_transfer_cfg(file="quick_schedules/stage0_classifier_scenes_cpu.yaml")
    monkeypatch.setattr(maskx.data.label_maps, "decode_segmentation", None)
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert len(batch) == 4
    assert all("sem_seg" not in sample for sample in batch)


def test_source_label_maps_are_those_of_the_objects(make_transfer_cfg, tiny_sparse):
    cfg = make_transfer_cfg("INPUT.MASKX.SIZE", 64, "INPUT.RANDOM_FLIP", "none")
    sets, sample_of = mapper_of(cfg)
    for index, record in enumerate(sets.source):
        sample = sample_of(index)
        truth = label_map_of_instances(record, 4)
        assert np.array_equal(sample["sem_seg"].numpy(), truth)
        assert sample["image_labels"] == [
            c for c in record["image_labels"] if (truth == c + 1).any()
        ]


def test_test_samples_are_asked_for_the_classes_of_their_data_set(make_transfer_cfg, two_sets):
    cfg = make_transfer_cfg(*TWO, "DATASETS.TEST", ("source", "target"))
    for name, label, candidates in (("source", 2, [2, 3]), ("target", 0, [0, 1])):
        (sample,) = next(iter(Trainer.build_test_loader(cfg, name)))
        assert (sample["image_labels"], sample["candidate_labels"]) == ([label], candidates)
        assert sample["image"].shape == (3, 24, 48)
        assert "sem_seg" not in sample


def test_every_batch_is_half_source_half_target(make_transfer_cfg, tiny_sparse):
    loader = iter(Trainer.build_train_loader(make_transfer_cfg()))
    for _ in range(6):
        sides = ["sem_seg" in sample for sample in next(loader)]
        assert sides == [True, True, False, False]


def test_fractions_of_the_source_are_nested_and_keep_the_target(make_transfer_cfg, tiny_sparse):
    def ids(*opts):
        sets = transfer_records(make_transfer_cfg(*opts))
        return [r["image_id"] for r in sets.source], [r["image_id"] for r in sets.target]

    source, target = ids()
    half, same_target = ids("DATASETS.MASKX.SOURCE_FRACTION", 0.5)
    few, _ = ids("DATASETS.MASKX.SOURCE_FRACTION", 0.01)
    assert same_target == target
    assert set(few) < set(half) < set(source)
    assert len(few) == 1
    split = transfer_split(make_transfer_cfg())
    plain = DatasetCatalog.get(tiny_sparse)
    expected = source_subset(transfer_sets(plain, split).source, 0.5, 1)
    found, _ = ids("DATASETS.MASKX.SOURCE_FRACTION", 0.5, "DATASETS.MASKX.SOURCE_SUBSET", 1)
    assert found == [r["image_id"] for r in expected]


def test_images_without_a_label_are_counted(make_transfer_cfg, write_set, caplog):
    write_set("source", ("zebra", "kite"), [{}, {}], [{"image_id": 1, "category_id": 1}])
    write_set("target", ("cat", "sofa"), [{"image_labels": [1]}])
    with caplog.at_level(logging.WARNING, "maskx"):
        sets = transfer_records(make_transfer_cfg(*TWO))
    assert sets.num_unlabelled == 1
    assert "1 of 3 images have no label" in caplog.text


def test_a_data_set_of_detectron2_itself_works(make_transfer_cfg, sparse_scenes):
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("plain", {}, str(sparse_scenes[0]), str(sparse_scenes[1]))
    cfg = make_transfer_cfg("DATASETS.TRAIN", ("plain",), "DATASETS.TEST", ("plain",))
    check_config(cfg)
    _, sample_of = mapper_of(cfg)
    assert "sem_seg" in sample_of(0)


def test_photographs_of_coco_are_divided(make_transfer_cfg, shared_data):
    """The 60 classes that VOC does not have are the source."""
    root = shared_data / "coco_mini"
    register_coco("mini", root / "annotations" / "instances_val2017.json", root / "val2017")
    cfg = make_transfer_cfg(
        *pairs(
            {
                "DATASETS.TRAIN": ("mini",),
                "DATASETS.TEST": ("mini",),
                "DATASETS.MASKX.SPLIT": "coco_nonvoc",
                "MODEL.MASKX.NUM_CLASSES": 80,
            }
        )
    )
    check_config(cfg)
    sets, names = transfer_records(cfg), transfer_split(cfg).class_names
    for records, is_target in ((sets.source, False), (sets.target, True)):
        assert len(records) > 5
        for record in records:
            labels = {names[label] in VOC_CLASSES_IN_COCO for label in record["image_labels"]}
            assert labels == {is_target}
    sides = ["sem_seg" in sample for sample in next(iter(Trainer.build_train_loader(cfg)))]
    assert sides == [True, True, False, False]


def test_the_classifier_needs_labels_of_all_classes(make_transfer_cfg, sparse_scenes, tmp_path):
    names = [c["name"] for c in json.loads(sparse_scenes[0].read_text())["categories"]]
    register_coco("partly", *sparse_scenes, class_names=[*names, "zebra", "kite"])
    split = tmp_path / "split.txt"
    split.write_text(names[0])
    cfg = make_transfer_cfg(
        *pairs(
            {
                "DATASETS.TRAIN": ("partly",),
                "DATASETS.TEST": (),
                "MODEL.MASKX.NUM_CLASSES": 6,
                "DATASETS.MASKX.SPLIT": str(split),
            }
        ),
        file="quick_schedules/stage0_classifier_scenes_cpu.yaml",
    )
    with pytest.raises(ValueError, match=r"'partly' annotates 4 of 6 classes"):
        check_config(cfg)


def test_categories_of_source_and_target_are_named(make_transfer_cfg, write_set):
    write_set("source", ("zebra", "tv", "couch"), [{}], [{"image_id": 1, "category_id": 1}])
    write_set("target", ("cat", "sofa", "tvmonitor"), [{"image_labels": [1]}])
    words = r"\('source', 'target'\): 2 categories are source and target: couch, tv\. Target"
    with pytest.raises(ValueError, match=words):
        Trainer(make_transfer_cfg(*TWO))


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("DATASETS.MASKX.SPLIT", "all"), r"SPLIT 'all' leaves no target category: all 4 of data"),
        (("DATASETS.TRAIN", ()), r"DATASETS\.TRAIN names 0 data sets.*from two, the source and"),
        (("DATASETS.TRAIN", ("a", "b", "c")), r"names 3 data sets: a, b, c\. MaskXTransferNet"),
        (
            ("DATASETS.TRAIN", ("tiny_sparse", "tiny_sparse")),
            r"SPLIT is 'scenes_half', but DATASETS\.TRAIN names two data sets.*Set SPLIT all",
        ),
        (
            ("MODEL.MASKX.NUM_CLASSES", 80),
            r"NUM_CLASSES is 80, but source \(2\) and target \(2\) have 4 classes together",
        ),
        (("DATASETS.MASKX.SOURCE_FRACTION", 0.0), r"SOURCE_FRACTION: The source fraction is 0\.0"),
        (("DATASETS.MASKX.SOURCE_SUBSET", -1), r"SOURCE_SUBSET is -1\. Allowed: a seed"),
        (("SOLVER.IMS_PER_BATCH", 3), r"IMS_PER_BATCH is 3 for 1 process.*multiples of 2"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_built(
    make_transfer_cfg, tiny_sparse, opts, words, monkeypatch
):
    monkeypatch.setattr(Trainer, "build_model", None)
    with pytest.raises(ValueError, match=words):
        Trainer(make_transfer_cfg(*opts))


def test_a_test_set_with_classes_the_model_does_not_know_is_refused(
    make_transfer_cfg, tiny_sparse, write_set
):
    write_set("farm", ("yak", "goat"), [{"image_labels": [1]}])
    words = r"'farm' \(DATASETS\.TEST\): 2 classes are not among the 4 of .*: yak, goat\."
    with pytest.raises(ValueError, match=words):
        check_config(make_transfer_cfg("DATASETS.TEST", ("farm",)))


def test_a_label_outside_the_class_list_is_named():
    split = CategorySplit("x", ("a", "b"), ("a",), ("b",))
    record = {"file_name": "f.png", "image_id": 9, "image_labels": [5], "supervision": "image"}
    with pytest.raises(ValueError, match=r"Image 9 \(f\.png\) has the labels \[5\]"):
        transfer_sets([record], split)
