import itertools
import json
import logging
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from maskx.data.label_maps import write_label_map
from maskx.data.large_vocabularies import ade20k_150_classes, base_and_novel, coco_stuff_classes
from maskx.data.masks import decode_segmentation
from maskx.data.prepare.ade20k import prepare_ade20k_150
from maskx.data.prepare.imagenet import prepare_imagenet21k
from maskx.data.scenes.generator import STUFF_CATEGORIES
from maskx.detectron2 import MaskXLarvSeg, Trainer, register_all
from maskx.detectron2.datasets import class_names_of
from maskx.systems.larvseg.detectron2 import (
    joint_sets_from_config,
    model_class_names,
    split_of_dataset,
)
from maskx.systems.larvseg.samples import JointSets

MASKS, TAGS = "maskx_scenes_sparse_stuff_train", "maskx_scenes_sparse_train"
VAL = "maskx_scenes_sparse_stuff_val"
JOINT = "DATASETS.MASKX.JOINT."
STUFF = [category.name for category in STUFF_CATEGORIES]


def register(name, class_names, records):
    """Register records of a class list with Detectron2, as a user may."""
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=list(class_names))


@pytest.fixture
def write_record(tmp_path):
    """Write an image and, with labels, a label map: a record in Detectron2's form."""

    def write(image_id, *, size=(40, 60), label_map=None, num_classes=2, **record):
        path = tmp_path / f"{image_id}.png"
        image = np.full((*size, 3), 10 * image_id % 256, np.uint8)
        record |= {"file_name": str(path), "image_id": image_id}
        record |= {"height": size[0], "width": size[1]}
        if label_map is not None:
            image[:] = 100 * label_map[:, :, None]
            labels = tmp_path / f"{image_id}_labels.png"
            write_label_map(labels, label_map, num_classes=num_classes)
            record["label_map_file_name"] = str(labels)
        cv2.imwrite(str(path), image)
        return record

    return write


# Classes


def test_the_classes_of_the_model_are_those_of_the_data_sets_by_name(make_joint_cfg):
    cfg = make_joint_cfg()
    things = class_names_of(TAGS)
    assert model_class_names(cfg) == (*things, *STUFF)
    assert class_names_of(MASKS) == class_names_of(VAL) == [*things, *STUFF]

    cfg.DATASETS.TRAIN = (TAGS, MASKS)
    cfg.MODEL.MASKX.LARVSEG.CLASSES_OF = ("maskx_coco_stuff_train", VAL)
    names = model_class_names(cfg)
    known = list(dict.fromkeys(entry.renamed for entry in coco_stuff_classes()))
    assert names == (*known, *(name for name in (*things, *STUFF) if name not in known))
    (sample,) = next(iter(Trainer.build_test_loader(cfg, VAL)))
    assert [names[i] for i in sample["class_indices"]] == [*things, *STUFF]


@pytest.mark.parametrize("train", [(MASKS, TAGS), (TAGS, MASKS)])
def test_data_sets_score_their_own_classes_without_withheld_ones(make_joint_cfg, train):
    supervision = tuple("mask" if name == MASKS else "image" for name in train)
    cfg = make_joint_cfg("DATASETS.TRAIN", train, JOINT + "SUPERVISION", supervision)
    things = class_names_of(TAGS)
    for classes_of in ((), (VAL,), ("maskx_coco_stuff_train", VAL)):
        cfg.MODEL.MASKX.LARVSEG.CLASSES_OF = classes_of
        names, sets = model_class_names(cfg), joint_sets_from_config(cfg)
        assert sets.class_names == names
        for name in train:
            expected = set(things) if name == TAGS else {*things[::2], *STUFF}
            assert {names[i] for i in sets.scored[name]} == expected


def test_labels_of_a_data_set_in_another_order_are_the_same_classes(make_joint_cfg, write_record):
    cfg = make_joint_cfg("DATASETS.TRAIN", (TAGS, "other"), JOINT + "SUPERVISION", ("image",) * 2)
    class_names = [*reversed(class_names_of(TAGS)), "heron"]
    register("other", class_names, [write_record(1, image_labels=[0, 2, 4])])
    names, sets = model_class_names(cfg), joint_sets_from_config(cfg)
    sample = sample_of(cfg, sets.data_sets[1].records[0], sets)
    found = {names[label] for label in sample["image_labels"]}
    assert found == {class_names[0], class_names[2], "heron"}


