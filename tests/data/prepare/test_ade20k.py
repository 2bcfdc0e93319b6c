import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from maskx.data.coco import load_coco
from maskx.data.images import read_image
from maskx.data.label_maps import read_label_map
from maskx.data.large_vocabularies import ade20k_150_classes, ade20k_847_classes
from maskx.data.prepare import ade20k as ade20k_module
from maskx.data.prepare.ade20k import (
    ADE20K_150_COUNTS,
    ADE20K_FULL_COUNTS,
    prepare_ade20k_150,
    prepare_ade20k_full,
    read_object_indices,
)

DATASETS = Path(__file__).parents[3] / "datasets"
FOLDERS = {"train": "training", "val": "validation"}


class Challenge:
    """ADE20K with 150 classes: three training images and two of validation."""

    def __init__(self, root):
        self.root, self.output = root, root / "ade20k_150"
        self.folder = root / "ADEChallengeData2016"
        self.values = {"train": {}, "val": {}}
        random = np.random.default_rng(1)
        for part, number in (("train", 3), ("val", 2)):
            for kind in ("images", "annotations"):
                (self.folder / kind / FOLDERS[part]).mkdir(parents=True)
            for index in range(1, number + 1):
                name = f"ADE_{part}_{index:08d}"
                size = (8 + index, 11)
                noise = random.integers(0, 256, (*size, 3), np.uint8)
                Image.fromarray(noise).save(self.image(part, name))
                values = random.choice([0, 1, 150, *random.integers(1, 151, 3)], size)
                self.write(part, name, values.astype(np.uint8))

    def image(self, part, name):
        return self.folder / "images" / FOLDERS[part] / f"{name}.jpg"

    def write(self, part, name, values):
        self.values[part][name] = values
        Image.fromarray(values).save(self.folder / "annotations" / FOLDERS[part] / f"{name}.png")

    def prepare(self, **kwargs):
        kwargs.setdefault("allow_other_counts", True)
        return prepare_ade20k_150(self.folder, self.output, **kwargs)

    def read(self, part):
        return json.loads((self.output / f"ade20k_150_{part}.json").read_text())


class Full:
    """The full ADE20K: frames, training images, validation images; some pixels are nothing."""

    def __init__(self, root):
        self.root, self.output = root, root / "ade20k_full"
        self.folder = root / "ADE20K_2021_17_01"
        self.indices, self.images = {}, {}
        random = np.random.default_rng(2)
        values = [entry.value for entry in ade20k_847_classes()]
        unused = next(i for i in range(1, 3000) if i not in values)
        for number, (kind, folder, scene, size) in enumerate(
            (
                ("train", "training", "urban/street", (12, 30)),
                ("frame", "training", "home_or_hotel/attic", (40, 21)),
                ("train", "training", "nature/beach", (10, 10)),
                ("val", "validation", "urban/street", (25, 17)),
            ),
            start=1,
        ):
            path = self.folder / "images" / "ADE" / folder / scene / f"ADE_{kind}_{number:08d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            ramp = np.add.outer(3 * np.arange(size[0]), 2 * np.arange(size[1])).astype(np.uint8)
            Image.fromarray(np.stack([ramp] * 3, axis=2)).save(path)
            self.images[path.stem] = path
            self.write(path, random.choice([0, unused, *random.choice(values, 4), 312], size))

    def write(self, path, indices):
        colours = np.zeros((*indices.shape, 3), np.uint8)
        colours[..., 0], colours[..., 1] = indices // 256 * 10, indices % 256
        colours[..., 2] = 7  # instances
        Image.fromarray(colours).save(path.with_name(f"{path.stem}_seg.png"))
        self.indices[path.stem] = indices

    def prepare(self, **kwargs):
        kwargs.setdefault("allow_other_counts", True)
        return prepare_ade20k_full(self.folder, self.output, **kwargs)

    def read(self, part):
        return json.loads((self.output / f"ade20k_full_{part}.json").read_text())


@pytest.fixture
def challenge(tmp_path):
    return Challenge(tmp_path)


@pytest.fixture
def full(tmp_path):
    return Full(tmp_path)


