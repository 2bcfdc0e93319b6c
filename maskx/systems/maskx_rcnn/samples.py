"""Samples of instances, of which some have masks, and what both hosts ask of them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskx.core.images import scale_boxes, shrink_image
from maskx.data.images import read_image_sample
from maskx.data.masks import PastedMasks, decode_at_size


class InstanceMapper:
    """Reads the image of a record and makes its training target.

    Masks of categories without masks are never decoded, so nothing of them can reach a loss.

    Args:
        classes_with_masks: class indices (A) whose masks are used.
        flip: mirror half of the training samples.
        sizes: an image is shrunk before anything is made of it, where the model would do so: its
            shorter and its longer side are at most these; None leaves it as it is. A photograph
            then costs what it is trained at.
    """

    def __init__(
        self,
        classes_with_masks: Collection[int],
        *,
        flip: bool = True,
        sizes: tuple[int, int] | None = None,
    ) -> None:
        self.classes_with_masks = frozenset(classes_with_masks)
        self.flip = flip
        self.sizes = sizes

    def __call__(self, record: dict[str, Any], random_state: np.random.RandomState) -> dict:
        """Make a training sample.

        Returns:
            What `read_image_sample` returns, with ``image`` (3, H, W) of the size that ``sizes``
            allow, and ``instances`` in its pixels: ``gt_boxes`` (N, 4) XYXY, ``gt_classes`` (N,)
            class indices, ``gt_has_mask`` (N,) bool and ``gt_masks`` (N, H, W) bool, all zero where
            there is no mask, or none is left at this size. ``gt_boxes_complete`` (N,), all False,
            is there only if the record has ``boxes_complete`` False: objects without a box may be
            anywhere, so nothing may be taken for background.
        """
        sample = read_image_sample(record)
        of_file = height, width = sample["height"], sample["width"]
        if self.sizes is not None:
            sample["image"] = shrink_image(sample["image"], self.sizes)
        size = tuple(sample["image"].shape[-2:])
        annotations = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        masks = torch.zeros(len(annotations), *size, dtype=torch.bool)
        for mask, annotation in zip(masks, annotations, strict=True):
            has_mask = "segmentation" in annotation
            if has_mask and annotation["class_index"] in self.classes_with_masks:
                pixels = decode_at_size(annotation["segmentation"], height, width, size)
                mask[:] = torch.from_numpy(pixels)
        instances = {
            "gt_boxes": scale_boxes(boxes, of_file, size),
            "gt_classes": torch.tensor([a["class_index"] for a in annotations], dtype=torch.int64),
            "gt_has_mask": masks.flatten(1).any(dim=1),
            "gt_masks": masks,
        }
        if not record.get("boxes_complete", True):
            instances["gt_boxes_complete"] = torch.zeros(len(boxes), dtype=torch.bool)
        if self.flip and random_state.randint(2):
            sample["image"] = sample["image"].flip(-1)
            instances["gt_masks"] = instances["gt_masks"].flip(-1)
            x0, y0, x1, y1 = instances["gt_boxes"].unbind(dim=1)
            instances["gt_boxes"] = torch.stack([size[1] - x1, y0, size[1] - x0, y1], dim=1)
        return sample | {"instances": instances}


def given_boxes(samples: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]] | None:
    """Return the boxes and classes whose masks are asked for, in pixels of the samples' images.

    They are the keys ``given_boxes`` (R, 4), XYXY in pixels of the file, and ``given_classes``
    (R,), class indices, of a sample.

    Returns:
        A pair per sample; None if the samples have no such keys, so that objects are to be found.
    """
    given = ["given_boxes" in sample for sample in samples]
    if not any(given):
        return None
    if not all(given):
        raise ValueError(
            f"{given.count(True)} of {len(given)} samples of a batch have given_boxes. Give them "
            "to all, or make two batches."
        )
    pairs = []
    for sample in samples:
        boxes = torch.as_tensor(sample["given_boxes"], dtype=torch.float32).reshape(-1, 4)
        classes = torch.as_tensor(sample["given_classes"], dtype=torch.int64)
        if classes.shape != boxes.shape[:1]:
            raise ValueError(
                f"A sample has {len(boxes)} given_boxes and given_classes of shape "
                f"{tuple(classes.shape)}. There must be one class index per box."
            )
        size = sample["image"].shape[-2:]
        boxes = scale_boxes(boxes, (sample["height"], sample["width"]), size)
        pairs.append((boxes, classes))
    return pairs


@torch.inference_mode()
def masks_of_boxes(
    model: nn.Module, sample: Mapping[str, Any], boxes: Tensor, class_indices: Tensor
) -> PastedMasks:
    """Segment given objects of an image.

    Args:
        model: a `SampleDetector` or, of Detectron2, a ``MaskXRCNN``, in evaluation mode.
        sample: ``image``, ``height`` and ``width`` as the model takes them.
        boxes: (R, 4) XYXY in pixels of the file.
        class_indices: (R,) the class of each.

    Returns:
        R masks of (height, width).
    """
    asked = {**sample, "given_boxes": boxes, "given_classes": class_indices}
    instances = model([asked])[0]["instances"]
    fields = instances if isinstance(instances, dict) else instances.get_fields()
    if "pred_masks" not in fields:
        raise ValueError(
            "The model finds boxes and makes no masks. Give a run whose model has a mask branch."
        )
    return fields["pred_masks"]
