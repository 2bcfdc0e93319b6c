"""Annotation files as users' tools write them, and what each must get.

The real ones lie in ../shared/cases, where it is there; a copy of each kind is made here.
"""

import copy
import json
import logging
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from maskx.data.coco import check_coco, in_class_list, load_coco, read_coco_json
from maskx.data.label_maps import semantic_label_map
from maskx.data.splits import check_masks, resolve_split

CASES = Path(__file__).parents[3] / "shared" / "cases"
SIZE = 96
NAMES = ("ring", "crescent", "moon", "disc")


def square(x, y, side=30):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def base():
    boxes = [(1, 1, 8, 27), (1, 1, 40, 11), (2, 3, 0, 47), (3, 4, 5, 7), (4, 1, 60, 60)]
    return {
        "images": [
            {"id": i, "file_name": f"{i - 1}.png", "height": SIZE, "width": SIZE}
            for i in range(1, 5)
        ],
        "categories": [
            {"id": i, "name": name, "supercategory": "thing"} for i, name in enumerate(NAMES, 1)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": [x, y, 30, 30],
                "area": 900.0,
                "iscrowd": 0,
                "segmentation": [square(x, y)],
            }
            for number, (image, category, x, y) in enumerate(boxes, start=1)
        ],
    }


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "img"
    images.mkdir()
    for i in range(4):
        cv2.imwrite(str(images / f"{i}.png"), np.full((SIZE, SIZE, 3), 40 * i, np.uint8))
    return tmp_path


def read(folder, content, **kwargs):
    path = folder / "ann.json"
    path.write_text(json.dumps(content))
    return load_coco(path, folder / "img", **kwargs)


def each(content, **keys):
    """Set keys of all annotations, of one argument each: the annotation."""
    for annotation in content["annotations"]:
        for key, make in keys.items():
            annotation[key] = make(annotation)
    return content


def shapes(data):
    return [
        (a["bbox"], a["class_index"], a["iscrowd"], "segmentation" in a)
        for record in data.records
        for a in record["annotations"]
    ]


def rename(content, make):
    for image in content["images"]:
        image["file_name"] = make(image["file_name"])
    return content


def group(name):
    content = base()
    for category in content["categories"]:
        category["supercategory"] = name
    content["categories"].insert(0, {"id": 0, "name": name, "supercategory": "none"})
    return content


def as_text(entries, *keys):
    for entry in entries:
        entry |= {key: str(entry[key]) for key in keys}


def text_ids(images=(), annotations=(), categories=()):
    content = base()
    as_text(content["images"], *images)
    as_text(content["annotations"], *annotations)
    as_text(content["categories"], *categories)
    return content


