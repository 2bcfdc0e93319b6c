"""The training loop when it is killed, when numbers go wrong and when files are damaged."""

import csv
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from full_disk import full_disk
from torch import nn

from maskx.core.archives import read_archive
from maskx.engine.checkpoints import locked
from maskx.engine.runs import Origin, Run, read_run
from maskx.engine.training import CHECKPOINT_NAME, TrainingSettings, train
from maskx.supervision import split_one_side

SETTINGS = TrainingSettings(iterations=40, batch_size=2, learning_rate=0.1, checkpoint_every=1)
CLASSES = ("cat", "dog")
RUN = Run(
    system="toy",
    host="pip",
    class_names=CLASSES,
    split=split_one_side("half", CLASSES, with_masks=("cat",)),
    settings={"model": {"size": 3}},
    started_from={"annotations": Origin("ab12", "train.json")},
)


class Model(nn.Module):
    """Learns with dropout, so that the random state counts; fails as a sample says."""

    def __init__(self, size=300):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(size, size), nn.Dropout(0.5), nn.BatchNorm1d(size))

    def forward(self, batch):
        x = torch.stack([sample["image"] for sample in batch])
        loss = self.network(x).square().mean()
        wrong = {name for sample in batch for name in sample.get("wrong", ())}
        if "gradient" in wrong:  # of 0 at 0 is not a number
            loss = loss + (self.network[0].bias * 0).abs().sqrt().sum()
        if "loss" in wrong:
            loss = loss / 0
        if "variance" in wrong:
            self.network[2].running_var.data[1] = float("inf")
        return {"loss_x": loss}


def batches(start, stop, wrong=None, pause=0.0):
    for step in range(start, stop):
        time.sleep(pause)
        draw = torch.Generator().manual_seed(step)
        samples = [{"image": torch.randn(300, generator=draw)} for _ in range(2)]
        samples[1] |= {"file_name": f"{step}.jpg", "wrong": (wrong or {}).get(step, ())}
        yield samples


def run_of(folder, resume=True, wrong=None, run=RUN, settings=SETTINGS, pause=0.0):
    def make(start, stop):
        return batches(start, stop, wrong, pause)

    model = Model()
    history = train(model, make, settings, output_dir=folder, run=run, resume=resume)
    return model.state_dict(), history


def test_no_gradient_is_kept_between_steps(tmp_path):
    model, seen = Model(), []

    def make(start, stop):
        for batch in batches(start, stop):
            seen.append(all(p.grad is None for p in model.parameters()))
            yield batch

    settings = replace(SETTINGS, iterations=3)
    train(model, make, settings, output_dir=tmp_path, run=RUN, resume=False)
    seen.append(all(p.grad is None for p in model.parameters()))
    assert seen == [True] * 4


def start_run(folder):
    """Train in a process of its own, which shares what this one has imported.

    Slowly, for 1.2 seconds or more, so that no machine is too fast to be stopped on the way.
    """
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)
            run_of(folder, pause=0.03)
        finally:
            os._exit(0)
    return process


def test_a_run_killed_at_any_point_ends_with_the_same_weights(tmp_path):
    """Checkpoints are written most of the time, so that most kills meet one."""
    expected, expected_history = run_of(tmp_path / "whole")
    draw, folder, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(12):
        process = start_run(folder)
        time.sleep(draw.uniform(0.0, 0.3))
        if os.waitpid(process, os.WNOHANG) == (0, 0):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kills += 1
    assert kills >= 3
    found, history = run_of(folder)
    assert history == expected_history
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gradient", r"The gradient at iteration 7 is not finite"),
        ("loss", r"Losses at iteration 7 are not finite"),
        ("variance", r"1 of 6 weights are not finite after iteration 7, such as '.*running_var'"),
    ],
)
def test_numbers_that_go_wrong_keep_the_checkpoint_and_name_step_and_images(
    tmp_path, what, message
):
    with pytest.raises(FloatingPointError, match=rf"{message}.*'7\.jpg'"):
        run_of(tmp_path, wrong={7: (what,)})
    saved = read_archive(tmp_path / CHECKPOINT_NAME)
    assert saved["iteration"] == 7
    assert all(value.isfinite().all() for value in saved["model"].values())
    found, _ = run_of(tmp_path)  # the image was mended
    expected, _ = run_of(tmp_path / "whole")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, 7), (1000.0, None)])
