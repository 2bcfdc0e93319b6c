import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from photos import frozen_options
from studies import transfernet as study_transfernet
from studies.options import StudyOptions
from studies.run import run_study
from studies.transfernet import METHODS

from maskx.data.images import read_rgb
from maskx.data.scenes.generator import generate_scenes, half_split_names
from maskx.engine import quickstart, training_chain
from maskx.engine.quickstart import SPARSE_STYLE
from maskx.systems.transfernet import pipeline as transfernet

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "SPARSE_SCENES", 24)
    monkeypatch.setattr(quickstart, "VAL_SCENES", 6)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
    return {
        "output": tmp_path / "study",
        "system": "transfernet",
        "settings": tuple(METHODS),
        "seeds": (0,),
        "iterations": 2,
        "stage2_iterations": 2,
        "batch_size": 4,
        "device": "cpu",
    }


@pytest.fixture
def trained(monkeypatch):
    names = []
    original = training_chain.train

    def train(*args, **kwargs):
        names.append(kwargs["output_dir"].name)
        return original(*args, **kwargs)

    monkeypatch.setattr(training_chain, "train", train)
    return names


def test_all_methods_share_encoder_and_first_stage_of_a_seed(tiny, trained):
    lines = []
    rows = run_study(StudyOptions(**tiny), lines.append)
    assert [row["setting"] for row in rows] == list(METHODS)
    with_source = {"baseline", "decoupled"}  # which train on the source first
    expected = [n for m in METHODS for n in (f"{m}_source", m) if n == m or m in with_source]
    assert trained == ["classifier", "attention", *expected]
    groups = {f"{group}{suffix}" for group in ("target", "source", "all") for suffix in ("", "_gt")}
    for row in rows:
        assert row.keys() - {"setting", "attention_entropy"} == groups
        has_attention = row["setting"].startswith("transfernet")
        assert ("attention_entropy" in row) == has_attention
    assert "| `transfernet_source_0.01` |" in lines[-2]
    assert "| 5% above 1% of the source, true labels |" in lines[-1]

    (tiny["output"] / "seed_0" / "baseline" / "result.json").unlink()
    assert run_study(StudyOptions(**tiny), lines.append) == rows
    assert trained[len(expected) + 2 :] == ["classifier", "baseline_source", "baseline"]


def test_the_settings_are_what_their_names_say(tiny, monkeypatch):
    sizes = {}
    original = transfernet.alternating_batches

    def alternating_batches(source, target, **options):
        sizes[len(sizes)] = len(source)
        return original(source, target, **options)

    monkeypatch.setattr(transfernet, "alternating_batches", alternating_batches)
    names = ("transfernet", "transfernet_frozen_attention", "transfernet_source_0.01")
    run_study(StudyOptions(**tiny | {"settings": names}), print)
    of_first_stage, *of_masks = sizes.values()
    assert of_masks == [of_first_stage, of_first_stage, 1]
    assert METHODS["transfernet_attention_input"].decoder_input == "attention"
    weights = {
        name: torch.load(tiny["output"] / "seed_0" / name / "checkpoint.pth", weights_only=True)
        for name in ("attention", *names)
    }
    of_attention = [name for name in weights["attention"]["model"] if ".attention." in name]
    assert of_attention

    def moved(name):
        first, second = (weights[n]["model"] for n in ("attention", name))
        return any(not torch.equal(first[key], second[key]) for key in of_attention)

    assert moved("transfernet")
    assert not moved("transfernet_frozen_attention")
    assert [weights[n]["iteration"] for n in ("attention", "transfernet")] == [1, 2]


def test_measures_with_true_labels_are_told_apart(tiny, monkeypatch):
    def evaluate_transfer(model, records, groups, *, gt_labels, **_):
        return {"mIoU": dict.fromkeys(groups, 50.0 if gt_labels else 40.0)}

    monkeypatch.setattr(study_transfernet, "evaluate_transfer", evaluate_transfer)
    run_study(StudyOptions(**tiny | {"settings": ("baseline",)}), print)
    result = json.loads((tiny["output"] / "seed_0" / "baseline" / "result.json").read_text())
    assert {name: result["result"][name] for name in ("target", "target_gt", "all", "all_gt")} == {
        **{"target": 40, "target_gt": 50},
        **{"all": 40, "all_gt": 50},
    }


def test_orderings_are_those_of_the_paper():
    pairs = {
        (ordering.better[0], ordering.worse[0])
        for ordering in study_transfernet.STUDY.orderings
        if ordering.better[1] == ordering.worse[1] == "target"
    }
    shares = ("transfernet", *(f"transfernet_source_{s}" for s in (0.5, 0.25, 0.1, 0.05, 0.01)))
    assert pairs == {
        ("transfernet", "baseline"),
        ("baseline", "decoupled"),
        ("transfernet", "transfernet_attention_input"),
        ("transfernet", "transfernet_frozen_attention"),
        *pairwise(shares),
    }


