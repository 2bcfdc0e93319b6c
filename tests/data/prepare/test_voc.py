import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskx.data.coco import load_coco
from maskx.data.label_maps import read_label_map
from maskx.data.prepare import label_map_sets
from maskx.data.prepare import voc as voc_module
from maskx.data.prepare.voc import (
    SBD_IMAGES,
    VOC_COUNTS,
    choose_trainaug,
    prepare_voc,
    read_sbd_mask,
)
from maskx.data.vocabularies import (
    COCO_THING_CLASSES,
    VOC_CLASSES,
    VOC_CLASSES_IN_COCO,
    VOC_TO_COCO,
)

SCRIPT = Path(__file__).parents[3] / "datasets" / "prepare.py"
HEIGHT, WIDTH = 12, 16


@dataclass
class Devkit:
    """A VOC and an SBD of a few images, and what was drawn for them."""

    root: Path
    train: list = field(default_factory=list)
    val: list = field(default_factory=list)
    sbd: list = field(default_factory=list)
    own_masks: dict = field(default_factory=dict)
    sbd_masks: dict = field(default_factory=dict)

    @property
    def voc(self):
        return self.root / "VOCdevkit" / "VOC2012"

    @property
    def sbd_mat(self):
        return self.root / "benchmark_RELEASE" / "dataset"

    @property
    def sbd_png(self):
        return self.voc / "SegmentationClassAug"

    @property
    def output(self):
        return self.root / "voc2012"

    def prepare(self, form="png", **kwargs):
        kwargs.setdefault("allow_other_counts", True)
        sbd = self.sbd_png if form == "png" else self.sbd_mat
        return prepare_voc(self.voc, sbd, self.output, **kwargs)

    def read(self, part):
        return json.loads((self.output / f"voc2012_{part}.json").read_text())


def draw_mask(random, void):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for label in random.choice(np.arange(1, 21), random.integers(0, 4), replace=False):
        y, x = random.integers(0, HEIGHT - 3), random.integers(0, WIDTH - 3)
        if void:
            mask[y : y + 4, x : x + 4] = 255
        mask[y + 1 : y + 3, x + 1 : x + 3] = label
    return mask


def write_png(path, mask, palette=True):
    image = Image.fromarray(mask)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def write_mat(path, mask):
    """Write the fields that SBD has: a cell array of sparse matrices and the mask."""
    from scipy.io import savemat
    from scipy.sparse import csc_matrix

    boundaries = np.empty((20, 1), object)
    boundaries[:, 0] = [csc_matrix((HEIGHT, WIDTH)) for _ in range(20)]
    struct = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": 3}
    savemat(path, {"GTcls": struct}, do_compression=True)


@pytest.fixture
def devkit(tmp_path):
    """9 images of VOC (5 train, 4 val), 8 of SBD, of which 2 are in train and 2 in val."""
    kit = Devkit(tmp_path)
    random = np.random.default_rng(0)
    folders = ("JPEGImages", "SegmentationClass", "SegmentationClassAug")
    for folder in (*(kit.voc / name for name in folders), kit.sbd_mat / "cls"):
        folder.mkdir(parents=True)
    (kit.voc / "ImageSets/Segmentation").mkdir(parents=True)
    names = [f"{2007 + i % 5}_{i:06d}" for i in random.permutation(13)]
    kit.train, kit.val = names[:5], names[5:9]
    kit.sbd = [*names[9:], *names[3:7]]
    for name in names:
        noise = random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(noise).save(kit.voc / f"JPEGImages/{name}.jpg")
    for name in kit.train + kit.val:
        kit.own_masks[name] = draw_mask(random, void=True)
        write_png(kit.voc / f"SegmentationClass/{name}.png", kit.own_masks[name])
    for name in kit.sbd:
        kit.sbd_masks[name] = draw_mask(random, void=False)
        write_png(kit.sbd_png / f"{name}.png", kit.sbd_masks[name], palette=False)
        write_mat(kit.sbd_mat / f"cls/{name}.mat", kit.sbd_masks[name])
    write_list(kit.voc / "ImageSets/Segmentation/train.txt", kit.train)
    write_list(kit.voc / "ImageSets/Segmentation/val.txt", kit.val)
    write_list(kit.sbd_mat / "train.txt", kit.sbd[:6])
    write_list(kit.sbd_mat / "val.txt", kit.sbd[6:])
    return kit


def write_list(path, names):
    path.write_text("".join(f"{name} \r\n" for name in names))


