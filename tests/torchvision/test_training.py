import dataclasses

import pytest
import torch
from torch import nn

from maskx.torchvision.data import InstanceMapper, training_batches
from maskx.torchvision.detection import SampleDetector
from maskx.torchvision.models import maskx_rcnn_small
from maskx.torchvision.training import (
    CHECKPOINT_NAME,
    TrainingSettings,
    load_weights,
    select_device,
    train,
)

SETTINGS = TrainingSettings(
    iterations=5, batch_size=2, learning_rate=0.01, seed=3, checkpoint_every=2
)


class Interrupted(Exception):
    pass


@pytest.fixture
def run(make_detector, scenes, split, tmp_path):
    """Train a tiny detector; ``stop_before`` breaks the run off before that step."""

    def run(settings=SETTINGS, *, folder="run", resume=False, stop_before=None, **mask_branch):
        model = make_detector(**mask_branch)
        mapper = InstanceMapper(split.indices_with_masks)

        def batches(start, stop):
            loader = training_batches(
                scenes.records,
                mapper,
                batch_size=settings.batch_size,
                seed=settings.seed,
                start=start,
                stop=stop,
            )
            for iteration, batch in enumerate(loader, start):
                if iteration == stop_before:
                    raise Interrupted
                yield batch

        history = train(model, batches, settings, output_dir=tmp_path / folder, resume=resume)
        return model, history

    return run


def assert_same_weights(model, other):
    for (name, value), (_, expected) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("stop_before", [1, 2, 3, 4])
def test_an_interrupted_run_resumes_to_the_same_weights(run, stop_before):
    expected, expected_history = run(folder="whole")
    with pytest.raises(Interrupted):
        run(stop_before=stop_before)
    torch.manual_seed(99)  # whatever else happened in between
    model, history = run(resume=True)
    assert_same_weights(model, expected)
    assert history == expected_history


def test_the_seed_decides_the_run(run):
    first, _ = run(folder="a")
    again, _ = run(folder="b")
    assert_same_weights(first, again)
    other, _ = run(dataclasses.replace(SETTINGS, seed=4), folder="c")
    weight = "detector.roi_heads.box_head.fc7.weight"
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_resuming_a_finished_run_changes_nothing(run):
    model, history = run()
    again, same_history = run(resume=True)
    assert_same_weights(model, again)
    assert history == same_history


def test_a_new_run_keeps_the_earlier_checkpoint(run, tmp_path):
    run()
    before = (tmp_path / "run" / CHECKPOINT_NAME).read_bytes()
    run(dataclasses.replace(SETTINGS, seed=4))
    assert (tmp_path / "run" / f"previous_{CHECKPOINT_NAME}").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_history_holds_first_and_last_losses(run):
    _, history = run()
    assert [row["iteration"] for row in history] == [0, 4]
    names = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert set(history[0]) == names | {"iteration", "total"}
    assert history[0]["total"] == pytest.approx(sum(history[0][n] for n in names), rel=1e-5)


def test_the_schedule_rises_then_falls():
    schedule = TrainingSettings(iterations=100, batch_size=1, learning_rate=0.5).schedule()
    rates = [schedule(step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == 5
    assert rates[99] < 0.001


def test_resuming_with_other_settings_is_refused(run):
    with pytest.raises(Interrupted):
        run(stop_before=3)
    with pytest.raises(ValueError, match=r"checkpoint\.pth' was made with learning_rate 0\.01, "):
        run(dataclasses.replace(SETTINGS, learning_rate=0.02), resume=True)
    run(dataclasses.replace(SETTINGS, checkpoint_every=5), resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"predictor": "class_agnostic"}, "made by another mask head"),
        ({"transfer_layers": 1}, "made by another mask head"),
        ({"num_convs": 2}, "made by another mask head"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(run, make_detector, tmp_path, change, words):
    run()
    with pytest.raises(ValueError, match=f"does not fit this model.*{words}"):
        run(resume=True, **change)
    with pytest.raises(ValueError, match=words):
        load_weights(make_detector(**change), tmp_path / "run" / CHECKPOINT_NAME)


def test_load_weights_restores_the_model(run, make_detector, tmp_path):
    trained, _ = run()
    model = make_detector()
    load_weights(model, tmp_path / "run" / CHECKPOINT_NAME)
    assert_same_weights(model, trained)
    assert not model.training


def test_unusable_checkpoints_are_named(run, make_detector, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*nothing\.pth'"):
        load_weights(make_detector(), tmp_path / "nothing.pth")
    run()
    whole = (tmp_path / "run" / CHECKPOINT_NAME).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"some": "thing"}, tmp_path / "other.pth")
    for name in ("half.pth", "other.pth"):
        with pytest.raises(ValueError, match=rf"{name}' is no checkpoint .*, or is damaged"):
            load_weights(make_detector(), tmp_path / name)


def test_a_checkpoint_with_other_classes_is_refused(run, tmp_path):
    run()
    other = SampleDetector(maskx_rcnn_small(4, min_size=64, channels=8, num_convs=1))
    with pytest.raises(ValueError, match=r"checkpoint: .*8 classes\n.*this model: .*3 classes"):
        load_weights(other, tmp_path / "run" / CHECKPOINT_NAME)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path):
    model = Diverges(at=7)
    settings = dataclasses.replace(SETTINGS, iterations=12, checkpoint_every=5)
    with pytest.raises(FloatingPointError, match="iteration 9"):
        train(model, lambda start, stop: [[{}]] * 12, settings, output_dir=tmp_path)
    saved = torch.load(tmp_path / CHECKPOINT_NAME, weights_only=True)
    assert saved["iteration"] == 5
    assert torch.isfinite(saved["model"]["weight"])


class Diverges(nn.Module):
    def __init__(self, at=0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.steps, self.at = 0, at

    def forward(self, batch):
        self.steps += 1
        return {"loss_x": self.weight / (0.0 if self.steps > self.at else 1.0)}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"iteration 0 are not finite.*loss_x"):
        train(Diverges(), lambda start, stop: [[{}]] * 3, SETTINGS, output_dir=tmp_path)
    assert not (tmp_path / CHECKPOINT_NAME).exists()


def test_asking_for_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"PyTorch finds no GPU here\. Use 'cpu' or 'auto'"):
        select_device("cuda")
    assert select_device("auto") == select_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto") == torch.device("cuda")
