"""A sixth system is one file and one line of registration, on the embedded host."""

import json

import numpy as np
import pytest
import torch
from toy_system import SYSTEM

import maskx
from maskx.data.scenes.generator import generate_scenes
from maskx.engine.options import QuickstartOptions
from maskx.engine.system import find_system, register_system


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    sources = []
    for seed, name in enumerate(("train", "val")):
        folder = root / name
        json_file = generate_scenes(folder, count=16, size=64, num_categories=4, seed=seed)
        sources.append((str(json_file), str(folder)))
    return {
        "coco_train": sources[0],
        "coco_val": sources[1],
        "masks_for": "scenes_half",
        "image_size": 64,
        "device": "cpu",
    }


def test_it_trains_resumes_evaluates_and_predicts(options, tmp_path):
    whole = SYSTEM.pipeline(QuickstartOptions(tmp_path / "whole", **options), print)
    assert whole["sem_seg"]["mIoU"] > 5
    assert set(whole["split"]["A"]) & set(whole["split"]["B"]) == set()

    SYSTEM.pipeline(QuickstartOptions(tmp_path / "parts", iterations=40, **options), print)
    again = QuickstartOptions(tmp_path / "parts", resume=True, **options)
    resumed = SYSTEM.pipeline(again, print)
    assert resumed["sem_seg"] == whole["sem_seg"]

    page = (tmp_path / "whole" / "report.html").read_text()
    for text in (
        "loss pixels: ",
        "in percent B (without)",
        "on 16 of 16 images",
        "The worst images",
    ):
        assert text in page
    assert "src=" not in page.replace('src="data:', "")  # it needs no other file

    run = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (run["system"], run["host"]) == ("colours", "pip")
    predictor = maskx.open_run(tmp_path / "whole")
    image = np.zeros((40, 50, 3), np.uint8)
    assert predictor(image, order="RGB").label_map.shape == (40, 50)


def test_its_model_is_the_same_after_a_resumed_training(options, tmp_path):
    checkpoints = []
    for output, steps in (("whole", (8,)), ("parts", (8, 8))):
        for _ in steps:
            given = QuickstartOptions(tmp_path / output, iterations=8, resume=True, **options)
            SYSTEM.pipeline(given, print)
        content = torch.load(tmp_path / output / "checkpoint.pth", weights_only=True)
        checkpoints.append(content["model"])
    first, second = checkpoints
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_name_stands_for_one_system():
    register_system("colours", SYSTEM)
    with pytest.raises(ValueError, match="'colours' is registered already"):
        register_system("colours", "another.module:SYSTEM")
    with pytest.raises(ValueError, match=r"no system 'colors'\. Allowed: .*colours"):
        find_system("colors")
