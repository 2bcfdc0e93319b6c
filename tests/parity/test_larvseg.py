"""LarvSeg: both hosts do the same."""

import copy

import pytest
import torch

pytest.importorskip("detectron2")

from maskx.detectron2 import MaskXLarvSeg, MaskXSmallResNet
from maskx.systems.larvseg.model import SampleLarvSeg
from maskx.systems.larvseg.network import LarvSeg

NAMES = ("wall", "tree", "cat", "mug", "owl", "sky", "boat", "yak")
SCORED = {"masks": (0, 1, 2, 5), "tags": (6, 3, 0)}
SIZE = 32
PIXELS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}


def make_models(*, window=False, test_classes=None, **options):
    torch.manual_seed(0)
    network = LarvSeg(
        MaskXSmallResNet(widths=(4, 4, 4, 8)),
        in_feature="layer4",
        in_channels=8,
        num_classes=len(NAMES),
        **{"bank_size": 2, "warm_up": 1, "top_tokens": 3} | options,
    )
    network.classifier.set_trained([0, 1, 2, 3, 5, 6])
    shared = {"class_names": NAMES, "scored": SCORED, "test_classes": test_classes}
    other = copy.deepcopy(network)
    first = MaskXLarvSeg(
        network=network, image_size=SIZE, window=SIZE if window else 0, **shared, **PIXELS
    )
    second = SampleLarvSeg(other, size=SIZE, sliding=window, **shared)
    return first, second


def make_samples(data_set, size=(SIZE, SIZE), *, single_label=False):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for labels in ([1, 2], [2]):
        image = 255 * torch.randint(2, (3, *size), generator=generator, dtype=torch.uint8)
        sample = {"image": image, "data_set": data_set, "single_label": single_label}
        if data_set == "masks":
            sample["label_map"] = torch.randint(-1, len(SCORED["masks"]), size, generator=generator)
        else:
            sample["image_labels"] = labels[-1:] if single_label else labels
        samples.append(sample)
    return samples


def fill_bank(bank):
    """Give all classes directions of their own, so that backgrounds are guessed."""
    if bank is not None:
        bank.means.normal_(generator=torch.Generator().manual_seed(0))
        bank.counts.fill_(bank.size)


@pytest.mark.parametrize(
    ("data_set", "single_label"), [("masks", False), ("tags", False), ("tags", True)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logit_form": "layernorm", "pooling": "normalised"},
        {"memory": "single_image", "hidden_channels": 6},
        {"memory": "none"},
    ],
)
def test_they_learn_the_same(data_set, single_label, options, in_float64, assert_same_step):
    first, second = in_float64(*make_models(**options))
    for model in (first.train(), second.train()):
        fill_bank(model.network.bank)
    samples = make_samples(data_set, single_label=single_label)
    losses = [model(samples) for model in (first, second)]
    expected = {"loss_pixels": data_set == "masks", "loss_labels": data_set == "tags"}
    if options.get("memory") != "none":
        expected["loss_attention"] = data_set == "tags"
    assert_same_step(
        *(first.network, second.network, *losses), expected=expected, trained=lambda name: True
    )
    buffers = dict(second.network.named_buffers())
    for name, buffer in first.network.named_buffers():  # the memory bank among them
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("test_classes", [None, (7, 5, 2, 0)])
def test_they_predict_the_same(window, test_classes, in_float64):
    """Detectron2 says positions among the classes to choose from, the other host classes."""
    models = make_models(window=window, test_classes=test_classes)
    first, second = in_float64(*models)
    samples = [s | {"height": 48, "width": 83} for s in make_samples("tags", (40, 69))]
    for result, other in zip(first.eval()(samples), second.eval()(samples), strict=True):
        label_map = result["class_indices"][result["sem_seg"]] + 1
        assert torch.equal(label_map, other["label_map"])
        assert len(label_map.unique()) > 1
        torch.testing.assert_close(result["top_scores"][0], other["scores"], rtol=1e-6, atol=1e-6)