def reference(kit):
    """Images of the files by part, slowly: name, mask, classes."""
    parts = {"trainaug": [], "val": []}
    for name in sorted({*kit.train, *kit.val, *kit.sbd}):
        part = "val" if name in kit.val else "trainaug"
        is_own = name in kit.train or name in kit.val
        mask = kit.own_masks[name] if is_own else kit.sbd_masks[name]
        classes = [c for c in VOC_CLASSES if (mask == VOC_CLASSES.index(c) + 1).any()]
        parts[part].append((name, mask, classes))
    return parts


@pytest.mark.parametrize("form", ["png", "mat"])
def test_the_files_are_those_of_the_description(devkit, form):
    summary = devkit.prepare(form)
    expected = reference(devkit)
    for part, images in expected.items():
        content = devkit.read(part)
        assert content["annotations"] == []
        assert [(c["id"], c["name"]) for c in content["categories"]] == [
            *enumerate(VOC_CLASSES, start=1)
        ]
        assert [i["file_name"] for i in content["images"]] == [f"{n}.jpg" for n, _, _ in images]
        for image, (name, mask, classes) in zip(content["images"], images, strict=True):
            assert image["id"] == int(name[:4] + name[5:])
            assert (image["height"], image["width"]) == (HEIGHT, WIDTH)
            assert [VOC_CLASSES[i - 1] for i in image["image_labels"]] == classes
            path = devkit.output / image["label_map_file_name"]
            written = read_label_map(path, HEIGHT, WIDTH, num_classes=20, image_id=name)
            np.testing.assert_array_equal(written, mask)
        written = summary.written
        assert written.num_images[part] == len(images)
        assert written.num_unlabeled[part] == sum(not classes for _, _, classes in images)
        for name, count in zip(VOC_CLASSES, written.num_images_with[part], strict=True):
            assert count == sum(name in classes for _, _, classes in images)
    assert summary.listed == {"train": 5, "val": 4, "trainaug": 9, "sbd": 8}
    assert summary.num_sbd_masks == 4
    assert summary.written.left_out == {}
    assert sum(summary.written.num_unlabeled.values()) > 0
    assert (devkit.output / "label_maps").is_dir() == (form == "mat")
    assert not list(devkit.output.rglob("*.partial")) + list(devkit.output.rglob("*.tmp"))


def test_the_tags_have_everything_but_the_masks(devkit):
    devkit.prepare()
    content, tags = devkit.read("trainaug"), devkit.read("trainaug_tags")
    assert "label_map" not in json.dumps(tags)
    for image in content["images"]:
        del image["label_map_file_name"]
    assert tags == content


def test_the_reader_takes_the_files(devkit):
    devkit.prepare("mat")
    expected = reference(devkit)
    for part, level in (("trainaug", "mask"), ("trainaug_tags", "image"), ("val", "mask")):
        data = load_coco(devkit.output / f"voc2012_{part}.json", devkit.voc / "JPEGImages")
        assert data.class_names == VOC_CLASSES
        assert {record["supervision"] for record in data.records} == {level}
        labels = [[VOC_CLASSES[i] for i in record["image_labels"]] for record in data.records]
        assert labels == [classes for _, _, classes in expected[part.removesuffix("_tags")]]


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights there")
def test_an_output_behind_a_symbolic_link_finds_its_masks(devkit):
    (devkit.root / "deep" / "er").mkdir(parents=True)
    devkit.output.symlink_to(devkit.root / "deep" / "er")
    devkit.prepare()
    data = load_coco(devkit.output / "voc2012_val.json", devkit.voc / "JPEGImages")
    assert len(data.records) == 4


def test_trainaug_is_what_is_not_in_val():
    assert choose_trainaug(["c", "a"], ["b", "d"], ["d", "a", "e"]) == ["a", "c", "e"]


def test_the_known_numbers_fit_together():
    """1464 + 9118 = 10582; SBD's 11355 include images of train and of val."""
    train = [f"t{i}" for i in range(VOC_COUNTS["train"])]
    val = [f"v{i}" for i in range(VOC_COUNTS["val"])]
    sbd = [f"s{i}" for i in range(9118)] + train[:1133] + val[:1104]
    assert len(sbd) == SBD_IMAGES
    assert len(choose_trainaug(train, val, sbd)) == VOC_COUNTS["trainaug"]


def test_names_agree_with_coco():
    assert len(set(VOC_CLASSES)) == 20
    assert sorted(VOC_CLASSES) == [*VOC_CLASSES]
    assert tuple(VOC_TO_COCO) == VOC_CLASSES
    assert set(VOC_TO_COCO.values()) == set(VOC_CLASSES_IN_COCO) <= set(COCO_THING_CLASSES)
    assert sum(name != coco for name, coco in VOC_TO_COCO.items()) == 6
    assert VOC_TO_COCO["tvmonitor"] == "tv"
    assert VOC_CLASSES.index("person") + 1 == 15  # the value in VOC's masks


