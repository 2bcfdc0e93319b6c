"""Training targets of ConceptMask's stages 2 and 3 for one image: mappers without their host.

Images are warped to squares, as the embedding network is trained on them; boxes and masks are
warped and flipped here in the same way. Records are those of
`maskx.systems.concept_mask.concept_sets`.
"""

from collections.abc import Collection, Mapping
from typing import Any

import cv2
import numpy as np

from maskx.data.masks import decode_segmentation
from maskx.systems.concept_mask.concept_sets import fully_masked

__all__ = ["box_target", "mask_target"]


def box_target(
    record: Mapping[str, Any], *, size: int, flip: bool
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Warp the boxes of an image to a square; those of crowds count like all others.

    Args:
        record: of the boxed images.
        size: side of the square in pixels.
        flip: whether left and right change places.

    Returns:
        concepts: the P concept indices with boxes, ascending.
        boxes: (B, 4) float32 [x1, y1, x2, y2] in [0, size].
        box_rows: (B,) int64, the position of each box's concept in ``concepts``.
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
    record: Mapping[str, Any],
    *,
    masked: Collection[int],
    size: int,
    flip: bool,
    max_concepts: int,
    rng: np.random.Generator,
) -> tuple[list[int], np.ndarray]:
    """Draw the masks of some concepts of an image, warped to a square.

    The mask of a concept is the union of its instances, crowds included. Left out are concepts of
    which an instance has no mask, as its pixels would count as background, and masks without any
    pixel at this size.

    Args:
        record: of the masked images.
        masked: concept indices that have masks.
        size: side of the square in pixels.
        flip: whether left and right change places.
        max_concepts: most concepts to take; which, is drawn.
        rng: source of the draw.

    Returns:
        concepts: P concept indices, ascending; there may be none.
        masks: (P, size, size) bool.
    """
    height, width = record["height"], record["width"]
    masks = {}
    for concept in rng.permutation(fully_masked(record["annotations"])).tolist():
        if concept not in masked or len(masks) == max_concepts:
            continue
        union = np.zeros((height, width), bool)
        for annotation in record["annotations"]:
            if annotation["class_index"] == concept:
                union |= decode_segmentation(annotation["segmentation"], height, width)
        # Takes the source pixel at the centre of each pixel; INTER_NEAREST takes one off centre.
        warped = cv2.resize(
            union.view(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST_EXACT
        )
        if warped.any():
            masks[concept] = (warped[:, ::-1] if flip else warped).astype(bool)
    concepts = sorted(masks)
    empty = np.zeros((0, size, size), bool)
    return concepts, np.stack([masks[concept] for concept in concepts]) if masks else empty
