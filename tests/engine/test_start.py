"""Trainings that start from a trained run."""

import functools

import pytest
import torch

from maskx.engine.checkpoints import write_checkpoint
from maskx.engine.runs import Run, write_run
from maskx.engine.start import read_start
from maskx.engine.training import CHECKPOINT_NAME
from maskx.systems.maskx_rcnn.pipeline import build_detector

OLD, NEW = ("cup", "bowl", "fork"), ("fork", "plate", "cup", "spoon")
BRANCH = {"predictor": "transfer", "transfer_inputs": "cls", "transfer_mix": 0.05}
SETTINGS = {"backbone": "small", "frozen_norm": False, "image_size": 32, "mask_branch": BRANCH}
build = functools.partial(build_detector, SETTINGS)


@pytest.fixture
def trained(tmp_path):
    """A model of the old categories, and the folder of its run."""
    torch.manual_seed(1)
    model = build(OLD)
    model.detector.roi_heads.mask_head.predictor.taught[1] = True
    folder = tmp_path / "first"
    run = Run(system="maskx", host="pip", class_names=OLD, settings=SETTINGS)
    folder.mkdir()
    write_run(folder, run)
    content = {"model": model.state_dict(), "run": run.as_json(), "iteration": 1}
    write_checkpoint(folder / CHECKPOINT_NAME, content)
    return model, folder


def test_rows_of_categories_go_by_name_and_all_else_as_it_is(trained):
    model, folder = trained
    start = read_start(folder, "maskx")
    assert start.describe(NEW).endswith("knows 2 of 4 categories; new: 'plate', 'spoon'.")
    torch.manual_seed(2)
    initial = build(NEW).state_dict()
    torch.manual_seed(2)
    found = start.give_to(build, NEW)
    after = torch.rand(1)
    torch.manual_seed(2)
    build(NEW)
    assert torch.equal(after, torch.rand(1))  # what follows is no matter of it
    old, new = model.state_dict(), found.state_dict()
    by_category = [
        "detector.roi_heads.box_predictor.cls_score.weight",
        "detector.roi_heads.box_predictor.cls_score.bias",
        "detector.roi_heads.box_predictor.bbox_pred.weight",
        "detector.roi_heads.box_predictor.bbox_pred.bias",
        "detector.roi_heads.mask_head.predictor.taught",
    ]
    for key, value in new.items():
        if key.endswith("_extra_state"):  # what the network is
            continue
        if key not in by_category:
            assert torch.equal(value, old[key]), key
            continue
        first = 0 if key.endswith("taught") else 1  # the background's
        ours, theirs, fresh = (
            each[key].reshape(len(names) + first, -1)
            for each, names in ((new, NEW), (old, OLD), (initial, NEW))
        )
        assert torch.equal(ours[:first], theirs[:first]), key
        for index, name in enumerate(NEW, start=first):
            source = theirs[first + OLD.index(name)] if name in OLD else fresh[index]
            assert torch.equal(ours[index], source), (key, name)


def test_the_same_categories_are_the_same_model(trained):
    model, folder = trained
    found = read_start(folder, "maskx").give_to(build, OLD)
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items()
    )


def test_a_training_with_a_teacher_starts_from_one_without(trained):
    """The teacher's average is no part of the run, and begins with the weights of the model."""
    model, folder = trained
    with_teacher = SETTINGS | {"mask_branch": BRANCH | {"ema_teacher": {}}}
    found = read_start(folder, "maskx").give_to(
        functools.partial(build_detector, with_teacher), OLD
    )
    heads = found.detector.roi_heads
    own = heads.ema_teacher.updated()["mask_head"].state_dict()
    expected = model.detector.roi_heads.mask_head.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in own.items())


def test_another_network_system_or_host_is_refused(trained, tmp_path):
    _, folder = trained
    start = read_start(folder, "maskx")
    settings = SETTINGS | {"mask_branch": {**BRANCH, "channels": 16}}
    with pytest.raises(ValueError, match=r"first' is of another network: .*Give the same backbone"):
        start.give_to(functools.partial(build_detector, settings), OLD)
    other = {"backbone": "resnet18", "frozen_norm": True}
    with pytest.raises(ValueError, match=r"is of another network: .*Give the same backbone"):
        start.give_to(functools.partial(build_detector, SETTINGS | other), OLD)
    with pytest.raises(ValueError, match=r"holds a run of maskx on pip\. A training of larvseg"):
        read_start(folder, "larvseg")
    with pytest.raises(FileNotFoundError, match="there is no such run folder"):
        read_start(tmp_path / "nowhere", "maskx")