def test_a_split_is_of_one_class_list(make_joint_cfg):
    cfg = make_joint_cfg("DATASETS.MASKX.SPLIT", "ade150_raw")
    assert split_of_dataset(cfg, MASKS) is None
    split = split_of_dataset(cfg, "maskx_ade20k_150_val")
    assert (split.with_masks, split.without_masks) == base_and_novel("ade150_raw")
    assert (len(split.with_masks), len(split.without_masks)) == (58, 92)
    cfg.DATASETS.MASKX.SPLIT = "scenes_half"
    split = split_of_dataset(cfg, VAL)
    things = class_names_of(TAGS)
    assert split.without_masks == tuple(things[1::2])
    assert split.with_masks == (*things[::2], *STUFF)


def test_masks_of_novel_classes_under_another_class_list_are_reported(
    make_joint_cfg, write_record, caplog
):
    """As those of "traffic light" in COCO-Stuff, which is novel in ADE20K's 847 classes."""
    label_map = np.ones((8, 8), np.uint8)
    cfg = make_joint_cfg()
    novel = class_names_of(TAGS)[1]
    record = write_record(1, size=(8, 8), label_map=label_map, image_labels=[0])
    register("other", [novel, "unheard of"], [record])
    cfg.DATASETS.TRAIN = ("other", TAGS)
    with caplog.at_level(logging.WARNING, logger="maskx"):
        joint_sets_from_config(cfg)
    assert f"all used, also those of 1 classes that are novel by it: '{novel}'." in caplog.text


# Mapper


def sample_of(cfg, record, sets, seed=0):
    """Make a sample as the loader of a training does."""
    loader = Trainer.build_train_loader(cfg)
    return loader.dataset.mapper(record, np.random.RandomState(seed))


def test_pixels_have_the_base_classes_of_things_and_stuff(make_joint_cfg):
    cfg = make_joint_cfg("INPUT.MASKX.SIZE", 64, "INPUT.RANDOM_FLIP", "none")
    names, sets = model_class_names(cfg), joint_sets_from_config(cfg)
    content = json.loads(Path(MetadataCatalog.get(MASKS).json_file).read_text())
    folder = Path(MetadataCatalog.get(MASKS).image_root)
    base = class_names_of(TAGS)[::2]
    category = {c["id"]: c["name"] for c in content["categories"]}
    for record, image in zip(sets.data_sets[0].records, content["images"], strict=True):
        stuff = cv2.imread(str(folder / image["stuff_file_name"]), cv2.IMREAD_UNCHANGED)
        expected = np.array(["", *STUFF], object)[stuff]
        for annotation in content["annotations"]:
            if annotation["image_id"] == image["id"]:
                mask = decode_segmentation(annotation["segmentation"], 64, 64)
                name = category[annotation["category_id"]]
                expected[mask] = name if name in base else ""
        sample = sample_of(cfg, record, sets)
        assert sample["data_set"] == MASKS
        assert "image_labels" not in sample
        sem_seg = sample["sem_seg"].numpy()
        assert sem_seg.dtype == np.int64
        known = sem_seg != 255
        of_label = np.array(["", *names, *[""] * (255 - len(names))], object)
        assert (of_label[sem_seg] == expected)[known].all()
        # Unknown is what is of a novel class, and nothing else; masks of one scene share no pixel.
        assert (expected[~known] == "").all()
        assert (known | (expected == "")).all()


