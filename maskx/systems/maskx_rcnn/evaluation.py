"""How well masks fit objects whose boxes and classes are given."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_api
from tqdm import tqdm

from maskx.data.coco import CocoData
from maskx.data.coco_shapes import SOURCE_KEY
from maskx.data.grabcut import grabcut_masks
from maskx.data.images import read_image_sample, read_record_image
from maskx.data.masks import encode_masks, run_lengths
from maskx.supervision import CategorySplit
from maskx.systems.maskx_rcnn.samples import masks_of_boxes
from maskx.systems.maskx_rcnn.torchvision import SampleDetector

Segment = Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], list[dict[str, Any]]]
"""Makes run lengths of a record, and of annotations of objects in its image."""


def by_model(model: SampleDetector) -> Segment:
    """Segment by a trained detector."""
    model.eval()

    def segment(
        record: Mapping[str, Any], objects: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        sample = read_image_sample(record, model.shrink)
        boxes = torch.tensor([each["bbox"] for each in objects])
        classes = torch.tensor([each["class_index"] for each in objects])
        return masks_of_boxes(model, sample, boxes, classes).encode()

    return segment


def by_grabcut(
    record: Mapping[str, Any], objects: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Segment by GrabCut."""
    image = read_record_image(record, image_format="RGB")
    return encode_masks(grabcut_masks(image, [each["bbox"] for each in objects]))


def mean_iou_of_boxes(
    segment: Segment, data: CocoData, split: CategorySplit, *, description: str
) -> dict[str, float]:
    """Compare masks in the boxes of annotations with their true masks.

    Objects without a mask, crowds, and masks that nobody drew are left out.

    Returns:
        Mean IoU over the objects of each group of the split, from 0 to 1; NaN where there are none.
    """
    ious: dict[int, list[float]] = {}
    for record in tqdm(data.records, desc=description, unit="img"):
        objects = [each for each in record["annotations"] if _is_drawn(each)]
        if not objects:
            continue
        size = record["height"], record["width"]
        for each, mask in zip(objects, segment(record, objects), strict=True):
            truth = run_lengths(each["segmentation"], *size)
            iou = float(mask_api.iou([mask], [truth], [0])[0, 0])
            ious.setdefault(each["class_index"], []).append(iou)
    means = {}
    for group, indices in split.groups().items():
        of_group = [iou for index in indices for iou in ious.get(index, ())]
        means[group] = float(np.mean(of_group)) if of_group else float("nan")
    return means


def _is_drawn(annotation: Mapping[str, Any]) -> bool:
    is_drawn = "segmentation" in annotation and SOURCE_KEY not in annotation
    return is_drawn and not annotation["iscrowd"]