SAME = {
    "image ids as text": lambda: text_ids(images=["id"]),
    "category_id as text": lambda: text_ids(annotations=["category_id"]),
    "all category ids as text": lambda: text_ids(annotations=["category_id"], categories=["id"]),
    "ids of pandas": lambda: each(
        base(),
        image_id=lambda a: float(a["image_id"]),
        category_id=lambda a: float(a["category_id"]),
    ),
    "iscrowd null": lambda: each(base(), iscrowd=lambda a: None),
    "iscrowd as text": lambda: each(base(), iscrowd=lambda a: "0"),
    "iscrowd false": lambda: each(base(), iscrowd=lambda a: False),
    "area null": lambda: each(base(), area=lambda a: None),
    "area as text": lambda: each(base(), area=lambda a: "12.5"),
    "area NaN": lambda: each(base(), area=lambda a: float("nan")),
    "area 0": lambda: each(base(), area=lambda a: 0),
    "group category": lambda: group("things-k3x9"),
    "group category with the name of a class": lambda: group("moon"),
    "backslashes": lambda: rename(base(), lambda name: f"img\\{name}"),
    "absolute paths": lambda: rename(base(), lambda name: f"/{name}"),
    "other case": lambda: rename(base(), lambda name: name.replace(".png", ".PNG")),
    "Label Studio": lambda: rename(base(), lambda name: f"/data/local-files/?d=img/{name}"),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("strict", [True, False])
def test_what_tools_write_is_read_as_it_is_meant_and_said(folder, caplog, kind, strict):
    expected = read(folder, base())
    assert not caplog.messages
    found = read(folder, SAME[kind](), strict=strict)
    assert shapes(found) == shapes(expected)
    assert found.class_names == expected.class_names == NAMES
    assert [r["file_name"] for r in found.records] == [r["file_name"] for r in expected.records]
    assert not found.problems
    assert sum(found.notes.values()) >= 1
    (message,) = caplog.messages
    assert "is read as it is meant" in message


def test_the_scorer_reads_the_same(folder):
    for kind in ("area null", "area as text", "area NaN", "area 0", "iscrowd null"):
        (folder / "ann.json").write_text(json.dumps(SAME[kind]()))
        content = read_coco_json(folder / "ann.json")
        assert all(a["iscrowd"] == 0 for a in content["annotations"])
        assert all("area" not in a for a in content["annotations"]) or kind.startswith("iscrowd")


def test_accents_and_escaped_spaces_in_paths(folder):
    (folder / "img" / "my img").mkdir()
    for i, name in enumerate(("e\u0301", "my img/")):
        shutil.copy(folder / "img" / "0.png", folder / "img" / f"{name}{i}.png")
    content = rename(base(), str)
    content["images"][0]["file_name"] = "\u00e90.png"
    content["images"][1]["file_name"] = "my%20img/1.png"
    found = read(folder, content)
    assert [Path(r["file_name"]).is_file() for r in found.records] == [True] * 4
    assert sum(found.notes.values()) == 2


@pytest.mark.parametrize(
    ("name", "near"),
    [("https://example.org/a/0.png", "0.png"), ("0", "0.png"), ("x/0.png", "0.png")],
)
def test_a_path_that_is_not_found_is_named_with_the_near_one(folder, name, near):
    content = base()
    content["images"][0]["file_name"] = name
    words = rf"1 of 4 files named do not exist, .*{name}, but .*img.{near} does"
    with pytest.raises(FileNotFoundError, match=words):
        read(folder, content)
    found = read(folder, content, strict=False)
    assert len(found.records) == 3
    assert found.problems == {"image_missing": 1}


def test_two_images_are_never_the_same_file(folder):
    content = base()
    content["images"][1]["file_name"] = "other\\0.png"
    with pytest.raises(FileNotFoundError, match=r"1 of 4 files"):
        read(folder, content)


def box_of(annotation):
    x, y, width, height = annotation["bbox"]
    return {"x": x, "y": y, "width": width, "height": height}


MENDED = {
    "box missing": (lambda c: [a.pop("bbox") for a in c["annotations"]], "box_missing"),
    "box []": (lambda c: each(c, bbox=lambda a: []), "box_missing"),
    "box a dict": (lambda c: each(c, bbox=box_of), "box_malformed"),
    "box of strings": (
        lambda c: each(c, bbox=lambda a: [str(n) for n in a["bbox"]]),
        "box_malformed",
    ),
    "rotated box": (lambda c: each(c, bbox=lambda a: [*a["bbox"], 30.0]), "box_malformed"),
    "part of two points": (
        lambda c: each(c, segmentation=lambda a: [*a["segmentation"], [10, 10, 50, 60]]),
        "polygon_malformed",
    ),
}


@pytest.mark.parametrize("kind", MENDED)
def test_a_bad_part_is_named_and_the_rest_is_kept_if_asked_for(folder, kind):
    expected = read(folder, base())
    change, problem = MENDED[kind]
    content = base()
    change(content)
    words = rf"has 5 bad annotations \({problem}: 5\).*--skip-bad.*5 mended:\n  annotation 1 of"
    with pytest.raises(ValueError, match=words):
        read(folder, content)
    found = read(folder, content, strict=False)
    assert shapes(found) == shapes(expected)
    assert found.problems == {problem: 5}
    scored = read_coco_json(folder / "ann.json", strict=False)["annotations"]
    assert [a["bbox"] for a in scored] == [a["bbox"] for a in base()["annotations"]]


def test_a_box_or_polygon_over_the_edge_is_clipped(folder):
    content = base()
    content["annotations"][0] |= {"bbox": [-3, 27, 41, 30], "segmentation": [square(8, 27)]}
    content["annotations"][4] |= {"bbox": [66, 60, 30, 30], "segmentation": [square(70, 60)]}
    for kind in ("box_outside: 1", "polygon_outside: 1"):
        with pytest.raises(ValueError, match=kind):
            read(folder, content)
    found = read(folder, content, strict=False)
    assert shapes(found)[0] == ([0, 27, 38, 57], 0, 0, True)
    (last,) = found.records[3]["annotations"]
    assert [list(p) for p in last["segmentation"]] == [[70, 60, 96, 60, 96, 90, 70, 90]]


def test_a_mask_without_points_is_none_and_one_of_two_points_is_lost(folder):
    found = read(folder, each(base(), segmentation=lambda a: [[]]))
    assert [s[3] for s in shapes(found)] == [False] * 5
    assert sum(found.notes.values()) == 5
    content = base()
    content["annotations"][0]["segmentation"] = [[10, 10, 50, 60]]
    with pytest.raises(ValueError, match="polygon of 4 coordinates"):
        read(folder, content)
    assert [s[3] for s in shapes(read(folder, content, strict=False))] == [False, *[True] * 4]


def test_an_object_whose_place_is_not_known_never_trains_as_background(folder):
    content = base()
    content["annotations"][1] = {"id": 2, "image_id": 1, "category_id": 1, "bbox": "none"}
    first, second, *_ = read(folder, content, strict=False).records
    assert first["boxes_complete"] is False
    assert "boxes_complete" not in second
    label_map = semantic_label_map(first, 4)
    assert set(np.unique(label_map)) == {1, 255}
    content["annotations"][1]["category_id"] = 99
    assert read(folder, content, strict=False).records[0]["boxes_complete"] is False


def test_a_box_of_zeros_is_no_object_and_no_label(folder):
    content = base()
    content["annotations"][2] |= {"bbox": [0, 0, 0, 0], "segmentation": [], "category_id": 4}
    with pytest.raises(ValueError, match=r"(?s)box_empty: 1.*category 'disc'"):
        read(folder, content)
    record = read(folder, content, strict=False).records[1]
    assert (record["image_labels"], record["annotations"]) == ([], [])
    assert record["supervision"] == "box"
    assert record.get("boxes_complete", True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: [*a["bbox"][:2], a["bbox"][0] + 30, a["bbox"][1] + 30], "as corners"),
        (lambda a: [a["bbox"][0] + 15, a["bbox"][1] + 15, 30, 30], "as centres"),
        (lambda a: [n / SIZE for n in a["bbox"]], "shares of the image"),
        (lambda a: [2, 2, 4, 4], "5 of 5 boxes are not where their masks are, such as annotation"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_boxes_that_are_not_where_their_masks_are(folder, change, words, strict):
    content = each(base(), bbox=change)
    with pytest.raises(ValueError, match=words):
        read(folder, content, strict=strict)


def test_one_box_beside_its_mask_is_a_warning(folder, caplog):
    content = base()
    content["annotations"][0]["bbox"] = [2, 60, 30, 30]
    assert len(shapes(read(folder, content))) == 5
    (message,) = caplog.messages
    assert "1 of 5 boxes are not where their masks are: annotation 1 of image 1: box" in message


def test_all_shares_of_the_image(folder):
    def share(numbers):
        return [number / SIZE for number in numbers]

    content = each(
        base(),
        bbox=lambda a: share(a["bbox"]),
        segmentation=lambda a: [share(p) for p in a["segmentation"]],
    )
    with pytest.raises(
        ValueError, match=r"5 of 5 boxes lie within one pixel .*shares of the image"
    ):
        read(folder, content)


def without(section):
    return lambda content: content[section].clear()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["categories"].clear() or c["annotations"].clear(), "has no categories"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), "has no images"),
        (lambda c: c["images"].append({}), r"images\[4\] .* lacks the key 'id'"),
        (lambda c: c["images"].append(dict(c["images"][0])), "images repeat the id 1"),
        (lambda c: c["annotations"][0].update(image_id=999), "image_id 999, which is not in 'im"),
        (lambda c: c["annotations"][0].update(id=2), "annotations repeat the id 2"),
    ],
)
def test_parts_that_do_not_fit_are_named(folder, change, words):
    content = base()
    change(content)
    with pytest.raises(ValueError, match=words):
        read(folder, content)


