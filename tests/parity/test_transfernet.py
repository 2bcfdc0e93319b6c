"""TransferNet on both hosts is one class: what Detectron2 makes of a configuration."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.utils.events import EventStorage

from maskx.core.backbones import SmallResNet
from maskx.core.image_classifier import ImageClassifier
from maskx.core.sample_models import SampleClassifier
from maskx.detectron2 import MaskXSmallResNet, MaskXTransferClassifier, MaskXTransferNet
from maskx.systems.transfernet.model import METHODS, TransferNetModel, build_network

K, SIZE = 4, 32
WIDTHS = (4, 4, 6, 8)
FORM = {"in_feature": "layer4", "in_channels": 8, "num_classes": K}


def make_model(cls, backbone, method):
    torch.manual_seed(0)
    network = build_network(
        backbone(widths=WIDTHS),
        **FORM,
        stride=8,
        size=SIZE,
        stage_classes=None,
        method=method,
        stage="joint" if method == "transfernet" else "source",
        num_factors=8,
        hidden_channels=8,
    )
    classifier = ImageClassifier(backbone(widths=WIDTHS), **FORM)
    return cls(network=network, classifier=classifier, size=SIZE)


def make_samples():
    """A source image, which has a label map, and two target images, one of them without labels."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for labels in ([2, 0], [1], []):
        image = torch.randint(256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        samples.append({"image": image, "image_labels": labels, "height": 40, "width": 50})
    samples[0]["sem_seg"] = torch.randint(K + 1, (SIZE, SIZE), generator=generator)
    samples[0]["sem_seg"][:3] = 255
    return samples


@pytest.mark.parametrize("method", METHODS)
def test_they_are_one_class(method, in_float64, assert_same_step):
    """With the encoders of each."""
    assert issubclass(MaskXTransferNet, TransferNetModel)
    for name in ("forward", "preprocess", "start_from"):
        assert getattr(MaskXTransferNet, name) is getattr(TransferNetModel, name)
    first, second = in_float64(
        make_model(MaskXTransferNet, MaskXSmallResNet, method),
        make_model(TransferNetModel, SmallResNet, method),
    )
    second.load_state_dict(first.state_dict())
    with EventStorage():
        losses = [model.train()(make_samples()) for model in (first, second)]
    assert_same_step(
        first.network,
        second.network,
        *losses,
        expected={"loss_labels": True, "loss_masks": True},
        trained=lambda name: not name.startswith("encoder."),
    )
    for model in (first, second):
        model.eval().gt_labels = True
    with torch.no_grad():
        for result, other in zip(first(make_samples()), second(make_samples()), strict=True):
            assert result.keys() == other.keys()
            for key, value in result.items():
                torch.testing.assert_close(value, other[key], rtol=0, atol=1e-6)


def test_their_classifiers_learn_the_same(in_float64, assert_same_step):
    """Source labels of a target image are absent on both, whatever labels are candidates."""
    torch.manual_seed(0)
    classifier = ImageClassifier(MaskXSmallResNet(widths=WIDTHS), **FORM)
    first = MaskXTransferClassifier(classifier=classifier, size=SIZE)
    plain = ImageClassifier(SmallResNet(widths=WIDTHS), **FORM)
    plain.load_state_dict(first.classifier.state_dict())
    first, second = in_float64(first, SampleClassifier(plain, size=SIZE))
    samples = make_samples()
    samples[1]["candidate_labels"] = [1, 3]
    losses = [model.train()(samples) for model in (first, second)]
    assert_same_step(
        first.classifier,
        second.classifier,
        *losses,
        expected={"loss_labels": True},
        trained=lambda name: True,
    )