def test_other_counts_are_an_error_that_says_what_is_there(devkit):
    with pytest.raises(ValueError, match="--allow-other-counts") as error:
        devkit.prepare(allow_other_counts=False)
    message = str(error.value)
    assert "train 5 (known: 1464), val 4 (known: 1449), trainaug 9 (known: 10582)" in message
    assert "the 4 (known: 9118) of 8 masks given as SBD's (11355 as published)" in message
    assert not devkit.output.exists()


def test_the_known_counts_pass(devkit, monkeypatch):
    monkeypatch.setattr(voc_module, "VOC_COUNTS", {"train": 5, "val": 4, "trainaug": 9})
    summary = devkit.prepare(allow_other_counts=False)
    assert summary.written.num_images["trainaug"] == 9


def test_the_summary_is_readable(devkit):
    text = str(devkit.prepare())
    assert "train 5 (known: 1464)" in text
    assert "Masks of trainaug: 5 of VOC, 4 of SBD." in text
    assert "all images             9         4" in text
    assert text.endswith("Images left out: none.")


def test_masks_of_voc_among_those_of_sbd_change_nothing(devkit):
    """As SegmentationClassAug is passed around: 10582 masks of trainaug and 1449 of val."""
    before = devkit.prepare()
    files = {part: devkit.read(part) for part in ("trainaug", "trainaug_tags", "val")}
    for name in set(devkit.train + devkit.val) - set(devkit.sbd):
        write_png(devkit.sbd_png / f"{name}.png", np.ones((HEIGHT, WIDTH), np.uint8))
    after = devkit.prepare()
    assert {part: devkit.read(part) for part in files} == files
    assert after == replace(before, listed=before.listed | {"sbd": 13})


def remove_image(kit, name):
    (kit.voc / f"JPEGImages/{name}.jpg").unlink()


def break_image(kit, name):
    (kit.voc / f"JPEGImages/{name}.jpg").write_bytes(b"no image")


def remove_mask(kit, name):
    (kit.voc / f"SegmentationClass/{name}.png").unlink()


def resize_mask(kit, name):
    write_png(kit.voc / f"SegmentationClass/{name}.png", kit.own_masks[name][:-1])


def wrong_class(kit, name):
    write_png(kit.voc / f"SegmentationClass/{name}.png", kit.own_masks[name] * 0 + 21)


def colours(kit, name):
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(rgb).save(kit.voc / f"SegmentationClass/{name}.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_image, "{name}.jpg: there is no such image, but it is listed"),
        (break_image, "{name}.jpg: cannot be read as image"),
        (remove_mask, "{name}.png' (image '{name}'): there is no such file"),
        (resize_mask, "{name}.png' (image '{name}') is 16 x 11 pixels, its image is 16 x 12"),
        (wrong_class, "{name}.png' (image '{name}') has the value 21"),
        (colours, "{name}.png' (image '{name}') is a colour image"),
    ],
)
def test_bad_files_of_an_image_are_named_or_left_out_counted(devkit, damage, message):
    name = devkit.train[0]
    damage(devkit, name)
    with pytest.raises(ValueError, match="1 of 13 images cannot be used") as error:
        devkit.prepare()
    assert message.format(name=name) in str(error.value)
    assert "--skip-bad" in str(error.value)
    assert not devkit.output.exists()

    summary = devkit.prepare(strict=False)
    assert [Path(path).stem for path in summary.written.left_out] == [name]
    assert summary.written.num_images["trainaug"] == 8
    assert f"{name}.jpg" not in [image["file_name"] for image in devkit.read("trainaug")["images"]]
    text = str(summary)
    assert "Images left out: 1.\n" in text
    assert message.format(name=name) in text


def test_only_the_first_bad_images_are_quoted(devkit):
    for name in devkit.train + devkit.val[:2]:
        remove_image(devkit, name)
    with pytest.raises(ValueError, match="7 of 13 images") as error:
        devkit.prepare()
    assert str(error.value).endswith("and 2 more")


def test_nothing_left_is_an_error(devkit):
    for name in devkit.val:
        remove_mask(devkit, name)
    with pytest.raises(ValueError, match="No image is left for val, of 4 listed"):
        devkit.prepare(strict=False)
    assert not devkit.output.exists()


def missing_mat(kit, path):
    path.unlink()


def text_for_mat(kit, path):
    path.write_text("no mat")


def other_struct(kit, path):
    from scipy.io import savemat

    savemat(path, {"GTinst": {"Segmentation": np.zeros((HEIGHT, WIDTH), np.uint8)}})


