import json

import cv2
import pytest

from maskx.engine import quickstart
from maskx.engine.options import QuickstartOptions
from maskx.systems.class_patterns.system import quickstart_class_patterns


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "VAL_SCENES", 4)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
    monkeypatch.setattr(quickstart, "SPARSE_SCENES", 6)
    return {"output": tmp_path / "out", "iterations": 2, "batch_size": 2}


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


def test_tagged_photographs_of_ones_own(shared_data, tmp_path, tiny):
    coco = shared_data / "coco_mini"
    content = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][:3]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "three.json").write_text(json.dumps(content))
    source = (str(tmp_path / "three.json"), str(coco / "val2017"))
    options = QuickstartOptions(**tiny, coco_train=source, coco_val=source, image_size=32)
    metrics = quickstart_class_patterns(options, print)
    assert metrics["mIoU"]["proxy"]["C41"] > 0
    assert (tiny["output"] / "predictions.png").is_file()
