"""ConceptMask: a model with the same weights and samples does the same on both hosts.

Compared are the models as each host builds them from its settings. Detectron2's are of `get_cfg`,
with RGB images and the mean and deviation of ImageNet, as in all configurations of ConceptMask;
torchvision's host has these built in.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model

from maskx.core.word_table import WordTable, save_word_table
from maskx.detectron2 import get_cfg
from maskx.systems.concept_mask.concept_sets import ConceptSplit, write_concept_split
from maskx.systems.concept_mask.model import build_concept_mask
from maskx.systems.concept_mask.overlap import (
    concept_overlap,
    load_overlap,
    negative_weights,
    save_overlap,
)
from maskx.systems.concept_mask.steps import named_query

NAMES = ("cat", "dog", "fire truck", "green", "owl", "sky")
SIDE, MASK_SIDE, MAPS = 32, 48, (32, 48)  # of training images, of masks, of attention maps
STAGES = (1, 2, 3)
LOSSES = {
    1: {"loss_embedding"},
    2: {"loss_boxes", "loss_matching", "loss_discrimination"},
    3: {"loss_masks"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Word table, split and overlaps of boxes."""
    folder = tmp_path_factory.mktemp("concepts")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((len(NAMES), 8))
    save_word_table(
        folder / "words.safetensors",
        WordTable(NAMES, vectors, rng.uniform(1, 3, len(NAMES)), source="a test"),
    )
    split = ConceptSplit(NAMES, boxed=NAMES[:4], masked=NAMES[:2])
    write_concept_split(folder / "split.json", split)
    boxes = {0: [0, 0, 20, 20], 1: [4, 4, 24, 24], 2: [18, 0, 28, 30], 3: [19, 2, 39, 9]}
    annotations = [{"class_index": c, "bbox": box, "iscrowd": 0} for c, box in boxes.items()]
    records = [{"image_id": 0, "height": 40, "width": 40, "annotations": annotations}]
    save_overlap(folder / "overlap.npz", concept_overlap(records, len(NAMES)), NAMES)
    return folder


def both_models(files, stage):
    """The models of Detectron2 and of torchvision's host, with the same weights, in float64."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "MaskXConceptMask"
    cfg.MODEL.BACKBONE.NAME = "MaskXSmallResNet"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MASKX.SIZE = MASK_SIDE if stage == 3 else SIDE
    cfg.MODEL.MASKX.BACKBONE.OUTPUT_STRIDE = 8
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    keys.STAGE = stage
    keys.WORD_TABLE = str(files / "words.safetensors")
    keys.SPLIT = str(files / "split.json")
    keys.OVERLAP = str(files / "overlap.npz") if stage == 2 else ""
    keys.EMBEDDING_CHANNELS = (12, 10)
    keys.HIDDEN_CHANNELS = 12
    keys.ATTENTION_SIZES = MAPS
    keys.ENCODER_DEPTH = 0
    keys.DECODER_CHANNELS = (8, 8, 8, 8, 4)
    keys.NUM_MATCHED = 2
    keys.MATCHING_WEIGHT = 0.1
    torch.manual_seed(0)
    theirs = build_model(cfg)
    for parameter in theirs.parameters():  # as initialised, refined maps hardly differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)

    content = {
        "stage": stage,
        "boxed": NAMES[:4],
        "masked": NAMES[:2],
        "network": {
            "image_size": MASK_SIDE,
            "attention_sizes": MAPS,
            "hidden_channels": (12, 10),
            "refinement_channels": 12,
            "encoder_widths": (32, 64, 96, 128),
            "decoder_channels": (8, 8, 8, 8, 4),
        },
    }
    gamma = negative_weights(load_overlap(files / "overlap.npz", NAMES)) if stage == 2 else None
    ours = build_concept_mask(
        content, theirs.table, gamma=gamma, num_matched=2, matching_weight=0.1
    )
    ours.network.load_state_dict(theirs.network.state_dict())
    ours, theirs = ours.double(), theirs.double()
    assert torch.equal(theirs.pixel_mean, ours.pixel_mean)
    assert torch.equal(theirs.pixel_std, ours.pixel_std)
    return ours, theirs


def make_batch(stage):
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[0.0, 0, 16, 16], [8, 8, 30, 30], [20, 2, 28, 9]])
    masks = torch.rand(2, MASK_SIDE, MASK_SIDE, generator=generator) > 0.5
    none = torch.zeros(0, dtype=torch.int64)
    targets = {
        1: [{"image_labels": labels} for labels in ([1, 4], [0, 3, 5], [])],
        2: [
            {"concepts": [0, 2], "boxes": boxes, "box_rows": torch.tensor([0, 1, 1])},
            {"concepts": [1, 3, 0], "boxes": boxes, "box_rows": torch.tensor([2, 1, 0])},
            {"concepts": [], "boxes": torch.zeros(0, 4), "box_rows": none},
        ],
        3: [
            {"concepts": [0, 1], "masks": masks},
            {"concepts": [1], "masks": ~masks[:1]},
            {"concepts": [], "masks": masks[:0]},
        ],
    }[stage]
    return [{"image": make_image(i, SIDE, SIDE), "image_id": i} | t for i, t in enumerate(targets)]


def make_image(seed, height, width):
    """Black and white, which division by 255 in float32, by torchvision's host, does not round."""
    generator = torch.Generator().manual_seed(seed)
    return 255 * torch.randint(2, (3, height, width), generator=generator, dtype=torch.uint8)


def gradients(losses, network):
    network.zero_grad()
    sum(losses.values()).backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    """Equal to 1e-6 of the largest value."""
    scale = expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_gradients_and_statistics_are_the_same(files, stage):
    ours, theirs = (model.train() for model in both_models(files, stage))
    losses, expected = ours(make_batch(stage)), theirs(make_batch(stage))
    assert losses.keys() == expected.keys() == LOSSES[stage]
    for name, loss in expected.items():
        assert loss > 0
        assert_equal(losses[name], loss)
    found, gradients_there = gradients(losses, ours.network), gradients(expected, theirs.network)
    trained = {n for n, p in theirs.network.named_parameters() if p.requires_grad}
    assert found.keys() == gradients_there.keys() == trained
    for name, gradient in gradients_there.items():
        assert_equal(found[name], gradient)
    # Running statistics of batch norm, which belong to what a step learns.
    for name, value in theirs.network.state_dict().items():
        if value.is_floating_point():
            assert_equal(ours.network.state_dict()[name], value)


@pytest.mark.parametrize("stage", STAGES)
def test_predictions_are_the_same(files, stage):
    """Of squares of the size of the segmenter, to which torchvision's host warps all images."""
    ours, theirs = (model.eval() for model in both_models(files, stage))
    if stage > 1:
        for model in (ours, theirs):
            model.network.set_fitted(theta_image=0.4, theta_unseen=0.3)
    vector = np.linspace(-1, 1, 8)
    _, query = named_query(theirs.table, None, ["dog", "green", "owl", vector])
    image = make_image(7, MASK_SIDE, MASK_SIDE)
    for asked in (query, None):
        sample = {"image": image} if asked is None else {"image": image, "query": asked}
        (found,), (expected,) = ours([sample]), theirs([sample])
        assert len(expected["masks"]) > 0
        assert torch.equal(found.indices, expected["concept_indices"])
        assert_equal(found.existence, expected["existence"])
        assert torch.equal(found.exists, expected["exists"])
        for name, value in (("attention", found.attention), ("masks_prob", found.mask_prob)):
            assert expected[name].std() > 1e-4
            assert_equal(value, expected[name])
        assert torch.equal(found.masks, expected["masks"])
