import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskx.data.coco import load_coco
from maskx.data.label_maps import read_label_map
from maskx.data.large_vocabularies import coco_stuff_classes
from maskx.data.prepare import coco_stuff as coco_stuff_module
from maskx.data.prepare import label_map_sets
from maskx.data.prepare.coco_stuff import (
    COCO_STUFF_COUNTS,
    coco_stuff_class_of_id,
    coco_stuff_names,
    prepare_coco_stuff,
)

SCRIPT = Path(__file__).parents[3] / "datasets" / "prepare.py"
HEIGHT, WIDTH = 10, 14
IDS = [entry.category_id for entry in coco_stuff_classes()]


class Coco:
    """A COCO-Stuff of four training and two validation images."""

    def __init__(self, root):
        self.root = root
        self.images, self.output = root / "coco", root / "coco_stuff"
        self.stuff = self.images / "stuffthingmaps"
        random = np.random.default_rng(0)
        self.values = {"train2017": {}, "val2017": {}}
        for part, number in (("train2017", 4), ("val2017", 2)):
            (self.images / part).mkdir(parents=True)
            (self.stuff / part).mkdir(parents=True)
            for index in range(number):
                name = f"{17 * index + number:012d}"
                noise = random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
                Image.fromarray(noise).save(self.images / part / f"{name}.jpg")
                chosen = [*random.choice(IDS, 5, replace=False), 171 + index, 256]  # walls
                values = (random.choice(chosen, (HEIGHT, WIDTH)) - 1).astype(np.uint8)
                self.write(part, name, values)

    def write(self, part, name, values):
        self.values[part][name] = values
        Image.fromarray(values).save(self.mask(part, name))

    def mask(self, part, name):
        return self.stuff / part / f"{name}.png"

    def prepare(self, **kwargs):
        kwargs.setdefault("allow_other_counts", True)
        return prepare_coco_stuff(self.images, self.stuff, self.output, **kwargs)

    def read(self, part, prefix="coco_stuff"):
        return json.loads((self.output / f"{prefix}_{part}.json").read_text())


@pytest.fixture
def coco(tmp_path):
    return Coco(tmp_path)


def reference(values, naming):
    """Names by pixel, slowly; None for unlabelled ones."""
    names = {
        e.category_id: e.renamed if naming == "renamed" else e.name for e in coco_stuff_classes()
    }
    return [
        [None if value == 255 else names[value + 1] for value in row] for row in values.tolist()
    ]


@pytest.mark.parametrize(("naming", "workers"), [("renamed", 1), ("raw", 1), ("renamed", 2)])
def test_every_pixel_keeps_its_name(coco, naming, workers):
    summary = coco.prepare(naming=naming, workers=workers)
    prefix = "coco_stuff" if naming == "renamed" else "coco_stuff_raw"
    names = coco_stuff_names(naming)
    assert summary.class_names == names
    for part, values in coco.values.items():
        content = coco.read(part, prefix)
        assert [c["name"] for c in content["categories"]] == [*names]
        assert [c["id"] for c in content["categories"]] == [*range(1, len(names) + 1)]
        assert content["annotations"] == []
        assert [i["file_name"] for i in content["images"]] == [f"{n}.jpg" for n in sorted(values)]
        for image in content["images"]:
            expected = reference(values[image["file_name"][:-4]], naming)
            path = coco.output / image["label_map_file_name"]
            label_map = read_label_map(
                path, HEIGHT, WIDTH, num_classes=len(names), image_id=image["id"]
            )
            found = [
                [None if label == 255 else names[label - 1] for label in row]
                for row in label_map.tolist()
            ]
            assert found == expected
            assert not (label_map == 0).any()
            present = {name for row in expected for name in row if name is not None}
            assert {names[label - 1] for label in image["image_labels"]} == present
            assert image["id"] == int(image["file_name"][:-4])
        counts = summary.num_images_with[part]
        assert sum(counts) == sum(len(image["image_labels"]) for image in content["images"])
    assert summary.num_images == {"train2017": 4, "val2017": 2}
    assert summary.left_out == {}
    assert summary.num_reused == 0
    assert not [*coco.output.rglob("*.partial"), *coco.output.rglob("*.tmp")]


def test_tied_ids_have_one_class():
    by_id, names = coco_stuff_class_of_id(), coco_stuff_names()
    walls = [e.category_id for e in coco_stuff_classes() if e.name.startswith("wall-")]
    assert walls == [*range(171, 178)]
    assert {by_id[i] for i in walls} == {names.index("wall")}
    assert len(by_id) == 171
    assert sorted(set(by_id.values())) == [*range(160)]
    assert coco_stuff_class_of_id("raw") == {i: index for index, i in enumerate(IDS)}
    with pytest.raises(ValueError, match=r"no names 'other'\. Allowed: renamed, raw"):
        coco_stuff_names("other")


def test_the_tags_have_everything_but_the_masks(coco):
    coco.prepare()
    content, tags = coco.read("train2017"), coco.read("train2017_tags")
    assert "label_map" not in json.dumps(tags)
    for image in content["images"]:
        del image["label_map_file_name"]
    assert tags == content
    assert not (coco.output / "coco_stuff_val2017_tags.json").exists()


def test_the_reader_takes_the_files(coco):
    coco.prepare()
    for part, level in (("train2017", "mask"), ("train2017_tags", "image"), ("val2017", "mask")):
        root = coco.images / part.removesuffix("_tags")
        data = load_coco(coco.output / f"coco_stuff_{part}.json", root)
        assert data.class_names == coco_stuff_names()
        assert {record["supervision"] for record in data.records} == {level}