def test_pixels_of_no_class_are_unknown_and_the_others_stay(challenge):
    summary = challenge.prepare()
    for part, values in challenge.values.items():
        content = challenge.read(part)
        names = [entry.name for entry in ade20k_150_classes()]
        assert [c["name"] for c in content["categories"]] == names
        for image, (name, expected) in zip(content["images"], sorted(values.items()), strict=True):
            assert image["file_name"] == f"{name}.jpg"
            assert image["id"] == int(name[-8:])
            path = challenge.output / image["label_map_file_name"]
            found = read_label_map(path, *expected.shape, num_classes=150, image_id=name)
            np.testing.assert_array_equal(found, np.where(expected == 0, 255, expected))
            assert image["image_labels"] == sorted(set(expected.ravel().tolist()) - {0})
    assert summary.num_images == {"train": 3, "val": 2}
    assert challenge.prepare().num_reused == 5


def test_the_reader_takes_the_files_of_150_classes(challenge):
    challenge.prepare()
    for part, level in (("train", "mask"), ("train_tags", "image"), ("val", "mask")):
        folder = FOLDERS[part.removesuffix("_tags")]
        data = load_coco(
            challenge.output / f"ade20k_150_{part}.json", challenge.folder / "images" / folder
        )
        assert {record["supervision"] for record in data.records} == {level}
        assert data.class_names[0] == "wall"
    assert "label_map" not in json.dumps(challenge.read("train_tags"))


def test_bad_files_of_the_challenge_are_named(challenge):
    challenge.write("train", "ADE_train_00000002", np.full((10, 11), 151, np.uint8))
    with pytest.raises(ValueError, match=r"1 of 5 images cannot be used") as error:
        challenge.prepare()
    assert "ADE_train_00000002.png: has the value 151 at row 0, column 0" in str(error.value)
    assert challenge.prepare(strict=False).num_images == {"train": 2, "val": 2}
    challenge.write("train", "other", np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"other\.png: is no name of an image of ADE20K"):
        challenge.prepare()


@pytest.mark.parametrize(
    ("prepare", "counts"),
    [(prepare_ade20k_150, ADE20K_150_COUNTS), (prepare_ade20k_full, ADE20K_FULL_COUNTS)],
)
def test_other_counts_and_missing_folders_are_errors(tmp_path, prepare, counts):
    kit = Challenge(tmp_path) if prepare is prepare_ade20k_150 else Full(tmp_path)
    with pytest.raises(ValueError, match="--allow-other-counts") as error:
        kit.prepare(allow_other_counts=False)
    assert f"images listed: train 3 (known: {counts['train']}), val " in str(error.value)
    assert "(known: 2000)" in str(error.value)
    assert not kit.output.exists()
    with pytest.raises(FileNotFoundError, match=r"no such folder of ADE20K\. datasets/README\.md"):
        prepare(tmp_path / "nothing", kit.output)


def test_object_indices_are_in_two_channels(full):
    for name, path in full.images.items():
        found = read_object_indices(path.with_name(f"{name}_seg.png"))
        np.testing.assert_array_equal(found, full.indices[name])


def test_every_pixel_of_the_full_data_set_keeps_its_object(full):
    summary = full.prepare(short_side=0)
    number_of = {entry.value: n for n, entry in enumerate(ade20k_847_classes(), start=1)}
    for part, names in (
        ("train", ["ADE_frame_00000002", "ADE_train_00000001", "ADE_train_00000003"]),
        ("val", ["ADE_val_00000004"]),
    ):
        content = full.read(part)
        assert [Path(image["file_name"]).stem for image in content["images"]] == names
        assert [image["id"] for image in content["images"]] == [*range(1, len(names) + 1)]
        for image, name in zip(content["images"], names, strict=True):
            rows = full.indices[name].tolist()
            expected = [[number_of.get(value, 65535) for value in row] for row in rows]
            path = full.output / image["label_map_file_name"]
            size = (image["height"], image["width"])
            found = read_label_map(path, *size, num_classes=847, image_id=name)
            assert found.tolist() == expected
            labels = {label for row in expected for label in row} - {65535}
            assert image["image_labels"] == sorted(labels)
            assert 2 in labels  # "building, edifice", whose index is 312
        data = load_coco(full.output / f"ade20k_full_{part}.json", full.folder / "images" / "ADE")
        assert len(data.class_names) == 847
    assert summary.num_images == {"train": 3, "val": 1}
    assert not (full.output / "images").exists()


