"""Samples of ConceptMask: images with tags, boxes or masks of concepts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from maskx.core.images import warp_image
from maskx.core.sample_models import Sample
from maskx.data.image_samples import read_image_sample
from maskx.systems.concept_mask.samples import box_target, mask_target

__all__ = ["ConceptMapper", "read_sample"]

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


def read_sample(record: Record) -> Sample:
    """Read an image alone, as it is."""
    return read_image_sample(record)
