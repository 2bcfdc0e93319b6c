import json
import runpy
import sys
from pathlib import Path

import pytest

import maskx.systems  # noqa: F401 - registers them
from maskx.data.scenes.generator import generate_scenes
from maskx.engine import quickstart
from maskx.engine.options import QuickstartOptions
from maskx.engine.quickstart import write_metrics
from maskx.engine.system import find_system
from maskx.systems.maskx_rcnn.pipeline import quickstart_maskx

TOOL = Path(__file__).parents[2] / "tools" / "quickstart.py"

OURS = ("maskx", "class_patterns", "transfernet", "larvseg", "concept_mask")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "TRAIN_SCENES", 6)
    monkeypatch.setattr(quickstart, "VAL_SCENES", 4)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
    monkeypatch.setattr(quickstart, "SPARSE_SCENES", 6)
    return {"output": tmp_path / "out", "iterations": 2, "batch_size": 2}


def make_coco(folder, count=3, **changes):
    json_file = generate_scenes(folder, count=count, size=64, num_categories=4, seed=1)
    if changes:
        content = json.loads(json_file.read_text()) | changes
        json_file.write_text(json.dumps(content))
    return str(json_file), str(folder)


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Run the script in this process; returns what it printed and how it ended."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        ended = None
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as error:
            ended = error.code
        return capsys.readouterr().out, ended

    return run


def test_the_command_on_coco_files(tmp_path, run_tool):
    names = tmp_path / "with_masks.txt"
    names.write_text("red lamp shade\n")
    data, val = make_coco(tmp_path / "data"), make_coco(tmp_path / "val", count=1)
    arguments = (
        "--coco-train",
        *data,
        "--coco-val",
        *val,
        "--masks-for",
        str(names),
        "--iterations",
        "1",
        "--batch-size",
        "2",
        "--image-size",
        "64",
        "--backbone",
        "test_resnet",
        "--output",
        str(tmp_path / "out"),
    )
    printed, ended = run_tool(*arguments)
    assert ended is None
    assert "1 categories with masks (A), 3 with boxes only (B), on cpu" in printed
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["split"]["A"] == [
        "red lamp shade"
    ]


def test_user_errors_end_with_their_message(tmp_path, run_tool):
    data = make_coco(tmp_path / "data")
    _, ended = run_tool("--coco-train", *data, "--coco-val", "missing.json", data[1])
    assert ended.startswith("error: ")
    assert "missing.json" in ended
    assert "Traceback" not in ended


def test_resuming_with_another_split_is_refused(tmp_path, tiny):
    data = make_coco(tmp_path / "data")
    for name, category in (("a.txt", "red lamp shade"), ("b.txt", "blue lamp shade")):
        (tmp_path / name).write_text(category)
    tiny = tiny | {"coco_train": data, "coco_val": data, "image_size": 64}
    quickstart_maskx(QuickstartOptions(**tiny, masks_for=str(tmp_path / "a.txt")), print)
    message = r"b\.txt' has other categories with masks .* had 'red lamp shade'"
    with pytest.raises(ValueError, match=message):
        quickstart_maskx(
            QuickstartOptions(**tiny, masks_for=str(tmp_path / "b.txt"), resume=True), print
        )


def test_a_file_without_images_is_named(tmp_path, tiny):
    data = make_coco(tmp_path / "data")
    empty = make_coco(tmp_path / "empty", images=[], annotations=[])
    for sources in (
        {"coco_train": empty, "coco_val": data},
        {"coco_train": data, "coco_val": empty},
    ):
        with pytest.raises(ValueError, match="has no images"):
            quickstart_maskx(QuickstartOptions(**tiny, **sources), print)


def test_bad_annotations_are_left_out_from_reading_to_evaluation(tmp_path, tiny):
    json_file, images = make_coco(tmp_path / "data")
    content = json.loads(Path(json_file).read_text())
    content["annotations"][0]["bbox"] = [1, 1, float("nan"), 5]
    content["annotations"][1]["segmentation"] = [[1, 1, 2, 2]]
    Path(json_file).write_text(json.dumps(content))
    tiny = tiny | {"coco_train": (json_file, images), "coco_val": (json_file, images)}
    with pytest.raises(ValueError, match="nan"):
        quickstart_maskx(QuickstartOptions(**tiny), print)
    metrics = quickstart_maskx(QuickstartOptions(**tiny, image_size=64, skip_bad=True), print)
    assert metrics["bbox"]["all"]["AP"] >= 0


def test_options_that_contradict_are_named(tmp_path, tiny):
    data = make_coco(tmp_path / "data")
    with pytest.raises(ValueError, match="for training and for validation, got only one"):
        quickstart_maskx(QuickstartOptions(**tiny, coco_train=data), print)
    categories = [{"id": 1, "name": "other"}]
    other = make_coco(tmp_path / "other", categories=categories, annotations=[])
    # Its images name tags of categories that are gone, too.
    content = json.loads(Path(other[0]).read_text())
    for image in content["images"]:
        image.pop("image_labels")
    Path(other[0]).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must have the same categories"):
        quickstart_maskx(QuickstartOptions(**tiny, coco_train=data, coco_val=other), print)


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("class_patterns", {"compare": True}, "compare has no meaning for the system class_patt"),
        ("class_patterns", {"masks_for": "all"}, "masks_for has no meaning for the system class"),
        ("larvseg", {"crf": True}, "only for class_patterns, transfernet. Leave it out"),
        ("maskx", {"crf": True}, "crf has no meaning for the system maskx, only for class_patt"),
        ("maskx", {"threshold": "otsu"}, "threshold has no meaning for the system maskx"),
        ("maskx", {"resolve": "ignore"}, "resolve has no meaning for the system maskx"),
        ("class_patterns", {"threshold": "mean"}, "threshold must be one of 'zero', 'otsu'"),
        ("class_patterns", {"iterations": 0}, "iterations must be at least 1, got 0"),
        ("class_patterns", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("class_patterns", {"backbone": "resnet5"}, "no backbone 'resnet5'.*resnet50"),
    ],
)
def test_options_without_meaning_for_a_system_are_refused(tiny, system, options, words):
    with pytest.raises(ValueError, match=words):
        find_system(system).pipeline(QuickstartOptions(**(tiny | options)), print)


def test_the_help_names_every_system(run_tool):
    text, _ = run_tool("--help")
    assert all(text.count(system) >= 3 for system in OURS)


def test_metrics_are_written_for_json_and_the_files_are_named(tmp_path):
    lines = []
    metrics = write_metrics(
        QuickstartOptions(output=tmp_path),
        {"system": "maskx", "mIoU": {"all": float("nan"), "base": 12.34567}},
        started=0.0,
        pictures=("one.png", "two.png"),
        report=lines.append,
    )
    assert metrics["seconds"] > 0
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "system": "maskx",
        "mIoU": {"all": None, "base": 12.3457},
        "seconds": metrics["seconds"],
    }
    files = ", ".join(str(tmp_path / name) for name in ("metrics.json", "one.png", "two.png"))
    assert lines == [f"\nWrote {files}"]
