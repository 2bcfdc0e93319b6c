import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.concept_mask import (
    attention_cases,
    attention_sizes,
    prediction_cases,
    training_cases,
)
from torch.utils._python_dispatch import TorchDispatchMode

from maskx.systems.concept_mask.losses import peak_activations

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
SIZES = {"vocabularies": (20, 60), "image_size": 64, "device": torch.device("cpu")}


def test_attention_sizes_are_those_of_the_paper_at_320_pixels():
    assert attention_sizes(320) == (300, 700)
    assert attention_sizes(16) == (32, 35)


def test_attention_is_measured_against_the_small_vocabulary_and_the_unfolded_form():
    small, large, unfolded = attention_cases(**SIZES, num_concepts=5)
    for case, num_vocabulary in ((small, 20), (large, 60)):
        assert [tuple(each.shape) for each in case.step()] == [(1, 5, 2, 2), (1, 5, 5, 5)]
        assert case.parameters == 1024 * num_vocabulary * 2 + 1024 + num_vocabulary
    assert unfolded.settings["largest_difference"] < 1e-5
    # Boxed concepts are not blended, so what is measured is what is compared.
    for refined, maps in zip(unfolded.step(), large.step(), strict=True):
        torch.testing.assert_close(refined[:, :2], maps[:, :2], atol=1e-5, rtol=0)


def test_predictions_are_those_of_all_three_networks():
    small, large = prediction_cases(**SIZES, num_concepts=3, depth=18)
    assert large.step()["masks"].shape == small.step()["masks"].shape == (3, 64, 64)
    assert large.parameters - small.parameters == 40 * (2 * 1024 + 1)


def test_a_training_step_trains_with_all_three_losses():
    small, large = training_cases(**SIZES, num_images=2)
    network = large.step.__defaults__[0]
    assert network.stage == 2
    before = {name: value.clone() for name, value in network.named_parameters()}
    large.step()
    moved = {name for name, value in network.named_parameters() if not value.equal(before[name])}
    assert {name.partition(".")[0] for name in moved} == {"embedding", "refinement"}
    assert small.settings["peak_resident_growth_bytes"] >= 0
    assert "process grew by" in large.name


def test_a_training_step_makes_no_maps_of_the_whole_vocabulary():
    num_vocabulary, made = 1500, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple | list) else (result,)
            made.extend(each.shape for each in results if isinstance(each, torch.Tensor))
            return result

    def full_maps():
        # 2 images of 2 x 2 positions; nothing else of the network is 4 or 2 x 2 wide.
        return [s for s in made if num_vocabulary in s and (s[-1:] == (4,) or s[-2:] == (2, 2))]

    sizes = SIZES | {"vocabularies": (num_vocabulary,)}
    (case,) = training_cases(**sizes, num_images=2)
    with Watch():
        case.step()
        assert made
        assert not full_maps()
        peak_activations(torch.zeros(2, 512, 2, 2), torch.zeros(num_vocabulary, 512), chunk=9999)
        assert full_maps()


@pytest.mark.parametrize("section", ["training", "attention"])
def test_the_tool_measures(section, monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    options = ("--vocabularies", "20", "60", "--image-size", "64", "--section", section)
    options += ("--repeats", "1", "--json", str(path), "--device", "cpu")
    monkeypatch.setattr(sys, "argv", [str(TOOL), "concept_mask", *options])
    runpy.run_path(str(TOOL), run_name="__main__")
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == {"training": 2, "attention": 3}[section]
    assert all(row["name"] in printed for row in rows)
