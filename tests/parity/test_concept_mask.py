"""ConceptMask: a model with the same weights and samples does the same on both hosts.

Both are one class. Compared are the models as each host builds them from its settings, and the
samples as each host makes them of a record.
"""

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import build_model

from maskx.core.word_table import WordTable, load_word_table, save_word_table
from maskx.data.masks import encode_masks
from maskx.detectron2 import get_cfg
from maskx.detectron2.adapters import in_format
from maskx.systems.concept_mask.concept_sets import ConceptSplit, write_concept_split
from maskx.systems.concept_mask.detectron2.data import training_mapper
from maskx.systems.concept_mask.model import EmbeddingModel
from maskx.systems.concept_mask.overlap import (
    concept_overlap,
    load_overlap,
    negative_weights,
    save_overlap,
)
from maskx.systems.concept_mask.query import named_query
from maskx.systems.concept_mask.samples import ConceptMapper
from maskx.systems.concept_mask.system import ConceptNetwork
from maskx.systems.concept_mask.system import build_model as build_on_pip

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
    write_concept_split(folder / "split.json", SPLIT)
    boxes = {0: [0, 0, 20, 20], 1: [4, 4, 24, 24], 2: [18, 0, 28, 30], 3: [19, 2, 39, 9]}
    annotations = [{"class_index": c, "bbox": box, "iscrowd": 0} for c, box in boxes.items()]
    records = [{"image_id": 0, "height": 40, "width": 40, "annotations": annotations}]
    save_overlap(folder / "overlap.npz", concept_overlap(records, len(NAMES)), NAMES)
    return folder


SPLIT = ConceptSplit(NAMES, boxed=NAMES[:4], masked=NAMES[:2])
META = ("MaskXConceptEmbedding", "MaskXConceptRefinement", "MaskXConceptSegmentation")


def make_cfg(files, stage):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = META[stage - 1]
    cfg.MODEL.BACKBONE.NAME = "MaskXSmallResNet"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MASKX.SIZE = MASK_SIDE if stage == 3 else SIDE
    cfg.MODEL.MASKX.BACKBONE.OUTPUT_STRIDE = 8
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    keys.WORD_TABLE = str(files / "words.safetensors")
    keys.SPLIT = str(files / "split.json")
    keys.OVERLAP = str(files / "overlap.npz") if stage == 2 else ""
    keys.EMBEDDING_CHANNELS = (12, 10)
    keys.HIDDEN_CHANNELS = 12
    keys.ATTENTION_SIZES = MAPS
    keys.ENCODER = "small"
    keys.DECODER_CHANNELS = (8, 8, 8, 8, 4)
    keys.NUM_MATCHED = 2
    keys.MATCHING_WEIGHT = 0.1
    return cfg


def both_models(files, stage):
    """The models as Detectron2 and as the host on pip alone build them, with the same weights."""
    torch.manual_seed(0)
    theirs = build_model(make_cfg(files, stage))
    for parameter in theirs.parameters():  # as initialised, refined maps hardly differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    network = ConceptNetwork(
        backbone="small",
        image_size=MASK_SIDE,
        attention_sizes=MAPS,
        hidden_channels=(12, 10),
        refinement_channels=12,
        encoder="small",
        decoder_channels=(8, 8, 8, 8, 4),
    )
    losses = {}
    if stage == 2:
        gamma = negative_weights(load_overlap(files / "overlap.npz", NAMES))
        losses = {"gamma": gamma, "num_matched": 2, "matching_weight": 0.1}
    table = load_word_table(files / "words.safetensors")
    ours = build_on_pip(network, stage, table, SPLIT, **losses)
    ours.load_state_dict(theirs.state_dict())
    assert type(theirs).forward is type(ours).forward is EmbeddingModel.forward
    assert type(theirs).__bases__[-1] is type(ours)
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
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def gradients(losses, network):
    network.zero_grad()
    sum(losses.values()).backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_gradients_and_statistics_are_the_same(files, stage):
    ours, theirs = (model.train() for model in both_models(files, stage))
    losses, expected = ours(make_batch(stage)), theirs(make_batch(stage))
    assert losses.keys() == expected.keys() == LOSSES[stage]
    assert all(loss > 0 for loss in losses.values())
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    found, gradients_there = gradients(losses, ours), gradients(expected, theirs)
    assert found.keys() == {n for n, p in theirs.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found, gradients_there, rtol=1e-6, atol=1e-6)
    # Running statistics of batch norm, which belong to what a step learns.
    statistics = (dict(model.named_buffers()) for model in (ours, theirs))
    torch.testing.assert_close(*statistics, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_predictions_of_images_of_any_size_are_the_same(files, stage):
    ours, theirs = (model.eval() for model in both_models(files, stage))
    for model in (ours, theirs):
        model.set_fitted(theta_image=0.4, theta_unseen=0.3)
    concepts = ["dog", "green", "owl", np.linspace(-1, 1, 8)]
    for query in (named_query(theirs.table, None, concepts, blended=True), None):
        sample = {"image": make_image(7, 50, 70), "height": 60, "width": 84}
        sample |= {} if query is None else {"query": query}
        (found,), (expected,) = ours([sample]), theirs([sample])
        assert len(expected["masks"]) > 0
        assert found["concepts"] == expected["concepts"]
        assert found["borrowed"] == expected["borrowed"]
        tensors = {name for name, value in expected.items() if isinstance(value, torch.Tensor)}
        assert len(tensors) == 8
        for name in tensors:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_samples_of_a_random_state_are_the_same_but_for_the_order_of_channels(
    files, stage, tmp_path
):
    cv2.imwrite(str(tmp_path / "a.png"), make_image(3, 60, 40).permute(1, 2, 0).numpy())
    masks = np.zeros((2, 60, 40), bool)
    masks[0, 4:40, 3:30] = masks[1, 20:50, 20:38] = True
    annotations = [
        {"class_index": c, "bbox": box, "iscrowd": 0, "segmentation": segmentation}
        for c, box, segmentation in zip(
            (0, 1), ([3, 4, 30, 40], [20, 20, 38, 50]), encode_masks(masks), strict=True
        )
    ]
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 5, "height": 60, "width": 40}
    record |= {"annotations": annotations, "image_labels": [0, 1]}
    cfg = make_cfg(files, stage)
    ours = ConceptMapper(
        stage, size=cfg.INPUT.MASKX.SIZE, attention_sizes=MAPS, masked=SPLIT.masked_indices
    )
    theirs = in_format(training_mapper(cfg), "BGR")
    for seed in range(4):
        found, expected = (m(record, np.random.RandomState(seed)) for m in (ours, theirs))
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found.pop("image"), expected.pop("image").flip(0))
        assert found.pop("file_name") == expected.pop("file_name") == record["file_name"]
        torch.testing.assert_close(found, expected)
