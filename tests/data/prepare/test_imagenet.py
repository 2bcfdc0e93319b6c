import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskx.data.coco import load_coco
from maskx.data.large_vocabularies import (
    AdeClass,
    ade20k_150_classes,
    ade20k_847_classes,
    imagenet_synsets,
)
from maskx.data.prepare import imagenet as imagenet_module
from maskx.data.prepare.imagenet import (
    HOMONYMS,
    choose_synsets,
    match_synsets,
    prepare_imagenet21k,
    synset_names,
)

SCRIPT = Path(__file__).parents[3] / "datasets" / "prepare.py"
# crane (bird), crane (machine), sky, one of the walls, tench
SYNSETS = {"n02012849": 2, "n03126707": 1, "n09436708": 3, "n04547592": 2, "n01440764": 1}


class Folders:
    """A part of ImageNet: five synsets with few images."""

    def __init__(self, root):
        self.root, self.images = root, root / "imagenet21k"
        self.output = root / "imagenet21k_labels"
        self.sizes = {}
        random = np.random.default_rng(0)
        for synset, number in SYNSETS.items():
            (self.images / synset).mkdir(parents=True)
            for index in range(number):
                height, width = (int(side) for side in random.integers(4, 20, 2))
                name = f"{synset}/{synset}_{10 - index}.JPEG"
                image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
                image.save(self.images / name, format="JPEG")
                self.sizes[name] = (height, width)
        (self.images / "n01440764" / "notes.txt").write_text("no image")
        (self.images / "synsets.txt").write_text("no folder")

    def prepare(self, **kwargs):
        kwargs.setdefault("classes", "all")
        return prepare_imagenet21k(self.images, self.output, **kwargs)

    def read(self, name="all"):
        return json.loads((self.output / f"imagenet_{name}_tags.json").read_text())


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_image_has_its_synset(folders, workers):
    summary = folders.prepare(workers=workers)
    content = folders.read()
    assert content["annotations"] == []
    assert [(c["synset"], c["name"]) for c in content["categories"]] == [
        ("n01440764", "tench"),
        ("n02012849", "crane (n02012849)"),
        ("n03126707", "crane"),
        ("n04547592", "wall (n04547592)"),
        ("n09436708", "sky"),
    ]
    synset_of = {category["id"]: category["synset"] for category in content["categories"]}
    assert [image["file_name"] for image in content["images"]] == sorted(folders.sizes)
    assert [image["id"] for image in content["images"]] == [*range(1, 10)]
    for image in content["images"]:
        assert (image["height"], image["width"]) == folders.sizes[image["file_name"]]
        (label,) = image["image_labels"]
        assert synset_of[label] == image["file_name"].split("/")[0]
    assert sum(summary.num_images.values()) == 9
    assert summary.num_images["sky"] == 3
    data = load_coco(folders.output / "imagenet_all_tags.json", folders.images)
    assert {record["supervision"] for record in data.records} == {"image"}


def test_the_classes_of_ade20k_have_its_names_and_the_synset_with_images(folders):
    # WordNet has four synsets "wall" of one name; of n04547592 there are images.
    summary = folders.prepare(classes="ade150", allow_other_counts=True)
    content = folders.read("ade150")
    wall = next(c for c in content["categories"] if c["name"] == "wall")
    assert wall["synset"] == "n04547592"
    assert {i["file_name"][:9] for i in content["images"]} == {"n04547592", "n09436708"}
    assert summary.num_images["wall"] == 2
    assert summary.num_images["person"] == 0
    assert summary.missing["person"] == "n00007846"
    assert "painting" not in summary.num_images
    assert "arcade machine" in summary.without_synset
    text = str(summary)
    assert text.startswith("2 classes with 5 images (published: 124 classes, 174000 images).")
    assert f"without a synset: {len(summary.without_synset)} (" in text
    assert f"Synsets without images: {len(summary.missing)} (" in text


def test_synsets_without_images_are_an_error(folders):
    with pytest.raises(ValueError, match=r"of 126 synsets have no images, such as .*--allow-other"):
        folders.prepare(classes="ade150")
    assert not folders.output.exists()


def test_the_intersections_have_126_and_576_classes():
    """124 and 585 in the paper, which does not say how it matched them."""
    assert len(match_synsets(ade20k_150_classes())) == 126
    assert len(match_synsets(ade20k_847_classes())) == 576


def test_synsets_that_share_only_the_name_are_no_match():
    found = {name: s for s, name in match_synsets(ade20k_847_classes()).items()}
    assert found["crane"] == "n03126707"  # the machine, not the bird
    assert found["pen"] == "n03906997"  # to write with, not the swan
    small = {name: s for s, name in match_synsets(ade20k_150_classes()).items()}
    assert small["ball"] == "n02778669"  # not the game
    # The only synset of the name is a flounder, a horse, a hole in the ground.
    assert not {"windowpane", "poster", "sink"} & small.keys()


def test_names_do_not_depend_on_what_part_of_imagenet_is_there():
    everything = synset_names(list(imagenet_synsets()))
    # The bird, and the flounder: "windowpane" is a class of COCO-Stuff.
    for synset, name in (("n02012849", "crane"), ("n02662825", "windowpane")):
        assert synset_names([synset]) == {synset: f"{name} ({synset})"}
        assert everything[synset] == f"{name} ({synset})"


def best_synsets(entry, synsets):
    """The candidates that share most names, slowly."""
    shares = {}
    for synset, names in synsets.items():
        names, own = {n.lower() for n in names}, {n.lower() for n in entry.synonyms} | {entry.name}
        if entry.synonyms[0] in names or entry.name in names:
            shares[synset] = len(names & own) / len(names | own)
    return {s for s, share in shares.items() if share == max(shares.values())}


