import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.systems.concept_mask.losses import (
    box_loss,
    box_maps,
    discrimination_loss,
    matched_concepts,
    matching_loss,
    negative_concepts,
    peak_activations,
)
from maskx.systems.concept_mask.network import AttentionRefinement, initial_attention


def cross_entropy(logit, target):
    prob = 1 / (1 + math.exp(-logit))
    return -math.log(prob if target else 1 - prob)


def slow_box_maps(boxes, box_rows, num_rows, image_size, map_size):
    (height, width), (h, w) = image_size, map_size
    maps = torch.zeros(num_rows, h, w)
    for (x0, y0, x1, y1), row in zip(boxes, box_rows, strict=True):
        x0, x1 = (min(max(x, 0), width) for x in (x0, x1))
        y0, y1 = (min(max(y, 0), height) for y in (y0, y1))
        cells = [
            (i, j)
            for i in range(h)
            for j in range(w)
            if y0 <= (i + 0.5) * height / h < y1 and x0 <= (j + 0.5) * width / w < x1
        ]
        own = (int((y0 + y1) / 2 * h / height), int((x0 + x1) / 2 * w / width))
        for i, j in cells or [own]:
            maps[row, min(i, h - 1), min(j, w - 1)] = 1
    return maps


def test_box_maps_are_those_drawn_by_hand():
    boxes = torch.tensor(
        [
            [
                0.0,
                0,
                24,
                15,
            ],  # ends at the centre of the second column, above that of the second row
            [24, 25, 60, 64],
            [33, 1, 35, 7],  # no centre at all
        ]
    )
    maps = box_maps(boxes, torch.tensor([0, 0, 2]), 3, (64, 64), (4, 4))
    assert maps.tolist() == [
        [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]],
        [[0, 0, 0, 0]] * 4,
        [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
    assert box_maps(boxes[:0], torch.tensor([], dtype=torch.int64), 0, (64, 64), (4, 4)).shape == (
        0,
        4,
        4,
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_box_maps_equal_a_loop_over_cells(data):
    side = st.integers(1, 40)
    height, width = data.draw(side), data.draw(side)
    map_size = (data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7)))
    coordinate = st.integers(-5, 45)
    corners = st.tuples(coordinate, coordinate, st.integers(0, 30), st.integers(0, 30))
    boxes = [[x, y, x + w, y + h] for x, y, w, h in data.draw(st.lists(corners, max_size=5))]
    rows = [data.draw(st.integers(0, 2)) for _ in boxes]
    found = box_maps(
        torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        torch.tensor(rows, dtype=torch.int64),
        3,
        (height, width),
        map_size,
    )
    expected = slow_box_maps(boxes, rows, 3, (height, width), map_size)
    assert torch.equal(found.float(), expected)
    # No row that has a box is empty.
    assert set(found.flatten(1).any(dim=1).nonzero().flatten().tolist()) == set(rows)


def test_the_box_loss_is_the_mean_over_cells_and_pairs():
    logits, targets = torch.randn(3, 2, 4).double(), (torch.rand(3, 2, 4) > 0.5).float()
    expected = [
        cross_entropy(z, g)
        for z, g in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True)
    ]
    assert box_loss(logits, targets).item() == pytest.approx(sum(expected) / 24)