def test_parts_that_do_not_fit_are_passed_over_and_counted_if_asked_for(folder, caplog):
    content = base()
    content["images"] += [{}, dict(content["images"][0]), 5]
    content["annotations"] += [
        {**content["annotations"][0], "image_id": 999, "id": 90},
        dict(content["annotations"][0]),
        {**content["annotations"][4], "bbox": [0, 0, 20, 20], "segmentation": None},
        7,
    ]
    found = read(folder, content, strict=False)
    assert found.problems == {
        "image_malformed": 2,
        "image_repeated": 1,
        "orphan_image_id": 1,
        "annotation_repeated": 1,
        "annotation_malformed": 1,
    }
    assert len(shapes(found)) == 6
    ids = [a["id"] for record in found.records for a in record["annotations"]]
    assert len(set(ids)) == 6
    assert any("6 left out" in message for message in caplog.messages)


def test_a_file_that_teaches_nothing_is_named(folder, caplog):
    read(folder, base() | {"annotations": []})
    assert "nothing but background can be learned" in caplog.text
    read(folder, each(base(), iscrowd=lambda a: 1))
    assert "all of its 5 annotations are crowd regions" in caplog.text
    content = each(base(), bbox=lambda a: [0, 0, 0, 0], segmentation=lambda a: [])
    with pytest.raises(ValueError, match="none of its 5 annotations can be used"):
        read(folder, content, strict=False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "page of text"),
        (b"\x89PNG\r\n\x1a\n00", "cut"),
        (b"\0 of no kind", "no kind of image"),
    ],
)
def test_broken_images_are_found_before_training_or_passed_over_and_counted(
    folder, caplog, content, words
):
    (folder / "img" / "2.png").write_bytes(content)
    found = read(folder, base(), strict=False)
    assert [record["image_id"] for record in found.records] == [1, 2, 4]
    assert found.problems == {"image_broken": 1}
    assert words in caplog.text
    with pytest.raises(ValueError, match=rf"ann\.json: image .*2\.png .*{words}"):
        read(folder, base())


