import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from maskx.data.coco import load_coco
from maskx.data.grabcut import grabcut_mask
from maskx.data.masks import decode_segmentation, encode_masks
from maskx.data.scenes import generate_scenes
from maskx.supervision import resolve_split
from maskx.torchvision import quickstart
from maskx.torchvision.quickstart import (
    QuickstartOptions,
    quickstart_class_patterns,
    quickstart_maskx,
)

TOOL = Path(__file__).parents[2] / "tools" / "quickstart.py"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "_TRAIN_SCENES", 6)
    monkeypatch.setattr(quickstart, "_VAL_SCENES", 4)
    monkeypatch.setattr(quickstart, "_SCENE_SIZE", 64)
    monkeypatch.setattr(quickstart, "_TAG_SCENES", 6)
    return {"output": tmp_path / "out", "iterations": 2, "batch_size": 2}


def test_generated_data_to_metrics_and_picture(tiny):
    lines = []
    metrics = quickstart_maskx(QuickstartOptions(**tiny, compare=True), lines.append)
    written = json.loads((tiny["output"] / "metrics.json").read_text())
    assert written["system"] == "maskx"
    assert written["seconds"] == metrics["seconds"] > 0
    for results in (written, written["class_agnostic"], written["grabcut"]):
        for task in ("segm", "bbox"):
            for group in ("A", "B", "all"):
                assert {"AP", "AP50", "AP75"} <= set(results[task][group])
    for results in (written, written["class_agnostic"]):
        assert results["losses"]["end"]["iteration"] == 1
    assert written["grabcut"]["bbox"] == written["bbox"]
    assert len(written["split"]["A"]) == len(written["split"]["B"]) == 20
    for name in ("predictions.png", "comparison.png"):
        assert cv2.imread(str(tiny["output"] / name)).shape[1] == 1600
    text = "\n".join(lines)
    assert "20 categories with masks (A), 20 with boxes only (B)" in text
    assert "class_agnostic, average precision" in text
    assert "grabcut, average precision" in text


def test_grabcut_replaces_the_masks_of_detections(tmp_path):
    json_file = generate_scenes(tmp_path, count=3, size=64, num_categories=4, seed=1)
    data = load_coco(json_file, tmp_path)
    truth = json.loads(json_file.read_text())["annotations"]
    detections = [
        {key: annotation[key] for key in ("image_id", "category_id", "bbox", "segmentation")}
        | {"score": 1 - number / 100}
        for number, annotation in enumerate(truth)
        if annotation["image_id"] != 1  # an image without detections
    ][::-1]
    replaced = quickstart._with_grabcut_masks(data, detections)
    assert sorted(d["score"] for d in replaced) == sorted(d["score"] for d in detections)
    by_score = {d["score"]: d for d in replaced}
    for old in detections:
        new = by_score[old["score"]]
        assert {**new, "segmentation": None} == {**old, "segmentation": None}
        x, y, width, height = old["bbox"]
        image = cv2.imread(data.records[old["image_id"]]["file_name"])[:, :, ::-1]
        np.testing.assert_array_equal(
            decode_segmentation(new["segmentation"], 64, 64),
            grabcut_mask(image, [x, y, x + width, y + height]),
        )


