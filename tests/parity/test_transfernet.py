"""TransferNet, its baselines and its classifier: both hosts do the same."""

import copy

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.utils.events import EventStorage

from maskx.core.image_classifier import ImageClassifier, choose_labels
from maskx.core.sample_models import SampleClassifier
from maskx.detectron2 import MaskXSmallResNet, MaskXTransferClassifier, MaskXTransferNet
from maskx.systems.transfernet.attention import FactoredAttention
from maskx.systems.transfernet.baselines import BaselineNet, DecoupledNet
from maskx.systems.transfernet.decoder import TransposedDecoder
from maskx.systems.transfernet.network import TransferNet
from maskx.systems.transfernet.pipeline import SampleTransferNet

K, SIZE = 4, 32
PIXELS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}
FORM = {"in_feature": "layer4", "in_channels": 8, "num_classes": K}
METHODS = ("transfernet", "baseline", "decoupled")


def make_backbone():
    return MaskXSmallResNet(widths=(4, 4, 6, 8))


def make_models(method="transfernet", **options):
    torch.manual_seed(0)
    form = FORM | {"decoder": TransposedDecoder(stride=8)} | options
    if method == "transfernet":
        form["attention"] = FactoredAttention(in_channels=8, num_classes=K, num_factors=8)
        network = TransferNet(make_backbone(), hidden_channels=8, **form)
    elif method == "baseline":
        network = BaselineNet(make_backbone(), classifier_channels=8, **form)
    else:
        network = DecoupledNet(make_backbone(), classifier_channels=8, **form)
    first = MaskXTransferNet(
        network=network,
        classifier=ImageClassifier(make_backbone(), **FORM),
        image_size=SIZE,
        gt_labels=True,
        **PIXELS,
    )
    second = SampleTransferNet(copy.deepcopy(network), size=SIZE, num_classes=K)
    return first, second


def make_samples(size=(SIZE, SIZE)):
    """A source image, which has a label map, and two target images, one of them without labels."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for labels in ([2, 0], [1], []):
        image = 255 * torch.randint(2, (3, *size), generator=generator, dtype=torch.uint8)
        samples.append({"image": image, "image_labels": labels})
    label_map = torch.randint(K + 1, size, generator=generator)
    label_map[:3] = 255
    samples[0]["sem_seg"] = label_map
    return samples


def in_detectron2(samples):
    names = {"label_map": "sem_seg"}
    return [{names.get(key, key): v for key, v in sample.items()} for sample in samples]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in METHODS),
        ("transfernet", {"freeze_encoder": False, "decoder_input": "attention"}),
        ("transfernet", {"freeze_attention": True, "reference_scale": True}),
        ("transfernet", {"train_stage": "attention"}),
    ],
)
def test_they_learn_the_same(method, options, in_float64, assert_same_step):
    first, second = in_float64(*make_models(method, **options))
    samples = make_samples()
    with EventStorage():
        losses = [first.train()(in_detectron2(samples)), second.train()(samples)]
    expected = {"loss_labels": True, "loss_masks": True}
    fixed = [] if options.get("freeze_encoder") is False else ["encoder."]
    if options.get("freeze_attention"):
        fixed.append("attention.")
    if options.get("train_stage") == "attention":
        del expected["loss_masks"]
        fixed += ["decoder.", "decoder_norm."]
    assert_same_step(
        *(first.network, second.network, *losses),
        expected=expected,
        trained=lambda name: not name.startswith(tuple(fixed)),
    )


def make_sharp(network):
    """Make masks of foreground and background: with random weights pixels hardly differ."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        network.decoder.predictor.weight.normal_(std=3, generator=generator)
        if isinstance(network, BaselineNet):
            network.classifier.score.weight.normal_(std=100, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_they_predict_the_same_for_the_true_labels_of_a_square_image(method, in_float64):
    """Other images are padded to a square on Detectron2, as in the reference, and warped here."""
    first, second = in_float64(*make_models(method))
    for model in (first, second):
        make_sharp(model.network)
        model.eval()
    samples = [s | {"height": 45, "width": 45} for s in make_samples((45, 45))]
    for result, other in zip(first(in_detectron2(samples)), second(samples), strict=True):
        assert result["image_labels"].tolist() == other["labels"]
        torch.testing.assert_close(
            result["masks_prob"], other["prob"], rtol=0, atol=1e-6, check_dtype=False
        )
        assert torch.equal(result["sem_seg"], other["label_map"])
        assert ("attention" in result) == ("attention" in other) == (method == "transfernet")
        if "attention" in result:
            torch.testing.assert_close(
                result["attention"], other["attention"], rtol=0, atol=1e-6, check_dtype=False
            )


def test_their_classifiers_learn_the_same(in_float64, assert_same_step):
    """Source labels of a target image are absent on both, whatever labels are candidates."""
    torch.manual_seed(0)
    first = MaskXTransferClassifier(
        classifier=ImageClassifier(make_backbone(), **FORM), size=SIZE, **PIXELS
    )
    second = SampleClassifier(copy.deepcopy(first.classifier), size=SIZE)
    first, second = in_float64(first, second)
    samples = make_samples((24, 41))
    samples[1]["candidate_labels"] = [1, 3]
    losses = [model.train()(samples) for model in (first, second)]
    assert_same_step(
        *(first.classifier, second.classifier, *losses),
        expected={"loss_labels": True},
        trained=lambda name: True,
    )


@torch.no_grad()
def test_they_predict_the_same_for_labels_that_the_classifier_chooses(in_float64):
    first, second = in_float64(*make_models())
    for model in (first, second):
        make_sharp(model.network)
        model.eval()
    first.gt_labels = False
    first.has_classifier.fill_(True)
    samples = [s | {"height": SIZE, "width": SIZE} for s in make_samples()]
    linear = first.classifier.classifier
    linear.weight.normal_(std=500, generator=torch.Generator().manual_seed(1))
    linear.bias -= first.classifier(second.preprocess(samples)).mean(dim=0)
    of_torchvision = SampleClassifier(copy.deepcopy(first.classifier), size=SIZE)
    classifier = in_float64(first, of_torchvision)[1].eval()
    prob = torch.stack([output["image_labels_prob"] for output in classifier(samples)])
    labels = [row.nonzero()[:, 0].tolist() for row in choose_labels(prob)]
    assert len({tuple(chosen) for chosen in labels}) > 1
    chosen_by_image = zip(samples, labels, strict=True)
    others = second([sample | {"image_labels": chosen} for sample, chosen in chosen_by_image])
    for result, other, row in zip(first(in_detectron2(samples)), others, prob, strict=True):
        torch.testing.assert_close(result["image_labels_prob"], row, rtol=0, atol=1e-6)
        assert result["image_labels"].tolist() == other["labels"]
        assert torch.equal(result["sem_seg"], other["label_map"])
