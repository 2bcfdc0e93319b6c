"""The loss of masks that a moving average of the model makes, against loops over what it says."""

import copy
import math

import pytest
import torch
from torch import nn

from maskx.core.mask_quality import mask_quality
from maskx.systems.maskx_rcnn.weak_losses import EMATeacher, masks_in_rois

M = 6


def draw(num_rois=5, seed=0):
    """Logits of both models, RoIs and boxes."""
    generator = torch.Generator().manual_seed(seed)
    logits, sure = (
        torch.randn(num_rois, M, M, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    corners = torch.rand(num_rois, 2, generator=generator, dtype=torch.float64) * 20
    sides = 12 + torch.rand(num_rois, 2, generator=generator, dtype=torch.float64) * 20
    boxes = torch.cat([corners, corners + sides], dim=1)
    moved = torch.randn(num_rois, 4, generator=generator, dtype=torch.float64) * 2
    return logits.requires_grad_(), sure * 4 + 2, boxes + moved, boxes


def slow_mask(prob, box, roi):
    """Bilinear interpolation at the centre of each cell, cell by cell."""

    def at(row, column):
        row, column = (min(max(value, 0), M - 1) for value in (row, column))
        y, x = math.floor(row), math.floor(column)
        total = 0.0
        for i, share in ((y, 1 - row + y), (y + 1, row - y)):
            for j, part in ((x, 1 - column + x), (x + 1, column - x)):
                total += share * part * float(prob[min(i, M - 1), min(j, M - 1)])
        return total

    mask = torch.zeros(M, M, dtype=torch.bool)
    for row in range(M):
        for column in range(M):
            x = roi[0] + (roi[2] - roi[0]) * (column + 0.5) / M
            y = roi[1] + (roi[3] - roi[1]) * (row + 0.5) / M
            if box[0] <= x <= box[2] and box[1] <= y <= box[3]:
                on_grid = (
                    (y - box[1]) / (box[3] - box[1]) * M - 0.5,
                    (x - box[0]) / (box[2] - box[0]) * M - 0.5,
                )
                mask[row, column] = at(*on_grid) >= 0.5
    return mask


def test_masks_in_rois_are_interpolated_at_the_centres_of_their_cells():
    _, teacher_logits, rois, boxes = draw()
    prob = teacher_logits.sigmoid()
    found = masks_in_rois(prob, boxes, rois)
    expected = [
        slow_mask(p, b.tolist(), r.tolist()) for p, b, r in zip(prob, boxes, rois, strict=True)
    ]
    assert torch.equal(found, torch.stack(expected))
    assert found.any(dim=(1, 2)).all()
    assert not found.all(dim=(1, 2)).any()
    assert torch.equal(masks_in_rois(prob, boxes, boxes), prob >= 0.5)  # their own grids


def make_teacher(**arguments):
    teacher = EMATeacher(**arguments)
    teacher.follow(layer=nn.Linear(2, 2))
    return teacher


def test_the_loss_is_the_cross_entropy_with_good_masks_weighted_by_their_quality():
    logits, teacher_logits, rois, boxes = draw(num_rois=12)
    prob = teacher_logits.sigmoid()
    quality = mask_quality(prob, boxes)
    bound = quality.median().item()
    total, kept = 0.0, 0
    for each, p, q, box, roi in zip(logits, prob, quality, boxes, rois, strict=True):
        if q < bound:
            continue
        target = slow_mask(p, box.tolist(), roi.tolist())
        chance = torch.where(target, each.sigmoid(), 1 - each.sigmoid()).detach()
        total, kept = total - float(q) * float(chance.log().mean()), kept + 1
    assert 0 < kept < 12
    teacher = make_teacher(weight=0.5, min_quality=bound)
    teacher.updated()
    loss = teacher(logits, teacher_logits, rois, boxes)
    assert loss.item() == pytest.approx(0.5 * total / kept)
    loss.backward()
    learned = logits.grad.abs().sum(dim=(1, 2)) > 0
    assert torch.equal(learned, quality >= bound)


@pytest.mark.parametrize("kind", ["no RoI", "no good mask"])
def test_with_nothing_to_learn_it_is_zero_with_a_graph(kind):
    logits, teacher_logits, rois, boxes = draw(num_rois=0 if kind == "no RoI" else 3)
    teacher = make_teacher(min_quality=1.0)
    teacher.updated()
    loss = teacher(logits, teacher_logits, rois, boxes)
    assert loss == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_average_is_exponential_and_nothing_of_it_learns():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    teacher = EMATeacher(decay=0.9)
    teacher.follow(part=student)
    assert not any(p.requires_grad for p in teacher.parameters())
    expected = None
    for _ in range(4):
        with torch.no_grad():
            for value in student.parameters():
                value += torch.randn_like(value)
            student(torch.randn(5, 3))  # changes the statistics of the norm
        weights = [p.detach().clone() for p in student.parameters()]
        expected = [
            w if e is None else 0.9 * e + 0.1 * w
            for e, w in zip(expected or [None] * len(weights), weights, strict=True)
        ]
        averaged = teacher.updated()["part"]
        torch.testing.assert_close(list(averaged.parameters()), expected)
        assert not averaged.training
        # Statistics are those of the model: their own averages.
        torch.testing.assert_close(list(averaged.buffers()), list(student.buffers()))


def test_the_weight_rises_and_a_resumed_run_goes_on_where_it_was():
    logits, teacher_logits, rois, boxes = draw()
    teacher = make_teacher(weight=2.0, warm_up=4, min_quality=0.0)
    found = []
    for step in range(6):
        if step == 2:
            resumed = make_teacher(weight=2.0, warm_up=4, min_quality=0.0)
            resumed.load_state_dict(teacher.state_dict())
            teacher = resumed
        teacher.updated()
        found.append(teacher(logits, teacher_logits, rois, boxes).item())
    shares = [0.25, 0.5, 0.75, 1, 1, 1]
    assert found == pytest.approx([found[-1] * share for share in shares])


def test_a_resumed_average_is_equal_to_the_bit():
    def train(stops):
        torch.manual_seed(0)
        student, teacher = nn.Linear(4, 4), EMATeacher(decay=0.95)
        teacher.follow(part=student)
        for step in range(6):
            teacher.updated()
            with torch.no_grad():
                student.weight *= 1 + 0.01 * step
            if step == stops:
                state = copy.deepcopy((student.state_dict(), teacher.state_dict()))
                student, teacher = nn.Linear(4, 4), EMATeacher(decay=0.95)
                teacher.follow(part=student)
                student.load_state_dict(state[0])
                teacher.load_state_dict(state[1])
        return teacher.updated()["part"].weight

    assert torch.equal(train(stops=2), train(stops=-1))


@pytest.mark.parametrize("missing", ["all", "a part"])
def test_of_a_checkpoint_that_lacks_a_part_it_begins_anew_with_the_weights_of_the_model(missing):
    old, student = nn.Linear(2, 2), nn.Linear(2, 2)
    source, teacher = EMATeacher(), EMATeacher()
    source.follow(part=old)
    teacher.follow(part=student)
    source.updated()
    state = source.state_dict()
    for name in list(state):
        if missing == "all" or name.endswith("bias"):
            del state[name]
    teacher.load_state_dict(state, strict=False)
    averaged = teacher.updated()["part"]
    assert torch.equal(averaged.weight, student.weight)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("weight", -1, "0 or more"),
        ("decay", 1.0, "below 1"),
        ("decay", float("nan"), "below 1"),
        ("min_quality", 1.5, "0 to 1"),
        ("warm_up", -1, "0 or more"),
    ],
)
def test_options_out_of_range_are_refused_by_name_and_key(name, value, allowed):
    match = rf"{name} .*MODEL\.MASKX\.EMA_TEACHER\.{name.upper()}.*{value}.*{allowed}"
    with pytest.raises(ValueError, match=match):
        EMATeacher(**{name: value})
