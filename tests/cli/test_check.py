"""`maskx check`: counts, problems, advice, page, exit status."""

import base64
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from maskx.cli.main import main
from maskx.data.coco import load_coco

CASES = Path(__file__).parents[3] / "shared" / "cases"
SIZE = 96
NAMES = ("ring", "crescent", "moon", "disc")


def square(x, y, side=30):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def content(masks=NAMES, boxes=NAMES, tags=()):
    """Five objects of four categories, of which some have masks, boxes or tags."""
    places = [(1, 1, 8, 27), (1, 1, 40, 11), (2, 3, 0, 47), (3, 4, 5, 7), (4, 2, 60, 60)]
    images = [
        {"id": i, "file_name": f"{i - 1}.png", "height": SIZE, "width": SIZE} for i in range(1, 5)
    ]
    annotations = []
    for number, (image, category, x, y) in enumerate(places, start=1):
        name = NAMES[category - 1]
        if name in tags:
            images[image - 1].setdefault("image_labels", []).append(category)
        if name in boxes:
            entry = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0}
            entry |= {"bbox": [x, y, 30, 30], "area": 900.0}
            entry["segmentation"] = [square(x, y)] if name in masks else []
            annotations.append(entry)
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img").mkdir()
    for i in range(4):
        cv2.imwrite(str(tmp_path / "img" / f"{i}.png"), np.full((SIZE, SIZE, 3), 40 * i, np.uint8))
    return tmp_path


def check(capsys, data, *words):
    Path("ann.json").write_text(json.dumps(data))
    status = main(["check", "ann.json", *words])
    return status, capsys.readouterr().out


def test_what_is_there_by_category(folder, capsys):
    data = content(masks=["ring"], boxes=["ring", "crescent", "moon"], tags=["disc"])
    status, text = check(capsys, data, "img")
    assert status == 0
    assert "No problems." in text
    rows = dict(re.findall(r"^  (\w+) +(\d+ +\d+ +\d+ +\d+)$", text, re.MULTILINE))
    assert {name: [int(n) for n in row.split()] for name, row in rows.items()} == {
        "ring": [1, 2, 2, 0],
        "crescent": [1, 1, 0, 0],
        "moon": [1, 1, 0, 0],
        "disc": [1, 0, 0, 1],
    }


@pytest.mark.parametrize(
    ("labels", "system"),
    [
        ({"masks": ["ring"]}, "maskx"),
        ({"masks": NAMES}, "maskx"),
        ({"boxes": [], "tags": NAMES}, "class_patterns"),
        ({"masks": ["ring", "moon"], "boxes": ["ring", "moon"], "tags": NAMES}, "transfernet"),
        ({"masks": ["ring"], "boxes": ["ring", "moon"], "tags": NAMES}, "concept_mask"),
        ({"masks": []}, None),
        ({"boxes": []}, None),
    ],
)
def test_the_system_that_fits_and_its_command(folder, capsys, labels, system):
    data = content(**labels)
    _, text = check(capsys, data, "img")
    commands = re.findall(r"^  (maskx train .*)$", text, re.MULTILINE)
    assert [command.split()[3] for command in commands] == [system] * (system is not None)
    if system is None:
        return
    # It is one that the verb understands, and the files that it names can be made as it says.
    words = commands[0].split()[1:]
    for preparing in re.findall(r"^  maskx (check .*)$", text, re.MULTILINE):
        assert main(preparing.split()) == 0
    if "--masks-for" in words:
        names = Path(words[words.index("--masks-for") + 1]).read_text().split()
        assert names == [name for name in NAMES if name in labels["masks"]]
    with pytest.raises(SystemExit) as ending:
        main([*words, "--iterations", "0", "--output", "run"])
    assert "VALIDATION" in str(ending.value) or "iterations" in str(ending.value)


def test_boxes_alone_are_for_a_teacher(folder, capsys):
    _, text = check(capsys, content(masks=[]), "img")
    command = "maskx complete ann.json img --teacher grabcut --output completed.json"
    assert f"\n  {command}\n" in text
    assert main(command.split()[1:]) == 0
    completed = json.loads(Path("completed.json").read_text())
    assert len(completed["annotations"]) == 5
    capsys.readouterr()
    main(["export", "ann.json", "img", "--format", "labelme", "--output", "lm", "--copy-images"])
    main(["check", "lm", "lm"])
    text = capsys.readouterr().out
    assert "\n  maskx export lm lm --format coco --output coco\n" in text
    assert "\n  maskx complete coco/annotations.json lm --teacher grabcut" in text