def test_image_labels_come_without_any_pixel(make_joint_cfg, monkeypatch):
    cfg = make_joint_cfg(JOINT + "SINGLE_LABEL", (False, True), JOINT + "SIZES", (48, 32))
    names, sets = model_class_names(cfg), joint_sets_from_config(cfg)
    monkeypatch.delattr(JointSets, "label_map")
    things = class_names_of(TAGS)
    expected = {r["image_id"]: r["image_labels"] for r in DatasetCatalog.get(TAGS)}
    for record in sets.data_sets[1].records:
        sample = sample_of(cfg, record, sets)
        assert sample["image"].shape == (3, 32, 32)
        assert sample["image"].dtype == torch.uint8
        assert sample["single_label"] is True
        assert "sem_seg" not in sample
        found = {names[label] for label in sample["image_labels"]}
        assert found == {things[label] for label in expected[sample["image_id"]]}


def test_images_have_the_channel_order_of_the_model(make_joint_cfg):
    images = {}
    for image_format in ("RGB", "BGR"):
        cfg = make_joint_cfg("INPUT.FORMAT", image_format)
        batch = next(iter(Trainer.build_train_loader(cfg)))
        (tested,) = next(iter(Trainer.build_test_loader(cfg, VAL)))
        images[image_format] = [batch[0]["image"], tested["image"]]
    for rgb, bgr in zip(*images.values(), strict=True):
        assert torch.equal(rgb, bgr.flip(0))
    record = DatasetCatalog.get(VAL)[0]
    image = torch.from_numpy(cv2.imread(record["file_name"])).permute(2, 0, 1)
    assert torch.equal(images["BGR"][1], image)


def test_images_are_mirrored_as_the_configuration_says(make_joint_cfg):
    record = joint_sets_from_config(make_joint_cfg()).data_sets[0].records[0]
    for flip, count in (("horizontal", 2), ("none", 1)):
        cfg = make_joint_cfg("INPUT.RANDOM_FLIP", flip)
        seen = {sample_of(cfg, record, None, s)["image"].numpy().tobytes() for s in range(8)}
        assert len(seen) == count


def test_crop_level_labels_are_those_of_the_crop(make_joint_cfg, write_record):
    label_map = np.ones((40, 40), np.uint8)
    label_map[0, 0] = 2
    label_map[20:, :] = 255  # unknown, in every crop
    record = write_record(1, size=(40, 40), label_map=label_map, image_labels=[0, 1])
    register("corner", ["most", "corner"], [{**record, "supervision": "mask"}])
    cfg = make_joint_cfg(JOINT + "CROP_LEVEL_LABELS", True, JOINT + "MIN_CROP", 0.5)
    train = ("DATASETS.TRAIN", ("corner", MASKS))
    cfg.merge_from_list([*train, JOINT + "SUPERVISION", ("image", "mask")])
    found = Counter()
    for level in (True, False):
        cfg.merge_from_list([JOINT + "CROP_LEVEL_LABELS", level])
        sets = joint_sets_from_config(cfg)
        for seed in range(20):
            sample = sample_of(cfg, sets.data_sets[0].records[0], sets, seed)
            assert "sem_seg" not in sample
            found[level, tuple(sample["image_labels"])] += 1
    assert found[True, (0,)] > 10
    assert found[False, (0, 1)] == 20
    assert sum(found.values()) - found[True, (0, 1)] - found[True, (0,)] == 20


def test_test_samples_say_which_classes_to_choose_from(make_joint_cfg):
    cfg = make_joint_cfg()
    (sample,) = next(iter(Trainer.build_test_loader(cfg, TAGS)))
    assert sample.keys() == {"file_name", "image_id", "height", "width", "image", "class_indices"}
    assert sample["class_indices"] == (0, 1, 2, 3)
    (sample,) = next(iter(Trainer.build_test_loader(cfg, VAL)))
    assert sample["class_indices"] == tuple(range(9))


# Loader


def take(loader, count, start=0):
    loader.start = start
    return list(itertools.islice(loader, count))


def summary(batches):
    return [[(s["data_set"], s["image_id"], s["image"].sum().item()) for s in b] for b in batches]


