"""The quality of masks, against loops over what it says."""

import pytest
import torch

from maskx.core.mask_quality import box_agreement, expected_iou, mask_quality


def slow_iou(one, other):
    overlap = [max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1)]
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    shared = overlap[0] * overlap[1]
    return shared / (sum(areas) - shared)


def slow_quality(prob, box):
    """Of one mask on the grid of its box."""
    on = [(y, x) for y, row in enumerate(prob) for x, p in enumerate(row) if p >= 0.5]
    if not on:
        return 0.0
    shared = sum(float(prob[y, x]) for y, x in on)
    union = len(on) + sum(float(p) for p in prob.flatten() if p < 0.5)
    height, width = prob.shape
    cell = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    rows, columns = [y for y, _ in on], [x for _, x in on]
    extent = [
        box[0] + min(columns) * cell[0],
        box[1] + min(rows) * cell[1],
        box[0] + (max(columns) + 1) * cell[0],
        box[1] + (max(rows) + 1) * cell[1],
    ]
    extent = [b if abs(e - b) < 1 else e for e, b in zip(extent, box, strict=True)]
    return shared / union * slow_iou(extent, box)


def test_the_quality_is_the_expected_iou_times_the_agreement_with_the_box():
    generator = torch.Generator().manual_seed(0)
    prob = torch.rand(40, 5, 7, generator=generator, dtype=torch.float64)
    prob = (prob * torch.linspace(0.45, 1.3, 40)[:, None, None]).clamp(max=1)
    corners = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 20
    sides = 2 + torch.rand(40, 2, generator=generator, dtype=torch.float64) * 60
    boxes = torch.cat([corners, corners + sides], dim=1)
    expected = [slow_quality(p, b) for p, b in zip(prob, boxes.tolist(), strict=True)]
    assert min(expected) == 0
    assert max(expected) > 0.6
    torch.testing.assert_close(mask_quality(prob, boxes).tolist(), expected)


def test_a_sure_mask_that_fills_its_box_has_the_quality_1_and_an_empty_one_0():
    boxes = torch.tensor([[3.0, 4.0, 20.0, 30.0]] * 2)
    prob = torch.stack([torch.ones(6, 6), torch.zeros(6, 6)])
    assert mask_quality(prob, boxes).tolist() == [1, 0]
    assert mask_quality(prob[:0], boxes[:0]).shape == (0,)


def test_a_mask_that_misses_a_part_of_the_box_is_worth_less_by_that_part():
    prob = torch.ones(1, 8, 8)
    prob[:, :, 4:] = 0
    assert mask_quality(prob, torch.tensor([[0.0, 0.0, 40.0, 40.0]])).item() == 0.5


def test_the_expected_iou_falls_with_doubt():
    sure, unsure = torch.full((2, 4, 4), 0.9), torch.full((2, 4, 4), 0.6)
    sure[:, 0], unsure[:, 0] = 0.1, 0.4
    assert (expected_iou(sure) > expected_iou(unsure)).all()


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_pixels_that_the_box_cuts_are_no_disagreement(shift):
    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 4:10, 5:15] = True
    image = torch.tensor([[0.0, 0.0, 30.0, 20.0]])
    box = torch.tensor([[5 + shift, 4 + shift, 15 - shift, 10 - shift]])
    assert box_agreement(masks, image, box).item() == pytest.approx(1)
    box = torch.tensor([[5.0, 4.0, 25.0, 10.0]])
    assert box_agreement(masks, image, box).item() == pytest.approx(0.5)
