"""The losses of objects with a box only, against loops over their equations."""

import math

import cv2
import numpy as np
import pytest
import torch

from maskx.systems.maskx_rcnn.weak_losses import (
    BoxMaskLoss,
    box_mask_losses,
    box_projections,
    pairwise_loss,
    projection_loss,
    rgb_to_lab,
    roi_colours,
)

M = 6


def draw(num_rois=3, seed=0, size=M):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rois, size, size, generator=generator, dtype=torch.float64) * 3
    colours = torch.rand(num_rois, 3, size, size, generator=generator, dtype=torch.float64) * 6
    return logits.requires_grad_(), colours


def slow_projection(logits, across, down):
    losses = []
    for p, columns, rows in zip(logits.sigmoid(), across, down, strict=True):
        loss = 0.0
        for target, values in ((columns, p.max(0).values), (rows, p.max(1).values)):
            top = sum(float(v) for v, t in zip(values, target, strict=True) if t)
            bottom = sum(float(v) ** 2 for v in values) + int(target.sum()) + 1e-5
            loss += 1 - 2 * top / bottom
        losses.append(loss)
    return sum(losses) / len(losses)


def slow_pairwise(logits, inside, colours, dilation, min_similarity):
    """Over all eight neighbours, so that each pair counts twice in both sums."""
    total, count, prob = 0.0, 0, logits.sigmoid()
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    for r in range(len(logits)):
        for y in range(M):
            for x in range(M):
                for i, j in steps:
                    v, u = y + i * dilation, x + j * dilation
                    if not (0 <= v < M and 0 <= u < M and inside[r, y, x] and inside[r, v, u]):
                        continue
                    distance = (colours[r, :, y, x] - colours[r, :, v, u]).norm()
                    if math.exp(-float(distance) / 2) < min_similarity:
                        continue
                    p, q = float(prob[r, y, x]), float(prob[r, v, u])
                    total -= math.log(p * q + (1 - p) * (1 - q))
                    count += 1
    return total / max(count, 1), count


def test_box_projections_are_the_cells_whose_centre_is_in_the_box():
    rois = torch.tensor([[10.0, 20.0, 22.0, 32.0], [0.0, 0.0, 6.0, 6.0]])
    boxes = torch.tensor([[13.0, 10.0, 40.0, 25.0], [0.0, 0.0, 6.0, 6.0]])
    across, down = box_projections(rois, boxes, M)
    # Cells are 2 pixels, with centres at 11, 13, ... and 21, 23, ...
    assert across[0].tolist() == [False, True, True, True, True, True]
    assert down[0].tolist() == [True, True, True, False, False, False]
    assert across[1].all()
    assert down[1].all()