def test_one_worker_alternates_by_the_ratios(make_joint_cfg):
    cfg = make_joint_cfg(JOINT + "RATIOS", (3, 1), "SOLVER.IMS_PER_BATCH", 3)
    batches = take(Trainer.build_train_loader(cfg), 12)
    sets = [{sample["data_set"] for sample in batch} for batch in batches]
    assert all(len(names) == 1 for names in sets)
    assert all(len(batch) == 3 for batch in batches)
    assert Counter(name for (name,) in sets) == {MASKS: 9, TAGS: 3}
    # 27 samples of 6 images: every image 4 or 5 times, in another order each time.
    ids = [s["image_id"] for batch in batches for s in batch if s["data_set"] == MASKS]
    assert set(Counter(ids).values()) <= {4, 5}
    assert ids[:6] != ids[6:12]


def test_attention_is_for_the_data_sets_that_the_configuration_says(make_joint_cfg):
    """As in the paper's Table 4, on one of the data sets alone."""
    for attended in ((True, False), (False, True), ()):
        loader = Trainer.build_train_loader(make_joint_cfg(JOINT + "ATTENTION", attended))
        found = {s["data_set"]: s.get("attention", True) for b in take(loader, 2) for s in b}
        assert found == dict(zip((MASKS, TAGS), attended or (True, True), strict=True))


@pytest.mark.parametrize("ratios", [(4, 4), (3, 3, 2)])
def test_eight_workers_keep_their_data_sets(make_joint_cfg, monkeypatch, ratios):
    cfg = make_joint_cfg(JOINT + "RATIOS", ratios[:2], "SOLVER.IMS_PER_BATCH", 16)
    if len(ratios) == 3:
        train = ("DATASETS.TRAIN", (MASKS, TAGS, VAL), JOINT + "RATIOS", ratios)
        cfg.merge_from_list([*train, JOINT + "SUPERVISION", ("mask", "image", "mask")])
    monkeypatch.setattr(comm, "get_world_size", lambda: 8)
    kept, images = Counter(), []
    for rank in range(8):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        batches = take(Trainer.build_train_loader(cfg), 3)
        names = {sample["data_set"] for batch in batches for sample in batch}
        assert len(names) == 1
        assert all(len(batch) == 2 for batch in batches)
        kept[names.pop()] += 1
        images.append(summary(batches))
    assert tuple(kept[name] for name in cfg.DATASETS.TRAIN) == ratios
    assert len({str(each) for each in images}) == 8  # no two see the same


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_at_any_step(make_joint_cfg, num_workers):
    cfg = make_joint_cfg(JOINT + "MIN_CROP", 0.5)
    expected = summary(take(Trainer.build_train_loader(cfg), 7))
    # Masks are of 8 samples of 6 images: one that is seen again has another crop.
    assert len({sample for batch in expected for sample in batch}) == 14
    cfg.DATALOADER.NUM_WORKERS = num_workers
    state = np.random.get_state()[1].copy()
    assert summary(take(Trainer.build_train_loader(cfg), 3, start=4)) == expected[4:]
    assert np.array_equal(np.random.get_state()[1], state)
    cfg.SEED = 2
    assert summary(take(Trainer.build_train_loader(cfg), 7)) != expected