def test_hundreds_of_tags_are_for_the_system_of_large_vocabularies(folder, capsys):
    data = content(masks=["ring"], boxes=["ring"])
    data["categories"] += [{"id": i, "name": f"class {i}"} for i in range(5, 300)]
    data["images"][3]["image_labels"] = list(range(5, 300))
    _, text = check(capsys, data)
    assert "maskx train --system larvseg" in text
    assert "and 239 more (--html has all)" in text


def faults():
    """A file with a fault of every sort that reading can go on from."""
    data = content()
    annotations, images = data["annotations"], data["images"]
    for image in images:
        image["image_labels"] = [1]
    extra = [dict(annotations[0], id=10 + i) for i in range(9)]
    extra[0]["bbox"] = [1, 2, 3]
    extra[1]["image_id"] = 99
    extra[2]["category_id"] = 99
    extra[3]["iscrowd"] = "many"
    extra[4]["segmentation"] = [[1, 2, 3, 4]]
    extra[5]["bbox"] = [80, 80, 40, 40]
    extra[6]["id"] = 1
    extra[6]["bbox"] = [9, 28, 30, 30]
    extra[7]["id"] = [1]
    del extra[8]["id"]
    data["annotations"] += [*extra, 5]
    images[1]["image_labels"] = [77]
    images[2]["height"] = SIZE - 1
    data["images"] += [
        {},
        dict(images[0]),
        {"id": 9, "file_name": "x/3.png", "height": 9, "width": 9},
    ]
    data["categories"] += [{"id": 5}, {"id": 6, "name": "ring"}]
    return data


def test_every_problem_is_said_at_once_with_count_and_remedy(folder, capsys):
    (folder / "img" / "1.png").write_bytes(b"")
    status, text = check(capsys, faults(), "img")
    assert status == 1
    found = dict(re.findall(r"^  (\w+): (\d+)$", text, re.MULTILINE))
    assert {kind: int(number) for kind, number in found.items()} == {
        "box_malformed": 1,
        "orphan_image_id": 1,
        "orphan_category_id": 1,
        "iscrowd": 1,
        "polygon_malformed": 1,
        "box_outside": 1,
        "annotation_id_repeated": 1,
        "annotation_id": 1,
        "annotation_without_id": 1,
        "annotation_malformed": 1,
        "image_labels_unknown": 1,
        "image_of_other_size": 1,
        "image_malformed": 1,
        "image_repeated": 1,
        "image_missing": 1,
        "image_broken": 1,
        "category_malformed": 1,
        "categories_repeat_name": 1,
    }
    assert text.count("    -> ") == len(found)
    assert "Image img/x/3.png does not exist, but img/3.png does" in text
    assert "Correct first what no option passes over:" in text


def moved(annotation):
    annotation["bbox"][0] += 500
    annotation["segmentation"] = []


def as_shares(annotation):
    annotation["bbox"] = [number / SIZE for number in annotation["bbox"]]
    annotation["segmentation"] = []


def exchanged(annotation):
    x, y, width, height = annotation["bbox"]
    annotation["bbox"] = [y + SIZE, x, height, width]
    annotation["segmentation"] = []


def with_a_bad_mask(annotation):
    annotation["segmentation"] = [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (moved, ["All 5 objects are bad: without them tags", "times its size: were they drawn"]),
        (exchanged, ["All 5 objects are bad", "inside with x and y, and width and height, exch"]),
        (as_shares, ["boxes_of_another_form", "look like shares of the image"]),
        (with_a_bad_mask, ["All masks are bad: without them boxes and tags are left at most"]),
    ],
)
def test_where_all_of_it_is_bad_nothing_is_advised(folder, capsys, spoil, words):
    data = content()
    for image in data["images"]:
        image["height"] = 2 * SIZE
    for annotation in data["annotations"]:
        spoil(annotation)
    status, text = check(capsys, data)
    assert status == 1
    assert all(each in text for each in words)
    assert not re.search(r"^  maskx (train|complete)", text, re.MULTILINE)


def test_where_some_is_left_what_learns_from_it_is_advised(folder, capsys):
    data = content()
    for annotation in data["annotations"][1:]:
        moved(annotation)
    _, text = check(capsys, data)
    assert re.search(r"^  maskx train --system \w+ .*--skip-bad", text, re.MULTILINE)


def test_many_of_a_kind_are_counted_with_examples(folder, capsys):
    data = content()
    data["annotations"] = [dict(data["annotations"][0], id=i, bbox=[0, 0]) for i in range(20)]
    status, text = check(capsys, data)
    assert status == 1
    assert "box_malformed: 20" in text
    assert text.count("bbox is [0, 0]") == 5
    assert "and 15 more" in text
    assert "with --skip-bad: 20 mended" in text
    assert "look" in text  # at the image files it did not


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}', "{", '{"images": 1, "images": 2}'])
def test_what_is_no_annotation_file_is_a_problem(folder, capsys, text):
    Path("ann.json").write_text(text)
    assert main(["check", "ann.json"]) == 1
    assert "not_readable: 1" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_an_error(folder):
    with pytest.raises(SystemExit, match=r"error: nowhere\.json: there is no such"):
        main(["check", "nowhere.json"])