def test_projection_loss_is_the_equation():
    logits, _ = draw()
    across = torch.tensor([[0, 1, 1, 1, 0, 0], [1] * 6, [0, 0, 0, 0, 0, 1]]).bool()
    down = torch.tensor([[1] * 6, [0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    expected = slow_projection(logits.detach(), across, down)
    assert projection_loss(logits, across, down).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("min_similarity", [0.0, 0.3, 0.6])
def test_pairwise_loss_is_the_equation(dilation, min_similarity):
    logits, colours = draw()
    inside = torch.ones(3, M, M, dtype=torch.bool)
    inside[0, :2] = False
    inside[1, :, 5] = False
    expected, count = slow_pairwise(
        logits.detach(), inside, colours, dilation=dilation, min_similarity=min_similarity
    )
    assert count > 0
    found = pairwise_loss(logits, inside, colours, dilation=dilation, min_similarity=min_similarity)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_gradients_are_those_of_finite_differences():
    logits, colours = draw(num_rois=2)
    rois = torch.tensor([[0.0, 0.0, 12.0, 12.0], [3.0, 1.0, 9.0, 13.0]], dtype=torch.float64)
    boxes = torch.tensor([[2.0, 1.0, 9.0, 12.0], [3.0, 3.0, 9.0, 9.0]], dtype=torch.float64)

    def loss(x):
        return sum(box_mask_losses(x, rois, boxes, colours, dilation=1).values())

    assert torch.autograd.gradcheck(loss, logits)


def test_cells_outside_the_box_learn_to_be_background_and_those_inside_agree():
    """In a box of one colour, half filled, the pairwise term fills it: it has no other rest."""
    rois = torch.tensor([[0.0, 0.0, 6.0, 6.0]], dtype=torch.float64)
    boxes = torch.tensor([[1.0, 1.0, 5.0, 5.0]], dtype=torch.float64)
    colours = torch.zeros(1, 3, M, M, dtype=torch.float64)
    logits = torch.zeros(1, M, M, dtype=torch.float64)
    logits[:, 1:5, 1:3] = 1.0
    logits.requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(300):
        loss = sum(box_mask_losses(logits, rois, boxes, colours, dilation=1).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = torch.zeros(M, M, dtype=torch.bool)
    expected[1:5, 1:5] = True
    assert torch.equal(logits[0] > 0, expected)


@pytest.mark.parametrize("what", ["no RoI", "no pair", "grid smaller than the dilation"])
def test_where_there_is_nothing_to_compare_the_loss_is_zero_with_a_graph(what):
    size = 2 if what.startswith("grid") else M
    logits, colours = draw(num_rois=0 if what == "no RoI" else 2, size=size)
    if what == "no pair":
        colours = torch.rand(colours.shape, dtype=torch.float64) * 1e4
    rois = torch.tensor([[0.0, 0.0, 6.0, 6.0]], dtype=torch.float64).expand(len(logits), 4)
    losses = box_mask_losses(logits, rois, rois, colours, dilation=3 if size == 2 else 2)
    assert losses["pairwise"] == 0
    sum(losses.values()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    if what == "no RoI":
        assert losses["projection"] == 0


def test_lab_is_that_of_opencv():
    image = np.random.default_rng(0).random((9, 11, 3), dtype=np.float32)
    image[0, 0], image[0, 1], image[0, 2] = 0, 1, 0.01
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    found = rgb_to_lab(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    assert np.abs(found.numpy() - expected).max() < 0.4  # OpenCV reads its curves from tables
    primaries = rgb_to_lab(torch.eye(3)[:, :, None])[..., 0]
    known = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    torch.testing.assert_close(primaries, torch.tensor(known), atol=0.02, rtol=0)


def test_colours_of_a_roi_are_those_under_its_cells():
    image = torch.zeros(2, 3, 12, 12)
    image[1, 0, :, 6:] = 1.0  # red on the right
    boxes = [torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 12.0, 12.0]])]
    colours = roi_colours(image, boxes, M)
    red = rgb_to_lab(torch.tensor([1.0, 0.0, 0.0])[None, :, None, None])[0, :, 0, 0]
    assert colours.shape == (1, 3, M, M)
    torch.testing.assert_close(colours[0, :, :, :3], torch.zeros(3, M, 3))
    torch.testing.assert_close(colours[0, :, :, 3:], red[:, None, None].expand(3, M, 3))


def test_the_pairwise_term_rises_and_a_resumed_run_goes_on_where_it_was():
    logits, _ = draw()
    rois = [torch.tensor([[0.0, 0.0, 9.0, 9.0]]).double().expand(3, 4)]
    images = torch.full((1, 3, 12, 12), 0.5).double()
    losses = box_mask_losses(logits, rois[0], rois[0], roi_colours(images, rois, M), dilation=1)
    projection, pairwise = losses["projection"].item(), losses["pairwise"].item()
    assert pairwise > 0
    loss = BoxMaskLoss(weight=0.5, warm_up=4)
    found = [loss(logits, rois, rois[0], images).item() for _ in range(2)]
    resumed = BoxMaskLoss(weight=0.5, warm_up=4)
    resumed.load_state_dict(loss.state_dict())
    found += [resumed(logits, rois, rois[0], images).item() for _ in range(3)]
    expected = [0.5 * (projection + share * pairwise) for share in (0.25, 0.5, 0.75, 1, 1)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", -1), ("warm_up", -1), ("dilation", 0), ("min_similarity", -0.1)],
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        BoxMaskLoss(**{name: value})
