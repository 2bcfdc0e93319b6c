"""Samples of instances, of which some have masks, and what both hosts ask of them."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.data.image_samples import read_image_sample
from maskx.data.sized_masks import PastedMasks, decode_at_size
from maskx.supervision import CategorySplit

logger = logging.getLogger(__name__)


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
            there is no mask, or none is left at this size.
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
            if has_usable_mask(annotation, self.classes_with_masks):
                pixels = decode_at_size(annotation["segmentation"], height, width, size)
                mask[:] = torch.from_numpy(pixels)
        instances = {
            "gt_boxes": scale_boxes(boxes, of_file, size),
            "gt_classes": torch.tensor([a["class_index"] for a in annotations], dtype=torch.int64),
            "gt_has_mask": masks.flatten(1).any(dim=1),
            "gt_masks": masks,
        }
        if self.flip and random_state.randint(2):
            sample["image"] = sample["image"].flip(-1)
            instances["gt_masks"] = instances["gt_masks"].flip(-1)
            x0, y0, x1, y1 = instances["gt_boxes"].unbind(dim=1)
            instances["gt_boxes"] = torch.stack([size[1] - x1, y0, size[1] - x0, y1], dim=1)
        return sample | {"instances": instances}


def has_usable_mask(annotation: Mapping[str, Any], classes_with_masks: Collection[int]) -> bool:
    """Whether the mask of an annotation may train the model."""
    return "segmentation" in annotation and annotation["class_index"] in classes_with_masks


def check_masks(records: Iterable[Mapping[str, Any]], split: CategorySplit) -> None:
    """Compare what a split says of masks with the annotations that will be trained on.

    Categories that have masks by the split, and none in the data, are named in a warning.

    Args:
        records: of the training data, see :func:`maskx.data.coco.load_coco`.
        split: says which categories have masks (A).

    Raises:
        ValueError: none of the categories of A has a mask, so no mask would be learned.
    """
    boxes: Counter[int] = Counter()
    masks: Counter[int] = Counter()
    for record in records:
        for annotation in record["annotations"]:
            if not annotation["iscrowd"]:
                boxes[annotation["class_index"]] += 1
                masks[annotation["class_index"]] += bool(annotation.get("segmentation"))
    names = dict(zip(split.indices_with_masks, split.with_masks, strict=True))
    without = [index for index in names if not masks[index]]
    listed = ", ".join(f"{names[index]!r} ({boxes[index]} boxes)" for index in without[:8])
    if without and len(without) == len(names):
        raise ValueError(
            f"Category split '{split.name}' says that {len(names)} categories have masks (A), but "
            f"no annotation of theirs has one: {listed}{', ...' if len(without) > 8 else ''}. The "
            "mask branch would learn nothing. Add polygons or RLE masks to the annotation file, or "
            "name categories that have some."
        )
    if without:
        logger.warning(
            "Category split '%s' says that %d categories have masks (A), but %d of them have none "
            "in the training data: %s%s. They learn from their boxes alone.",
            *(split.name, len(names), len(without), listed, ", ..." if len(without) > 8 else ""),
        )


def shrink_image(image: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Make an image smaller, never larger; each pixel is a mean of those that it stands for.

    Args:
        image: (3, H, W) uint8 or float.
        sizes: the most that the shorter side may have, and the longer one.
    """
    sides = image.shape[-2:]
    scale = min(sizes[0] / min(sides), sizes[1] / max(sides))
    if scale >= 1:
        return image
    size = [max(1, round(side * scale)) for side in sides]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def scale_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Take (R, 4) XYXY boxes from an image of size (H, W) to the same image at another size."""
    if tuple(old) == tuple(new):
        return boxes
    return boxes * boxes.new_tensor([new[1] / old[1], new[0] / old[0]] * 2)


def given_boxes(samples: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]] | None:
    """Return the boxes and classes whose masks are asked for, in pixels of the samples' images.

    They are the keys ``given_boxes`` (R, 4), XYXY in pixels of the file, and ``given_classes``
    (R,), class indices, of a sample.

    Returns:
        A pair per sample; None if the samples have no such keys, so that objects are to be found.

    Raises:
        ValueError: only some samples have them, or a box has no class.
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
        model: a `MaskXDetector` or, of Detectron2, a ``MaskXRCNN``, in evaluation mode.
        sample: ``image``, ``height`` and ``width`` as the model takes them.
        boxes: (R, 4) XYXY in pixels of the file.
        class_indices: (R,) the class of each.

    Returns:
        R masks of (height, width).
    """
    asked = {**sample, "given_boxes": boxes, "given_classes": class_indices}
    instances = model([asked])[0]["instances"]
    return instances["pred_masks"] if isinstance(instances, dict) else instances.pred_masks
