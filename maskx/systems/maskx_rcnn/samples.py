"""Samples of instances, of which some have masks, and what both hosts ask of them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskx.core.checks import check_choice
from maskx.core.images import scale_boxes, shrink_image
from maskx.data.coco_shapes import QUALITY_KEY, SOURCE_KEY, read_quality
from maskx.data.images import read_image_sample
from maskx.data.masks import PastedMasks, decode_at_size
from maskx.supervision import Supervision

PSEUDO_WEIGHTS = ("quality", "one")


class InstanceMapper:
    """Reads the image of a record and makes its training target.

    Masks of categories without masks are never decoded, so nothing of them can reach a loss; but
    for those that a model or a teacher made, see :func:`mask_weight`.

    Args:
        classes_with_masks: class indices (A) whose masks are used.
        pseudo_weight: see :func:`mask_weight`.
        flip: mirror half of the training samples.
        sizes: an image is shrunk before anything is made of it, where the model would do so: its
            shorter and its longer side are at most these; None leaves it as it is. A photograph
            then costs what it is trained at.
    """

    def __init__(
        self,
        classes_with_masks: Collection[int],
        *,
        pseudo_weight: str = "quality",
        flip: bool = True,
        sizes: tuple[int, int] | None = None,
    ) -> None:
        check_choice("pseudo_weight", pseudo_weight, PSEUDO_WEIGHTS)
        self.classes_with_masks = frozenset(classes_with_masks)
        self.pseudo_weight = pseudo_weight
        self.flip = flip
        self.sizes = sizes

    def __call__(self, record: dict[str, Any], random_state: np.random.RandomState) -> dict:
        """Make a training sample.

        Returns:
            What `read_image_sample` returns, with ``image`` (3, H, W) of the size that ``sizes``
            allow, and ``instances`` in its pixels: ``gt_boxes`` (N, 4) XYXY, ``gt_classes`` (N,)
            class indices, ``gt_has_mask`` (N,) bool, ``gt_mask_weight`` (N,), what they weigh in
            the mask loss, and ``gt_masks`` (N, H, W) bool, all zero where
            there is no mask, or none is left at this size. ``gt_boxes_complete`` (N,), all False,
            is there only if the record has ``boxes_complete`` False, or has image labels alone:
            objects without a box may be anywhere, so nothing may be taken for background. For the
            latter there is ``tags``, see :func:`tags_of`.
        """
        shrink = None if self.sizes is None else partial(shrink_image, sizes=self.sizes)
        sample = read_image_sample(record, shrink)
        of_file = height, width = sample["height"], sample["width"]
        size = tuple(sample["image"].shape[-2:])
        annotations = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        masks = torch.zeros(len(annotations), *size, dtype=torch.bool)
        weights = [
            mask_weight(
                annotation,
                withheld=annotation["class_index"] not in self.classes_with_masks,
                pseudo_weight=self.pseudo_weight,
            )
            for annotation in annotations
        ]
        for mask, weight, annotation in zip(masks, weights, annotations, strict=True):
            if weight > 0:
                pixels = decode_at_size(annotation["segmentation"], height, width, size)
                mask[:] = torch.from_numpy(pixels)
        instances = {
            "gt_boxes": scale_boxes(boxes, of_file, size),
            "gt_classes": torch.tensor([a["class_index"] for a in annotations], dtype=torch.int64),
            "gt_has_mask": masks.flatten(1).any(dim=1),
            "gt_mask_weight": torch.tensor(weights, dtype=torch.float32),
            "gt_masks": masks,
        }
        tags = tags_of(record)
        if tags is not None:
            sample["tags"] = tags
        if tags is not None or not record.get("boxes_complete", True):
            instances["gt_boxes_complete"] = torch.zeros(len(boxes), dtype=torch.bool)
        if self.flip and random_state.randint(2):
            sample["image"] = sample["image"].flip(-1)
            instances["gt_masks"] = instances["gt_masks"].flip(-1)
            x0, y0, x1, y1 = instances["gt_boxes"].unbind(dim=1)
            instances["gt_boxes"] = torch.stack([size[1] - x1, y0, size[1] - x0, y1], dim=1)
        return sample | {"instances": instances}


def tags_of(record: Mapping[str, Any]) -> Tensor | None:
    """Return the class indices of an image of which labels alone are known; None of others."""
    if record.get("supervision") != Supervision.IMAGE.value:
        return None
    return torch.tensor(record["image_labels"], dtype=torch.int64)


def mask_weight(annotation: Mapping[str, Any], *, withheld: bool, pseudo_weight: str) -> float:
    """Return what the mask of an annotation weighs in the mask loss; 0: it must not be used.

    A mask that a person drew weighs 1, or nothing where it is withheld. One that a model or a
    teacher made of the box (``segmentation_source``, see ``maskx complete``) says no more of its
    category than the box does, so it is not withheld. It weighs by its quality, or as a drawn one.

    Args:
        annotation: of a record.
        withheld: whether its category is one without masks (B).
        pseudo_weight: of a mask that nobody drew: ``quality``, or ``one`` (as in the paper's
            baseline that trains on masks of GrabCut).
    """
    if annotation.get("segmentation") is None:
        return 0.0
    quality = read_quality(annotation)
    if quality is None:
        return 0.0 if withheld else 1.0
    return quality if pseudo_weight == "quality" else 1.0


def pseudo_masks_line(records: Iterable[Mapping[str, Any]]) -> str | None:
    """Say how many masks nobody drew, by what made them and how good they are; None: there is none.

    Args:
        records: of :func:`maskx.data.coco.load_coco`.
    """
    qualities: dict[str, list[float]] = {}
    for record in records:
        for annotation in record.get("annotations", ()):
            if annotation.get(SOURCE_KEY) is not None:
                qualities.setdefault(annotation[SOURCE_KEY], []).append(annotation[QUALITY_KEY])
    if not qualities:
        return None
    parts = [
        f"{len(found)} by {source} (mean quality {sum(found) / len(found):.2f})"
        for source, found in sorted(qualities.items())
    ]
    return f"masks that nobody drew: {', '.join(parts)}"


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
