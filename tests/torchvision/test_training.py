import dataclasses
import functools

import pytest
import torch
from torch import nn

from maskx.engine.batches import training_batches
from maskx.engine.training import (
    CHECKPOINT_NAME,
    TrainingSettings,
    load_weights,
    select_device,
    train,
)
from maskx.systems.maskx_rcnn.samples import InstanceMapper
from maskx.systems.maskx_rcnn.torchvision import SampleDetector, maskx_rcnn

SETTINGS = TrainingSettings(
    iterations=5, batch_size=2, learning_rate=0.01, seed=3, checkpoint_every=2
)


class Interrupted(Exception):
    pass


@pytest.fixture
def run(make_detector, scenes, split, tmp_path):
    """Train a tiny detector; ``stop_before`` breaks the run off before that step.

    ``pixel`` is the value of all pixels of step 3.
    """

    def run(
        settings=SETTINGS, *, folder="run", resume=False, stop_before=None, pixel=None, **branch
    ):
        model = make_detector(**branch)
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
                for sample in batch if pixel is not None and iteration == 3 else ():
                    sample["image"] = torch.full_like(sample["image"].float(), pixel)
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


class TakesTurns(nn.Module):
    """The loss of the batch's data set is its number, that of the other is zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        value, name = batch[0]
        losses = dict.fromkeys(("loss_even", "loss_odd"), 0 * self.weight)
        return losses | {name: value + 0 * self.weight}


@pytest.mark.parametrize("stop_before", [None, 5, 21, 33])
def test_losses_are_means_over_the_steps_that_have_them_also_when_resumed(tmp_path, stop_before):
    settings = TrainingSettings(iterations=44, batch_size=1, learning_rate=0.1, checkpoint_every=3)

    def batches(start, stop, last=None):
        for step in range(start, stop):
            if step == last:
                raise Interrupted
            yield [(float(step), ("loss_even", "loss_odd")[step % 2])]

    if stop_before is not None:
        broken_off = functools.partial(batches, last=stop_before)
        with pytest.raises(Interrupted):
            train(TakesTurns(), broken_off, settings, output_dir=tmp_path)
    history = train(TakesTurns(), batches, settings, output_dir=tmp_path, resume=True)
    assert [row["iteration"] for row in history] == [0, 20, 40, 43]
    # Steps 1 to 20 have the even numbers 2 to 20 and the odd ones 1 to 19. A step that lacks a loss
    # has no part in its mean.
    assert history[0]["loss_odd"] == 0
    assert history[1]["loss_even"] == pytest.approx(110 / 10)
    assert history[1]["loss_odd"] == pytest.approx(100 / 10)
    assert history[1]["total"] == pytest.approx(210 / 20)
    assert history[3]["loss_even"] == pytest.approx(42)
    assert history[3]["loss_odd"] == pytest.approx((41 + 43) / 2)


def test_the_schedule_rises_then_falls():
    schedule = TrainingSettings(iterations=100, batch_size=1, learning_rate=0.5).schedule()
    rates = [schedule(step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == 5
    assert rates[99] < 0.001


def test_the_poly_schedule_falls_as_a_power():
    settings = TrainingSettings(
        iterations=100, batch_size=1, learning_rate=0.5, warmup_fraction=0.2, decay="poly"
    )
    schedule = settings.schedule()
    for share in (0.2, 0.5, 0.9):
        done = (share - 0.2) / 0.8
        assert schedule(share) == pytest.approx(0.5 * (1 - done) ** 0.9, rel=1e-4)
    assert schedule(0.1) == pytest.approx(0.5 * 0.505, rel=1e-4)
    without = dataclasses.replace(settings, warmup_fraction=0.0).schedule()
    assert without(0.0) == pytest.approx(0.5)


def test_resuming_with_other_settings_is_refused(run):
    with pytest.raises(Interrupted):
        run(stop_before=3)
    with pytest.raises(
        ValueError,
        match=r"learning_rate is 0\.02, but the run in .*checkpoint\.pth' was .* with 0\.01",
    ):
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
    with pytest.raises(ValueError, match=r"half\.pth' is no checkpoint, or is damaged"):
        load_weights(make_detector(), tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"other\.pth' is no checkpoint of maskx's training loop"):
        load_weights(make_detector(), tmp_path / "other.pth")


def test_of_the_weights_of_another_network_a_few_are_named(tmp_path):
    path = tmp_path / CHECKPOINT_NAME
    weights = nn.Sequential(*(nn.Linear(2, 3) for _ in range(4))).state_dict()
    torch.save({"model": weights, "run": {}, "iteration": 1}, path)
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        load_weights(nn.Sequential(nn.Linear(5, 3), nn.Identity(), nn.PReLU()), path)
    assert str(caught.value).splitlines() == [
        f"'{path}' does not fit this model. Not of this model (5): 1.weight, 1.bias, 2.bias and "
        "more. Of another shape (2): 0.weight (3, 2) instead of (3, 5), 2.weight (3, 2) instead of "
        "(1,). Give the checkpoint of such a model, or train this one anew."
    ]
    with pytest.raises(ValueError, match=r"model\. Missing \(2\): 4\.weight, 4\.bias\. Give the"):
        load_weights(nn.Sequential(*(nn.Linear(2, 3) for _ in range(5))), path)


def test_a_checkpoint_with_other_classes_is_refused(run, tmp_path):
    run()
    other = SampleDetector(maskx_rcnn(4, detector={"min_size": 64}, channels=8, num_convs=1))
    with pytest.raises(
        ValueError, match=r"checkpoint: .*num_classes 8.*\n.*this model: .*num_classes 3"
    ):
        load_weights(other, tmp_path / "run" / CHECKPOINT_NAME)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path):
    model = Diverges(at=7)
    settings = dataclasses.replace(SETTINGS, iterations=12, checkpoint_every=5)
    with pytest.raises(FloatingPointError, match="iteration 7 are not finite"):
        train(model, lambda start, stop: [[{}]] * 12, settings, output_dir=tmp_path)
    saved = torch.load(tmp_path / CHECKPOINT_NAME, weights_only=True)
    assert saved["iteration"] == 5
    assert torch.isfinite(saved["model"]["weight"])


@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_name_step_and_images(run, pixel):
    words = r"iteration 3 .*not finite.*images of that step \('\d', '\d'\)"
    with pytest.raises(FloatingPointError, match=words):
        run(pixel=pixel)


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


def test_a_loss_that_is_not_finite_between_two_rows_stops_the_run_too(tmp_path):
    settings = dataclasses.replace(SETTINGS, iterations=30, checkpoint_every=30)
    batches = [[[float("inf") if step == 7 else 1.0, "loss_odd"]] for step in range(30)]
    with pytest.raises(FloatingPointError, match="iteration 7 are not finite"):
        train(TakesTurns(), lambda start, stop: batches, settings, output_dir=tmp_path)


def test_asking_for_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"PyTorch finds no GPU here\. Use 'cpu' or 'auto'"):
        select_device("cuda")
    assert select_device("auto") == select_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto") == torch.device("cuda")


ADAM = dataclasses.replace(
    SETTINGS,
    learning_rate=1e-3,
    optimizer="adam",
    lr_multipliers={"detector.backbone.": 0.1, "detector.backbone.fpn.": 0.5},
)


@pytest.mark.parametrize("settings", [ADAM, dataclasses.replace(ADAM, optimizer="sgd")])
@pytest.mark.parametrize("stop_before", [2, 3])
def test_adam_and_multipliers_resume_to_the_same_weights(run, settings, stop_before):
    expected, expected_history = run(settings, folder="whole")
    with pytest.raises(Interrupted):
        run(settings, stop_before=stop_before)
    torch.manual_seed(99)
    model, history = run(settings, resume=True)
    assert_same_weights(model, expected)
    assert history == expected_history


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd', but .* with 'adam'"),
        (
            {"lr_multipliers": {}},
            r"lr_multipliers.detector.backbone. is None, but .* with 0.1",
        ),
        ({"lr_multipliers": {"detector.backbone.": 0.1}}, "lr_multipliers"),
    ],
)
def test_optimizer_and_multipliers_identify_a_run(run, change, words):
    with pytest.raises(Interrupted):
        run(ADAM, stop_before=3)
    with pytest.raises(ValueError, match=words):
        run(dataclasses.replace(ADAM, **change), resume=True)


class Linear(nn.Module):
    """A loss whose gradient is the same at every step: 1 for all weights but the frozen one."""

    def __init__(self):
        super().__init__()
        self.head = nn.Parameter(torch.zeros(2, 2))
        self.backbone = nn.ParameterDict(
            {name: torch.zeros(2, 2) for name in ("stem", "last_conv")} | {"bias": torch.zeros(2)}
        )
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, batch):
        return {"loss_x": sum(p.sum() for p in self.parameters())}


def moved_weights(tmp_path, **changes):
    """Weights of :class:`Linear` after 3 steps, by name."""
    model = Linear()
    settings = TrainingSettings(
        iterations=3, batch_size=1, learning_rate=0.1, weight_decay=0.0, **changes
    )
    train(model, lambda start, stop: [[{}]] * (stop - start), settings, output_dir=tmp_path)
    return model.state_dict()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_longest_prefix_sets_the_rate(tmp_path, optimizer):
    plain = moved_weights(tmp_path / "plain", optimizer=optimizer)
    factors = {"backbone.": 0.5, "backbone.last": 2.0, "backbone.b": 0.25}
    moved = moved_weights(tmp_path / "factors", optimizer=optimizer, lr_multipliers=factors)
    expected = {"head": 1, "backbone.stem": 0.5, "backbone.last_conv": 2, "backbone.bias": 0.25}
    for name, factor in expected.items():
        assert (plain[name] != 0).all(), name
        assert torch.allclose(moved[name], factor * plain[name], rtol=1e-6), name
    assert not moved["frozen"].any()


def test_adam_moves_as_its_paper_says(tmp_path):
    """Kingma & Ba, ICLR 2015, Algorithm 1, with the clipped gradient of the loop."""
    settings = TrainingSettings(iterations=3, batch_size=1, learning_rate=0.1)
    gradient = 1.0  # of 14 trained weights: a norm of 3.7, below the limit of 10
    weight = first = second = 0.0
    for step in range(1, 4):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        root = (second / (1 - 0.999**step)) ** 0.5 + 1e-8
        weight -= settings.schedule()((step - 1) / 3) * first / (1 - 0.9**step) / root
    moved = moved_weights(tmp_path, optimizer="adam")
    assert moved["head"][0, 0].item() == pytest.approx(weight, rel=1e-5)


def test_a_prefix_of_no_parameter_is_named(tmp_path):
    words = "which fits none of the 5 parameters"
    with pytest.raises(ValueError, match=f"prefix 'body.', {words}"):
        moved_weights(tmp_path, lr_multipliers={"backbone.": 0.5, "body.": 0.1})


def test_a_prefix_may_be_that_of_what_is_frozen(tmp_path):
    plain = moved_weights(tmp_path / "plain")
    moved = moved_weights(tmp_path / "factor", lr_multipliers={"frozen": 0.1})
    assert all(torch.equal(value, plain[name]) for name, value in moved.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": "Adam"}, "optimizer must be one of sgd, adam, got 'Adam'"),
        ({"decay": "step"}, "decay must be one of cosine, poly, got 'step'"),
        ({"lr_multipliers": {"a": 0}}, r"lr_multipliers\['a'\] must be a positive number, got 0"),
        ({"lr_multipliers": {"a": float("nan")}}, "must be a positive number, got nan"),
        ({"lr_multipliers": {"a": float("inf")}}, "must be a positive number, got inf"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SETTINGS, **change)


def test_settings_compare_and_hash_and_do_not_change_with_the_mapping():
    factors = {"a": 0.5}
    settings = dataclasses.replace(SETTINGS, lr_multipliers=factors)
    assert settings == dataclasses.replace(SETTINGS, lr_multipliers={"a": 0.5})
    assert settings != SETTINGS
    factors["a"] = 2.0
    assert settings.lr_multipliers == {"a": 0.5}
    assert len({settings, dataclasses.replace(settings)}) == 1