def test_matches_share_most_names():
    synsets = imagenet_synsets()
    class_of = match_synsets(ade20k_150_classes())
    found = {name: synset for synset, name in class_of.items()}
    for entry in ade20k_150_classes()[::10]:
        best = best_synsets(entry, synsets)
        if entry.name in found:
            assert found[entry.name] in best
        else:
            assert best <= set(class_of) | set(HOMONYMS)
    assert found["car"] == "n02958343"
    assert found["sofa"] == "n04256520"


def test_a_synset_is_of_the_class_that_shares_most():
    classes = [AdeClass(1, "bag", ("bag",)), AdeClass(2, "purse", ("bag", "purse"))]
    synsets = {"n00000001": ("bag", "purse")}
    assert match_synsets(classes, synsets=synsets) == {"n00000001": "purse"}
    synsets |= {"n00000002": ("bag",), "n00000003": ("Bag",)}
    assert match_synsets(classes, synsets=synsets) == {"n00000002": "bag", "n00000001": "purse"}
    counts = {"n00000002": 1, "n00000003": 5}
    assert match_synsets(classes, counts, synsets) == {"n00000003": "bag", "n00000001": "purse"}
    assert match_synsets([AdeClass(1, "sky", ("sky",))], synsets=synsets) == {}


def test_names_of_all_synsets_are_unique():
    names = synset_names(list(imagenet_synsets()))
    assert len(set(names.values())) == len(names) == 21844
    assert names["n02012849"] == "crane (n02012849)"
    with pytest.raises(ValueError, match="1 of 1 synsets are not known, such as 'n00000000'"):
        synset_names(["n00000000"])


def test_a_file_names_synsets(folders):
    path = folders.root / "mine.json"
    path.write_text(json.dumps({"n09436708": "heaven", "n01440764": "fish"}))
    summary = folders.prepare(classes=path)
    assert summary.num_images == {"heaven": 3, "fish": 1}
    assert [c["name"] for c in folders.read("mine")["categories"]] == ["heaven", "fish"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "must be a JSON object"),
        ('{"sky": "n09436708"}', "has the entry 'sky': 'n09436708'. Allowed: a synset"),
        ('{"n09436708": 3}', "has the entry 'n09436708': 3"),
        (
            '{"n09436708": "sky", "n01440764": "sky"}',
            "has 1 class names of several synsets, such as 'sky'",
        ),
        (
            '{"n09436708": "sky", "n09436708": "heaven"}',
            "repeats the key 'n09436708'",
        ),
    ],
)
def test_bad_files_of_synsets_are_named(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json: ") as error:
        choose_synsets(path, {})
    assert message in str(error.value)


def test_an_unknown_list_is_an_error(folders):
    with pytest.raises(
        FileNotFoundError, match=r"'ade160' is neither .* all, ade150, ade847, or a"
    ):
        folders.prepare(classes="ade160")


def test_bad_images_are_named_or_left_out_counted(folders):
    path = folders.images / "n09436708" / "n09436708_9.JPEG"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 9 images cannot be used.*--skip-bad") as error:
        folders.prepare()
    assert f"{path}: cannot be read as image" in str(error.value)
    assert not list(folders.output.glob("*.json"))
    summary = folders.prepare(strict=False)
    assert list(summary.left_out) == [str(path)]
    assert summary.num_images["sky"] == 2
    assert summary.num_reused == 4  # all but the folder with the bad image
    assert "Images left out: 1.\n" in str(summary)


def test_a_run_goes_on_with_the_folders_that_are_left(folders, monkeypatch):
    def interrupt(path):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return image_size(path)

    image_size, calls = imagenet_module.image_size, []
    monkeypatch.setattr(imagenet_module, "image_size", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folders.prepare()
    assert not list(folders.output.glob("*.json"))
    assert folders.prepare().num_reused == 3
    assert folders.prepare().num_reused == 5
    added = folders.images / "n01440764" / "n01440764_99.JPEG"
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(added)
    (folders.output / "sizes" / "n09436708.json").write_text("{")
    summary = folders.prepare()
    assert summary.num_reused == 3
    assert summary.num_images["tench"] == 2
    assert summary.num_images["sky"] == 3


def test_the_number_of_images_can_be_limited(folders):
    summary = folders.prepare(max_images_per_class=1)
    assert set(summary.num_images.values()) == {1}
    assert [i["file_name"] for i in folders.read()["images"]][-1] == "n09436708/n09436708_10.JPEG"
    with pytest.raises(ValueError, match="max_images_per_class must be at least 1, got 0"):
        folders.prepare(max_images_per_class=0)


def test_missing_folders_are_named(folders):
    with pytest.raises(
        FileNotFoundError, match=r"nothing: there is no such folder of images\. data"
    ):
        prepare_imagenet21k(folders.root / "nothing", folders.output)
    with pytest.raises(FileNotFoundError, match="has no folder of a synset, such as n01440764"):
        prepare_imagenet21k(folders.images / "n01440764", folders.output)


def test_the_script_takes_what_is_there(folders):
    def run(*arguments):
        command = [
            sys.executable,
            SCRIPT,
            "imagenet21k",
            "--root",
            folders.root,
            "--workers",
            1,
            *arguments,
        ]
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
        return subprocess.run(
            [*map(str, command)], capture_output=True, text=True, check=False, env=environment
        )

    finished = run("--classes", "ade847")
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in finished.stderr
    finished = run("--classes", "all", "--max-images-per-class", 2)
    assert finished.returncode == 0, finished.stderr
    assert "5 classes with 8 images (published: 21841 classes, 14197122 images)." in finished.stdout
    assert f"Written to {folders.output}." in finished.stdout
