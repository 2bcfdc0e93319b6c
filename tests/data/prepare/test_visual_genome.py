import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.coco import load_coco
from maskx.data.prepare.visual_genome import (
    COCO_SYNSETS,
    align_with_coco,
    choose_classes,
    prepare_visual_genome,
    read_class_names,
    split_images,
)
from maskx.data.vocabularies import COCO_THING_CLASSES

SCRIPT = Path(__file__).parents[3] / "datasets" / "prepare.py"
FILES = runpy.run_path(str(Path(__file__).parents[2] / "support" / "visual_genome_files.py"))
make_vg, manual_synsets = FILES["make_vg"], FILES["manual_synsets"]
WIDTH, HEIGHT = FILES["WIDTH"], FILES["HEIGHT"]


def reference(images, objects, val_ids, num_classes, num_test):
    """What should be written, slowly, from the description of the data set."""
    occurring = [s for entry in objects for item in entry["objects"] for s in item["synsets"]]
    distinct = sorted(set(occurring), key=occurring.index)
    ranked = sorted(distinct, key=lambda s: -occurring.count(s))  # stable: first come, first
    aligned = []
    for name in COCO_THING_CLASSES:
        if name in manual_synsets():
            aligned.append(manual_synsets()[name])
        else:
            aligned.append(next(s for s in ranked if s[:-5].replace("_", " ") == name))
    others = [s for s in ranked if s not in aligned][: num_classes - 80]
    classes = aligned + sorted(others)

    val = [i["image_id"] for i in images if i["coco_id"] in val_ids]
    test = [i["image_id"] for i in images if i["coco_id"] is None][-num_test:]
    train = [i["image_id"] for i in images if i["image_id"] not in val + test]
    boxes, clipped, seen, repeated = {"train": [], "val": [], "test": []}, 0, [], []
    for entry in objects:
        (part,) = [
            n for n, ids in zip(boxes, (train, val, test), strict=True) if entry["image_id"] in ids
        ]
        for item in entry["objects"]:
            if len(item["synsets"]) != 1 or item["synsets"][0] not in classes:
                continue
            box = [item["x"], item["y"], item["w"], item["h"]]
            if None in box or item["w"] == 0:
                continue
            x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
            if min(x2, WIDTH) <= max(x1, 0) or min(y2, HEIGHT) <= max(y1, 0):
                continue
            if x1 < -1 or y1 < -1 or x2 > WIDTH + 1 or y2 > HEIGHT + 1:
                clipped += 1
                x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, WIDTH), min(y2, HEIGHT)
                box = [x1, y1, x2 - x1, y2 - y1]
            annotation = {
                "id": item["object_id"],
                "image_id": entry["image_id"],
                "category_id": 1 + classes.index(item["synsets"][0]),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            if item["object_id"] in seen:
                repeated.append(annotation)
            seen.append(item["object_id"])
            boxes[part].append(annotation)
    for number, annotation in enumerate(repeated):
        annotation["id"] = max(seen) + 1 + number
    return classes, dict(zip(boxes, (train, val, test), strict=True)), boxes, clipped, len(repeated)


@pytest.fixture
def write_vg(tmp_path):
    """Write the files of `make_vg`; changes are made by the functions given."""

    def write(seed=0, change=lambda images, objects: None):
        images, objects, val_ids = make_vg(seed)
        change(images, objects)
        (tmp_path / "visual_genome").mkdir()
        (tmp_path / "coco" / "annotations").mkdir(parents=True)
        files = (
            tmp_path / "visual_genome" / "objects.json",
            tmp_path / "visual_genome" / "image_data.json",
            tmp_path / "coco" / "annotations" / "instances_val2017.json",
        )
        coco = {"images": [{"id": i} for i in sorted(val_ids)]}
        for file, content in zip(files, (objects, images, coco), strict=True):
            file.write_text(json.dumps(content))
        return (*files, tmp_path / "visual_genome" / "annotations")

    return write


def read(folder, part):
    return json.loads((folder / f"instances_vg3k_{part}.json").read_text())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_files_are_those_of_the_description(write_vg, seed):
    images, objects, val_ids = make_vg(seed)
    paths = write_vg(seed)
    summary = prepare_visual_genome(*paths, num_classes=110, num_test_images=12)
    classes, image_ids, boxes, clipped, renumbered = reference(images, objects, val_ids, 110, 12)

    categories = json.loads((paths[-1] / "vg3k_categories.json").read_text())
    assert [c["synset"] for c in categories] == classes
    assert [c["id"] for c in categories] == list(range(1, 111))
    assert [c["name"] for c in categories] == list(COCO_THING_CLASSES) + classes[80:]
    assert [c.get("coco") for c in categories] == [*COCO_THING_CLASSES, *[None] * 30]
    given = {image["image_id"]: image for image in images}
    for part in ("train", "val", "test"):
        content = read(paths[-1], part)
        assert content["categories"] == categories
        assert [image["id"] for image in content["images"]] == image_ids[part]
        for image in content["images"]:
            url = f"https://cs.stanford.edu/people/rak248/{image['file_name']}"
            assert url == given[image["id"]]["url"]
            assert (image["width"], image["height"]) == (WIDTH, HEIGHT)
            assert image["coco_id"] == given[image["id"]]["coco_id"]
        assert content["annotations"] == boxes[part]
        num_classes = len({annotation["category_id"] for annotation in boxes[part]})
        assert summary.splits[part] == (len(image_ids[part]), len(boxes[part]), num_classes)
    assert len(image_ids["test"]) == 12
    assert summary.num_classes == 110
    assert summary.infrequent == {"hair drier": ("hand_blower.n.01", 1)}
    assert summary.clipped == clipped > 0
    assert summary.renumbered == renumbered > 0
    everything = sum(len(entry["objects"]) for entry in objects)
    assert sum(map(len, boxes.values())) + summary.left_out.total() == everything
    reasons = {"without a synset": 20, "with several synsets": 12}
    assert summary.left_out == summary.left_out | reasons
    others = {"of other synsets", "with box_empty", "with box_outside", "with box_malformed"}
    assert set(summary.left_out) == {*reasons, *others}


def test_the_reader_takes_every_box(write_vg):
    *paths, output = write_vg()
    summary = prepare_visual_genome(*paths, output, num_classes=110, num_test_images=12)
    ids = []
    for part in ("train", "val", "test"):
        path = output / f"instances_vg3k_{part}.json"
        data = load_coco(path, output, strict=True, check_images=False)
        assert data.class_names == tuple(read_class_names(output / "vg3k_categories.json"))
        assert sum(len(record["annotations"]) for record in data.records) == summary.splits[part][1]
        assert {record["supervision"] for record in data.records} == {"box"}
        ids += [a["id"] for record in data.records for a in record["annotations"]]
    assert len(set(ids)) == len(ids)


def test_the_reference_list_has_what_is_outside_the_most_frequent_as_well(write_vg):
    _, objects, _ = make_vg(0)
    paths = write_vg()
    summary = prepare_visual_genome(*paths, num_classes=110, reference_classes=True)
    counts = Counter(s for entry in objects for item in entry["objects"] for s in item["synsets"])
    frequent = {synset for synset, _ in counts.most_common(110)}
    assert "hand_blower.n.01" not in frequent
    assert summary.num_classes == 111
    categories = json.loads((paths[-1] / "vg3k_categories.json").read_text())
    assert {c["synset"] for c in categories} == frequent | {"hand_blower.n.01"}


def test_clean_names_keep_the_more_frequent_synset_and_the_table_goes_first():
    _, objects, _ = make_vg(0)
    counts = Counter(s for entry in objects for item in entry["objects"] for s in item["synsets"])
    aligned = align_with_coco(counts)
    assert list(aligned) == list(COCO_THING_CLASSES)
    assert aligned["person"] == "person.n.01"
    assert aligned["dog"] == "dog.n.03"
    assert aligned["orange"] == "orange.n.01"
    assert aligned["traffic light"] == "traffic_light.n.01"
    assert len(set(aligned.values())) == 80
    assert manual_synsets() == COCO_SYNSETS


def test_the_numbers_of_the_paper_and_of_the_published_code():
    """3000 classes, 80 and 2920; 3002 outputs of the published models; 5000 test images."""
    by_hand = manual_synsets()
    assert len(by_hand) == 18
    by_name = [name for name in COCO_THING_CLASSES if name not in by_hand]
    assert len(by_name) == 62
    counts = {f"{name.replace(' ', '_')}.n.01": 9000 for name in by_name}
    counts |= dict.fromkeys(by_hand.values(), 9000)
    counts |= {f"other_{i}.n.01": 8000 - i for i in range(4000)}
    assert len(choose_classes(counts)) == len(choose_classes(counts, reference=True)) == 3000
    counts["hand_blower.n.01"] = 2  # outside the most frequent
    classes = [category["synset"] for category in choose_classes(counts)]
    assert (len(classes), len(classes[80:])) == (3000, 2920)
    published = [category["synset"] for category in choose_classes(counts, reference=True)]
    background = 1
    assert background + len(published) == 3002
    assert set(published) - set(classes) == {"other_2920.n.01"}
    assert published[:80] == classes[:80]

    # 108077 images, about half of them in COCO.
    images = [{"id": i, "coco_id": i if i % 2 else None} for i in range(108077)]
    parts = split_images(images, set(range(5000)))
    assert {part: len(images) for part, images in parts.items()} == {
        "train": 108077 - 2500 - 5000,
        "val": 2500,
        "test": 5000,
    }
    assert [image["id"] for image in parts["test"]] == list(range(98078, 108077, 2))


@given(st.integers(0, 10**6), st.integers(80, 140), st.booleans())
def test_the_class_list_has_its_properties(seed, num_classes, as_reference):
    _, objects, _ = make_vg(seed)
    counts = Counter(s for entry in objects for item in entry["objects"] for s in item["synsets"])
    categories = choose_classes(counts, num_classes, reference=as_reference)
    names = [category["name"] for category in categories]
    assert len(set(names)) == len(names)
    assert tuple(names[:80]) == COCO_THING_CLASSES
    assert names[80:] == sorted(names[80:])
    if as_reference:
        assert num_classes <= len(names) <= num_classes + 80
    else:
        assert len(names) == num_classes
    left_out = [n for s, n in counts.items() if s not in {c["synset"] for c in categories}]
    assert min((counts[name] for name in names[80:]), default=99) >= max(left_out, default=0)


def test_images_are_split_by_their_place_in_coco():
    images = [{"id": i, "coco_id": coco} for i, coco in enumerate([5, None, -1, 6, None, None])]
    parts = split_images(images, {6, 9}, 2)
    assert {k: [i["id"] for i in v] for k, v in parts.items()} == {
        "train": [0, 1, 2],
        "val": [3],
        "test": [4, 5],
    }
    as_in_the_paper = split_images(images, {6, 9}, 0)
    assert [image["id"] for image in as_in_the_paper["train"]] == [0, 1, 2, 4, 5]
    assert as_in_the_paper["test"] == []
    assert len(split_images(images, {6}, 100)["test"]) == 3
    with pytest.raises(ValueError, match=r"-1 test images are asked for\. Allowed: 0 or more"):
        split_images(images, {6}, -1)


def drop(position, key):
    return lambda images, objects: images[position].pop(key)


def drop_of_object(key):
    return lambda images, objects: first_object(objects).pop(key)


def first_object(objects):
    return next(entry for entry in objects if entry["objects"])["objects"][0]


def set_of_image(key, value):
    return lambda images, objects: images[3].update({key: value})


def set_of_object(key, value):
    return lambda images, objects: first_object(objects).update({key: value})


def rename(old, new):
    def change(images, objects):
        for entry in objects:
            for item in entry["objects"]:
                item["synsets"] = [new if s == old else s for s in item["synsets"]]

    return change


BAD = {
    "image without coco_id": (
        drop(3, "coco_id"),
        r"image_data\.json: \[3\] .* lacks .*'coco_id'.*1\.4",
    ),
    "image without url": (drop(0, "url"), r"image_data\.json: \[0\] .* lacks the key 'url'"),
    "coco_id of text": (set_of_image("coco_id", "7"), r"\[3\] .* has coco_id '7'. Allowed: int"),
    "image id of text": (set_of_image("image_id", "7"), r"has image_id '7'\. Allowed: int"),
    "url of a number": (set_of_image("url", 7), r"\[3\] .* has url 7\. Allowed: str"),
    "url without file": (set_of_image("url", "x/y/"), r"has url 'x/y/'\. Allowed: .*file"),
    "width of text": (set_of_image("width", "60"), r"has width '60'\. Allowed: int"),
    "objects of no list": (
        lambda images, objects: objects[2].update(objects={}),
        r"objects\.json: \[2\] .* has objects \{\}\. Allowed: list",
    ),
    "url without folder": (set_of_image("url", "7.jpg"), r"has url '7\.jpg'\. Allowed: .*folder"),
    "image without width": (set_of_image("width", 0), r"has width 0\. Allowed: pixels, above 0"),
    "object without synsets": (drop_of_object("synsets"), r"objects\.json: .*objects\[0\] lacks"),
    "object of version 1.0": (drop_of_object("object_id"), r"'object_id'.*version 1\.4"),
    "object id of text": (set_of_object("object_id", "5"), r"has object_id '5'\. Allowed: int"),
    "synsets of numbers": (set_of_object("synsets", [1]), r"has synsets \[1\]\. Allowed: strings"),
    "synsets of text": (set_of_object("synsets", "a"), r"has synsets 'a'\. Allowed: list"),
    "image id repeated": (
        lambda images, objects: images.append(images[0]),
        r"image_data\.json: repeats the image_id \d+",
    ),
    "unknown image": (
        lambda images, objects: objects[2].update(image_id=99999),
        r"objects\.json: \[2\] \(image_id 99999\) is an image that image_data\.json lacks",
    ),
    "entry of no dict": (lambda images, objects: objects.insert(1, 5), r"\[1\] is 5\. Allowed: a"),
    "COCO class without synset": (
        rename("zebra.n.01", "okapi.n.01"),
        r"COCO class 'zebra' has no synset .* named 'zebra'",
    ),
    "mapped synset that does not occur": (
        rename("bag.n.06", "bag.n.01"),
        r"COCO class 'suitcase' has no synset .* 'bag\.n\.06'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_entry(write_vg, name):
    change, message = BAD[name]
    paths = write_vg(change=change)
    with pytest.raises(ValueError, match=message):
        prepare_visual_genome(*paths, num_classes=110)
    assert not paths[-1].exists()


def test_files_that_are_missing_or_no_json_are_named(write_vg, tmp_path):
    objects, images, coco, output = write_vg()
    with pytest.raises(FileNotFoundError, match=r"none\.json: there is no such file"):
        prepare_visual_genome(objects, tmp_path / "none.json", coco, output)
    broken = tmp_path / "broken.json"
    for content, message in [
        (b"[1, 2", r"broken\.json: is not valid JSON"),
        (b"\xff\xfe\xff", r"broken\.json: is not UTF-8 text"),
        (b"{}", r"broken\.json: holds a dict\. Allowed is a list"),
    ]:
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            prepare_visual_genome(broken, images, coco, output)
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json: has no list 'images'.*instances_val2017"):
        prepare_visual_genome(objects, images, broken, output)
    broken.write_text('{"images": [{"id": 3}]}')
    with pytest.raises(ValueError, match=r"none of its 1 images is in Visual Genome"):
        prepare_visual_genome(objects, images, broken, output, num_classes=110)


@pytest.mark.parametrize("num_classes", [79, 10**6])
def test_the_number_of_classes_is_limited_by_what_there_is(write_vg, num_classes):
    with pytest.raises(ValueError, match=rf"{num_classes} classes .* from 80, .* to \d+, the syn"):
        prepare_visual_genome(*write_vg(), num_classes=num_classes)


def test_a_category_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "vg3k_categories.json"
    for content in ("[1]", '[{"id": 2, "name": "cat"}]', '[{"id": 1}]'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"vg3k_categories\.json: is no list .*Write it again"):
            read_class_names(path)


def test_a_second_run_replaces_the_first(write_vg):
    paths = write_vg()
    prepare_visual_genome(*paths, num_classes=110, num_test_images=12)
    prepare_visual_genome(*paths, num_classes=90, num_test_images=0)
    assert len(read_class_names(paths[-1] / "vg3k_categories.json")) == 90
    assert read(paths[-1], "test")["images"] == []


def test_a_run_that_breaks_off_leaves_no_class_list(write_vg):
    paths = write_vg()
    prepare_visual_genome(*paths, num_classes=110)
    (paths[-1] / "instances_vg3k_test.json").unlink()
    (paths[-1] / "instances_vg3k_test.json").mkdir()
    with pytest.raises(IsADirectoryError):
        prepare_visual_genome(*paths, num_classes=90)
    assert not (paths[-1] / "vg3k_categories.json").exists()


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), "visual_genome", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_writes_the_files_and_says_what_is_in_them(write_vg, tmp_path):
    paths = write_vg()
    done = run_script("--root", tmp_path, "--classes", 110, "--test-images", 12)
    assert done.returncode == 0, done.stderr
    assert [len(read(paths[-1], part)["images"]) for part in ("val", "test")] == [19, 12]
    expected = prepare_visual_genome(*paths, num_classes=110, num_test_images=12)
    assert done.stdout.startswith(str(expected))
    assert "110 classes: 80 of COCO and 30 others." in done.stdout
    assert "'hair drier' of COCO is hand_blower.n.01, which is not among" in done.stdout
    assert "20 without a synset" in done.stdout
    assert "train" in done.stdout
    as_reference = ("--classes", 110, "--reference-classes", "--coco-val-json", paths[2])
    assert "111 classes" in run_script("--root", tmp_path, *as_reference).stdout


def test_the_script_ends_with_the_message_of_an_error(tmp_path):
    done = run_script("--root", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "instances_val2017.json: there is no such file" in done.stderr