def test_the_picture_shows_the_confident_detections_of_both_sides(tmp_path, monkeypatch):
    json_file = generate_scenes(tmp_path, count=3, size=64, num_categories=4, seed=1)
    data = load_coco(json_file, tmp_path)
    split = resolve_split("scenes_half", data.class_names)
    of_a, of_b = (indices[0] for indices in (split.indices_with_masks, split.indices_without_masks))
    square, other = np.zeros((2, 64, 64), bool)
    square[10:30, 5:25] = other[40:60, 40:50] = True
    square, other = encode_masks(np.stack([square, other]))

    def detection(image_id, class_index, score, segmentation, bbox):
        return {
            "image_id": image_id,
            "category_id": data.category_ids[class_index],
            "score": score,
            "segmentation": segmentation,
            "bbox": bbox,
        }

    detections = [
        detection(0, of_a, 0.9, square, [5, 10, 20, 20]),
        detection(0, of_b, 0.49, other, [40, 40, 10, 20]),  # not confident
        detection(0, of_b, 0.8, square, [5, 10, 20, 20]),  # the same pixels as a surer one
        detection(2, of_b, 0.6, square, [5, 10, 20, 20]),
        detection(2, of_a, 0.7, other, [40, 40, 10, 20]),
    ]
    drawn = []

    def draw(image, **instances):
        drawn.append(instances)
        return image

    monkeypatch.setattr(quickstart, "draw_instances", draw)
    (path,) = quickstart._save_pictures(tmp_path, data, {"maskx": detections}, split)
    assert path == tmp_path / "predictions.png"
    # First the image with both sides, last the one without anything.
    assert [tile["with_masks"] for tile in drawn] == [[True, False], [True], []]
    assert drawn[0]["boxes"].tolist() == [[40, 40, 50, 60], [5, 10, 25, 30]]
    names = data.class_names
    assert drawn[0]["labels"] == [f"{names[of_a]} 0.70", f"{names[of_b]} 0.60"]
    assert drawn[0]["masks"].sum(axis=(1, 2)).tolist() == [200, 400]

    drawn.clear()
    methods = {"maskx": detections, "grabcut": [d for d in detections if d["image_id"] == 2]}
    paths = quickstart._save_pictures(tmp_path, data, methods, split)
    assert paths == [tmp_path / "predictions.png", tmp_path / "comparison.png"]
    # The same images in the order of Mask^X, a row per method.
    rows = [[tile["with_masks"] for tile in drawn[start : start + 3]] for start in (3, 6)]
    assert rows == [[[True, False], [True], []], [[True, False], [], []]]


def test_resume_needs_no_second_training(tiny):
    first = quickstart_maskx(QuickstartOptions(**tiny), lambda line: None)
    again = quickstart_maskx(QuickstartOptions(**tiny, resume=True), lambda line: None)
    assert str(first["segm"]) == str(again["segm"])
    assert first["losses"] == again["losses"]


def make_coco(folder, **changes):
    json_file = generate_scenes(folder, count=3, size=64, num_categories=4, seed=1)
    if changes:
        content = json.loads(json_file.read_text()) | changes
        json_file.write_text(json.dumps(content))
    return str(json_file), str(folder)


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_on_coco_files(tmp_path):
    names = tmp_path / "with_masks.txt"
    names.write_text("red lamp shade\n")
    data = make_coco(tmp_path / "data")
    finished = run_tool(
        *("--coco-train", *data, "--coco-val", *data, "--masks-for", str(names)),
        *("--iterations", "1", "--batch-size", "2", "--image-size", "64"),
        *("--backbone", "resnet18", "--output", str(tmp_path / "out")),
    )
    assert finished.returncode == 0, finished.stderr
    assert "1 categories with masks (A), 3 with boxes only (B), on cpu" in finished.stdout
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["split"]["A"] == [
        "red lamp shade"
    ]