def fractions(kit, path):
    write_mat(path, np.full((HEIGHT, WIDTH), 0.5))


def small_mat(kit, path):
    write_mat(path, np.zeros((HEIGHT, WIDTH - 1), np.uint8))


def wrong_mat_class(kit, path):
    write_mat(path, np.full((HEIGHT, WIDTH), 21, np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_mat, "there is no such mask, but its image is listed"),
        (text_for_mat, "cannot be read as mask of SBD"),
        (other_struct, "cannot be read as mask of SBD (KeyError"),
        (fractions, "has shape (12, 16) and dtype float64. Allowed: (H, W) integers"),
        (small_mat, "the masks are 15 x 12 pixels, the image is 16 x 12"),
        (wrong_mat_class, "has the value 21"),
    ],
)
def test_bad_masks_of_sbd_are_named(devkit, damage, message):
    path = devkit.sbd_mat / "cls" / f"{devkit.sbd[0]}.mat"
    damage(devkit, path)
    with pytest.raises(ValueError, match="1 of 13 images") as error:
        devkit.prepare("mat")
    assert f"{path}: " in str(error.value)
    assert message in str(error.value)
    assert not list(devkit.output.glob("*.json"))


def test_masks_of_sbd_are_integers(devkit):
    path = devkit.sbd_mat / "cls" / f"{devkit.sbd[0]}.mat"
    np.testing.assert_array_equal(read_sbd_mask(path), devkit.sbd_masks[devkit.sbd[0]])
    fractions(devkit, path)
    with pytest.raises(ValueError, match=r"GTcls\.Segmentation has shape \(12, 16\) and dtype fl"):
        read_sbd_mask(path)


def test_an_interrupted_run_leaves_the_files_of_the_last(devkit, monkeypatch):
    devkit.prepare("mat")
    before = {path: path.read_bytes() for path in devkit.output.rglob("*") if path.is_file()}

    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return read_label_map(*args, **kwargs)

    calls = []
    monkeypatch.setattr(label_map_sets, "read_label_map", interrupt)
    remove_image(devkit, sorted(devkit.train)[-1])
    with pytest.raises(KeyboardInterrupt):
        devkit.prepare("mat", strict=False)
    after = {path: path.read_bytes() for path in devkit.output.rglob("*") if path.is_file()}
    assert after == before


def test_missing_folders_and_lists_are_named(devkit):
    with pytest.raises(FileNotFoundError, match=r"nothing/JPEGImages: .*datasets/README\.md"):
        prepare_voc(devkit.root / "nothing", devkit.sbd_png, devkit.output)
    with pytest.raises(FileNotFoundError, match=r"neither a folder cls .* nor PNG files"):
        prepare_voc(devkit.voc, devkit.root, devkit.output)
    (devkit.sbd_mat / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset/val\.txt: there is no such list"):
        devkit.prepare("mat")


def test_bad_lists_are_named(devkit):
    path = devkit.voc / "ImageSets/Segmentation/train.txt"
    write_list(path, [*devkit.train, "/JPEGImages/2007_000032.jpg /Seg/2007_000032.png"])
    with pytest.raises(ValueError, match=r"train\.txt: '/JPEGImages/.* is no name of an image"):
        devkit.prepare()
    write_list(path, [*devkit.train, devkit.train[2]])
    with pytest.raises(ValueError, match=rf"train\.txt: repeats {devkit.train[2]}"):
        devkit.prepare()
    write_list(path, [*devkit.train, devkit.val[0]])
    with pytest.raises(ValueError, match=f"1 images are in train.txt and .* {devkit.val[0]}"):
        devkit.prepare()


def test_a_file_that_is_no_mask_among_the_masks_is_named(devkit):
    write_png(devkit.sbd_png / "palette.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="SegmentationClassAug: 'palette' is no name of an image"):
        devkit.prepare()


def test_the_script_takes_what_is_there(devkit, monkeypatch, capsys):
    def command(*arguments):
        return [str(SCRIPT), "voc", "--root", str(devkit.root), "--workers", "1", *arguments]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", command(*arguments))
        runpy.run_path(str(SCRIPT), run_name="__main__")

    finished = subprocess.run(
        [sys.executable, *command()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in finished.stderr

    run("--allow-other-counts")
    assert f"Written to {devkit.output}." in capsys.readouterr().out
    assert not (devkit.output / "label_maps").exists()  # SegmentationClassAug was found

    devkit.sbd_png.rename(devkit.root / "elsewhere")
    run("--allow-other-counts")
    assert len(list((devkit.output / "label_maps").iterdir())) == 4