def test_an_interrupted_run_goes_on(coco, monkeypatch):
    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    write, calls = label_map_sets.write_label_map, []
    monkeypatch.setattr(label_map_sets, "write_label_map", interrupt)
    with pytest.raises(KeyboardInterrupt):
        coco.prepare()
    assert not list(coco.output.glob("*.json"))
    summary = coco.prepare()
    assert summary.num_reused == 3
    assert coco.prepare().num_reused == 6
    assert "Label maps of an earlier run: 3." in str(summary)


def test_changed_masks_and_damaged_label_maps_are_made_anew(coco):
    coco.prepare()
    before = coco.read("val2017")
    first = min(coco.values["val2017"])
    coco.write("val2017", first, np.zeros((HEIGHT, WIDTH), np.uint8))
    future = (coco.output / before["images"][0]["label_map_file_name"]).stat().st_mtime + 5
    os.utime(coco.mask("val2017", first), (future, future))
    (coco.output / before["images"][1]["label_map_file_name"]).write_bytes(b"cut")
    assert coco.prepare().num_reused == 4
    after = coco.read("val2017")
    assert after["images"][0]["image_labels"] == [1]
    assert after["images"][1] == before["images"][1]


def test_other_counts_are_an_error_that_says_what_is_there(coco, monkeypatch):
    with pytest.raises(ValueError, match="--allow-other-counts") as error:
        coco.prepare(allow_other_counts=False)
    assert "train2017 4 (known: 118287), val2017 2 (known: 5000)" in str(error.value)
    assert not coco.output.exists()
    assert COCO_STUFF_COUNTS == {"train2017": 118287, "val2017": 5000}
    monkeypatch.setattr(coco_stuff_module, "COCO_STUFF_COUNTS", {"train2017": 4, "val2017": 2})
    assert coco.prepare(allow_other_counts=False).num_images["train2017"] == 4


def remove_image(coco, name):
    (coco.images / "train2017" / f"{name}.jpg").unlink()


def break_image(coco, name):
    (coco.images / "train2017" / f"{name}.jpg").write_bytes(b"no image")


def break_mask(coco, name):
    coco.mask("train2017", name).write_bytes(b"no image")


def resize_mask(coco, name):
    coco.write("train2017", name, np.zeros((HEIGHT, WIDTH - 1), np.uint8))


def missing_id(coco, name):
    coco.write("train2017", name, np.full((HEIGHT, WIDTH), 11, np.uint8))


def too_large(coco, name):
    coco.write("train2017", name, np.full((HEIGHT, WIDTH), 182, np.uint8))


def colours(coco, name):
    coco.write("train2017", name, np.zeros((HEIGHT, WIDTH, 3), np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_image, "{name}.jpg: there is no such image, but it is listed"),
        (break_image, "{name}.jpg: cannot be read as image"),
        (break_mask, "{name}.png: cannot be read as mask"),
        (resize_mask, "{name}.png: the masks are 13 x 10 pixels, the image is 14 x 10"),
        (missing_id, "{name}.png: has the value 11 at row 0, column 0. Allowed: category ids"),
        (too_large, "{name}.png: has the value 182 at row 0"),
        (colours, "{name}.png: has shape (10, 14, 3) and dtype uint8. Allowed: (H, W) integers"),
    ],
)
def test_bad_files_of_an_image_are_named_or_left_out_counted(coco, damage, message):
    name = sorted(coco.values["train2017"])[1]
    damage(coco, name)
    with pytest.raises(ValueError, match="1 of 6 images cannot be used") as error:
        coco.prepare()
    assert message.format(name=name) in str(error.value)
    assert "--skip-bad" in str(error.value)
    assert not list(coco.output.glob("*.json"))
    summary = coco.prepare(strict=False)
    assert [Path(path).stem for path in summary.left_out] == [name]
    assert summary.num_images == {"train2017": 3, "val2017": 2}
    assert "Images left out: 1.\n" in str(summary)


def test_nothing_left_is_an_error(coco):
    for path in (coco.images / "val2017").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="No image is left for val2017, of 2 listed"):
        coco.prepare(strict=False)


def test_other_files_and_missing_folders_are_named(coco):
    (coco.stuff / "val2017" / "notes.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"notes\.png: is no name of an image of COCO"):
        coco.prepare()
    with pytest.raises(FileNotFoundError, match=r"nothing/train2017: .*datasets/README\.md"):
        prepare_coco_stuff(coco.images, coco.root / "nothing", coco.output)


def test_the_summary_names_classes_without_an_image(coco):
    summary = coco.prepare()
    text = str(summary)
    assert text.startswith("160 classes.\ntrain2017: 4 images, ")
    absent = summary.num_images_with["val2017"].count(0)
    assert f"classes without an image: {absent} (" in text.splitlines()[2]
    assert text.endswith("Images left out: none.")


def test_the_script_takes_what_is_there(coco):
    def run(*arguments):
        command = [
            sys.executable,
            SCRIPT,
            "coco_stuff",
            "--root",
            coco.root,
            "--workers",
            1,
            *arguments,
        ]
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
        return subprocess.run(
            [*map(str, command)], capture_output=True, text=True, check=False, env=environment
        )

    finished = run()
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in finished.stderr
    finished = run("--allow-other-counts", "--names", "raw")
    assert finished.returncode == 0, finished.stderr
    assert "171 classes." in finished.stdout
    assert f"Written to {coco.output}." in finished.stdout
