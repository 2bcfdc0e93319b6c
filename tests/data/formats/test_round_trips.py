"""What is written in a format and read again is the same, but for what was said to be lost."""

import copy
import tempfile
from collections import Counter
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_api

from maskx.data.coco_structure import Report
from maskx.data.formats.dataset import Dataset, extra_keys, has_own_box
from maskx.data.formats.outlines import as_one_outline, mask_outlines
from maskx.data.formats.table import FORMATS, find_format, read_dataset, write_dataset
from maskx.data.masks import decode_segmentation

SIGNS = st.characters(exclude_categories=("C", "Z"))
WORDS = st.text(SIGNS, min_size=1, max_size=8).map(lambda word: normalize("NFC", f"a {word}"))
# What each holds beside one outline for each object and the box of that; see `kept`.
HOLDS = {
    "coco": {"tags", "crowds", "boxes", "own boxes", "extra"},
    "cvat": {"tags", "crowds", "boxes", "own boxes", "extra"},
    "labelme": {"tags", "crowds", "boxes", "own boxes", "extra"},
    "label-studio": {"tags", "boxes", "own boxes", "extra"},
    "voc": {"tags", "tags that are file names", "crowds", "boxes", "own boxes"},
    "yolo": set(),
}


@st.composite
def polygons(draw, height, width):
    """A convex or crossed polygon of some area, at places as of a mouse."""
    number = draw(st.integers(3, 6))
    x = draw(st.lists(st.integers(0, 4 * width), min_size=number, max_size=number))
    y = draw(st.lists(st.integers(0, 4 * height), min_size=number, max_size=number))
    return [value / 4 for pair in zip(x, y, strict=True) for value in pair]


@st.composite
def segmentations(draw, height, width):
    kind = draw(st.sampled_from(["none", "polygon", "polygons", "mask", "mask"]))
    if kind == "none":
        return []
    if kind == "mask":  # with holes and specks
        bits = draw(st.integers(0, 2**32 - 1))
        values = np.random.default_rng(bits).random((height, width))
        mask = values > draw(st.sampled_from([0.2, 0.5, 0.9]))
        rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": [height, width], "counts": rle["counts"].decode()}
    number = 1 if kind == "polygon" else draw(st.integers(2, 3))
    return [draw(polygons(height, width)) for _ in range(number)]


@st.composite
def datasets(draw):
    names = draw(st.lists(WORDS, min_size=1, max_size=3, unique_by=str.casefold))
    images, annotations = [], []
    for number in range(draw(st.integers(1, 3))):
        height, width = draw(st.integers(4, 20)), draw(st.integers(4, 20))
        image = {"id": number + 1, "height": height, "width": width}
        image["file_name"] = draw(st.sampled_from(["", "part/"])) + f"picture {number}.png"
        images.append(image)
        for _ in range(draw(st.integers(0, 3))):
            segmentation = draw(segmentations(height, width))
            own = draw(st.booleans()) or not segmentation
            if segmentation and not area_of(segmentation, height, width):
                continue
            box = [1.5, 2.25, 2, 1.25] if own else box_of(segmentation)
            if min(box[2:]) <= 0:
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": draw(st.integers(1, len(names))),
                    "bbox": box,
                    "iscrowd": draw(st.sampled_from([0, 0, 0, 1])),
                    "segmentation": segmentation,
                }
            )
            if draw(st.booleans()):
                annotations[-1] |= {"segmentation_quality": 0.5, "segmentation_source": "grabcut"}
        shown = {a["category_id"] for a in annotations if a["image_id"] == number + 1}
        tags = [i for i in range(1, len(names) + 1) if i not in shown and draw(st.booleans())]
        if tags:
            image["image_labels"] = sorted([*tags, *shown])
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def area_of(segmentation, height, width):
    if isinstance(segmentation, list):
        areas = [
            abs(sum(x * v - u * y for (x, y), (u, v) in zip(p, np.roll(p, -1, 0), strict=True)))
            for p in (np.reshape(polygon, (-1, 2)) for polygon in segmentation)
        ]
        if min(areas) == 0:
            return 0
    return decode_segmentation(segmentation, height, width).sum()