def test_a_folder_that_is_not_there_is_a_problem(folder, capsys):
    status, text = check(capsys, content(), "nowhere")
    assert status == 1
    assert "image folder nowhere does not exist" in text


def test_the_page_holds_everything_and_pictures(folder, capsys):
    data = content(masks=["ring"])
    data["categories"][2]["name"] = "<b>moon & stars"
    data["annotations"][0]["bbox"] = [1, 2]
    data["images"][3] |= {"image_labels": [4], "label_map_file_name": "map.png"}
    data["annotations"].pop()
    cv2.imwrite("map.png", np.full((SIZE, SIZE), 4, np.uint8))
    status, _ = check(capsys, data, "img", "--html", "out/check.html")
    assert status == 1
    page = Path("out/check.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 4
    assert "http" not in page
    assert "&lt;b&gt;moon &amp; stars" in page
    assert "<b>moon" not in page
    assert "box_malformed: 1" in page
    assert "maskx train" in page


def test_pictures_show_the_outlines(folder):
    data = content(masks=["ring"])
    Path("ann.json").write_text(json.dumps(data))
    main(["check", "ann.json", "img", "--html", "check.html"])
    encoded = re.search(r"base64,([^\"]+)", Path("check.html").read_text()).group(1)
    image = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR)
    scale = image.shape[0] / SIZE
    blue, green, red = image[round(12 * scale), round(45 * scale)].astype(int)  # in a mask
    assert green > blue + 30
    assert green > red + 30
    assert np.ptp(image[round(90 * scale), round(90 * scale)].astype(int)) < 10  # outside


def test_nothing_is_overwritten(folder, capsys):
    for option in ("--html", "--split"):
        Path("there").write_text("precious")
        with pytest.raises(SystemExit, match=r"error: there exists.*--overwrite"):
            check(capsys, content(), option, "there")
        assert Path("there").read_text() == "precious"
        assert check(capsys, content(), option, "there", "--overwrite")[0] == 0
        assert Path("there").read_text() != "precious"
        Path("there").unlink()


# What the report of a case must hold. All others are fine, but for what is read as it is meant.
PROBLEMS = {
    "a15": "polygon of 4",
    "a22": "polygon of 4",
    "a31": "bbox is {",
    "a32": "as corners|corners",
    "a33": "shares of the image",
    "a34": "shares of the image",
    "a35": r"bbox is \['",
    "a36": "box_missing",
    "a37": "box_missing",
    "a47": "image_missing: 4",
    "a48": "0.png does",
    "a56": "has no categories",
    "a58": "has no images",
    "a73": "image_id 999",
    "a85": "polygon_outside",
    "a86": "box_outside",
    "a87": "box_malformed",
    "b02": "2.jpg is a JPEG file that is cut off",
    "b03": "page of text",
    "b04": "is empty",
    "c03": "drawn as 255",
    "c11": "from 0",
    "g03": "box_empty",
    "g04": "box_missing",
    "g06": "lacks the key 'id'",
    "g07": "images repeat the id",
    "g13": "centres",
}
SAID = {
    "a01": "image_id of another type",
    "a02": "category_id of another type",
    "a03": "category id that is no integer",
    "a04": "iscrowd that is no 0 or 1",
    "a05": "iscrowd that is no 0 or 1",
    "a09": "group category without annotations",
    "a10": "area that is no number",
    "a14": "one polygon without points",
    "a45": "image path as a tool writes it",
    "a46": "image path as a tool writes it",
    "a57": "nothing but background",
    "a84": "crowd regions",
    "c16": "none has image_labels",
    "c31": "but not one mask",
    "c32": "no labels",
    "h02": "but not one mask",
}


@pytest.mark.parametrize(
    "case", sorted(p.name for p in CASES.iterdir() if p.is_dir()) if CASES.is_dir() else []
)
def test_a_case_of_a_user_is_reported(case, capsys):
    paths = [str(CASES / case / "ann.json"), str(CASES / case / "img")]
    status = main(["check", *paths])
    text = capsys.readouterr().out
    assert status == (case[:3] in PROBLEMS)
    expected = PROBLEMS.get(case[:3]) or SAID.get(case[:3], "No problems")
    assert re.search(expected, text, re.IGNORECASE)
    if status == 0:
        assert load_coco(*paths).records