def test_an_image_of_another_size_is_found_before_training(folder):
    """Sides the other way round are right where a JPEG file says that it is turned."""
    content = base()
    content["images"][2] |= {"file_name": "2.jpg", "height": SIZE - 6}
    turned = Image.Exif()
    turned[0x0112] = 6
    for size, exif in (((SIZE, SIZE - 6), Image.Exif()), ((SIZE - 6, SIZE), turned)):
        Image.new("RGB", size).save(folder / "img" / "2.jpg", exif=exif)
        assert len(read(folder, content).records) == 4
    Image.new("RGB", (SIZE - 6, SIZE)).save(folder / "img" / "2.jpg")
    with pytest.raises(
        ValueError, match=r"2\.jpg is 90 x 96 pixels, but its annotations say 96 x 90"
    ):
        read(folder, content)
    assert read(folder, content, strict=False).problems == {"image_of_other_size": 1}


def map_content(folder, values, labels):
    (folder / "maps").mkdir(exist_ok=True)
    content = base() | {"annotations": []}
    for image, own in zip(content["images"], labels, strict=True):
        name = f"maps/{image['id']}.png"
        array = np.full((SIZE, SIZE), values(own), np.uint8)
        array[:20] = 0
        cv2.imwrite(str(folder / name), array)
        image |= {"label_map_file_name": name, "image_labels": [own]}
    return content


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda label: 255, "is a class drawn as 255"),
        (lambda label: label - 1, r"4 of 4 label maps show no class .*count the classes from 0"),
    ],
)
def test_label_maps_that_contradict_the_image_labels(folder, values, words):
    content = map_content(folder, values, [3, 3, 4, 3])
    with pytest.raises(ValueError, match=words):
        read(folder, content)
    read(folder, content | {"info": {"label_maps": "predicted"}})  # which claims nothing
    read(folder, map_content(folder, lambda label: label, [1, 2, 3, 4]))


def test_label_maps_without_image_labels_are_said(folder, caplog):
    content = map_content(folder, lambda label: label, [1, 2, 3, 4])
    for image in content["images"]:
        del image["image_labels"]
    read(folder, content)
    assert "4 images have a label map, but none has image_labels" in caplog.text


def test_a_split_that_names_categories_without_masks(folder, caplog):
    content = base()
    for annotation in content["annotations"]:
        if annotation["category_id"] == 1:
            annotation["segmentation"] = []
    data = read(folder, content)
    (folder / "split.txt").write_text("ring\ncrescent\n")
    split = resolve_split(folder / "split.txt", data.class_names)
    with pytest.raises(ValueError, match=r"one: 'ring \(3 boxes\)'.*No mask could"):
        check_masks(data.records, split)
    split = resolve_split("all", data.class_names)
    check_masks(data.records, split)
    assert "2 of them have none" in caplog.text