def box_of(segmentation):
    if isinstance(segmentation, dict):
        return mask_api.toBbox(segmentation).tolist()
    points = np.concatenate([np.reshape(p, (-1, 2)) for p in segmentation])
    return [*points.min(0).tolist(), *np.ptp(points, axis=0).tolist()]


def kept(content, holds):
    """What a format that holds so much gives back, and how much of each kind is lost."""
    content, lost = copy.deepcopy(content), Counter()
    left = []
    for annotation in content["annotations"]:
        if annotation["iscrowd"] and "crowds" not in holds:
            lost["crowd regions"] += 1
            continue
        if not annotation["segmentation"] and "boxes" not in holds:
            lost["boxes without a mask"] += 1
            if "extra" not in holds:
                lost["values of"] += len(extra_keys(annotation))
            continue
        if annotation["segmentation"] and has_own_box(annotation) and "own boxes" not in holds:
            lost["boxes that are not those of their masks"] += 1
            annotation["bbox"] = None
        parts = annotation["segmentation"]
        if isinstance(parts, list) and len(parts) > 1 and "own boxes" not in holds:
            annotation["bbox"] = None  # parts that overlap become pixels, of which the box is
        if "extra" not in holds:
            lost["values of"] += len(extra_keys(annotation))
            for key in extra_keys(annotation):
                del annotation[key]
        left.append(annotation)
    for image in content["images"]:
        shown = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        tags = set(image.get("image_labels", ())) - shown
        if "tags" not in holds:
            lost["tags"] += len(tags)
            tags = set()
        if "tags that are file names" in holds:
            names = {c["id"]: c["name"] for c in content["categories"]}
            held = {tag for tag in tags if not set(names[tag]) & set('/\\:*?"<>|')}
            lost["tags"] += len(tags) - len(held)
            tags = held
        image["tags"] = tags
    content["annotations"] = left
    return content, lost


