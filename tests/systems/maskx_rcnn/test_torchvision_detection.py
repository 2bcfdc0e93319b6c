import json

import numpy as np
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from maskx.data.masks import decode_segmentation
from maskx.evaluation.average_precision import evaluate_detections
from maskx.systems.maskx_rcnn.mask_head import crop_mask_targets
from maskx.systems.maskx_rcnn.torchvision import SampleDetector, detect


class Oracle(nn.Module):
    """The parts of a torchvision detector, which find the ground truth."""

    def __init__(self, records):
        super().__init__()
        self.transform = GeneralizedRCNNTransform(64, 64, [0.0] * 3, [1.0] * 3)
        self.backbone = nn.Conv2d(3, 1, 1)
        self.records = iter(records)

    def rpn(self, batch, features):
        return None, {}

    def roi_heads(self, features, proposals, image_sizes):
        return [self.answer(next(self.records)) for _ in image_sizes], {}

    def answer(self, record):
        annotations = record["annotations"]
        boxes = torch.tensor([a["bbox"] for a in annotations])
        masks = [decode_segmentation(a["segmentation"], 64, 64) for a in annotations]
        rows = torch.arange(len(boxes))
        return {
            "boxes": boxes,
            "labels": torch.tensor([a["class_index"] + 1 for a in annotations]),
            "scores": torch.full((len(annotations),), 0.9),
            "masks": crop_mask_targets(torch.tensor(np.stack(masks)), boxes, rows, 112)[:, None]
            * 0.8,
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
            # Masks of 112 x 112 are exact but for a few pixels of the smallest objects.
            assert results[task][group]["AP"] > (98.0 if task == "segm" else 99.99)


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
    assert instances["pred_masks"][0].dtype == torch.bool
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
