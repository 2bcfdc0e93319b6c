"""The quick start on photographs, on generated images."""

import json
from pathlib import Path

import pytest
import toy_system  # noqa: F401 - registers a system without settings for photographs
from photos import make_photos, make_weights

import maskx.systems
from maskx.cli.main import main
from maskx.engine.options import QuickstartOptions
from maskx.engine.photos import photo_options, plan_of_photos
from maskx.engine.quickstart import load_data, load_split_data
from maskx.engine.system import find_system

SYSTEMS = ("maskx", "class_patterns", "transfernet", "larvseg", "concept_mask")
SMALL = ("--image-size", "64", "--iterations", "2", "--batch-size", "2", "--device", "cpu")


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture
def backbone(tmp_path):
    """Words that name a pretrained backbone."""
    return ("--backbone", "resnet10t", "--weights", make_weights(tmp_path / "weights.pth"))


def train(*words, output):
    assert main(["train", *words, *SMALL, "--output", str(output)]) in (None, 0)
    return json.loads((output / "metrics.json").read_text())


def test_one_command_trains_on_photographs_and_says_first_what_it_does(
    photos, backbone, tmp_path, capsys
):
    output = tmp_path / "out"
    metrics = train("--photos", *photos, *backbone, output=output)
    printed = capsys.readouterr().out
    plan = "Photographs: 6 to train on, 2 held out of them to evaluate on, 4 categories; "
    assert printed.startswith(plan)
    assert "resnet10t with pretrained weights, frozen" in printed
    assert "2 steps of 2 photographs at 64 pixels" in printed
    assert "about 1 min on two CPU cores" in printed
    assert "There are fewer masks and fewer categories with masks here" in printed
    names = metrics["split"]
    assert (names["name"], len(names["A"]), len(names["B"])) == ("drawn", 2, 2)
    assert metrics["mean_iou"].keys() == {"all", "A", "B"}
    run = json.loads((output / "maskx" / "run.json").read_text())
    assert run["settings"]["frozen"] is True
    (about,) = output.glob("features/*/features.json")
    assert "resnet10t" in json.loads(about.read_text())["backbone"]
    assert maskx.open_run(output).class_names == tuple(names["A"] + names["B"])


