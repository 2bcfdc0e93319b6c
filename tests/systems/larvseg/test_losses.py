import math

import pytest
import torch
import torch.nn.functional as F

from maskx.core.losses import label_pairs
from maskx.systems.larvseg.network import (
    LogitFactors,
    attentive_loss,
    image_level_loss,
    segmentation_loss,
)

LABELS = [[3, 0, 5], [], [1]]


def make_factors(shift=0.3):
    torch.manual_seed(0)
    tensors = (torch.randn(3, 4, 2, 3), torch.randn(6, 4), torch.tensor(shift))
    return LogitFactors(*(tensor.double().requires_grad_() for tensor in tensors))


def cross_entropy(logits, kept, label):
    return math.log(sum(math.exp(logits[k]) for k in kept)) - logits[label]


def slow_label_losses(logits, labels, pool):
    """Loss of each pair: ``logits`` is (N, L, h, w), ``pool`` maps a row and its logits to (L,)."""
    losses, row = [], 0
    for image, each in enumerate(labels):
        for label in sorted(each):
            pooled = pool(row, logits[image].flatten(1)).tolist()
            kept = [k for k in range(logits.shape[1]) if k == label or k not in each]
            losses.append(cross_entropy(pooled, kept, label))
            row += 1
    return losses


def test_image_level_loss_equals_a_loop_over_pairs():
    factors = make_factors()
    losses = slow_label_losses(factors.dense(), LABELS, lambda row, logits: logits.mean(dim=1))
    found = image_level_loss(factors, label_pairs(LABELS, 6))
    assert found.item() == pytest.approx(sum(losses) / 4)


@pytest.mark.parametrize("pooling", ["weighted", "normalised"])
def test_attentive_loss_equals_a_loop_over_pairs(pooling):
    factors, attention = make_factors(), torch.rand(4, 6, dtype=torch.float64)
    ready = torch.tensor([True, False, True, True])

    def pool(row, logits):
        pooled = (logits * attention[row]).mean(dim=1)
        return pooled if pooling == "weighted" else pooled / attention[row].mean()

    losses = slow_label_losses(factors.dense(), LABELS, pool)
    # The pair that is not ready counts in the mean, with zero.
    expected = (losses[0] + losses[2] + losses[3]) / 4
    found = attentive_loss(factors, label_pairs(LABELS, 6), attention, ready, pooling=pooling)
    assert found.item() == pytest.approx(expected)


def test_an_even_attention_map_gives_the_image_level_loss_when_normalised():
    factors, pairs = make_factors(), label_pairs(LABELS, 6)
    attention, ready = torch.full((4, 6), 0.5).double(), torch.ones(4, dtype=torch.bool)
    found = attentive_loss(factors, pairs, attention, ready, pooling="normalised")
    assert found.item() == pytest.approx(image_level_loss(factors, pairs).item())


def test_the_gradient_flows_through_the_logits_alone():
    factors = make_factors()
    attention = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    ready = torch.ones(4, dtype=torch.bool)
    attentive_loss(factors, label_pairs(LABELS, 6), attention, ready).backward()
    assert attention.grad is None
    assert factors.vectors.grad.any(dim=1).all()
    assert factors.tokens.grad.flatten(1).any(dim=1).tolist() == [True, False, True]


def test_other_labels_of_the_image_are_not_pushed_down():
    factors = make_factors()
    pairs = label_pairs([[0, 2], [], []], 6)
    loss = image_level_loss(factors, pairs)
    (grad,) = torch.autograd.grad(loss, factors.vectors)
    # A label is pulled towards the image and pushed away by no other label of it.
    mean = factors.tokens[0].mean(dim=(1, 2))
    assert (grad[[0, 2]] @ mean < 0).all()
    assert (grad[[1, 3, 4, 5]] @ mean > 0).all()


@pytest.mark.parametrize("size", [None, (3, 5), (6, 8)])
def test_segmentation_loss_equals_a_loop_over_pixels(size):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    label_maps = torch.randint(0, 4, (2, 6, 8))
    label_maps[torch.rand(2, 6, 8) > 0.6] = 255
    height, width = size or (3, 4)
    resized = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
    losses = []
    for n in range(2):
        for y in range(height):
            for x in range(width):
                label = int(label_maps[n, y * 6 // height, x * 8 // width])
                if label != 255:
                    losses.append(cross_entropy(resized[n, :, y, x].tolist(), range(4), label))
    found = segmentation_loss(logits, label_maps, ignore=255, size=size)
    assert found.item() == pytest.approx(sum(losses) / len(losses))


def test_nearest_labels_are_those_of_interpolate():
    label_maps = torch.randint(0, 4, (1, 7, 9))
    logits = torch.randn(1, 4, 3, 4)
    nearest = F.interpolate(label_maps[None].float(), (3, 4), mode="nearest")[0].long()
    expected = F.cross_entropy(logits, nearest)
    torch.testing.assert_close(segmentation_loss(logits, label_maps, ignore=255), expected)


@pytest.mark.parametrize("num_images", [0, 2])
def test_without_labels_the_losses_are_zero_with_graph(num_images):
    factors = LogitFactors(
        torch.randn(num_images, 4, 2, 3, requires_grad=True),
        torch.randn(6, 4, requires_grad=True),
        torch.tensor(0.1, requires_grad=True),
    )
    pairs = label_pairs([[]] * num_images, 6)
    label_maps = torch.full((num_images, 4, 6), 255)
    losses = (
        image_level_loss(factors, pairs),
        attentive_loss(factors, pairs, torch.zeros(0, 6), torch.zeros(0, dtype=torch.bool)),
        segmentation_loss(factors.dense(), label_maps, ignore=255),
    )
    for loss in losses:
        assert loss.item() == 0
        grads = torch.autograd.grad(loss, factors)
        assert not any(grad.any() for grad in grads)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling of the attentive loss must be one of 'weighted'"):
        attentive_loss(
            make_factors(), label_pairs(LABELS, 6), torch.rand(4, 6), torch.ones(4), pooling="max"
        )
