import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from maskx.core.word_table import WordTable, load_word_table, save_word_table
from maskx.data.coco import load_coco
from maskx.data.scenes.concepts import scene_concept_kinds
from maskx.detectron2 import Trainer, register_all, register_tag_list
from maskx.detectron2.datasets import class_names_of
from maskx.detectron2.known_datasets import KNOWN_DATASETS, concept_scene_dataset
from maskx.detectron2.trainer import check_config
from maskx.systems.concept_mask.concept_sets import (
    concept_sets,
    scene_concept_split,
    write_concept_split,
)
from maskx.systems.concept_mask.detectron2.data import (
    concept_records,
    concept_table,
    make_overlap,
    make_word_table,
    training_mapper,
)
from maskx.systems.concept_mask.overlap import concept_overlap, load_overlap

KEYS = "MODEL.MASKX.CONCEPT_MASK."
FILES = {
    1: "quick_schedules/stage1_embedding_scenes_cpu.yaml",
    2: "quick_schedules/stage2_refinement_scenes_cpu.yaml",
    3: "quick_schedules/stage3_segmentation_scenes_cpu.yaml",
}
STAGES = {1: ("tags", "tagged"), 2: ("boxes", "boxed"), 3: ("masks", "masked")}


@pytest.fixture
def sets(concept_files):
    """What the stages may see of the tiny data set, read without Detectron2."""
    root = concept_files / "scenes"
    data = load_coco(root / "concepts.json", root)
    return concept_sets(scene_concept_split(), tags=data, boxes=data, masks=data)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_sees_what_it_learns_from_and_nothing_else(stage, make_concept_cfg, sets):
    records = concept_records(make_concept_cfg(file=FILES[stage]))
    assert records == getattr(sets, STAGES[stage][1])
    annotations = [a for record in records for a in record["annotations"]]
    split = scene_concept_split()
    allowed = {1: (), 2: split.boxed, 3: split.masked}[stage]
    assert {split.vocabulary[a["class_index"]] for a in annotations} <= set(allowed)
    assert bool(annotations) == (stage > 1)
    assert any("segmentation" in a for a in annotations) == (stage == 3)
    twice = make_concept_cfg("DATASETS.TRAIN", ("tiny_concepts",) * 2, file=FILES[stage])
    assert concept_records(twice) == records * 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_mapper_is_that_of_the_keys(stage, make_concept_cfg, sets):
    cfg = make_concept_cfg("INPUT.RANDOM_FLIP", "none", KEYS + "MAX_CONCEPTS", 3, file=FILES[stage])
    mapper = training_mapper(cfg)
    assert (mapper.stage, mapper.size, mapper.max_concepts) == (stage, 32, 3)
    assert mapper.masked == set(sets.split.masked_indices)
    assert not mapper.flip
    # The largest attention map of stage 3 needs larger images than its masks.
    assert mapper.image_size == (48 if stage == 3 else 32)
    assert training_mapper(make_concept_cfg(file=FILES[stage])).flip


def test_batches_follow_from_the_seed_and_the_step(make_concept_cfg):
    def batch(*opts):
        return next(iter(Trainer.build_train_loader(make_concept_cfg(*opts, file=FILES[2]))))

    first, again, other = batch("SEED", 4), batch("SEED", 4), batch("SEED", 5)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True))
    flipped = batch("SEED", 4, "INPUT.FORMAT", "BGR")
    for rgb, bgr in zip(first, flipped, strict=True):
        assert torch.equal(rgb["image"], bgr["image"].flip(0))
        assert torch.equal(rgb["boxes"], bgr["boxes"])


def test_test_samples_ask_for_what_has_a_true_mask(make_concept_cfg, concept_files, tiny_concepts):
    names = class_names_of(tiny_concepts)
    unseen = set(scene_concept_split().unseen)
    words = ("TEST.MASKX.UNSEEN_WORDS", str(concept_files / "unseen.safetensors"))
    for opts, left_out in (((), unseen), (words, set())):
        cfg = make_concept_cfg(*opts)
        samples = {s["image_id"]: s for (s,) in Trainer.build_test_loader(cfg, tiny_concepts)}
        for record in DatasetCatalog.get(tiny_concepts):
            shown = [names[c] for c in sorted({a["class_index"] for a in record["annotations"]})]
            asked = [name for name in shown if name not in left_out]
            again = [f"{name} (blended)" for name in asked if name in unseen]
            sample = samples[record["image_id"]]
            assert sample["image"].shape == (3, 64, 64)
            assert list(sample["query"].names) == asked + again
            table = concept_table(cfg)
            indices = [-1 if name in unseen else table.index_of(name) for name in asked]
            assert sample["query"].indices.tolist() == indices + [-1] * len(again)


