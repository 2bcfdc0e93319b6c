"""Samples of ConceptMask: images with tags, boxes or masks of concepts.

Images are warped to squares, as the networks are trained on them; boxes and masks are warped and
flipped here in the same way. Records are those of `maskx.systems.concept_mask.concept_sets`.
"""

import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from maskx.core.images import warp_image
from maskx.core.sample_models import Sample
from maskx.data.images import as_sample_image, read_record_image
from maskx.data.masks import decode_segmentation
from maskx.systems.concept_mask.concept_sets import fully_masked

Record = Mapping[str, Any]


class ConceptMapper:
    """Reads the records of concept sets with the targets of one of the three stages.

    Args:
        stage: 1 reads tags, 2 boxes, 3 masks. What another stage learns from is not decoded.
        size: side in pixels of the squares that images and targets are warped to.
        attention_sizes: of the network; in stage 3 images are warped to the largest of these sizes
            and `size`, as the network makes smaller ones of them itself.
        masked: concept indices whose masks are learned from; of stage 3 alone.
        max_concepts: most concepts of an image, chosen at random; of stage 3 alone.
    """

    def __init__(
        self,
        stage: int,
        *,
        size: int,
        attention_sizes: Sequence[int] = (),
        masked: Collection[int] = (),
        max_concepts: int = 4,
        flip: bool = True,
    ) -> None:
        self.stage, self.size, self.flip = stage, size, flip
        self.image_size = max(size, *attention_sizes, 1) if stage == 3 else size
        self.masked, self.max_concepts = frozenset(masked), max_concepts

    def __call__(self, record: Record, random_state: np.random.RandomState) -> Sample:
        """Make a training sample; the record stays as it is.

        Returns:
            What :func:`read_sample` returns, the image warped to a square; and of stage 1
            ``image_labels``, concept indices; of stage 2 ``concepts``, P concept indices,
            ``boxes`` (B, 4) XYXY in pixels of the warped image, ``box_rows`` (B,) int64 positions
            in the concepts; of stage 3 ``concepts`` and ``masks`` (P, ``size``, ``size``) bool.
        """
        sample = read_sample(record, functools.partial(warp_image, size=self.image_size))
        flip = bool(self.flip and random_state.randint(2))
        if flip:
            sample["image"] = sample["image"].flip(-1)
        if self.stage == 1:
            return sample | {"image_labels": list(record["image_labels"])}
        if self.stage == 2:
            concepts, boxes, rows = box_target(record, size=self.size, flip=flip)
            targets = {"boxes": torch.from_numpy(boxes), "box_rows": torch.from_numpy(rows)}
            return sample | {"concepts": concepts} | targets
        concepts, masks = mask_target(
            record,
            masked=self.masked,
            size=self.size,
            flip=flip,
            max_concepts=self.max_concepts,
            random_state=random_state,
        )
        return sample | {"concepts": concepts, "masks": torch.from_numpy(masks)}


def read_sample(record: Record, resize: Callable[[Tensor], Tensor] | None = None) -> Sample:
    """Read an image alone.

    Args:
        resize: see :func:`maskx.data.images.as_sample_image`; as it is by default.

    Returns:
        ``image`` (3, H, W) uint8 RGB, ``height``, ``width``, ``image_id``, ``file_name``. An image
        of a tag list, whose size is not known before, has that of its file.
    """
    file, image_id = os.fspath(record["file_name"]), record["image_id"]
    image = read_record_image(record, image_format="RGB")
    height, width = image.shape[:2]
    about = {"height": height, "width": width, "image_id": image_id, "file_name": file}
    return {"image": as_sample_image(image, resize), **about}


def box_target(
    record: Record, *, size: int, flip: bool
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Warp the boxes of an image to a square; those of crowds count like all others.

    Returns:
        The P concept indices with boxes, ascending; (B, 4) float32 [x1, y1, x2, y2] in [0, size];
        and (B,) int64, the position of each box's concept among the concepts.
    """
    annotations = record["annotations"]
    classes = np.array([annotation["class_index"] for annotation in annotations], np.int64)
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4)
    boxes = boxes * (size / np.array([record["width"], record["height"]] * 2))
    if flip:
        boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], 1)
    concepts, box_rows = np.unique(classes, return_inverse=True)
    return concepts.tolist(), boxes.clip(0, size).astype(np.float32), box_rows.astype(np.int64)


def mask_target(
    record: Record,
    *,
    masked: Collection[int],
    size: int,
    flip: bool,
    max_concepts: int,
    random_state: np.random.RandomState,
) -> tuple[list[int], np.ndarray]:
    """Draw the masks of some concepts of an image, warped to a square, at random if too many.

    The mask of a concept is the union of its instances, crowds included. Left out are concepts of
    which an instance has no mask, as its pixels would count as background, and masks without any
    pixel at this size.

    Returns:
        P concept indices, ascending, and (P, size, size) bool masks; there may be none.
    """
    masks = {}
    for concept in random_state.permutation(fully_masked(record["annotations"])).tolist():
        if concept not in masked or len(masks) == max_concepts:
            continue
        # Takes the source pixel at the centre of each pixel; INTER_NEAREST takes one off centre.
        warped = cv2.resize(
            union_mask(record, concept).view(np.uint8),
            (size, size),
            interpolation=cv2.INTER_NEAREST_EXACT,
        )
        if warped.any():
            masks[concept] = (warped[:, ::-1] if flip else warped).astype(bool)
    concepts = sorted(masks)
    empty = np.zeros((0, size, size), bool)
    return concepts, np.stack([masks[concept] for concept in concepts]) if masks else empty


def union_mask(record: Record, class_index: int) -> np.ndarray:
    """Draw the (H, W) bool union of the masks of a class of an image."""
    height, width = record["height"], record["width"]
    union = np.zeros((height, width), bool)
    for annotation in record["annotations"]:
        if annotation["class_index"] == class_index:
            union |= decode_segmentation(annotation["segmentation"], height, width)
    return union