def described(content):
    """What an annotation file says, whatever its ids and its way to write a mask."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {}
    for image in content["images"]:
        size = image["height"], image["width"]
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        shown = {a["category_id"] for a in own}
        tags = image.get("tags", set(image.get("image_labels", ())) - shown)
        objects = [
            (
                names[a["category_id"]],
                a["iscrowd"],
                extra_keys(a),
                decode_segmentation(a["segmentation"], *size).tolist()
                if a.get("segmentation")
                else None,
            )
            for a in own
        ]
        boxes = [a["bbox"] for a in own]
        found[image["file_name"]] = size, {names[t] for t in tags}, objects, boxes
    return list(names.values()), found


def written_and_read(content, name, folder, *, copy_images=True):
    root = folder / "images"
    for image in content["images"]:
        path = root / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"])).save(path)
    output = folder / "out"
    dataset = Dataset(content, root, label_map_root=folder)
    lost = write_dataset(dataset, output, name, copy_images=copy_images)
    return read_dataset(output, None if copy_images else root), lost


def without_overlap(content):
    """Keep, of the masks of an image, those that no other covers: what a map can hold."""
    for image in content["images"]:
        covered = np.zeros((image["height"], image["width"]), bool)
        for annotation in content["annotations"]:
            if annotation["image_id"] == image["id"] and annotation["segmentation"]:
                mask = decode_segmentation(annotation["segmentation"], *covered.shape)
                if (mask & covered).any():
                    annotation["segmentation"], annotation["bbox"] = [], [1.5, 2.25, 2, 1.25]
                else:
                    covered |= mask
    return content


@pytest.mark.parametrize("name", HOLDS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(content=datasets())
def test_a_round_trip_loses_what_it_says_and_nothing_else(name, content):
    if name == "voc":
        content = without_overlap(content)
    expected, lost = kept(content, HOLDS[name])
    with tempfile.TemporaryDirectory() as folder:
        dataset, said = written_and_read(content, name, Path(folder))
    names, images = described(dataset.content)
    expected_names, expected_images = described(expected)
    assert names == expected_names
    assert images.keys() == expected_images.keys()
    for file_name, (size, tags, objects, boxes) in images.items():
        expected_size, expected_tags, expected_objects, expected_boxes = expected_images[file_name]
        assert (size, tags) == (expected_size, expected_tags)
        assert objects == expected_objects
        for box, expected_box in zip(boxes, expected_boxes, strict=True):
            if expected_box is not None:
                assert box == pytest.approx(expected_box, abs=0.06)
    losses = {what: number for what, number in said.items() if "joined" not in what}
    if name == "cvat":  # the file holds more than CVAT reads
        losses = {what: n for what, n in losses.items() if "does not read" not in what}
    for kind in lost.keys() | {"crowd", "boxes", "values", "tags", "masks"}:
        own = sum(number for what, number in losses.items() if what.startswith(kind))
        assert own == sum(n for k, n in lost.items() if k.startswith(kind)), kind


@pytest.mark.parametrize(("name", "copied"), [("voc", True), ("coco", True), ("coco", False)])
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(content=datasets(), seed=st.integers(0, 99))
def test_label_maps_come_back(name, copied, content, seed):
    """Those of some images; the others get none."""
    content = without_overlap(content)
    rng = np.random.default_rng(seed)
    given_maps = {}
    with tempfile.TemporaryDirectory() as folder:
        for image in content["images"]:
            if rng.random() < 0.7:
                values = [*range(len(content["categories"]) + 1), 255]
                labels = rng.choice(values, (image["height"], image["width"])).astype(np.uint8)
                Image.fromarray(labels).save(Path(folder, f"map {image['id']}.png"))
                image["label_map_file_name"] = f"map {image['id']}.png"
                given_maps[image["file_name"]] = labels.tolist()
        dataset, said = written_and_read(content, name, Path(folder), copy_images=copied)
        found = {
            image["file_name"]: dataset.label_map(image, Report(Path(folder))).tolist()
            for image in dataset.content["images"]
            if "label_map_file_name" in image
        }
    assert found == given_maps
    assert not any("label map" in what for what in said)


@pytest.mark.parametrize("name", HOLDS)
def test_every_format_is_known_again(name):
    assert set(HOLDS) == set(FORMATS)
    content = {
        "images": [{"id": 1, "file_name": "0.png", "height": 9, "width": 7}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 5], "iscrowd": 0}
            | {"segmentation": [[1, 1, 5, 1, 5, 6, 1, 6]]}
        ],
        "categories": [{"id": 1, "name": "ring"}],
    }
    with tempfile.TemporaryDirectory() as folder:
        dataset, said = written_and_read(content, name, Path(folder))
        found = find_format(Path(folder) / "out")
    assert found == {"cvat": "coco"}.get(name, name)
    (box,) = [annotation.pop("bbox") for annotation in dataset.content["annotations"]]
    assert box == pytest.approx(content["annotations"][0].pop("bbox"), abs=1e-6)
    dataset.content["annotations"][0]["bbox"] = content["annotations"][0]["bbox"] = None
    assert described(dataset.content) == described(content)
    assert not said


def test_masks_that_others_cover_are_cut_in_voc_and_counted(tmp_path):
    """The smaller one lies on top; one that is covered wholly keeps its box."""
    squares = [[2, 2, 8, 8], [5, 5, 9, 9], [6, 6, 8, 8], [6, 6, 8, 8]]
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [x, y, u - x, v - y], "iscrowd": 0}
        | {"segmentation": [[x, y, u, y, u, v, x, v]]}
        for i, (x, y, u, v) in enumerate(squares, 1)
    ]
    content = {
        "images": [{"id": 1, "file_name": "0.png", "height": 10, "width": 10}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "ring"}],
    }
    dataset, said = written_and_read(content, "voc", tmp_path)
    masks = [annotation.get("segmentation") for annotation in dataset.content["annotations"]]
    areas = [decode_segmentation(mask, 10, 10).sum() if mask else 0 for mask in masks]
    assert areas == [36 - 9, 16 - 4, 0, 4]
    assert said == {
        "masks that others cover in part, cut there": 2,
        "masks that others cover wholly, left out": 1,
    }


def test_outlines_of_masks_give_the_same_pixels():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(2, 30, 2).tolist()
        mask = rng.random((height, width)) > rng.random()
        if not mask.any():
            continue
        parts = [part.ravel().astype(float).tolist() for part in mask_outlines(mask)]
        rings = mask_api.decode(mask_api.frPyObjects(parts, height, width))
        assert (rings.sum(-1) % 2 == mask).all()
        rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
        outline = as_one_outline(rle, height, width).ravel().astype(float).tolist()
        assert (decode_segmentation([outline], height, width) == mask).all()
