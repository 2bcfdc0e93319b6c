import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.class_patterns import discovery_cases

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"


def test_steps_share_one_classifier_and_say_what_is_held():
    cases = discovery_cases(
        depth=18, image_size=48, num_images=2, labels=(1, 3), device=torch.device("cpu")
    )
    reference, one, three = cases
    assert reference.name == "forward pass alone"
    assert reference.step().shape == (2, 20)
    assert reference.settings["layers"] == ["C41", "C42"]
    # Two layers of d = 512: products in float64, and 1024 pixels in float32 with their keys.
    per_class = 2 * (512 * 512 * 8 + 1024 * (512 * 4 + 8))
    for case, labels in ((one, 1), (three, 3)):
        assert case.settings["labels"] == labels
        assert case.settings["bytes_per_class"] == per_class
        case.step()
        assert case.parameters == reference.parameters == 11_186_772
    assert one.name == "with moments, 1 label, 8.4 MB per class"
    assert three.name == "with moments, 3 labels, 8.4 MB per class"
    assert three.settings["bytes_held"] - one.settings["bytes_held"] == 2 * per_class


def test_the_tool_measures_the_pass(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    options = ("--image-size", "48", "--images", "1", "--repeats", "1", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", [str(TOOL), "class_patterns", "--json", str(path), *options])
    runpy.run_path(str(TOOL), run_name="__main__")
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 3
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["name"] in printed
        assert row["table"] == "moments of all blocks of C4, ResNet-18, 1 images of 48 pixels"
        assert row["settings"]["image_size"] == 48


def test_the_tool_refuses_a_depth_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "class_patterns", "--depth", "20"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert "argument --depth: invalid choice: 20" in capsys.readouterr().err