def test_names_with_accents_are_those_of_the_split(folder):
    content = base()
    content["categories"][0]["name"] = "cafe\u0301"
    (folder / "split.txt").write_text("caf\u00e9\n", encoding="utf-8")
    data = read(folder, content)
    assert resolve_split(folder / "split.txt", data.class_names).indices_with_masks == (0,)


def test_classes_of_a_second_file_are_matched_by_name(folder):
    train = read(folder, base())
    moved = each(base(), category_id=lambda a: 20 - a["category_id"])
    for category in moved["categories"]:
        category["id"] = 20 - category["id"]
    val = in_class_list(read(folder, moved), train)
    assert shapes(val) == shapes(train)
    assert (val.class_names, val.category_ids) == (NAMES, (19, 18, 17, 16))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ("crescent", "moon", "disc", "ring"),
            "1 is 'crescent' in the first, 'ring' in the second",
        ),
        (("Ring ", *NAMES[1:]), "'Ring ' of .* is not in .*, which has 'ring'"),
        (NAMES[:3], "'disc' of .* is not in"),
    ],
)
def test_other_names_in_a_second_file_are_named(folder, names, words):
    train = read(folder, base())
    content = base()
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= len(names)]
    with pytest.raises(ValueError, match=words):
        in_class_list(read(folder, content), train)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"images": [], "annotations": [], "categories": [], "images": []}',
            "repeats the key 'im",
        ),
        (
            '{"images": [{"id": 1, "id": 2}], "annotations": [], "categories": []}',
            "repeats the key 'id'",
        ),
        (
            '{"images": [], "annotations": [{"id": 1, "bbox": [], "bbox": []}], "categories": []}',
            "repeats the key 'bbox'",
        ),
        ('{"images": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"images": [{"id": ' + "9" * 5000 + '}], "annotations": []}', "integer of 5000 digits"),
        ("[1, 2]", "holds a list"),
    ],
)
def test_json_that_is_no_annotation_file(folder, text, words):
    (folder / "ann.json").write_text(text)
    with pytest.raises(ValueError, match=rf"ann\.json.*{words}"):
        load_coco(folder / "ann.json", folder / "img")
    with pytest.raises(ValueError, match=rf"ann\.json.*{words}"):
        read_coco_json(folder / "ann.json")


@pytest.mark.parametrize("image_id", [1, "1"])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ('{"size": [96, 96], "size": [96, 96], "counts": [0, 9216]}', "repeats the key 'size'"),
        ('{"size": [96, 96], "counts": [' + "9" * 5000 + "]}", "integer of 5000 digits"),
        ("[[" + "9" * 5000 + ", 1, 2, 3, 4, 5]]", "integer of 5000 digits"),
    ],
)
def test_masks_that_are_no_plain_json_are_named_with_their_file(folder, mask, words, image_id):
    content = base()
    content["annotations"][0] |= {"segmentation": "MASK", "image_id": image_id}
    (folder / "ann.json").write_text(json.dumps(content).replace('"MASK"', mask))
    for strict in (True, False):
        with pytest.raises(ValueError, match=rf"ann\.json.*{words}"):
            load_coco(folder / "ann.json", folder / "img", strict=strict)


def outcome(folder, content, **kwargs):
    """Read a file: what came out, and the name of the file or the error."""
    try:
        data = read(folder, content, **kwargs)
    except (ValueError, FileNotFoundError) as error:
        return (str(error),)
    return data.records, dict(data.problems), dict(data.notes), str(data.json_file)


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("annotations", {"bbox": [10**400, -(10**400), 5, 5]}),
        ("annotations", {"segmentation": [[10**400, -(10**400), 1, 1, 10**400, 2]]}),
        ("annotations", {"segmentation": {"size": [96, 96], "counts": [2**62] * 4 + [0, 9216]}}),
        ("annotations", {"segmentation": {"size": [96, 96], "counts": [0, 2**32 + 9216]}}),
        ("annotations", {"id": 10**30}),
        ("annotations", {"category_id": 10**30}),
        ("annotations", {"image_id": [1]}),
        ("images", {"width": 10**400}),
        ("images", {"height": 10**9}),
        ("images", {"id": None}),
        ("categories", {"id": 10**30}),
    ],
)
def test_numbers_beyond_64_bits_are_errors_or_left_out(folder, section, keys):
    content = base()
    content[section][0].update(keys)
    assert "ann.json" in outcome(folder, content, strict=False)[-1]
    if keys != {"id": 10**30} or section != "annotations":
        with pytest.raises(ValueError, match=r"ann\.json"):
            read(folder, content)


