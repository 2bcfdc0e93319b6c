import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskx.core.losses import pixel_loss
from maskx.systems.class_patterns.model import (
    DeepLab,
    LargeFOVHead,
    multi_scale_scores,
    restrict_to_labels,
)

IGNORE = 255


class Stride8(nn.Module):
    """Backbone of one layer with stride 8, as 241 / 8 is rounded up by a padded convolution."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 9, stride=8, padding=4)

    def forward(self, images):
        return {"last": self.conv(images).relu()}


def make_deeplab(num_classes=3):
    torch.manual_seed(0)
    return DeepLab(
        Stride8(),
        in_feature="last",
        in_channels=4,
        num_classes=num_classes,
        hidden_channels=8,
        dilation=2,
    )


def slow_pixel_loss(logits, label_maps):
    """Cross-entropy of one pixel after the other, at the size of the label maps."""
    losses = []
    for image, row, column in (label_maps != IGNORE).nonzero().tolist():
        scores = logits[image, :, row, column].tolist()
        label = label_maps[image, row, column]
        losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[label])
    return sum(losses) / len(losses)


def test_head_has_the_layers_of_large_fov():
    torch.manual_seed(0)
    head = LargeFOVHead(512, 21)
    convs = [layer for layer in head if isinstance(layer, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(3, 3), (1, 1), (1, 1)]
    assert [conv.dilation for conv in convs] == [(12, 12), (1, 1), (1, 1)]
    assert [conv.out_channels for conv in convs] == [1024, 1024, 21]
    assert [layer.p for layer in head if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    assert convs[-1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert all((conv.bias == 0).all() for conv in convs)
    # N(0, 2 / fan_out), fan_out = 1024 * 9
    assert convs[0].weight.std().item() == pytest.approx(math.sqrt(2 / 9216), rel=0.05)


def test_head_keeps_the_size_and_drops_only_in_training():
    torch.manual_seed(0)
    head = LargeFOVHead(4, 3, hidden_channels=16)
    features = torch.randn(2, 4, 5, 7)
    assert head(features).shape == (2, 3, 5, 7)
    assert not torch.equal(head(features), head(features))
    head.eval()
    torch.testing.assert_close(head(features), head(features))


def test_a_value_reaches_as_far_as_the_dilation_and_no_farther():
    torch.manual_seed(0)
    head = LargeFOVHead(1, 2, hidden_channels=64, dilation=3).eval()
    features = torch.zeros(1, 1, 15, 15)
    base = head(features)
    features[0, 0, 7, 7] = 1
    changed = ((head(features) - base).abs().amax(dim=1)[0] > 0).nonzero().tolist()
    assert changed == [[row, column] for row in (4, 7, 10) for column in (4, 7, 10)]


def test_deeplab_gives_logits_at_the_stride_of_the_feature():
    assert make_deeplab()(torch.randn(2, 3, 32, 48)).shape == (2, 4, 4, 6)


def test_an_unknown_feature_is_refused():
    network = DeepLab(Stride8(), in_feature="layer4", in_channels=4, num_classes=3)
    with pytest.raises(ValueError, match=r"Stride8 has no feature 'layer4'. Allowed: last"):
        network(torch.randn(1, 3, 32, 32))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), known=st.floats(0.1, 1))
def test_pixel_loss_equals_a_loop_over_pixels(seed, known):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    label_maps = torch.randint(0, 4, (2, 6, 9), generator=generator)
    label_maps[torch.rand(2, 6, 9, generator=generator) > known] = IGNORE
    label_maps[0, 0, 0] = 2
    resized = F.interpolate(logits, (6, 9), mode="bilinear", align_corners=False)
    loss = pixel_loss(logits, label_maps, ignore=IGNORE)
    assert loss.item() == pytest.approx(slow_pixel_loss(resized, label_maps))


def test_pixel_loss_of_a_value_by_hand():
    logits = torch.tensor([0.0, math.log(3)]).reshape(1, 2, 1, 1)
    label_maps = torch.tensor([[[1, 0, IGNORE]]])
    # -log(3 / 4) and -log(1 / 4); the ignored pixel does not count
    expected = (math.log(4 / 3) + math.log(4)) / 2
    loss = pixel_loss(logits.expand(1, 2, 1, 3), label_maps, ignore=IGNORE)
    assert loss.item() == pytest.approx(expected)


def test_ignored_pixels_have_no_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    label_maps = torch.full((1, 4, 4), IGNORE)
    label_maps[0, 1, 2] = 0
    pixel_loss(logits, label_maps, ignore=IGNORE).backward()
    touched = logits.grad.abs().sum(dim=1)[0] > 0
    assert touched.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("num_images", [0, 2])
def test_no_known_pixel_gives_zero_with_graph_through_every_parameter(num_images):
    network = make_deeplab()
    logits = network(torch.randn(num_images, 3, 32, 32))
    label_maps = torch.full((num_images, 32, 32), IGNORE)
    loss = pixel_loss(logits, label_maps, ignore=IGNORE)
    assert loss.item() == 0
    loss.backward()
    assert all(
        parameter.grad is not None and not parameter.grad.any()
        for parameter in network.parameters()
    )


def test_multi_scale_scores_equal_a_hand_loop():
    network = make_deeplab().eval()
    image = torch.randn(3, 50, 70)
    sizes, output_size = (241, 328, 401), (50, 70)
    scores = []
    for size in sizes:
        warped = F.interpolate(image[None], (size, size), mode="bilinear", align_corners=False)
        logits = network(warped)
        assert logits.shape[-1] == math.ceil(size / 8)
        scores.append(F.interpolate(logits, output_size, mode="bilinear", align_corners=False)[0])
    expected = torch.stack(scores).mean(dim=0).softmax(dim=0)
    found = multi_scale_scores(network, image, sizes=sizes, output_size=output_size)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    torch.testing.assert_close(found.sum(dim=0), torch.ones(50, 70))


def test_scores_are_averaged_before_the_softmax():
    def network(images):
        logit = {1: 0.0, 2: 4.0}[images.shape[-1]]
        return torch.tensor([0.0, logit]).reshape(1, 2, 1, 1)

    prob = multi_scale_scores(network, torch.zeros(3, 2, 2), sizes=(1, 2), output_size=(2, 3))
    expected = math.exp(2) / (1 + math.exp(2))  # the mean of the probabilities would be 0.741
    torch.testing.assert_close(prob[1], torch.full((2, 3), expected))


def test_a_larger_image_is_made_smaller_with_antialiasing():
    stripes = torch.tensor([1.0, -1.0, -1.0, -1.0]).repeat(16).expand(3, 64, 64)
    seen = []

    def network(images):
        seen.append(images)
        return images[:, :2]

    multi_scale_scores(network, stripes, sizes=(8,), output_size=(64, 64))
    # away from the border every output pixel averages two periods: mean -0.5
    assert seen[0][..., 1:-1, 1:-1].sub(-0.5).abs().max() < 0.02


@pytest.mark.parametrize("sizes", [(), (0, 8)])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(ValueError, match=r"sizes for inference .* such as \(241, 328, 401\)"):
        multi_scale_scores(make_deeplab(), torch.zeros(3, 8, 8), sizes=sizes, output_size=(8, 8))


def test_restricted_probabilities_are_a_softmax_over_the_labels_of_the_image():
    logits = torch.randn(5, 2, 3)
    prob = restrict_to_labels(logits.softmax(dim=0), [3, 0])
    torch.testing.assert_close(prob[[0, 1, 4]], logits[[0, 1, 4]].softmax(dim=0))
    assert not prob[[2, 3]].any()


def test_an_image_without_labels_is_background():
    prob = restrict_to_labels(torch.randn(4, 2, 2).softmax(dim=0), [])
    assert (prob[0] == 1).all()
    assert not prob[1:].any()


def test_a_pixel_without_any_probability_left_is_background():
    prob = torch.tensor([0.0, 0.0, 1.0]).reshape(3, 1, 1)
    assert restrict_to_labels(prob, [0]).flatten().tolist() == [1, 0, 0]


def test_labels_outside_the_class_list_are_refused():
    with pytest.raises(
        ValueError, match=r"image_labels \[-1, 4\]; class indices of 4 classes are 0 to 3"
    ):
        restrict_to_labels(torch.ones(5, 2, 2), [4, 1, -1])
