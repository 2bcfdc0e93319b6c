"""One of two CPU processes that train ConceptMask together; rank 1 has nothing to learn from."""

import numpy as np
import torch
from pycocotools import mask as mask_utils
from two_ranks import train_together

from maskx.core.backbones import SmallResNet
from maskx.core.word_table import WordTable
from maskx.detectron2 import (
    MaskXConceptEmbedding,
    MaskXConceptEvaluator,
    MaskXConceptRefinement,
    MaskXConceptSegmentation,
)
from maskx.systems.concept_mask.concept_sets import ConceptSplit
from maskx.systems.concept_mask.evaluation import ConceptTest
from maskx.systems.concept_mask.network import ConceptEmbedding, ConceptSegmenter

LOSSES = {1: "loss_embedding", 2: "loss_boxes", 3: "loss_masks"}


def make_model(stage):
    vectors = np.random.default_rng(0).standard_normal((5, 6))
    names = tuple("abcde")
    form = {"in_feature": "layer4", "in_channels": 8, "dim": 6, "hidden_channels": (8, 8)}
    arguments = {
        "embedding": ConceptEmbedding(SmallResNet(widths=(4, 4, 4, 8)), **form),
        "table": WordTable(names, vectors, np.ones(5)),
        "split": ConceptSplit(names, names[:3], names[:2]),
        "attention_sizes": (32, 48),
    }
    if stage == 1:
        return MaskXConceptEmbedding(**arguments)
    arguments["hidden_channels"] = 8
    if stage == 2:
        gamma = (torch.tensor([0, 1, 2, 2, 2, 2]), torch.tensor([1, 3]), torch.tensor([0.9, 0.8]))
        return MaskXConceptRefinement(gamma=gamma, **arguments)
    encoder = SmallResNet(widths=(4, 4, 4, 8), output_stride=16)
    segmenter = ConceptSegmenter(encoder, decoder_channels=(4,) * 5)
    return MaskXConceptSegmentation(segmenter=segmenter, mask_size=32, **arguments)


def make_batch(rank):
    is_empty = rank == 1
    count = 0 if is_empty else 2
    return [
        {
            "image": torch.rand(3, 32, 32) * 255,
            "image_labels": [] if is_empty else [0, 3],
            "concepts": [] if is_empty else [0, 1],
            "boxes": torch.tensor([[0.0, 0, 16, 16], [8, 8, 30, 30]])[:count],
            "box_rows": torch.arange(count),
            "masks": torch.rand(count, 32, 32) > 0.5,
        }
        for _ in range(2)
    ]


def take_steps(stage, rank):
    torch.manual_seed(0)
    model = make_model(stage).train()
    torch.manual_seed(rank)
    batch = make_batch(rank)
    for sample in batch:
        for name in {1: ("masks",), 2: ("masks",), 3: ("boxes", "box_rows")}[stage]:
            del sample[name]

    def check(losses):
        assert (losses[LOSSES[stage]] > 0) == (rank == 0)

    train_together(model, [batch, batch], check, lr=1e-2)


def measure(rank):
    """Each process measures its own image; the main one has the means over both."""
    truth = np.zeros((8, 8), bool)
    truth[:4] = True
    segmentation = mask_utils.encode(np.asfortranarray(truth.astype(np.uint8)))
    annotation = {"class_index": 0, "segmentation": segmentation}
    records = [
        {"image_id": i, "height": 8, "width": 8, "annotations": [annotation]} for i in range(2)
    ]
    test = ConceptTest(records, ("a",), np.array([0]), np.ones((1, 6), np.float32), ("box",))
    evaluator = MaskXConceptEvaluator("x", test=test)
    masks = torch.from_numpy(truth)[None] if rank == 0 else torch.zeros(1, 8, 8, dtype=torch.bool)
    output = {"concepts": ["a"], "masks": masks, "attention": masks.float()}
    evaluator.process([{"image_id": rank}], [output])
    found = evaluator.evaluate()
    if rank == 0:
        assert found["concepts"]["iou_box"] == found["concepts"]["pointing_box"] == 0.5
        assert found["concepts"]["num_concepts_box"] == 1
    else:
        assert found == {}


def work(rank):
    for stage in LOSSES:
        take_steps(stage, rank)
    measure(rank)
