"""The generated world of ConceptMask: true masks of all concepts, and levels that fit together."""

import json
from collections import Counter

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskx.data.coco import load_coco
from maskx.data.label_maps import read_label_map
from maskx.data.scenes import concepts as scene_concepts
from maskx.data.scenes.concepts import (
    generate_concept_scenes,
    scene_concept_kinds,
    scene_concept_masks,
    write_scene_tags,
)
from maskx.data.scenes.generator import COLORS, STUFF_CATEGORIES, SceneInstance, render_scene
from maskx.data.scenes.shapes import TEXTURE_NAMES
from maskx.systems.concept_mask.concept_sets import scene_concept_split

COUNT, SIZE = 100, 128
SPLIT = scene_concept_split()
KINDS = scene_concept_kinds()


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("concepts")
    return generate_concept_scenes(root, count=COUNT, size=SIZE, seed=0)


@pytest.fixture(scope="module")
def dataset(json_file):
    return json.loads(json_file.read_text())


@pytest.fixture(scope="module")
def masks_of(dataset):
    """By image: names and masks of its annotations."""
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    masks = {image["id"]: [] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        masks[annotation["image_id"]].append((names[annotation["category_id"]], mask))
    return masks


def union(masks, name):
    return np.any([mask for found, mask in masks if found == name], axis=0)


# --- the concepts and their levels ----------------------------------------------------------------


def test_the_vocabulary_has_concepts_of_every_kind_and_level():
    assert len(KINDS) == 71
    kinds = Counter(KINDS.values())
    assert kinds == {
        "thing": 40,
        "shape": 10,
        "whole": 2,
        "group": 5,
        "color": 4,
        "texture": 5,
        "stuff": 5,
    }
    assert Counter(SPLIT.levels) == {"mask": 20, "box": 20, "image": 26}
    assert set(SPLIT.vocabulary) | set(SPLIT.unseen) == set(KINDS)
    assert len(SPLIT.unseen) == 5
    of_tags_only = {n for n in SPLIT.vocabulary if n not in SPLIT.boxed}
    assert {KINDS[name] for name in of_tags_only} == set(kinds)


def test_each_shape_has_masks_in_two_colors_and_none_in_the_two_others():
    shapes = [name for name, kind in KINDS.items() if kind == "shape"]
    for shape in shapes:
        colored = {f"{color} {shape}" for color in COLORS}
        assert len(colored & set(SPLIT.masked)) == 2
    parts = {f"{color} {shape}" for color in COLORS for shape in scene_concepts._WHOLES}
    assert parts <= set(SPLIT.boxed)


def test_what_is_unseen_is_made_of_what_is_known():
    things = [name for name in SPLIT.unseen if KINDS[name] == "thing"]
    assert len({name.split(" ", 1)[0] for name in things}) == 4
    assert len({name.split(" ", 1)[1] for name in things}) == 4
    assert all(name.split(" ", 1)[0] in SPLIT.vocabulary for name in things)
    assert all(name.split(" ", 1)[1] in SPLIT.vocabulary for name in things)


# --- masks ----------------------------------------------------------------------------------------


def test_masks_of_a_scene_written_by_hand():
    masks = np.zeros((3, 16, 16), bool)
    masks[0, :4], masks[1, 4:8], masks[2, 8:12] = True, True, True
    attributes = [
        {"color": "red", "texture": "plain"},
        {"color": "green", "texture": "dots"},
        {"color": "red", "texture": "dots"},
    ]
    # red lamp shade, green lamp stand, red grid
    instances = [SceneInstance(*item) for item in zip((0, 1, 16), masks, attributes, strict=True)]
    stuff = np.zeros((16, 16), np.uint8)
    stuff[12:, :] = 4
    stuff[15, 13:] = 1  # 3 pixels: less than 1/64 of the image
    found = scene_concept_masks(instances, stuff)
    expected = {
        "red lamp shade": masks[0],
        "lamp shade": masks[0],
        "green lamp stand": masks[1],
        "lamp stand": masks[1],
        "red grid": masks[2],
        "grid": masks[2],
        "lamp": masks[0] | masks[1],
        "square": masks[2],
        "warm": masks[0] | masks[2],
        "red": masks[0] | masks[2],
        "cold": masks[1],
        "green": masks[1],
        "plain": masks[0],
        "dots": masks[1] | masks[2],
        "grass": stuff == 4,
    }
    assert [name for name, _ in found] == list(dict.fromkeys(name for name, _ in found))
    assert {name for name, _ in found} == set(expected)
    assert all(np.array_equal(mask, expected[name]) for name, mask in found)


def test_two_objects_of_one_kind_are_two_wholes():
    masks = np.eye(4, dtype=bool)[:, :, None] & np.ones(4, bool)
    attributes = {"color": "red", "texture": "plain"}
    # a lamp, then another lamp, by the places of their parts in the table
    instances = [SceneInstance(i, m, attributes) for i, m in zip((0, 1, 2, 3), masks, strict=True)]
    found = scene_concept_masks(instances, np.zeros((4, 4), np.uint8))
    wholes = [mask for name, mask in found if name == "lamp"]
    assert [mask.sum() for mask in wholes] == [8, 8]


def test_files_hold_the_true_masks_of_the_rendered_scenes(dataset, masks_of, json_file):
    for index in range(5):
        scene = render_scene(0, index, size=SIZE, num_categories=40, style="large")
        expected = scene_concept_masks(scene.instances, scene.stuff)
        assert len(expected) == len(masks_of[index])
        for (name, mask), (other_name, other) in zip(expected, masks_of[index], strict=True):
            assert name == other_name
            assert np.array_equal(mask, other)


def test_concepts_nest_as_their_names_say(masks_of, dataset, json_file):
    for image in dataset["images"][:40]:
        masks = masks_of[image["id"]]
        stuff = read_label_map(
            json_file.parent / f"stuff/{image['id']:06d}.png",
            SIZE,
            SIZE,
            num_classes=len(STUFF_CATEGORIES),
            image_id=image["id"],
        )
        things = np.any([mask for name, mask in masks if KINDS[name] == "thing"], axis=0)
        assert np.array_equal(things, stuff == 0)
        for kinds in (COLORS, TEXTURE_NAMES, ("warm", "cold")):
            present = [union(masks, name) for name in kinds if any(n == name for n, _ in masks)]
            assert np.array_equal(np.sum(present, axis=0), things)
        for name, mask in masks:
            if KINDS[name] == "thing":
                color, shape = name.split(" ", 1)
                assert not (mask & ~union(masks, color)).any()
                assert not (mask & ~union(masks, shape)).any()
            elif name in ("lamp", "flag"):
                parts = [union(masks, p) for p, w in scene_concepts._WHOLES.items() if w == name]
                assert not (mask & ~np.logical_or(*parts)).any()


# --- files ----------------------------------------------------------------------------------------


def test_the_file_is_read_without_any_problem(json_file, dataset):
    data = load_coco(json_file, json_file.parent)
    assert data.class_names == tuple(KINDS)
    assert len(data.records) == COUNT
    for image, record in zip(dataset["images"], data.records, strict=True):
        annotated = {annotation["class_index"] for annotation in record["annotations"]}
        assert record["image_labels"] == sorted(annotated)
        assert [label - 1 for label in image["image_labels"]] == record["image_labels"]
    for record in data.records:
        for annotation in record["annotations"]:
            mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
            x1, y1, x2, y2 = map(int, annotation["bbox"])
            assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
            assert mask[y1, x1:x2].any()
            assert mask[y2 - 1, x1:x2].any()
            assert mask[y1:y2, x1].any()
            assert mask[y1:y2, x2 - 1].any()


def test_tags_vary_and_objects_are_large_enough_for_maps_of_stride_8(json_file):
    data = load_coco(json_file, json_file.parent)
    shares = np.zeros(len(KINDS))
    for record in data.records:
        shares[record["image_labels"]] += 1 / COUNT
    # Each concept is learned from images that have it and from others that do not.
    assert shares.min() > 0.01
    assert shares.max() < 0.9
    sides = [
        np.sqrt((x2 - x1) * (y2 - y1))
        for record in data.records
        for x1, y1, x2, y2 in (annotation["bbox"] for annotation in record["annotations"])
    ]
    assert np.percentile(sides, 5) > 2 * 8
    assert np.median(sides) > 5 * 8


def test_a_second_call_leaves_the_file_as_it_is_and_other_arguments_are_refused(tmp_path):
    arguments = {"count": 2, "size": 64, "seed": 3}
    path = generate_concept_scenes(tmp_path, **arguments)
    content, time = path.read_bytes(), path.stat().st_mtime_ns
    assert generate_concept_scenes(tmp_path, **arguments) == path
    assert path.stat().st_mtime_ns == time
    with pytest.raises(ValueError, match="count: found 2, asked for 3"):
        generate_concept_scenes(tmp_path, **{**arguments, "count": 3})
    path.unlink()
    assert generate_concept_scenes(tmp_path, **arguments).read_bytes() == content


def test_a_file_of_another_version_of_the_concepts_is_written_again(tmp_path):
    arguments = {"count": 1, "size": 64, "seed": 3}
    path = generate_concept_scenes(tmp_path, **arguments)
    content = json.loads(path.read_text())
    older = content["info"] | {"concepts_version": 0}
    path.write_text(json.dumps(content | {"info": older, "annotations": []}))
    generate_concept_scenes(tmp_path, **arguments)
    assert json.loads(path.read_text()) == content


# --- tags -----------------------------------------------------------------------------------------


def test_tag_lists_hold_the_concepts_of_scenes(tmp_path):
    path = write_scene_tags(tmp_path / "tags.jsonl", count=20, seed=5, unseen=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["image_id"] for line in lines] == list(range(20))
    for index, line in enumerate(lines):
        scene = render_scene(5, index, size=64, num_categories=40, style="large")
        expected = {name for name, _ in scene_concept_masks(scene.instances, scene.stuff)}
        assert len(line["tags"]) == len(set(line["tags"]))
        assert set(line["tags"]) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"tags.jsonl"}


def test_unseen_concepts_are_tagged_only_where_asked_for(tmp_path):
    known, every = (
        [
            set(json.loads(line)["tags"])
            for line in write_scene_tags(
                tmp_path / f"{unseen}.jsonl", count=60, seed=5, unseen=unseen
            )
            .read_text()
            .splitlines()
        ]
        for unseen in (False, True)
    )
    assert [tags - set(SPLIT.unseen) for tags in every] == known
    assert set().union(*every) >= set(SPLIT.unseen)


def test_a_thing_with_tags_only_has_a_shape_with_boxes():
    levels = dict(zip(SPLIT.vocabulary, SPLIT.levels, strict=True))
    things = [name for name, kind in KINDS.items() if kind == "thing"]
    of_tags_only = [name for name in things if levels.get(name) == "image"]
    assert len(of_tags_only) == 4
    assert {levels[name.split(" ", 1)[1]] for name in of_tags_only} == {"box"}
