"""Masks as outlines along the edges of their pixels, from which the same pixels come back."""

from collections.abc import Sequence

import cv2
import numpy as np
from pycocotools import mask as mask_api
from scipy.spatial import cKDTree

from maskx.data.masks import decode_segmentation

__all__ = ["as_one_outline", "exact_shares", "has_one_outline", "joined_outline", "mask_outlines"]


def mask_outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Trace a mask along the edges of its pixels.

    Args:
        mask: (H, W) bool.

    Returns:
        (N, 2) integer x, y of each outline, those of holes too: a pixel is on if it lies in an odd
        number of them.
    """
    # Each pixel becomes 2 x 2: whether a point of a contour is odd tells where the edge is.
    doubled = np.repeat(np.repeat(mask.astype(np.uint8), 2, 0), 2, 1)
    contours, _ = cv2.findContours(
        np.pad(doubled, 1), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(-1, -1)
    )
    return [_without_straight_points((contour[:, 0] + 1) // 2) for contour in contours]


def joined_outline(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join outlines to one by lines that are walked there and back, so that they have no width.

    Args:
        parts: (N, 2) each; they must not overlap, but holes lie in what they are holes of.
    """
    joined, *others = parts
    for part in others:
        distances, nearest = cKDTree(joined).query(part)
        j = int(distances.argmin())
        i = int(nearest[j])
        joined = np.concatenate([joined[: i + 1], part[j:], part[: j + 1], joined[i:]])
    return joined


def has_one_outline(segmentation: list | dict) -> bool:
    """Whether a mask is a single polygon."""
    return isinstance(segmentation, list) and len(segmentation) == 1


def as_one_outline(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Return the one outline, (N, 2) x, y, of a mask of any form.

    Polygons stay as they are, unless several overlap.
    """
    if isinstance(segmentation, list):
        parts = mask_api.frPyObjects(segmentation, height, width)
        union = mask_api.area(mask_api.merge(parts))
        if len(parts) == 1 or mask_api.area(parts).sum() == union:
            return joined_outline([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
    return joined_outline(mask_outlines(decode_segmentation(segmentation, height, width)))


def exact_shares(points: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Divide so that the product is the same number again, on whose last bit pixels can depend.

    Args:
        points: (N, 2) x, y.
        size: (2,) that they are divided by.
    """
    shares = points / size
    for direction in (-np.inf, np.inf):
        beside = np.nextafter(points / size, direction)
        shares = np.where((shares * size != points) & (beside * size == points), beside, shares)
    return shares


def _without_straight_points(points: np.ndarray) -> np.ndarray:
    """Leave out points that repeat the one before, or lie on a straight line."""
    points = points[np.any(points != np.roll(points, 1, 0), 1)]
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    return points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