def test_a_tag_list_trains_stage_1(make_concept_cfg, concept_files, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((20, 30, 3), 90, np.uint8))
    lines = [{"file_name": "a.png", "tags": ["grass", "green", "never heard of"]}] * 4
    path = tmp_path / "tags.jsonl"
    path.write_text("\n".join(map(json.dumps, lines[:1])))
    register = [["own_tags", str(path), str(tmp_path)]]
    opts = ("DATASETS.MASKX.REGISTER", register, "DATASETS.TRAIN", ("own_tags", "tiny_concepts"))
    cfg = make_concept_cfg(*opts, file=FILES[1])
    check_config(cfg)
    records = concept_records(cfg)
    assert len(records) == 9
    names = scene_concept_split().vocabulary
    assert {names[i] for i in records[0]["image_labels"]} == {"grass", "green"}
    sample = training_mapper(cfg)(records[0], np.random.RandomState(0))
    assert sample["image"].shape == (3, 32, 32)
    assert (sample["height"], sample["width"]) == (20, 30)
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert all("image_labels" in each for each in batch)
    assert class_names_of("own_tags") == ["grass", "green", "never heard of"]
    register_tag_list("own_tags", path, tmp_path)  # changes nothing
    with pytest.raises(ValueError, match="'own_tags' is already registered with"):
        register_tag_list("own_tags", tmp_path / "other.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"'own_tags' .* is a tag list, which has no boxes"):
        concept_records(make_concept_cfg(*opts, file=FILES[2]))


# --- files that are made


def test_a_word_table_is_made_of_the_tags(make_concept_cfg, tmp_path):
    path = tmp_path / "words.safetensors"
    cfg = make_concept_cfg(file=FILES[1])
    with pytest.raises(ValueError, match=r"no vector|never|tag"):  # 8 images show not all concepts
        make_word_table(cfg, path)
    lists = scene_concept_split()
    lines = [
        {"file_name": f"{i}.png", "tags": list(lists.vocabulary[i : i + 6])} for i in range(61)
    ]
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, lines)))
    register_tag_list("all_tags", tmp_path / "tags.jsonl", tmp_path)
    cfg = make_concept_cfg("DATASETS.TRAIN", ("all_tags",), KEYS + "WORD_TABLE", "", file=FILES[1])
    make_word_table(cfg, path)
    table = load_word_table(path)
    assert table.names == lists.vocabulary
    assert "all_tags" in table.source
    before = path.stat().st_mtime_ns
    make_word_table(cfg, path)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"SPLIT and .*WORD_TABLE are empty"):
        make_word_table(make_concept_cfg(KEYS + "SPLIT", "", file=FILES[1]), tmp_path / "other")


def test_overlaps_are_made_of_the_boxes(make_concept_cfg, sets, tmp_path):
    make_overlap(make_concept_cfg(file=FILES[2]), tmp_path / "overlap.npz")
    found = load_overlap(tmp_path / "overlap.npz", sets.split.vocabulary)
    expected = concept_overlap(sets.boxed, len(sets.split.vocabulary))
    for key in ("rows", "columns", "intersection", "area"):
        assert np.array_equal(getattr(found, key), getattr(expected, key))


# --- registration


def test_scenes_with_concepts_are_written_when_first_used(tmp_path, monkeypatch):
    tiny = {"size": 64, "count": 2, "seed": 0}
    name = "maskx_scenes_concepts_val"
    monkeypatch.setitem(KNOWN_DATASETS, name, concept_scene_dataset("scenes", **tiny))
    register_all(tmp_path)
    assert class_names_of(name) == list(scene_concept_kinds())
    assert not (tmp_path / "scenes").exists()
    records = DatasetCatalog.get(name)
    assert len(records) == 2
    assert all("segmentation" in a for record in records for a in record["annotations"])
    assert len(DatasetCatalog.get(name)) == 2


