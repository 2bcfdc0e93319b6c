"""Training samples of instances, of which some have masks."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskx.data.image_samples import read_image_sample
from maskx.data.masks import decode_segmentation


class InstanceMapper:
    """Reads the image of a record and makes its training target.

    Masks of categories without masks are never decoded, so nothing of them can reach a loss.

    Args:
        classes_with_masks: class indices (A) whose masks are used.
        flip: mirror half of the training samples.
    """

    def __init__(self, classes_with_masks: Collection[int], *, flip: bool = True) -> None:
        self.classes_with_masks = frozenset(classes_with_masks)
        self.flip = flip

    def __call__(self, record: dict[str, Any], random_state: np.random.RandomState) -> dict:
        """Make a training sample.

        Returns:
            What `read_image_sample` returns, with ``instances``: ``gt_boxes`` (N, 4) XYXY pixels,
            ``gt_classes`` (N,) class indices, ``gt_has_mask`` (N,) bool and ``gt_masks``
            (N, H, W) bool, all zero where there is no mask.
        """
        sample = read_image_sample(record)
        height, width = sample["height"], sample["width"]
        annotations = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        has_mask = [self._has_mask(a) for a in annotations]
        masks = np.zeros((len(annotations), height, width), dtype=bool)
        for index, annotation in enumerate(annotations):
            if has_mask[index]:
                masks[index] = decode_segmentation(annotation["segmentation"], height, width)
        instances = {
            "gt_boxes": boxes,
            "gt_classes": torch.tensor([a["class_index"] for a in annotations], dtype=torch.int64),
            "gt_has_mask": torch.tensor(has_mask, dtype=torch.bool),
            "gt_masks": torch.from_numpy(masks),
        }
        if self.flip and random_state.randint(2):
            sample["image"] = sample["image"].flip(-1)
            instances["gt_masks"] = instances["gt_masks"].flip(-1)
            instances["gt_boxes"] = _flip_boxes(boxes, width)
        return sample | {"instances": instances}

    def _has_mask(self, annotation: dict[str, Any]) -> bool:
        return "segmentation" in annotation and annotation["class_index"] in self.classes_with_masks


def _flip_boxes(boxes: Tensor, width: int) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=1)