# Errors


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ((JOINT + "RATIOS", (4,)), r"RATIOS has 1 entries, \(4,\), but DATASETS.TRAIN names 2 .*"),
        ((JOINT + "RATIOS", (4, 0)), r"DATASETS.MASKX.JOINT: Data set .*: ratio must be at least"),
        ((JOINT + "RATIOS", (4, 1.5)), r"RATIOS has the entry 1.5. Allowed: values of type int."),
        ((JOINT + "SUPERVISION", ("mask", "tags")), r"supervision 'tags'. Allowed: mask, image"),
        ((JOINT + "SIZES", (0, 8)), r"image_size must be at least 1, got 0"),
        ((JOINT + "MIN_CROP", 1.5), r"MIN_CROP is 1.5. Allowed: above 0 and at most 1"),
        (("DATASETS.TRAIN", (MASKS, MASKS)), rf"names '{MASKS}' more than once.*RATIOS"),
        (("DATASETS.TRAIN", (MASKS, "maskx_scene")), r"no data set 'maskx_scene'"),
        (("DATASETS.TRAIN", ()), r"TRAIN and MODEL.MASKX.LARVSEG.CLASSES_OF are empty"),
        (
            ("MODEL.MASKX.LARVSEG.CLASSES_OF", ("maskx_coco_stuf_val",)),
            r"LARVSEG.CLASSES_OF: There is no data set 'maskx_coco_stuf_val'.*Did you mean",
        ),
        (
            ("MODEL.MASKX.LARVSEG.CLASSES_OF", (TAGS,)),
            rf"DATASETS.TRAIN \(.*CLASSES_OF\): Data set '{MASKS}' has 5 classes .* 4 of the model",
        ),
        (
            ("DATASETS.TEST", ("maskx_ade20k_150_val",)),
            r"'maskx_ade20k_150_val' \(DATASETS.TEST.*146 of the classes .* the model: 'wall', ",
        ),
        (
            ("DATASETS.MASKX.SPLIT", "coco_voc"),
            rf"SPLIT fits the classes of none of {MASKS}, .*voc",
        ),
        (("SOLVER.IMS_PER_BATCH", 0), r"IMS_PER_BATCH is 0. Allowed: multiples of 1"),
        (("INPUT.RANDOM_FLIP", "vertical"), r"RANDOM_FLIP is 'vertical'. Allowed .* horizontal, n"),
        ((JOINT + "ATTENTION", (True,)), r"ATTENTION has 1 entries, \(True,\)"),
    ],
)
def test_what_does_not_fit_is_said_before_reading(make_joint_cfg, opts, words, monkeypatch):
    cfg = make_joint_cfg(*opts)
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: pytest.fail("reads records"))
    with pytest.raises(ValueError, match=words):
        MaskXLarvSeg.maskx_hooks.check(cfg)


def test_a_split_that_is_no_name_is_an_error(make_joint_cfg):
    cfg = make_joint_cfg("DATASETS.MASKX.SPLIT", "ade150_row")
    with pytest.raises(FileNotFoundError, match=r"'ade150_row' is neither.*Did you mean"):
        MaskXLarvSeg.maskx_hooks.check(cfg)


@pytest.mark.parametrize(
    ("supervision", "record", "words"),
    [
        ("image", {"image_labels": []}, r"supervision 'image': none of its 1 images has image lab"),
        ("mask", {"image_labels": [0]}, r"supervision 'mask': none of its 1 images has pixel lab"),
        ("image", {"image_labels": [2]}, r"has the labels \[2\]. Allowed: class indices 0 to 1"),
        ("image", {"image_labels": [0], "image_id": None}, r"lacks image_id, height or width"),
    ],
)
def test_records_that_teach_nothing_are_errors(
    make_joint_cfg, write_record, supervision, record, words
):
    record = write_record(3) | record
    if record["image_id"] is None:
        del record["image_id"]
    register("few", ["cat", "dog"], [record])
    cfg = make_joint_cfg("DATASETS.TRAIN", ("few",), JOINT + "SUPERVISION", (supervision,))
    with pytest.raises(ValueError, match=words):
        Trainer.build_train_loader(cfg)


def test_one_name_of_several_ids_is_one_class_and_said(make_joint_cfg, write_record, caplog):
    label_map = np.repeat([[1, 2, 3]], 6, 0).repeat(2, 1).astype(np.uint8)
    record = write_record(1, size=(6, 6), label_map=label_map, num_classes=3, image_labels=[0, 1])
    register("walls", ["wall", "sky", "wall"], [record])
    cfg = make_joint_cfg("DATASETS.TRAIN", ("walls",), JOINT + "SUPERVISION", ("mask",))
    cfg.merge_from_list(["INPUT.MASKX.SIZE", 6, "INPUT.RANDOM_FLIP", "none"])
    cfg.DATASETS.TEST = ("walls",)
    cfg.DATASETS.MASKX.SPLIT = "all"
    MaskXLarvSeg.maskx_hooks.check(cfg)
    assert model_class_names(cfg) == ("wall", "sky")
    with caplog.at_level(logging.WARNING, logger="maskx"):
        sets = joint_sets_from_config(cfg)
    assert "'walls': 3 labels of 2 names; merged: wall x2." in caplog.text
    assert sets.scored == {"walls": (0, 1)}
    sample = sample_of(cfg, sets.data_sets[0].records[0], sets)
    assert sample["sem_seg"][0].tolist() == [1, 1, 2, 2, 1, 1]
    # Labels of a result are those of the list of the test set.
    (sample,) = next(iter(Trainer.build_test_loader(cfg, "walls")))
    assert sample["class_indices"] == (0, 1, 0)