def mutated(rng):
    """A file in which a few values were exchanged for others that stand in annotation files."""
    values = [
        None,
        0,
        -1,
        1.5,
        "1",
        "x",
        [],
        {},
        [[]],
        True,
        2**70,
        [1, 2, 3, 4],
        [[1, 2, 3, 4, 5, 6]],
        [[[1], [2], [3], [4], [5], [6]]],
    ]
    content = base()
    for _ in range(int(rng.integers(1, 4))):
        section = content[str(rng.choice(["images", "annotations", "annotations", "categories"]))]
        entry = section[int(rng.integers(len(section)))]
        key = str(rng.choice(sorted(entry)))
        if rng.random() < 0.2:
            del entry[key]
            continue
        entry[key] = copy.deepcopy(values[int(rng.integers(len(values)))])
    return content


@pytest.mark.parametrize("seed", range(10))
def test_mutants_end_in_records_or_in_a_clear_error(folder, seed, monkeypatch):
    """And it does not matter which parser reads them, or whether rows are read many at a time."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        content = mutated(rng)
        for strict in (True, False):
            outcomes = []
            for module, name, value in (
                (None, "", None),
                ("json_files", "msgspec", None),
                ("json_files", "simdjson", None),
                ("coco", "_numbers", lambda column, *_, **__: np.full(len(column), np.nan)),
            ):
                with monkeypatch.context() as patch:
                    if module:
                        patch.setattr(f"maskx.data.{module}.{name}", value)
                    outcomes.append(outcome(folder, content, strict=strict))
            assert all(outcome == outcomes[0] for outcome in outcomes)
            assert "ann.json" in outcomes[0][-1]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_collected_is_what_strict_reading_refuses(folder, seed):
    rng = np.random.default_rng(100 + seed)
    for _ in range(40):
        content = mutated(rng)
        (folder / "ann.json").write_text(json.dumps(content))
        _, report = check_coco(folder / "ann.json", folder / "img")
        refused = len(outcome(folder, content)) == 1
        assert refused == bool(report.problems), content


# Of each case: what reading it strictly and leniently must end in, None for records.
EXPECTED = {
    "a15": ("polygon of 4", None),
    "a22": ("polygon of 4", None),
    "a31": ("box_malformed", None),
    "a32": ("corners", "corners"),
    "a33": ("shares of the image", "shares of the image"),
    "a34": ("shares of the image", "shares of the image"),
    "a35": ("box_malformed", None),
    "a36": ("box_missing", None),
    "a37": ("box_missing", None),
    "a47": ("do not exist", "do not exist"),
    "a48": ("0.png does", "0.png does"),
    "a56": ("no categories", "no categories"),
    "a58": ("no images", "no images"),
    "a73": ("image_id 999", None),
    "a85": ("polygon_outside", None),
    "a86": ("box_outside", None),
    "a87": ("box_malformed", None),
    "b02": ("JPEG file that is cut off", None),
    "b03": ("page of text", None),
    "b04": ("is empty", None),
    "c03": ("drawn as 255", "drawn as 255"),
    "c11": ("from 0", "from 0"),
    "g03": ("box_empty", None),
    "g04": ("box_missing", None),
    "g06": ("lacks the key 'id'", None),
    "g07": ("images repeat the id", None),
    "g13": ("centres", "centres"),
}


@pytest.mark.parametrize(
    "case", sorted(p.name for p in CASES.iterdir() if p.is_dir()) if CASES.is_dir() else []
)
def test_a_case_of_a_user_is_read_or_named(case, caplog):
    caplog.set_level(logging.WARNING)
    for strict, words in zip((True, False), EXPECTED.get(case[:3], (None, None)), strict=True):
        if words is None:
            data = load_coco(CASES / case / "ann.json", CASES / case / "img", strict=strict)
            assert data.records
            continue
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load_coco(CASES / case / "ann.json", CASES / case / "img", strict=strict)
