"""The loss of images with labels alone, against loops over what it says."""

import math

import pytest
import torch

from maskx.systems.maskx_rcnn.weak_losses import check_tag_loss_weight, largest_boxes, tag_loss


def draw(num_images=4, columns=6):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_images, columns, generator=generator, dtype=torch.float64) * 2
    labels = [torch.tensor(own) for own in ([1], [0, 3], [4, 2, 1], [5])]
    return logits.requires_grad_(), labels[:num_images]


def test_a_softmax_classifier_is_asked_for_each_label():
    logits, labels = draw()
    total = 0.0
    for row, own in zip(logits.detach().tolist(), labels, strict=True):
        below = sum(math.exp(value) for value in row)
        total -= sum(math.log(math.exp(row[label]) / below) for label in own) / len(own)
    loss = tag_loss(logits, labels)
    assert loss.item() == pytest.approx(total / 4)
    assert torch.autograd.gradcheck(lambda x: tag_loss(x, labels), logits)


def test_independent_classes_are_asked_one_by_one():
    logits, labels = draw()
    total = 0.0
    for row, own in zip(logits.detach().tolist(), labels, strict=True):
        for column, value in enumerate(row):
            chance = 1 / (1 + math.exp(-value))
            total -= math.log(chance if column in own else 1 - chance)
    assert tag_loss(logits, labels, is_sigmoid=True).item() == pytest.approx(total / 4)


@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_without_images_it_is_zero_with_a_graph(is_sigmoid):
    logits, _ = draw(num_images=0)
    loss = tag_loss(logits, [], is_sigmoid=is_sigmoid)
    assert loss == 0
    loss.backward()
    assert logits.grad is not None


def test_the_largest_proposal_of_each_image_with_tags_is_chosen():
    boxes = [
        torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 9.0, 4.0], [0.0, 0.0, 2.0, 9.0]]),
        torch.tensor([[0.0, 0.0, 4.0, 4.0]]),
        torch.zeros(0, 4),
    ]
    tags = [torch.tensor([2]), torch.tensor([]), torch.tensor([1])]
    chosen = largest_boxes(boxes, tags)
    assert [x.tolist() for x in chosen] == [[[1.0, 1.0, 9.0, 4.0]], [], []]


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_a_weight_out_of_range_is_refused_by_its_key(weight):
    with pytest.raises(ValueError, match=r"MODEL\.MASKX\.TAG_LOSS_WEIGHT.*Allowed: 0"):
        check_tag_loss_weight(weight)


def test_a_frozen_detector_is_taught_no_classes():
    check_tag_loss_weight(0.0, freeze_detector=True)
    with pytest.raises(ValueError, match=r"TAG_LOSS_WEIGHT\) is 0\.1.*frozen"):
        check_tag_loss_weight(0.1, freeze_detector=True)
