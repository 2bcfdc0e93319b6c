"""A training that does not go on where it was killed is seen, and one that does is not."""

import os

import pytest
from benchmarks.kill_trials import kill_trials

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tool forks processes")

TOOL = """
import sys, time
from pathlib import Path
import torch

path = Path(sys.argv[1]) / "checkpoint.pth"
path.parent.mkdir(parents=True, exist_ok=True)
if sys.argv[2] == "broken":
    sys.exit(f"{path.name} is broken" if path.is_file() else 0)
start, weight = torch.load(path) if path.is_file() else (0, torch.zeros(1))
if sys.argv[2] == "forgetful" and path.is_file():
    weight = weight + 1
for step in range(start, 5):
    weight = weight + step
    scratch = path.with_suffix(".partial")
    torch.save((step + 1, weight), scratch)
    time.sleep(0.05)
    scratch.replace(path)
"""


@pytest.fixture
def run(tmp_path):
    tool = tmp_path / "tool.py"
    tool.write_text(TOOL)
    return lambda kind: list(
        kill_trials([str(tool), "{folder}", kind], tmp_path / "trials", count=4)
    )


def test_a_training_that_goes_on_where_it_was_ends_with_the_same_bits(run):
    trials = run("sound")
    assert all(trial.is_equal for trial in trials)
    assert sum(trial.kills for trial in trials) > 0
    assert sum(trial.in_writes for trial in trials) > 0


def test_one_that_goes_on_otherwise_is_named_by_its_checkpoint(run):
    assert ("checkpoint.pth",) in [trial.differences for trial in run("forgetful")]


def test_a_command_that_writes_nothing_has_no_checkpoint_to_compare(run):
    assert {trial.differences for trial in run("broken")} == {("there is no checkpoint",)}


def test_a_command_that_fails_is_named_with_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"nothing\.py fails.*No such file"):
        list(kill_trials([str(tmp_path / "nothing.py"), "{folder}"], tmp_path / "t", count=1))
    with pytest.raises(ValueError, match=r"\{folder\}"):
        list(kill_trials(["tool.py"], tmp_path, count=1))