@given(
    num_concepts=st.integers(1, 70),
    num_matched=st.integers(1, 80),
    chunk=st.integers(1, 80),
    num_images=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_streaming_top_n_equals_dense_top_n(num_concepts, num_matched, chunk, num_images):
    torch.manual_seed(num_concepts)
    maps, vectors = torch.randn(num_images, 4, 3, 2).double(), torch.randn(num_concepts, 4).double()
    peaks = peak_activations(maps, vectors, chunk=chunk)
    found = matched_concepts(maps, vectors, num_matched)
    dense = torch.einsum("nkhw,vk->nvhw", maps, vectors).flatten(2).max(dim=2).values
    torch.testing.assert_close(peaks, dense)
    count = min(num_matched, num_concepts // 2)
    assert found.shape == (num_images, count)
    assert torch.equal(found, dense.argsort(dim=1, descending=True)[:, :count])


def test_800_concepts_are_matched_of_a_large_vocabulary():
    maps, vectors = torch.randn(2, 3, 2, 2), torch.randn(1700, 3)
    assert matched_concepts(maps, vectors).shape == (2, 800)


def test_streaming_keeps_no_graph():
    maps = torch.randn(1, 3, 2, 2, requires_grad=True)
    assert not peak_activations(maps, torch.randn(4, 3)).requires_grad


def test_the_matching_loss_is_a_sum_over_cells_and_concepts_and_a_mean_over_images():
    torch.manual_seed(0)
    original, vectors = torch.randn(2, 4, 3, 5).double(), torch.randn(9, 4).double()
    concepts = torch.tensor([[3, 1, 8], [0, 1, 2]])
    logits = torch.randn(2, 3, 3, 5).double()
    total, num_on = 0.0, 0
    for image in range(2):
        for slot, concept in enumerate(concepts[image].tolist()):
            coarse = [
                sum((original[image, :, i, j] * vectors[concept]).tolist())
                for i in range(3)
                for j in range(5)
            ]
            mean = sum(coarse) / 15
            std = math.sqrt(sum((value - mean) ** 2 for value in coarse) / 15)
            for value, z in zip(coarse, logits[image, slot].flatten().tolist(), strict=True):
                total += cross_entropy(z, value > mean + std)
                num_on += value > mean + std
    assert 0 < num_on < 45
    assert matching_loss(logits, original, vectors, concepts).item() == pytest.approx(total / 2)


def test_a_match_is_above_the_standard_deviation_of_the_map_itself_not_of_a_sample():
    original, vectors = torch.tensor([0.0, 1.0, 2.0]).reshape(1, 1, 1, 3), torch.ones(2, 1)
    logits = torch.zeros(1, 1, 1, 3, requires_grad=True)
    matching_loss(logits, original, vectors, torch.tensor([[1]])).backward()
    # At logit 0 the gradient is 0.5 - target; the threshold is 1 + 0.82, of a sample 1 + 1.
    assert logits.grad.flatten().tolist() == [0.5, 0.5, -0.5]


def test_a_constant_initial_map_matches_nothing():
    # Its sum over its number of cells is less than its value.
    original, vectors = torch.full((1, 1, 37, 41), 0.01), torch.ones(2, 1)
    logits = torch.zeros(1, 1, 37, 41, requires_grad=True)
    matching_loss(logits, original, vectors, torch.tensor([[1]])).backward()
    # At logit 0 the gradient is 0.5 - target.
    assert (logits.grad == 0.5).all()
    one = torch.zeros(1, 1, 1, 1, requires_grad=True)
    matching_loss(one, torch.ones(1, 1, 1, 1), vectors, torch.tensor([[0]])).backward()
    assert one.grad.item() == 0.5


def test_the_matching_loss_has_no_gradient_to_what_stage_1_saw():
    original = torch.randn(1, 4, 3, 3, requires_grad=True)
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    matching_loss(logits, original, torch.randn(5, 4), torch.tensor([[0, 4]])).backward()
    assert original.grad is None
    assert logits.grad.all()


# Rows of gamma: 0 excludes 2 and 5, 1 nothing, 2 excludes 0, 5 excludes 0, 2 and 4.
GAMMA = (
    torch.tensor([0, 2, 2, 3, 3, 3, 6]),
    torch.tensor([2, 5, 0, 0, 2, 4]),
    torch.tensor([0.9, 0.6, 0.7, 1.0, 0.5, 0.8]),
)


def dense_gamma():
    indptr, indices, weights = GAMMA
    dense = torch.zeros(6, 6)
    for i in range(6):
        for entry in range(indptr[i], indptr[i + 1]):
            dense[i, indices[entry]] = weights[entry]
    return dense


@pytest.mark.parametrize("index_type", [torch.int64, torch.int32])
def test_negative_concepts_are_those_of_gamma(index_type):
    gamma = (GAMMA[0].to(index_type), GAMMA[1].to(index_type), GAMMA[2])
    negatives, weights = negative_concepts(torch.tensor([2, 0, 1]), gamma)
    assert negatives.tolist() == [0, 2, 5]
    expected = torch.tensor([[0.7, 0, 0], [0, 0.9, 0.6], [0, 0, 0]])
    assert torch.equal(weights, expected)


@given(st.lists(st.integers(0, 5), max_size=8))
@settings(max_examples=40, deadline=None)
def test_negative_concepts_are_rows_of_the_dense_matrix(concepts):
    negatives, weights = negative_concepts(torch.tensor(concepts, dtype=torch.int64), GAMMA)
    rows = dense_gamma()[concepts] if concepts else torch.zeros(0, 6)
    assert negatives.tolist() == rows.any(dim=0).nonzero().flatten().tolist()
    assert torch.equal(weights, rows[:, negatives])


def slow_discrimination_loss(every_logit, targets, pair_images, pair_concepts, gamma):
    """Eq. 4 pair by pair, with logits of all concepts and a dense gamma."""
    losses = []
    for row, (image, i) in enumerate(zip(pair_images, pair_concepts, strict=True)):
        cells = targets[row].nonzero().tolist()
        num_negatives = int((gamma[i] > 0).sum())
        if not cells or not num_negatives:
            continue
        loss = 0.0
        for j in range(len(gamma)):
            values = [cross_entropy(every_logit[image, j, y, x].item(), False) for y, x in cells]
            loss += gamma[i, j].item() * sum(values) / len(values)
        losses.append(loss / num_negatives)
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize(
    ("pair_images", "pair_concepts"),
    [([0, 2, 2, 2], [0, 5, 1, 2]), ([2, 0, 2], [0, 0, 5]), ([1], [1]), ([], [])],
)
def test_the_discrimination_loss_equals_a_loop_over_pairs(pair_images, pair_concepts):
    torch.manual_seed(0)
    every_logit = torch.randn(3, 6, 2, 3).double()
    targets = (torch.rand(len(pair_images), 2, 3) > 0.4).float()
    if len(targets) == 4:
        targets[3] = 0
    images = torch.tensor(pair_images, dtype=torch.int64)
    negatives, weights = negative_concepts(torch.tensor(pair_concepts, dtype=torch.int64), GAMMA)
    found = discrimination_loss(every_logit[:, negatives], targets, images, weights)
    expected = slow_discrimination_loss(
        every_logit, targets, pair_images, pair_concepts, dense_gamma()
    )
    assert found.item() == pytest.approx(expected)


def test_only_negatives_in_the_cells_of_the_concept_are_pushed_down():
    logits = torch.zeros(2, 6, 1, 2, requires_grad=True)
    negatives, weights = negative_concepts(torch.tensor([0]), GAMMA)
    targets = torch.tensor([[[1.0, 0.0]]])
    discrimination_loss(logits[:, negatives], targets, torch.tensor([1]), weights).backward()
    pushed = logits.grad.nonzero().tolist()
    assert pushed == [[1, 2, 0, 0], [1, 5, 0, 0]]
    # 0.5 is the gradient of -log(1 - sigmoid(0)), times 0.9 and 0.6; mean of two negatives.
    torch.testing.assert_close(logits.grad[1, [2, 5], 0, 0], torch.tensor([0.225, 0.15]))


def test_a_very_sure_logit_has_a_finite_loss():
    logits = torch.full((1, 1, 2, 2), 200.0, requires_grad=True)
    pair = (torch.ones(1, 2, 2), torch.tensor([0]), torch.ones(1, 1))
    loss = discrimination_loss(logits, *pair)
    assert loss.item() == 200
    loss.backward()
    assert logits.grad.isfinite().all()


def stage_2_losses(refinement, maps, pair_images, pair_concepts, *, num_matched=4, gamma=GAMMA):
    """The three losses as a model composes them; the maps are those of the frozen copy too."""
    images = torch.tensor(pair_images, dtype=torch.int64)
    concepts = torch.tensor(pair_concepts, dtype=torch.int64)
    targets = torch.ones(len(images), *maps.shape[-2:])
    targets[:, 0] = 0
    hidden = refinement.hidden(maps, refinement.vectors)
    matched = matched_concepts(maps, refinement.vectors, num_matched)
    negatives, weights = negative_concepts(concepts, gamma)
    return [
        box_loss(refinement.pair_logits(hidden, images, concepts), targets),
        matching_loss(refinement.logits(hidden, matched), maps, refinement.vectors, matched),
        discrimination_loss(refinement.logits(hidden, negatives), targets, images, weights),
    ]


class Refinement(AttentionRefinement):
    """With the word vectors, which a model holds."""

    def __init__(self, vectors, hidden):
        super().__init__(len(vectors), hidden_channels=hidden)
        self.register_buffer("vectors", vectors)


def make_refinement():
    torch.manual_seed(0)
    return Refinement(torch.randn(6, 4), 7)


def test_every_loss_reaches_every_parameter_and_the_embeddings():
    refinement = make_refinement()
    for number in range(3):
        maps = torch.randn(2, 4, 3, 3, requires_grad=True)
        refinement.zero_grad()
        stage_2_losses(refinement, maps, [0, 1, 1], [0, 5, 2])[number].backward()
        assert maps.grad.any()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in refinement.parameters())


@pytest.mark.parametrize("pairs", [([], []), ([1], [1])])
def test_a_batch_without_supervision_gives_zero_with_a_graph_through_every_parameter(pairs):
    """No boxes at all; and boxes in half of the batch, of a concept that excludes nothing."""
    refinement = make_refinement()
    boxes, _, discrimination = stage_2_losses(refinement, torch.randn(2, 4, 3, 3), *pairs)
    empty = [discrimination] if pairs[0] else [boxes, discrimination]
    for loss in empty:
        assert loss.item() == 0
        refinement.zero_grad()
        loss.backward(retain_graph=True)
        assert all(p.grad is not None and not p.grad.any() for p in refinement.parameters())
    assert not pairs[0] or boxes > 0


def test_a_vocabulary_too_small_to_match_gives_zero_with_a_graph():
    refinement = Refinement(torch.randn(1, 4), 7)
    maps = torch.randn(2, 4, 3, 3, requires_grad=True)
    gamma = (torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    matching = stage_2_losses(refinement, maps, [0], [0], gamma=gamma)[1]
    assert matching.item() == 0
    matching.backward()
    assert all(p.grad is not None for p in [maps, *refinement.parameters()])


def test_bfloat16_autocast_is_finite_and_sums_in_full_precision():
    refinement = make_refinement()
    maps = torch.randn(2, 4, 30, 30)
    expected = stage_2_losses(refinement, maps, [0, 1, 1], [0, 5, 2])
    with torch.autocast("cpu", torch.bfloat16):
        maps = maps.bfloat16().requires_grad_()
        found = stage_2_losses(refinement, maps, [0, 1, 1], [0, 5, 2])
    for loss, reference in zip(found, expected, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, reference, rtol=0.05, atol=0.05)
    sum(found).backward()
    assert maps.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in refinement.parameters())


def test_half_precision_logits_are_summed_in_full_precision():
    logits = torch.zeros(1, 3, 60, 60, dtype=torch.bfloat16)
    maps, vectors = torch.zeros(1, 2, 60, 60), torch.zeros(6, 2)
    loss = matching_loss(logits, maps, vectors, torch.tensor([[0, 1, 2]]))
    assert loss.item() == pytest.approx(3 * 3600 * math.log(2), rel=1e-5)
    loss = discrimination_loss(logits, torch.ones(1, 60, 60), torch.tensor([0]), torch.ones(1, 3))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)


def test_training_on_boxes_and_on_old_maps_lowers_the_losses():
    refinement = make_refinement()
    maps = torch.randn(2, 4, 4, 4)
    optimiser = torch.optim.Adam(refinement.parameters(), lr=0.02)
    totals = []
    for _ in range(150):
        losses = stage_2_losses(refinement, maps, [0, 1], [0, 5], num_matched=2)
        total = losses[0] + 1e-2 * losses[1] + losses[2]
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0]
    # The concept is where its box is, and what it excludes is not.
    refined = refinement.eval()(maps, refinement.vectors).sigmoid()
    assert refined[0, 0, 1:].mean() > 0.5 > refined[0, 0, 0].mean()
    assert refined[0, [2, 5], 1:].mean() < 0.3


def test_the_matched_maps_are_the_initial_attention_of_the_matched_concepts():
    maps, vectors = torch.randn(2, 4, 3, 3), torch.randn(6, 4)
    matched = matched_concepts(maps, vectors, 3)
    each = initial_attention(maps, vectors[matched])
    every = F.conv2d(maps, vectors[:, :, None, None])
    torch.testing.assert_close(each, every.gather(1, matched[..., None, None].expand(-1, -1, 3, 3)))