def test_slow_steps_are_saved_by_the_clock(tmp_path, seconds, kept):
    settings = replace(SETTINGS, checkpoint_every=1000, checkpoint_seconds=seconds)
    with pytest.raises(FloatingPointError):
        run_of(tmp_path, wrong={7: ("loss",)}, settings=settings)
    path = tmp_path / CHECKPOINT_NAME
    assert (read_archive(path)["iteration"] if path.is_file() else None) == kept
    # How often a run saves is not what it learns: other settings of it go on.
    found, _ = run_of(tmp_path)
    expected, _ = run_of(tmp_path / "whole")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_full_disk_loses_nothing(tmp_path):
    with pytest.raises(FloatingPointError):
        run_of(tmp_path, wrong={7: ("loss",)})
    with full_disk(1000), pytest.raises(OSError, match=r"checkpoint\.pth' could not be written"):
        run_of(tmp_path)
    assert read_archive(tmp_path / CHECKPOINT_NAME)["iteration"] == 7
    found, _ = run_of(tmp_path)
    expected, _ = run_of(tmp_path / "whole")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_run_json_and_checkpoint_say_what_was_trained(tmp_path):
    run_of(tmp_path)
    found = read_run(tmp_path)
    assert found.settings["model"] == {"size": 3}
    assert found.settings["training"]["iterations"] == 40
    assert found.weights_file == tmp_path / CHECKPOINT_NAME
    in_checkpoint = Run.from_json(read_archive(found.weights_file)["run"], "checkpoint")
    assert in_checkpoint == found
    assert in_checkpoint.split.with_masks == ("cat",)


OTHERS = {
    r"split 's' has other .* had 'cat': more 'dog', no more 'cat'": {
        "split": split_one_side("s", CLASSES, with_masks=("dog",))
    },
    r"annotations 'train.json' is not what the run": {
        "started_from": {"annotations": Origin("ff", "train.json")}
    },
    r"model\.size is 4, but the run in .* with 3": {"settings": {"model": {"size": 4}}},
}


@pytest.mark.parametrize(("message", "changes"), OTHERS.items(), ids=["split", "data", "model"])
def test_another_run_is_not_resumed_and_leaves_no_trace(tmp_path, message, changes):
    short = replace(SETTINGS, iterations=2)
    run_of(tmp_path, settings=short)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        run_of(tmp_path, settings=short, run=replace(RUN, **changes))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_checkpoint_is_refused_not_trained_over(tmp_path):
    run_of(tmp_path, settings=replace(SETTINGS, iterations=2))
    path = tmp_path / CHECKPOINT_NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pth' is no checkpoint, or is damaged \(the"):
        run_of(tmp_path, settings=replace(SETTINGS, iterations=2))
    assert path.read_bytes() == content


def test_a_checkpoint_that_lacks_parts_is_refused(tmp_path):
    run_of(tmp_path, settings=replace(SETTINGS, iterations=2))
    path = tmp_path / CHECKPOINT_NAME
    content = torch.load(path, weights_only=True)
    for lost in ("optimizer", "losses", "history"):
        torch.save({key: value for key, value in content.items() if key != lost}, path)
        with pytest.raises(ValueError, match=rf"not all that a training needs .*{lost}"):
            run_of(tmp_path, settings=replace(SETTINGS, iterations=2))
    torch.save(content | {"optimizer": {"state": {}}}, path)
    with pytest.raises(ValueError, match="not all that a training needs to go on"):
        run_of(tmp_path, settings=replace(SETTINGS, iterations=2))


def test_two_trainings_do_not_share_a_folder(tmp_path):
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:  # holds the folder until it is killed
        with locked(tmp_path):
            os.write(writer, b"held")
            time.sleep(60)
        os._exit(0)
    try:
        os.read(reader, 4)
        with pytest.raises(ValueError, match="Another process is at work in"):
            run_of(tmp_path)
        assert not (tmp_path / CHECKPOINT_NAME).exists()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)
    run_of(tmp_path, settings=replace(SETTINGS, iterations=1))


def test_the_losses_are_a_table_that_goes_on_with_the_run(tmp_path):
    _, history = run_of(tmp_path / "whole")
    with (tmp_path / "whole" / "losses.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == history
    assert [row["iteration"] for row in rows] == [0, 20, 39]
    with pytest.raises(FloatingPointError):
        run_of(tmp_path / "parts", wrong={30: ("loss",)})
    run_of(tmp_path / "parts")
    table = (tmp_path / "parts" / "losses.csv").read_bytes()
    assert table == (tmp_path / "whole" / "losses.csv").read_bytes()


def test_tensorboard_shows_the_same(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra `tensorboard` is not installed",
    )
    with pytest.raises(FloatingPointError):
        run_of(tmp_path, wrong={30: ("loss",)})
    _, history = run_of(tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss_x", "total"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({row["iteration"]: row[name] for row in history})