@pytest.mark.parametrize("system", SYSTEMS[1:])
def test_every_other_system_trains_on_photographs_too(system, photos, backbone, tmp_path, capsys):
    val = make_photos(tmp_path / "val", count=2, with_masks=4, seed=1)
    words = ("--system", system, "--photos", *photos, "--val", *val, *backbone)
    metrics = train(*words, output=tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.startswith("Photographs: 8 to train on, 2 to evaluate on, 4 categories")
    assert f"What is done: {find_system(system).photos.title}" in printed
    assert "resnet10t with pretrained weights, frozen" in printed
    assert "2 steps of 2 photographs at 64 pixels" in printed
    assert metrics["system"] == system
    assert maskx.open_run(tmp_path / "out").class_names


def test_photographs_with_tags_alone_are_learned_from(tmp_path, backbone, capsys):
    path, folder = make_photos(tmp_path / "photos", with_masks=0)
    content = json.loads(Path(path).read_text())
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        image["image_labels"] = sorted({annotation["category_id"] for annotation in own})
    content["annotations"] = []
    Path(path).write_text(json.dumps(content))
    words = ("--system", "class_patterns", "--photos", path, folder, *backbone)
    metrics = train(*words, output=tmp_path / "out")
    assert metrics["mIoU"] == {"trained": None, "retrained": None}
    assert metrics["tag_mAP"] > 0


def test_kept_features_change_no_loss(photos, backbone, tmp_path):
    rows = []
    for name, words in (("kept", ()), ("again", ()), ("none", ("--feature-cache", "0"))):
        output = tmp_path / ("kept" if name == "again" else name)
        words += ("--overwrite",) if name == "again" else ()
        train("--photos", *photos, *backbone, *words, output=output)
        rows.append((output / "maskx" / "losses.csv").read_text())
    assert rows[0] == rows[1] == rows[2]
    assert not (tmp_path / "none" / "features").exists()


def test_val_is_evaluated_on_in_the_same_folder(photos, tmp_path, capsys):
    words = ("--photos", *photos, "--val", photos[0], "--backbone", "small")
    train(*words, output=tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.startswith("Photographs: 8 to train on, 8 to evaluate on")
    assert "Backbone small from random weights;" in printed


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_given_counts_before_the_settings(system):
    plain = photo_options(system, {"output": Path("out")})
    assert (plain.backbone, plain.pretrained, plain.frozen) == ("efficientnet_lite0", True, True)
    assert plain.held_out > 0
    assert plain.iterations > 0
    assert plain.masks_for == (None if system == "class_patterns" else "drawn")
    given = {"iterations": 7, "frozen": False, "coco_val": ("a", "b"), "output": Path("out")}
    options = photo_options(system, given)
    assert (options.iterations, options.frozen, options.held_out) == (7, False, 0.0)
    assert options.batch_size == plain.batch_size


def test_a_weight_of_zero_counts_before_the_settings():
    given = {"box_loss": 0.0, "output": Path("out")}
    assert photo_options("maskx", given).box_loss == 0.0


@pytest.mark.parametrize(
    ("system", "given"),
    [("concept_mask", {"concept_split": "a.json"}), ("transfernet", {"target_train": ("a", "b")})],
)
def test_what_says_itself_which_categories_have_masks_takes_the_place_of_drawn(system, given):
    assert photo_options(system, given | {"output": Path("out")}).masks_for is None


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_time_that_is_said_follows_steps_and_pixels(system, photos):
    given = {"coco_train": photos, "output": Path("out"), "iterations": 10**4}
    minutes = []
    for size in (128, 256):
        options = photo_options(system, given | {"image_size": size})
        (line,) = (line for line in plan_of_photos(system, options) if line.startswith("How long"))
        minutes.append(int(line.split()[3]))
    assert minutes[0] > 1
    assert minutes[1] == pytest.approx(4 * minutes[0], abs=4)


def test_more_data_than_was_measured_on_is_not_said_to_be_less(photos):
    given = {"coco_train": photos, "output": Path("out"), "backbone": "small"}
    options = photo_options("maskx", given)
    assert "expect less" in "\n".join(plan_of_photos("maskx", options))


def test_a_system_without_settings_for_photographs_is_named():
    with pytest.raises(ValueError, match=r"'colours' has no settings for photographs.*'maskx'"):
        photo_options("colours", {"output": Path("out")})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--val", "a.json"), "--val is of --photos. Give --coco-val with --coco-train"),
        (("--photos", "a", "b", "--coco-train", "a", "b"), "--photos has the place of --coco-tr"),
        (("--photos", "a", "b", "--val", "a", "b", "c"), "--val takes DATA, or DATA and IMAGES"),
        (("--frozen",), "starts from random weights. Let it start from others: --pretrained"),
        (("--feature-cache", "-1"), r"feature_cache is -1\.0\. Allowed: 0, to keep no"),
        (("--light", "--system", "larvseg"), "light has no meaning for the system larvseg"),
    ],
)
def test_words_that_contradict_are_named(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["train", *words, "--output", str(tmp_path / "out")])


def test_a_file_without_any_mask_is_refused_with_a_remedy(photos, tmp_path):
    content = json.loads(Path(photos[0]).read_text())
    for annotation in content["annotations"]:
        annotation.pop("segmentation", None)
    Path(photos[0]).write_text(json.dumps(content))
    options = QuickstartOptions(tmp_path, coco_train=photos, masks_for="drawn", held_out=0.5)
    with pytest.raises(ValueError, match=r"None of the \d+ annotations .* --teacher grabcut"):
        load_split_data(options)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 2), (0.99, 7)])
def test_images_held_out_are_not_trained_on(photos, tmp_path, share, count):
    options = QuickstartOptions(tmp_path, coco_train=photos, held_out=share)
    train_data, val_data = load_data(options)
    ids = [{record["image_id"] for record in data.records} for data in (train_data, val_data)]
    assert len(ids[1]) == count
    assert len(ids[0] | ids[1]) == 8
    assert not ids[0] & ids[1]
    again = load_data(options)[1]
    assert [r["image_id"] for r in again.records] == [r["image_id"] for r in val_data.records]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 1.0}, r"held_out is 1\.0\. Allowed: a share"),
        ({"held_out": 0.5, "coco_val": ("a", "b")}, "where there is no coco_val"),
    ],
)
def test_a_share_that_cannot_be_held_out_is_refused(photos, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(QuickstartOptions(tmp_path, coco_train=photos, **options))