def test_other_options_are_refused(tiny):
    tiny["settings"] = ("baseline",)
    run_study(StudyOptions(**tiny), print)
    with pytest.raises(ValueError, match=r"result.json' was made with .*'iterations': 2"):
        run_study(StudyOptions(**tiny | {"iterations": 3}), print)


def test_an_unknown_setting_is_refused(tiny):
    with pytest.raises(ValueError, match=r"Setting 'source_50' is not known.*transfernet_source"):
        run_study(StudyOptions(**tiny | {"settings": ("source_50",)}), print)


TINY_STUDY = """
import json, sys
from pathlib import Path
from maskx.engine import quickstart
from studies.options import StudyOptions
from studies.run import run_study
quickstart.SPARSE_SCENES, quickstart.VAL_SCENES, quickstart.SCENE_SIZE = 24, 6, 64
options = json.loads(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
run_study(StudyOptions(**options | {"output": Path(options["output"])}), print)
"""


def test_processes_that_share_a_study_make_each_part_once(tiny):
    """The other process loads its libraries while this one makes the study alone."""
    together = tiny["output"].parent / "together"
    tiny |= {"settings": ("transfernet", "baseline"), "batch_size": 2}
    tiny |= {"iterations": 1, "stage2_iterations": 1}
    part = tiny | {"settings": ["transfernet"], "output": str(together)}
    other = subprocess.Popen(
        [sys.executable, "-c", TINY_STUDY, json.dumps(part)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tools")))},
    )
    with other:
        alone = run_study(StudyOptions(**tiny), print)
        other.stdout.readline()
        other.stdin.write("\n")
        other.stdin.flush()
        lines = []
        settings = ("baseline", "transfernet")
        shared = StudyOptions(**tiny | {"settings": settings, "output": together})
        rows = run_study(shared, lines.append)
        printed, errors = other.communicate()
    assert other.returncode == 0, errors
    printed += "\n".join(lines)
    for setting in settings:
        assert printed.count(f"seed 0: {setting} done") == 1
    assert rows == alone[::-1]
    assert run_study(StudyOptions(**tiny | {"output": together}), print) == alone


@pytest.mark.parametrize(
    ("system", "setting"), [("transfernet", "baseline"), ("larvseg", "larvseg")]
)
def test_own_data(system, setting, tiny, tmp_path):
    files = [
        generate_scenes(tmp_path / name, count=count, size=64, seed=seed, **SPARSE_STYLE)
        for name, count, seed in (("train", 24, 0), ("val", 4, 1))
    ]
    with_masks = tmp_path / "with_masks.txt"
    with_masks.write_text("\n".join(half_split_names(12, "sparse")))
    own = {"coco_train": (str(files[0]), str(files[0].parent)), "masks_for": str(with_masks)}
    own |= {"coco_val": (str(files[1]), str(files[1].parent)), "image_size": 48}
    options = tiny | {"system": system, "settings": (setting,), **own}
    (row,) = run_study(StudyOptions(**options), lambda line: None)
    assert row["setting"] == setting
    result = json.loads((options["output"] / f"seed_0/{setting}/result.json").read_text())
    assert result["run"]["image_size"] == 48
    assert result["run"]["masks_for"] == str(with_masks)
    assert not (options["output"] / "seed_0" / "scenes").exists()
    height, width, _ = read_rgb(options["output"] / "contact_sheet.png").shape
    assert width == 4 * 256  # four images
    assert height == 2 * (256 + 34)  # the truth and the setting, with their titles
    with pytest.raises(ValueError, match="vectors has no meaning for a study of"):
        run_study(StudyOptions(**options | {"vectors": Path("glove.txt")}), lambda line: None)


def test_a_frozen_backbone_computes_its_features_once_for_all_settings(tiny, tmp_path):
    own = frozen_options(tmp_path, masks_for="random_2_0", with_masks=4)
    settings = ("transfernet", "baseline")
    rows = run_study(StudyOptions(**tiny | own | {"settings": settings}), print)
    assert [row["setting"] for row in rows] == list(settings)
    seed = tiny["output"] / "seed_0"
    assert [path.relative_to(seed) for path in seed.rglob("features")] == [Path("features")]
    assert len(list((seed / "features").iterdir())) == 1  # of one backbone, which did not move
    result = json.loads((seed / "baseline" / "result.json").read_text())
    assert result["run"]["frozen"] is True
