import json

import numpy as np
import pytest
import torch
from torch import nn

from maskx.data.masks import decode_segmentation
from maskx.evaluation.average_precision import evaluate_detections
from maskx.systems.maskx_rcnn.torchvision.detection import SampleDetector, detect


class Oracle(nn.Module):
    """A detector of torchvision's interface that knows the ground truth."""

    def __init__(self, records):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.records = iter(records)

    def forward(self, images):
        return [self.answer(next(self.records), image) for image in images]

    def answer(self, record, image):
        annotations = record["annotations"]
        height, width = image.shape[1:]
        masks = [decode_segmentation(a["segmentation"], height, width) for a in annotations]
        return {
            "boxes": torch.tensor([a["bbox"] for a in annotations]),
            "labels": torch.tensor([a["class_index"] + 1 for a in annotations]),
            "scores": torch.full((len(annotations),), 0.9),
            "masks": torch.tensor(np.stack(masks))[:, None].float() * 0.8,
        }


def test_perfect_detections_score_100(scenes, split):
    model = SampleDetector(Oracle(scenes.records))
    detections = detect(model, scenes.records, scenes.category_ids, batch_size=3)
    results = evaluate_detections(
        scenes.json_file,
        json.loads(json.dumps(detections)),
        category_ids=scenes.category_ids,
        groups=split.groups(),
    )
    for task in ("bbox", "segm"):
        for group in ("all", "A", "B"):
            assert results[task][group]["AP"] == pytest.approx(100.0)


def test_outputs_have_the_names_and_shapes_of_both_hosts(make_detector, scenes):
    model = make_detector().eval()
    model.detector.roi_heads.score_thresh = 0.0
    sample = {"image": torch.zeros(3, 64, 48, dtype=torch.uint8)}
    with torch.no_grad():
        (output,) = model([sample])
    instances = output["instances"]
    count = len(instances["scores"])
    assert count > 0
    assert instances["pred_boxes"].shape == (count, 4)
    assert instances["pred_masks"].shape == (count, 64, 48)
    assert instances["pred_masks"].dtype == torch.bool
    assert instances["pred_classes"].min() >= 0
    assert instances["pred_classes"].max() < len(scenes.class_names)


def test_no_detection_at_all(make_detector, scenes, split):
    model = make_detector()
    model.detector.roi_heads.score_thresh = 1.1
    detections = detect(model, scenes.records, scenes.category_ids)
    assert detections == []
    results = evaluate_detections(
        scenes.json_file,
        detections,
        category_ids=scenes.category_ids,
        groups=split.groups(),
    )
    assert results["segm"]["A"]["AP"] == 0.0