# Registered data sets


def test_class_lists_of_the_paper_are_known_without_any_file(tmp_path):
    register_all(tmp_path)
    register_all(tmp_path)
    for part in ("train", "train_tags", "val"):
        assert len(class_names_of(f"maskx_coco_stuff_{part}")) == 160
        assert len(class_names_of(f"maskx_ade20k_150_{part}")) == 150
        assert len(class_names_of(f"maskx_ade20k_847_{part}")) == 847
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"coco_stuff_val2017.json.*prepare.py coco_stuff"):
        DatasetCatalog.get("maskx_coco_stuff_val")
    with pytest.raises(FileNotFoundError, match=r"prepare.py imagenet21k --classes ade150 --root"):
        class_names_of("maskx_imagenet_ade150")


def test_prepared_data_are_registered_as_they_are_named(tmp_path, make_joint_cfg):
    cfg = make_joint_cfg()
    rng = np.random.default_rng(0)
    challenge = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (challenge / kind / part).mkdir(parents=True)
        stem = f"ADE_{part[: 5 if part == 'training' else 3]}_00000001"
        image = rng.integers(0, 256, (30, 40, 3), np.uint8)
        cv2.imwrite(str(challenge / "images" / part / f"{stem}.jpg"), image)
        labels = np.repeat(np.arange(30, dtype=np.uint8)[:, None], 40, 1)
        cv2.imwrite(str(challenge / "annotations" / part / f"{stem}.png"), labels)
    prepare_ade20k_150(challenge, tmp_path / "ade20k_150", allow_other_counts=True)
    for synset in ("n03001627", "n02958343"):  # chair, car
        (tmp_path / "imagenet21k" / synset).mkdir(parents=True)
        path = tmp_path / "imagenet21k" / synset / f"{synset}_1.jpg"
        cv2.imwrite(str(path), rng.integers(0, 256, (20, 30, 3), np.uint8))
    folder = tmp_path / "imagenet21k_labels"
    prepare_imagenet21k(tmp_path / "imagenet21k", folder, classes="ade150", allow_other_counts=True)
    for name in [name for name in DatasetCatalog.list() if name.startswith("maskx_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_all(tmp_path)
    register_all(tmp_path)

    content = json.loads((folder / "imagenet_ade150_tags.json").read_text())
    assert class_names_of("maskx_imagenet_ade150") == [c["name"] for c in content["categories"]]
    assert set(class_names_of("maskx_imagenet_ade150")) <= {e.name for e in ade20k_150_classes()}
    names = class_names_of("maskx_imagenet_ade150")
    records = DatasetCatalog.get("maskx_imagenet_ade150")
    assert sorted(names[label] for r in records for label in r["image_labels"]) == ["car", "chair"]

    train = ("maskx_ade20k_150_train", "maskx_ade20k_150_val", "maskx_imagenet_ade150")
    cfg.merge_from_list(["DATASETS.TRAIN", train, "DATASETS.TEST", train[1:2]])
    cfg.merge_from_list([JOINT + "SUPERVISION", ("mask", "image", "image")])
    cfg.merge_from_list(["DATASETS.MASKX.SPLIT", "ade150_raw"])
    MaskXLarvSeg.maskx_hooks.check(cfg)
    sets = joint_sets_from_config(cfg)
    assert [len(sets.scored[name]) for name in train] == [58, 150, len(names)]
    base, _ = base_and_novel("ade150_raw")
    sample = sample_of(cfg, sets.data_sets[0].records[0], sets)
    shown = {entry.name for entry in ade20k_150_classes()[:29]} & set(base)
    found = set(sample["sem_seg"].unique().tolist()) - {255}
    assert {model_class_names(cfg)[label - 1] for label in found} == shown
    assert len(sample_of(cfg, sets.data_sets[1].records[0], sets)["image_labels"]) == 29