def test_large_images_are_made_small_with_their_label_maps(full):
    full.prepare(short_side=12)
    whole = {
        name: read_object_indices(path.with_name(f"{name}_seg.png"))
        for name, path in full.images.items()
    }
    number_of = {entry.value: n for n, entry in enumerate(ade20k_847_classes(), start=1)}
    sizes = {}
    for part, folder in FOLDERS.items():
        for image in full.read(part)["images"]:
            name = Path(image["file_name"]).stem
            size = sizes[name] = (image["height"], image["width"])
            written = full.output / "images" / folder / image["file_name"]
            pixels = read_image(written, *size, name)
            original = cv2.imread(str(full.images[name]))
            if size == whole[name].shape:
                assert written.read_bytes() == full.images[name].read_bytes()
            else:
                small = cv2.resize(original, size[::-1], interpolation=cv2.INTER_LINEAR)
                assert np.abs(pixels.astype(int) - small).mean() < 2  # of JPEG
            path = full.output / image["label_map_file_name"]
            found = read_label_map(path, *size, num_classes=847, image_id=name)
            rows = np.arange(size[0]) * whole[name].shape[0] // size[0]
            columns = np.arange(size[1]) * whole[name].shape[1] // size[1]
            expected = [
                [number_of.get(v, 65535) for v in row]
                for row in whole[name][rows][:, columns].tolist()
            ]
            assert found.tolist() == expected
    assert sizes == {
        "ADE_train_00000001": (12, 30),
        "ADE_frame_00000002": (23, 12),
        "ADE_train_00000003": (10, 10),
        "ADE_val_00000004": (18, 12),
    }
    data = load_coco(full.output / "ade20k_full_train.json", full.output / "images" / "training")
    assert len(data.records) == 3


def test_an_earlier_run_counts_if_its_sizes_fit(full):
    assert full.prepare(short_side=12).num_reused == 0
    before = full.read("train")
    assert full.prepare(short_side=12).num_reused == 4
    assert full.read("train") == before
    assert full.prepare(short_side=15).num_reused == 2
    sizes = {image["file_name"]: image["height"] for image in full.read("train")["images"]}
    assert sizes["ADE_frame_00000002.jpg"] == round(40 / 21 * 15)
    image = cv2.imread(str(full.output / "images/training/ADE_frame_00000002.jpg"))
    assert image.shape[:2] == (29, 15)


def test_bad_files_of_the_full_data_set_are_named(full):
    path = full.images["ADE_train_00000003"]
    masks = path.with_name(f"{path.stem}_seg.png")
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(masks)
    with pytest.raises(ValueError, match=r"_seg\.png: has shape \(10, 10\) and dtype uint8\. Allo"):
        full.prepare()
    masks.unlink()
    with pytest.raises(ValueError, match=r"_seg\.png: there are no such masks"):
        full.prepare()
    assert full.prepare(strict=False).num_images == {"train": 2, "val": 1}
    with pytest.raises(ValueError, match=r"short_side must be at least 1 pixel.* got -1"):
        full.prepare(short_side=-1)
    copy = path.parents[1] / "copy" / path.name
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="1 images of a name that another has, such as ADE_train"):
        full.prepare()


def test_nothing_is_unpickled(full):
    (full.folder / "index_ade20k.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    full.prepare()
    assert "pickle" not in Path(ade20k_module.__file__).read_text()


def run_script(name, *arguments):
    command = [sys.executable, DATASETS / "prepare.py", name, "--workers", 1, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(DATASETS.parent)}
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("name", ["ade20k_150", "ade20k_full"])
def test_the_scripts_take_what_is_there(tmp_path, name):
    kit = Challenge(tmp_path) if name == "ade20k_150" else Full(tmp_path)
    finished = run_script(name, "--root", tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in finished.stderr
    options = [] if name == "ade20k_150" else ["--short-side", 0]
    finished = run_script(name, "--root", tmp_path, "--allow-other-counts", *options)
    assert finished.returncode == 0, finished.stderr
    assert f"Written to {kit.output}." in finished.stdout
    assert "train: 3 images" in finished.stdout
    assert not (kit.output / "images").exists()
