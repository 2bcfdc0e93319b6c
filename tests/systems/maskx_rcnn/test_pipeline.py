import json

import cv2
import numpy as np
import pytest

from maskx import open_run
from maskx.data.coco import load_coco
from maskx.data.grabcut import grabcut_mask
from maskx.data.masks import decode_segmentation
from maskx.data.scenes.generator import generate_scenes
from maskx.engine import quickstart
from maskx.engine.options import QuickstartOptions
from maskx.systems.maskx_rcnn.pipeline import quickstart_maskx, with_grabcut_masks


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "TRAIN_SCENES", 6)
    monkeypatch.setattr(quickstart, "VAL_SCENES", 4)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
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
    replaced = with_grabcut_masks(data, detections)
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


def test_a_training_starts_from_another_one(tiny, tmp_path):
    first = tiny["output"]
    quickstart_maskx(QuickstartOptions(**tiny), lambda line: None)
    lines, losses = [], []
    again = tiny | {"start": str(first), "seed": 1}
    for output, options in ((tmp_path / "again", again), (tmp_path / "anew", tiny | {"seed": 1})):
        options = QuickstartOptions(**options | {"output": output})
        losses.append(quickstart_maskx(options, lines.append)["losses"]["start"]["total"])
    assert f"Starts from '{first}', which knows 40 of 40 categories." in lines
    assert losses[0] != losses[1]
    run = open_run(tmp_path / "again", device="cpu").run
    assert run.started_from["start"].path.endswith("out/maskx/checkpoint.pth")
    with pytest.raises(ValueError, match=r"start \(--start\) gives weights to Mask\^X alone"):
        quickstart_maskx(QuickstartOptions(**again | {"compare": True}), print)


def test_resume_needs_no_second_training(tiny):
    first = quickstart_maskx(QuickstartOptions(**tiny), lambda line: None)
    predictor = open_run(tiny["output"], device="cpu")
    assert predictor.run.split.name == "scenes_half"
    image = next((tiny["output"] / "scenes" / "val").rglob("*.png"))
    found = predictor(image)
    assert found.image_size == (64, 64)
    assert len(found.names) == len(found.boxes) == len(found.masks) == len(found.scores)
    assert set(found.names) <= set(predictor.class_names)
    again = quickstart_maskx(QuickstartOptions(**tiny, resume=True), lambda line: None)
    assert str(first["segm"]) == str(again["segm"])
    assert first["losses"] == again["losses"]


def test_an_opened_run_has_no_teacher(tiny):
    options = QuickstartOptions(**tiny, box_loss=1.0, ema_teacher=0.5)
    metrics = quickstart_maskx(options, lambda line: None)
    assert {"loss_mask_box", "loss_mask_ema"} <= metrics["losses"]["end"].keys()
    predictor = open_run(tiny["output"], device="cpu")
    assert predictor.run.settings["mask_branch"]["ema_teacher"]["weight"] == 0.5
    assert not any("ema_teacher" in name for name in predictor.model.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "mps"}, "Device must be 'auto', 'cpu' or 'cuda', got 'mps'"),
        ({"seed": -1}, r"seed is -1\. Allowed: 0 to"),
        ({"seed": 2**70}, r"seed is \d+\. Allowed: 0 to"),
        ({"workers": -1}, r"workers is -1\. Allowed: 0"),
        ({"image_size": 10**7}, r"image_size is 10000000\. Allowed: 8 to"),
        ({"device": "gpu"}, "Device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ({"backbone": "resnet5"}, "There is no backbone 'resnet5'.*the closest: resnet50"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"image_size": 0}, "image_size is 0. Allowed: 8 to 16384 pixels"),
        ({"ema_teacher": -1.0}, r"EMA_TEACHER\.WEIGHT\) is -1"),
        ({"pretrained": True}, "no pretrained weights of the backbone 'small'"),
        ({"masks_for": "coco_voc"}, "names 'person', which is not among the 40"),
    ],
)
def test_options_out_of_range_are_named(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        quickstart_maskx(QuickstartOptions(**(tiny | options)), print)


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
