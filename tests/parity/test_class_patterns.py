"""Classifier and segmentation network of class patterns: both hosts do the same."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from maskx.core.backbones import SmallResNet
from maskx.core.image_classifier import ImageClassifier, choose_labels
from maskx.core.sample_models import SampleClassifier
from maskx.detectron2 import MaskXDeepLab, MaskXImageClassifier, MaskXSmallResNet
from maskx.systems.class_patterns.model import DeepLab, SampleSegmenter

K, SIZE = 4, 32
WIDTHS = (4, 4, 6, 8)
FEATURE = {"in_feature": "layer4", "num_classes": K}
PIXELS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}


def in_bgr(samples):
    return [sample | {"image": sample["image"].flip(0)} for sample in samples]


def read_bgr(model, backbone):
    """Make a model that reads RGB read BGR."""
    model.pixel_mean, model.pixel_std = model.pixel_mean.flip(0), model.pixel_std.flip(0)
    with torch.no_grad():
        backbone.conv1.weight.copy_(backbone.conv1.weight.flip(1))


def make_samples(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for labels in ([0, 2], [], [3]):
        image = 255 * torch.randint(2, (3, *size), generator=generator, dtype=torch.uint8)
        label_map = torch.randint(K + 1, size, generator=generator)
        label_map[:3] = 255
        samples.append({"image": image, "image_labels": labels, "sem_seg": label_map})
    return samples


def make_classifiers():
    torch.manual_seed(0)
    of_detectron2 = MaskXImageClassifier(
        classifier=ImageClassifier(MaskXSmallResNet(widths=WIDTHS), in_channels=8, **FEATURE),
        size=SIZE,
        **PIXELS,
    )
    plain = ImageClassifier(SmallResNet(widths=WIDTHS), in_channels=8, **FEATURE)
    plain.load_state_dict(of_detectron2.classifier.state_dict())
    return of_detectron2, SampleClassifier(plain, size=SIZE)


def make_segmenters(sizes=(SIZE,)):
    torch.manual_seed(0)
    form = {"hidden_channels": 8, "dilation": 2} | FEATURE
    network = DeepLab(MaskXSmallResNet(widths=WIDTHS), in_channels=8, **form)
    of_detectron2 = MaskXDeepLab(network=network, test_sizes=sizes, **PIXELS)
    plain = DeepLab(SmallResNet(widths=WIDTHS), in_channels=8, **form)
    plain.load_state_dict(of_detectron2.network.state_dict())
    return of_detectron2, SampleSegmenter(plain, test_sizes=sizes)


@pytest.mark.parametrize("size", [(SIZE, SIZE), (24, 41)])
def test_classifiers_learn_the_same(size, in_float64, assert_same_step):
    first, second = in_float64(*make_classifiers())
    samples = make_samples(size)
    losses = [model.train()(samples) for model in (first, second)]
    assert_same_step(
        first.classifier,
        second.classifier,
        *losses,
        expected={"loss_labels": True},
        trained=lambda name: True,
    )


@torch.no_grad()
@pytest.mark.parametrize("bgr", [False, True])
def test_classifiers_predict_the_same(bgr, in_float64):
    first, second = in_float64(*make_classifiers())
    samples = make_samples((24, 41))
    if bgr:
        read_bgr(first, first.classifier.backbone)
    results = first.eval()(in_bgr(samples) if bgr else samples)
    for result, other in zip(results, second.eval()(samples), strict=True):
        prob = other["image_labels_prob"]
        torch.testing.assert_close(result["image_labels_prob"], prob, rtol=0, atol=1e-6)
        chosen = choose_labels(prob[None])[0].nonzero()[:, 0]
        assert torch.equal(result["image_labels"], chosen)
        torch.testing.assert_close(result["activation_maps"], other["activation_maps"])


def test_segmenters_learn_the_same(in_float64, assert_same_step):
    first, second = in_float64(*make_segmenters())
    samples = make_samples((SIZE, SIZE))
    losses = []
    for model in (first, second):
        torch.manual_seed(1)  # dropout
        losses.append(model.train()(samples))
    assert_same_step(
        first.network,
        second.network,
        *losses,
        expected={"loss_pixels": True},
        trained=lambda name: True,
    )


@torch.no_grad()
@pytest.mark.parametrize("bgr", [False, True])
@pytest.mark.parametrize("sizes", [(SIZE,), (24, 32, 40)])
def test_segmenters_predict_the_same(bgr, sizes, in_float64):
    first, second = in_float64(*make_segmenters(sizes))
    if bgr:
        read_bgr(first, first.network.backbone)
    samples = [sample | {"height": 30, "width": 37} for sample in make_samples((24, 41))]
    results = first.eval()(in_bgr(samples) if bgr else samples)
    for result, other in zip(results, second.eval()(samples), strict=True):
        assert result["sem_seg_prob"].shape == (K + 1, 30, 37)
        torch.testing.assert_close(result["sem_seg_prob"], other["sem_seg_prob"], rtol=0, atol=1e-6)
        assert torch.equal(result["sem_seg"], other["sem_seg"])
