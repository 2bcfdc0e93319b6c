import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskx.systems.larvseg.network import LarvSeg
from maskx.systems.larvseg.windows import check_windows, predict_windows

WINDOW = 16


class Patches(nn.Module):
    """Two layers with stride 4, the second of which sees beyond a token."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 6, 3, padding=1))

    def forward(self, images):
        return {"last": self.layers(images)}


def make_network(logit_form="temperature"):
    torch.manual_seed(0)
    return LarvSeg(
        Patches(), in_feature="last", in_channels=6, num_classes=9, logit_form=logit_form
    ).eval()


@torch.no_grad()
def mean_logits(network, image, classes, stride):
    """The logits of all classes, window by window, and their mean at every token."""
    vectors = network.classifier.class_vectors(classes)
    height, width = image.shape[-2:]
    total, count = torch.zeros(len(classes), height // 4, width // 4), torch.zeros(1, 1, 1)
    count = count.repeat(1, height // 4, width // 4)
    for top in sorted({*range(0, height - WINDOW, stride), height - WINDOW}):
        for left in sorted({*range(0, width - WINDOW, stride), width - WINDOW}):
            window = image[None, :, top : top + WINDOW, left : left + WINDOW]
            logits = network.classifier.factors(network(window), vectors).dense()[0]
            where = (
                ...,
                slice(top // 4, (top + WINDOW) // 4),
                slice(left // 4, (left + WINDOW) // 4),
            )
            total[where] += logits
            count[where] += 1
    return total / count


@pytest.mark.parametrize("logit_form", ["temperature", "layernorm"])
@pytest.mark.parametrize("stride", [4, 12, 16])
def test_the_mean_of_the_logits_of_overlapping_windows_is_exact(logit_form, stride):
    network, classes = make_network(logit_form), torch.tensor([7, 2, 0, 5, 8])
    image = torch.randn(3, 16, 40)  # no resizing; the last window does not begin at the stride
    labels, scores = predict_windows(
        network,
        image,
        (33, 61),
        class_indices=classes,
        window=WINDOW,
        stride=stride,
        feature_stride=4,
        top_k=3,
    )
    logits = mean_logits(network, image, classes, stride)
    dense = F.interpolate(logits[None], (33, 61), mode="bilinear", align_corners=False)[0]
    expected, positions = dense.topk(3, dim=0)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, positions)


@pytest.mark.parametrize("size", [(16, 16), (7, 30), (50, 41)])
def test_the_shorter_side_becomes_a_window_and_the_result_has_the_size_asked_for(size):
    network = make_network()
    labels, scores = predict_windows(
        network,
        torch.randn(3, *size),
        size,
        class_indices=torch.arange(9),
        window=WINDOW,
        stride=WINDOW,
        feature_stride=4,
    )
    assert labels.shape == scores.shape == (1, *size)


def test_one_window_is_the_whole_image():
    network, image = make_network(), torch.randn(3, 16, 16)
    options = {"class_indices": torch.arange(9), "top_k": 2}
    found = predict_windows(
        network, image, (20, 20), window=16, stride=16, feature_stride=4, **options
    )
    expected = network.predict(image[None], (20, 20), **options)
    torch.testing.assert_close(found, tuple(each[0] for each in expected))


def test_large_images_are_resized_without_aliasing():
    network, image, classes = make_network(), torch.randn(3, 48, 48), torch.arange(9)
    options = {"window": 16, "stride": 16, "feature_stride": 4}
    _, scores = predict_windows(network, image, (48, 48), class_indices=classes, **options)
    small = F.interpolate(image[None], (16, 16), mode="bilinear", antialias=True)
    _, expected = network.predict(small, (48, 48), class_indices=classes)
    torch.testing.assert_close(scores, expected[0])


@pytest.mark.parametrize(("window", "stride"), [(18, 16), (16, 6), (16, 20), (16, 0)])
def test_windows_whose_tokens_do_not_meet_are_refused(window, stride):
    message = rf"windows of {window} pixels with stride {stride} do not fit: both must be multiples"
    with pytest.raises(ValueError, match=message):
        check_windows(window, stride, 4)