def test_user_errors_end_with_their_message(tmp_path):
    data = make_coco(tmp_path / "data")
    finished = run_tool("--coco-train", *data, "--coco-val", "missing.json", data[1])
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert "missing.json" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_resuming_with_another_split_is_refused(tmp_path, tiny):
    data = make_coco(tmp_path / "data")
    for name, category in (("a.txt", "red lamp shade"), ("b.txt", "blue lamp shade")):
        (tmp_path / name).write_text(category)
    tiny = tiny | {"coco_train": data, "coco_val": data, "image_size": 64}
    quickstart_maskx(QuickstartOptions(**tiny, masks_for=str(tmp_path / "a.txt")), print)
    with pytest.raises(ValueError, match=r"made with categories with masks \['red lamp shade'\]"):
        quickstart_maskx(
            QuickstartOptions(**tiny, masks_for=str(tmp_path / "b.txt"), resume=True), print
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "Device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ({"backbone": "resnet5"}, "ResNet backbone must be one of .*'resnet50'.*got 'resnet5'"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"masks_for": "coco_voc"}, "names 'person', which is not among the 40"),
    ],
)
def test_options_out_of_range_are_named(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        quickstart_maskx(QuickstartOptions(**(tiny | options)), print)


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


def test_real_photographs(shared_data, tiny):
    """The whole way on COCO images, with masks for the VOC categories only."""
    coco = shared_data / "coco_mini"
    sources = {
        f"coco_{part}": (
            str(coco / "annotations" / f"instances_{part}2017.json"),
            str(coco / f"{part}2017"),
        )
        for part in ("train", "val")
    }
    options = QuickstartOptions(**tiny, **sources, masks_for="coco_voc", image_size=64)
    metrics = quickstart_maskx(options, print)
    assert len(metrics["split"]["A"]) == 20
    assert metrics["losses"]["start"]["loss_mask"] > 0
    assert (tiny["output"] / "predictions.png").is_file()


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


def test_image_labels_to_metrics_and_picture(tiny):
    lines = []
    metrics = quickstart_class_patterns(QuickstartOptions(**tiny), lines.append)
    written = json.loads((tiny["output"] / "metrics.json").read_text())
    assert written["system"] == "class_patterns"
    assert written["seconds"] == metrics["seconds"] > 0
    assert set(written["mIoU"]) == {"proxy", "trained", "retrained"}
    assert set(written["mIoU"]["proxy"]) == {"C41", "C42", "C43"}
    assert cv2.imread(str(tiny["output"] / "predictions.png")).shape[1] == 1280
    assert "6 training images with nothing but image labels, 4 validation images" in lines[0]
    info = json.loads((tiny["output"] / "scenes/train/annotations.json").read_text())["info"]
    assert (info["style"], info["num_categories"]) == ("sparse", 12)
    again = quickstart_class_patterns(QuickstartOptions(**tiny, resume=True), print)
    assert again["mIoU"] == metrics["mIoU"]


def test_the_papers_settings_of_proxy_masks(tiny):
    options = QuickstartOptions(**tiny, threshold="zero", resolve="ignore")
    metrics = quickstart_class_patterns(options, print)
    assert metrics["proxy_paper"] == metrics["mIoU"]["proxy"]


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("class_patterns", {"compare": True}, "compare has no meaning for the system class_patt"),
        ("class_patterns", {"masks_for": "all"}, "masks_for has no meaning for the system class"),
        ("maskx", {"crf": True}, "crf has no meaning for the system maskx, only for class_patt"),
        ("maskx", {"threshold": "otsu"}, "threshold has no meaning for the system maskx"),
        ("maskx", {"resolve": "ignore"}, "resolve has no meaning for the system maskx"),
        ("class_patterns", {"threshold": "mean"}, "threshold is 'mean'. Allowed: 'zero', 'otsu'"),
        ("class_patterns", {"iterations": 0}, "iterations must be at least 1, got 0"),
        ("class_patterns", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("class_patterns", {"backbone": "resnet5"}, "one of small, resnet18.*got 'resnet5'"),
    ],
)
def test_options_without_meaning_for_a_system_are_refused(tiny, system, options, words):
    with pytest.raises(ValueError, match=words):
        quickstart.SYSTEMS[system](QuickstartOptions(**(tiny | options)), print)


def test_tagged_photographs_of_ones_own(shared_data, tmp_path, tiny):
    coco = shared_data / "coco_mini"
    content = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][:5]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "five.json").write_text(json.dumps(content))
    source = (str(tmp_path / "five.json"), str(coco / "val2017"))
    options = QuickstartOptions(**tiny, coco_train=source, coco_val=source, image_size=32)
    metrics = quickstart_class_patterns(options, print)
    assert metrics["mIoU"]["proxy"]["C41"] > 0
    assert (tiny["output"] / "predictions.png").is_file()
