"""Samples of ConceptMask: tags, boxes or masks of concepts, true masks in evaluation."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from maskx.data.concept_samples import box_target, mask_target
from maskx.data.masks import decode_segmentation
from maskx.torchvision.data import InstanceMapper
from maskx.torchvision.images import warp_image
from maskx.torchvision.semantic import Sample

__all__ = ["ConceptMapper", "batch_targets", "concept_truths", "read_sample"]

Record = Mapping[str, Any]


class ConceptMapper:
    """Reads the records of concept sets with the targets of one of the three stages.

    Args:
        stage: 1 reads tags, 2 boxes, 3 masks. What another stage learns from is not decoded.
        size: side in pixels of the squares that images and targets are warped to.
        masked: concept indices whose masks are learned from; of stage 3 alone.
        max_concepts: most concepts of an image, chosen at random; of stage 3 alone.
        flip: mirror half of the samples.
    """

    def __init__(
        self,
        stage: int,
        *,
        size: int,
        masked: Sequence[int] = (),
        max_concepts: int = 4,
        flip: bool = True,
    ) -> None:
        self.stage, self.size, self.flip = stage, size, flip
        self.masked, self.max_concepts = frozenset(masked), max_concepts

    def __call__(self, record: Record, random_state: np.random.RandomState) -> Sample:
        """Make a training sample.

        Returns:
            ``image`` (3, ``size``, ``size``) uint8 RGB, ``height``, ``width``, ``image_id``; and
            of stage 1 ``image_labels``, concept indices; of stage 2 ``concepts``, P concept
            indices, ``boxes`` (B, 4) XYXY in pixels of the warped image, ``box_rows`` (B,) int64
            positions in the concepts; of stage 3 ``concepts`` and ``masks`` (P, ``size``,
            ``size``) bool.
        """
        sample = read_sample(record)
        sample["image"] = warp_image(sample["image"], self.size)
        flip = bool(self.flip and random_state.randint(2))
        if flip:
            sample["image"] = sample["image"].flip(-1)
        if self.stage == 1:
            return sample | {"image_labels": list(record["image_labels"])}
        if self.stage == 2:
            concepts, boxes, rows = box_target(record, size=self.size, flip=flip)
            sample["boxes"] = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
            sample["box_rows"] = torch.as_tensor(rows, dtype=torch.int64)
        else:
            concepts, masks = mask_target(
                record,
                masked=self.masked,
                size=self.size,
                flip=flip,
                max_concepts=self.max_concepts,
                rng=random_state,
            )
            sample["masks"] = torch.from_numpy(masks)
        return sample | {"concepts": concepts}


def batch_targets(samples: Sequence[Sample]) -> dict[str, Any]:
    """Put the targets of samples of stage 2 or 3 behind each other.

    The concepts of all images are the P pairs.

    Args:
        samples: as of :class:`ConceptMapper`, at least one.

    Returns:
        ``concepts`` of each image; and of stage 2 ``boxes`` (B, 4), ``box_rows`` (B,) positions in
        the pairs; of stage 3 ``masks`` (P, S, S) bool.
    """
    targets: dict[str, Any] = {"concepts": [sample["concepts"] for sample in samples]}
    if "masks" in samples[0]:
        return targets | {"masks": torch.cat([sample["masks"] for sample in samples])}
    ends = itertools.accumulate(len(concepts) for concepts in targets["concepts"])
    rows = [
        sample["box_rows"] + end - len(sample["concepts"])
        for sample, end in zip(samples, ends, strict=True)
    ]
    boxes = torch.cat([sample["boxes"] for sample in samples])
    return targets | {"boxes": boxes, "box_rows": torch.cat(rows)}


def read_sample(record: Record) -> Sample:
    """Read an image alone, as it is."""
    return InstanceMapper(()).read_image(record)


def concept_truths(record: Record) -> Iterator[tuple[int, np.ndarray]]:
    """Draw the true mask of each concept of an image: the union of its annotations.

    A concept of which an annotation has no mask is left out, since part of a mask is no truth, and
    so is one of which nothing is visible.

    Args:
        record: as of :func:`maskx.data.coco.load_coco`.

    Yields:
        Class index and (H, W) bool, in the order of the indices.
    """
    height, width = record["height"], record["width"]
    found: dict[int, list[Any]] = {}
    for annotation in record["annotations"]:
        found.setdefault(annotation["class_index"], []).append(annotation.get("segmentation"))
    for index in sorted(found):
        if any(segmentation is None for segmentation in found[index]):
            continue
        truth = np.zeros((height, width), bool)
        for segmentation in found[index]:
            truth |= decode_segmentation(segmentation, height, width)
        if truth.any():
            yield index, truth
