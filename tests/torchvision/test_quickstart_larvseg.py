import json

import cv2
import numpy as np
import pytest

import maskx.systems
from maskx.data.prepare.ccp import prepare_ccp
from maskx.data.scenes.generator import STUFF_CATEGORIES, generate_scenes, scene_categories
from maskx.engine import quickstart
from maskx.engine.options import QuickstartOptions
from maskx.engine.system import find_system
from maskx.systems.larvseg.pipeline import open_larvseg
from maskx.systems.larvseg.system import quickstart_larvseg


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "SPARSE_SCENES", 24)
    monkeypatch.setattr(quickstart, "VAL_SCENES", 6)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
    return {"output": tmp_path / "out", "iterations": 2, "batch_size": 4, "image_size": 64}


def run(options, report=print, **changes):
    return quickstart_larvseg(QuickstartOptions(**options | changes), report)


def attentive_weight(output):
    return open_larvseg(output / "larvseg").network.attentive_weight


def test_generated_data_to_metrics_and_picture(tiny):
    lines = []
    run(tiny, lines.append)
    written = json.loads((tiny["output"] / "metrics.json").read_text())
    assert written["system"] == "larvseg"
    assert set(written["mIoU"]) == {"baseline", "larvseg"}
    for of_method in written["mIoU"].values():
        assert set(of_method) == {"base", "novel", "all"}
    names = [category.name for category in scene_categories(12, "sparse")]
    stuff = [category.name for category in STUFF_CATEGORIES]
    for of_method in written["IoU"].values():
        assert list(of_method) == names + stuff
    assert set(written["split"]["B"]) == set(names[1::2])
    assert written["num_images"] == {"masks": 12, "image labels": 12}
    steps = {"start", "baseline", "larvseg", "evaluation", "picture"}
    assert set(written["step_seconds"]) == steps
    predictor = maskx.open_run(tiny["output"], device="cpu")
    found = predictor(next((tiny["output"] / "scenes" / "val").rglob("*.png")))
    assert found.label_map.shape == (64, 64)
    assert set(found.names) <= set(names + stuff)
    assert (found.label_map > 0).all()
    picture = cv2.imread(str(tiny["output"] / "predictions.png"))
    assert picture.shape[1] == 5 * 256
    text = "\n".join(lines)
    assert "12 training images with masks of 11 base classes" in text
    assert "12 with image labels of 17 classes, 6 of them novel" in text
    assert "| larvseg |" in text
    assert attentive_weight(tiny["output"]) == 1
    assert find_system("larvseg").pipeline is quickstart_larvseg


def test_a_resumed_run_ends_with_the_same_numbers(tiny):
    first = run(tiny)
    again = run(tiny, resume=True)
    for key in ("mIoU", "IoU"):
        assert str(first[key]) == str(again[key])


def test_own_data_with_masks_for_some_photos_and_tags_for_others(tmp_path, tiny):
    ccp = tmp_path / "ccp"
    for folder in ("photos", "masks"):
        (ccp / folder).mkdir(parents=True)
    names = ["null", "skirt", "hat", "shoes", "coat"]
    random = np.random.RandomState(0)
    numbers = [f"{i:04d}" for i in range(1, 11)]
    tags = {}
    for number in numbers:
        labels = random.randint(0, 5, (4, 3)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        image = random.randint(0, 256, (64, 48, 3)).astype(np.uint8)
        cv2.imwrite(str(ccp / "photos" / f"{number}.jpg"), image)
        cv2.imwrite(str(ccp / "masks" / f"{number}.png"), labels)
        tags[number] = np.unique(labels).tolist()
    (ccp / "classes.json").write_text(json.dumps({"classes": names}))
    (ccp / "image_level_tags.json").write_text(json.dumps(tags))
    lists = {"pixel_train": numbers[:4], "pixel_val": numbers[4:6], "image_level": numbers[6:]}
    for name, found in lists.items():
        (ccp / f"{name}.txt").write_text("\n".join(found))
    prepare_ccp(ccp, ccp / "annotations")
    (tmp_path / "base.txt").write_text("skirt\nshoes\n")
    files = {
        f"coco_{part}": (str(ccp / "annotations" / f"ccp_{name}.json"), str(ccp / "photos"))
        for part, name in (("train", "mixed"), ("val", "val"))
    }
    found = run(tiny, **files, masks_for=str(tmp_path / "base.txt"))
    assert found["num_images"] == {"masks": 4, "image labels": 8}
    assert attentive_weight(tiny["output"]) == 0.1  # the paper's
    for of_method in found["IoU"].values():
        assert list(of_method) == names[1:]  # no background is invented
    with pytest.raises(ValueError, match="'all' leaves no novel class: all 4 have masks"):
        run(tiny, **files, masks_for="all")
    (tmp_path / "base.txt").write_text("hat\nshoes\n")
    with pytest.raises(ValueError, match="split"):
        run(tiny, **files, masks_for=str(tmp_path / "base.txt"), resume=True)


def test_base_and_novel_that_overlap_are_named(tmp_path, tiny):
    json_file = generate_scenes(
        tmp_path / "data", count=8, size=64, num_categories=8, seed=1, style="sparse"
    )
    data = (str(json_file), str(tmp_path / "data"))
    names = [category.name for category in scene_categories(8, "sparse")]
    both = {"with_masks": names[:5], "without_masks": names[4:]}
    (tmp_path / "both.json").write_text(json.dumps(both))
    with pytest.raises(ValueError, match=f"'{names[4]}' stand on both sides"):
        run(tiny, coco_train=data, coco_val=data, masks_for=str(tmp_path / "both.json"))


def test_validation_images_without_masks_are_refused(tmp_path, tiny):
    json_file = generate_scenes(
        tmp_path / "data", count=8, size=64, num_categories=8, seed=1, style="sparse"
    )
    content = json.loads(json_file.read_text())
    del content["stuff_categories"]
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    for image in content["images"]:
        del image["stuff_file_name"]
    (tmp_path / "data" / "boxes.json").write_text(json.dumps(content))
    files = {"coco_train": json_file, "coco_val": tmp_path / "data" / "boxes.json"}
    files = {key: (str(path), str(tmp_path / "data")) for key, path in files.items()}
    with pytest.raises(ValueError, match=r"None of the 8 validation images of '.*boxes.json' has"):
        run(tiny, **files, masks_for="scenes_half")
    assert not (tiny["output"] / "start").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "Device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ({"backbone": "resnet5"}, "no backbone 'resnet5'.*resnet50"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"masks_for": "coco_voc"}, "names 'person', which is not among the 12"),
        ({"threshold": "zero"}, "threshold has no meaning for the system larvseg"),
        ({"compare": True}, "compare has no meaning for the system larvseg"),
    ],
)
def test_options_out_of_range_are_named(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        run(tiny, **options)