def test_public_tags_and_boxes_are_read_when_used(make_concept_cfg, tmp_path):
    register_all(tmp_path)
    register_all(tmp_path)
    for name, script in (
        ("maskx_open_images_train_tags", "prepare.py open_images --split train"),
        ("maskx_open_images_val_boxes", "prepare.py open_images --split val"),
        ("maskx_visual_genome_train_boxes", "prepare.py visual_genome_concepts"),
        ("maskx_visual_genome_val_tags", "prepare.py visual_genome_concepts"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"There is no file .*{script} --root"):
            DatasetCatalog.get(name)
        cfg = make_concept_cfg("DATASETS.TRAIN", (name,), file=FILES[1])
        check_config(cfg)
        with pytest.raises(FileNotFoundError, match=rf"There is no file .*{script} --root"):
            concept_records(cfg)
    folder = tmp_path / "visual_genome" / "annotations"
    folder.mkdir(parents=True)
    content = {
        "images": [{"id": 1, "file_name": "VG_100K/1.jpg", "height": 8, "width": 9}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4]}],
    }
    (folder / "concepts_train_boxes.json").write_text(json.dumps(content))
    (folder / "concepts_train_tags.jsonl").write_text(
        json.dumps({"file_name": "VG_100K/1.jpg", "tags": ["dog"]})
    )
    cv2.imwrite(str(tmp_path / "1.jpg"), np.zeros((8, 9, 3), np.uint8))
    (tmp_path / "visual_genome" / "VG_100K").mkdir()
    (tmp_path / "1.jpg").rename(tmp_path / "visual_genome" / "VG_100K" / "1.jpg")
    (record,) = DatasetCatalog.get("maskx_visual_genome_train_boxes")
    assert class_names_of("maskx_visual_genome_train_boxes") == ["cat", "dog"]
    assert record["annotations"][0]["class_index"] == 1
    (record,) = DatasetCatalog.get("maskx_visual_genome_train_tags")
    assert record["file_name"] == str(tmp_path / "visual_genome" / "VG_100K" / "1.jpg")


# --- errors


@pytest.mark.parametrize(
    ("stage", "opts", "error", "words"),
    [
        (1, (KEYS + "WORD_TABLE", ""), ValueError, r"WORD_TABLE is empty.*train_concept_mask\.py"),
        (1, (KEYS + "WORD_TABLE", "gone"), FileNotFoundError, r"no word table 'gone'"),
        (2, (KEYS + "SPLIT", ""), ValueError, r"SPLIT is empty, but stage 2, .*scenes_concepts"),
        (2, (KEYS + "SPLIT", "gone.json"), FileNotFoundError, r"gone\.json"),
        (1, ("DATASETS.TRAIN", ("tiny_concept",)), ValueError, r"mean 'tiny_concepts'"),
        (1, ("SOLVER.IMS_PER_BATCH", 1), ValueError, r"IMS_PER_BATCH is 1 .*from 2 on.*batch norm"),
        (1, ("INPUT.RANDOM_FLIP", "vertical"), ValueError, r"RANDOM_FLIP is 'vertical'"),
        (3, ("INPUT.MASKX.SIZE", 0), ValueError, r"SIZE is 0"),
        (3, (KEYS + "MAX_CONCEPTS", 0), ValueError, r"MAX_CONCEPTS is 0"),
    ],
)
def test_configs_that_do_not_fit_are_refused(stage, opts, error, words, make_concept_cfg):
    with pytest.raises(error, match=words):
        check_config(make_concept_cfg(*opts, file=FILES[stage]))


def test_tables_and_splits_that_do_not_fit_are_refused(make_concept_cfg, concept_files, tmp_path):
    table = load_word_table(concept_files / "words.safetensors")
    short = WordTable(table.names[:-1], table.vectors[:-1], table.idf[:-1])
    save_word_table(tmp_path / "short.safetensors", short)
    cfg = make_concept_cfg(KEYS + "WORD_TABLE", str(tmp_path / "short.safetensors"))
    with pytest.raises(ValueError, match=r"SPLIT is 'scenes_concepts', but .*65 concepts, not 66"):
        check_config(cfg)
    wide = WordTable(("x",), np.ones((1, 5)), np.ones(1))
    save_word_table(tmp_path / "wide.safetensors", wide)
    cfg = make_concept_cfg("TEST.MASKX.UNSEEN_WORDS", str(tmp_path / "wide.safetensors"))
    with pytest.raises(ValueError, match=r"wide\.safetensors' have .* length 5, .* of length 12"):
        check_config(cfg)
    lists = scene_concept_split()
    no_masks = type(lists)(lists.vocabulary, lists.boxed, (), lists.unseen)
    write_concept_split(tmp_path / "split.json", no_masks)
    cfg = make_concept_cfg(KEYS + "SPLIT", str(tmp_path / "split.json"))
    with pytest.raises(ValueError, match=r"has no concept with masks, which stage 3 learns from"):
        check_config(cfg)


def test_boxes_of_a_concept_that_is_not_listed_are_refused(make_concept_cfg, tmp_path):
    lists = scene_concept_split()
    without = type(lists)(lists.vocabulary, lists.boxed, lists.masked)
    write_concept_split(tmp_path / "split.json", without)
    cfg = make_concept_cfg(KEYS + "SPLIT", str(tmp_path / "split.json"), file=FILES[2])
    with pytest.raises(ValueError, match=r"concepts\.json: image \d+ is labelled with .*'unseen'"):
        concept_records(cfg)


def test_a_model_without_data_is_not_trained(make_concept_cfg):
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        concept_records(make_concept_cfg("DATASETS.TRAIN", ()))
