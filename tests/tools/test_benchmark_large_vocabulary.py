import json
import runpy
import sys
from pathlib import Path

import torch
from benchmarks.large_vocabulary import inference_cases, training_cases

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
SIZES = {"num_classes": 60, "channels": 8, "image_size": 64}


def test_inference_is_measured_against_the_product_alone():
    reference, *others = inference_cases(**SIZES, device=torch.device("cpu"))
    assert reference.step().shape == (16, 60)
    for case in others:
        classes, _ = case.step()
        assert classes.shape == (case.settings["top_k"], 64, 64)
    assert [case.settings["scores"] for case in others] == ["random", "peaked"] * 2
    # Most pixels of the peaked image are of the 12 classes that are in it.
    peaked = others[1].step()[0].flatten().bincount(minlength=60).sort().values
    assert peaked[-12:].sum() > 0.7 * 64 * 64


def test_training_steps_share_one_network_with_a_full_bank():
    cases = list(training_cases(**SIZES, num_images=2, device=torch.device("cpu")))
    assert [case.settings["num_labels"] for case in cases] == [3, 3, 1]
    for case in cases:
        case.step()
        assert case.parameters == 2 * 8 * 8 + 60 * 8 + 1
        assert case.settings["bank_bytes"] == 60 * (20 * 8 * 4 + 8)


def test_the_tool_measures_both(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    options = ("--classes", "60", "--channels", "8", "--image-size", "64", "--repeats", "1")
    options += ("--json", str(path), "--device", "cpu")
    monkeypatch.setattr(sys, "argv", [str(TOOL), "large_vocabulary", *options])
    runpy.run_path(str(TOOL), run_name="__main__")
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 5 + 3
    assert all(row["name"] in printed for row in rows)
