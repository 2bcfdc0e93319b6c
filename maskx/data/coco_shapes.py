"""Boxes and masks of COCO annotations: what is usable, what can be mended, and what is wrong."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

__all__ = [
    "OUTSIDE_TOLERANCE",
    "QUALITY_KEY",
    "SOURCE_KEY",
    "AnnotationProblem",
    "Shapes",
    "is_positive_number",
    "mask_extent",
    "mend_shapes",
    "read_box",
    "read_mask",
    "read_quality",
]

OUTSIDE_TOLERANCE = 1.0
"""Pixels by which a box or a polygon may leave its image.

Official COCO needs next to none: 0.0 was measured on all 4577 boxes and 100k polygon points of
542 images. One pixel also admits the rounding of x + width to two decimals (0.01) and tools that
count pixels from 1. Real files of tools have 1.2 to 7 pixels; more is another image's annotation
or another image size.
"""

SOURCE_KEY, QUALITY_KEY = "segmentation_source", "segmentation_quality"
"""Keys of an annotation whose mask was not drawn by a person."""

_MIN_INSIDE = 0.5  # share of a box or polygon in the image from which it is clipped, not refused


class AnnotationProblem(ValueError):
    """A bad box or mask of one annotation.

    Args:
        kind: Short name to count by; it starts with "box" if the box is bad.
        found: What the annotation holds.
    """

    def __init__(self, kind: str, found: str, allowed: str) -> None:
        super().__init__(f"{found}; allowed: {allowed}")
        self.kind = kind


class Shapes(NamedTuple):
    """What can be used of an annotation.

    Attributes:
        box: [x1, y1, x2, y2]; None if the annotation has to be left out.
        problems: What is wrong.
        is_placeholder: Whether there is no object at all: a box of zeros and no mask, as tools
            write for an image without objects.
    """

    box: list[float] | None
    mask: list | dict | None
    problems: list[AnnotationProblem]
    is_placeholder: bool


def mend_shapes(bbox: Any, segmentation: Any, height: int, width: int) -> Shapes:
    """Read box and mask, and mend what can be mended without a guess.

    A part of a mask that has no area goes, and the rest stays; a box or polygon that leaves the
    image with less than half of it is clipped; a box that is missing or bad comes from the mask.
    """
    problems = []
    try:
        mask = read_mask(segmentation, height, width)
    except AnnotationProblem as problem:
        problems.append(problem)
        mask = _mend_mask(segmentation, height, width)
    try:
        return Shapes(read_box(bbox, height, width), mask, problems, False)
    except AnnotationProblem as problem:
        problems.append(problem)
        box = _clipped(bbox, height, width) if problem.kind == "box_outside" else None
        if box is None and mask is not None:
            x1, y1, x2, y2 = mask_extent(mask)
            box = [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]
        is_zero = isinstance(bbox, list) and len(bbox) == 4 and not any(bbox)
        return Shapes(box, mask, problems, is_zero and mask is None)


def read_box(bbox: Any, height: int, width: int) -> list[float]:
    """Check a COCO box and turn it into corners.

    Args:
        bbox: [x, y, width, height] in absolute pixels, as in the file.

    Returns:
        [x1, y1, x2, y2] with positive area, clipped to the image.

    Raises:
        AnnotationProblem: It is no box, empty, or more than `OUTSIDE_TOLERANCE` outside.
    """
    if bbox is None or bbox == []:
        raise AnnotationProblem(
            "box_missing", f"bbox is {bbox!r}", "4 finite numbers [x, y, width, height]"
        )
    if not isinstance(bbox, list | tuple) or len(bbox) != 4 or not _all_finite(bbox):
        raise AnnotationProblem(
            "box_malformed", f"bbox is {bbox!r:.200}", "4 finite numbers [x, y, width, height]"
        )
    x1, y1, box_width, box_height = map(float, bbox)
    if box_width <= 0 or box_height <= 0:
        raise AnnotationProblem("box_empty", f"bbox is {bbox!r}", "width and height above 0")
    x2, y2 = x1 + box_width, y1 + box_height
    outside = _is_outside(x1, y1, x2, y2, height, width)
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if outside or x1 >= x2 or y1 >= y2:
        raise AnnotationProblem(
            "box_outside",
            f"bbox {bbox!r:.200} leaves its image",
            f"inside {width}x{height} (width x height), {OUTSIDE_TOLERANCE:g} pixel over at most",
        )
    return [x1, y1, x2, y2]


def read_mask(segmentation: Any, height: int, width: int) -> list[Sequence[float]] | dict | None:
    """Check a COCO mask.

    Args:
        segmentation: As in the file: polygons [[x, y, x, y, ...], ...], an RLE dict with counts
            compressed (str or bytes) or not (list), or nothing (None, [], [[]]).

    Returns:
        The polygons as they are, an RLE dict with compressed counts (text, of lists), or None if
        there is no mask.

    Raises:
        AnnotationProblem: If there is a mask and any part of it cannot be used.
    """
    if segmentation is None or segmentation == [] or segmentation == [[]]:
        return None
    if isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon, height, width)
        if not any(_polygon_area(polygon) for polygon in segmentation):
            raise AnnotationProblem("mask_empty", "polygons without any area", "at least one pixel")
        return segmentation
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, height, width)
    raise AnnotationProblem(
        "mask_malformed",
        f"segmentation is a {type(segmentation).__name__}",
        "a list of polygons, an RLE dict, or no such key",
    )


def read_quality(annotation: Mapping[str, Any]) -> float | None:
    """Return the quality of a mask that a model or a teacher made.

    Returns:
        From 0 to 1; None if a person drew the mask, so that it has no source.

    Raises:
        AnnotationProblem: There is a source, and no such quality.
    """
    source, quality = annotation.get(SOURCE_KEY), annotation.get(QUALITY_KEY)
    if source is None:
        return None
    is_number = isinstance(quality, int | float) and not isinstance(quality, bool)
    if not is_number or not 0 <= quality <= 1:
        raise AnnotationProblem(
            "mask_quality",
            f"{SOURCE_KEY} is {source!r:.80}, but {QUALITY_KEY} is {quality!r:.80}",
            f"0 to 1, or no {SOURCE_KEY} if a person drew or corrected the mask",
        )
    return float(quality)


def mask_extent(mask: list[Sequence[float]] | dict) -> tuple[float, float, float, float]:
    """Return the corners (x1, y1, x2, y2) of the smallest box around a mask of `read_mask`."""
    if isinstance(mask, dict):
        x, y, width, height = mask_utils.toBbox(mask).tolist()
        return x, y, x + width, y + height
    xs = [x for polygon in mask for x in polygon[0::2]]
    ys = [y for polygon in mask for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def is_positive_number(value: Any) -> bool:
    """Whether a value, as of an area, is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value > 0 and _all_finite([value])


def _clipped(bbox: Sequence[float], height: int, width: int) -> list[float] | None:
    """Clip a box of finite numbers to the image; None if more than half of it is outside."""
    x1, y1, box_width, box_height = map(float, bbox)
    box = [max(x1, 0.0), max(y1, 0.0)]
    box += [min(x1 + box_width, float(width)), min(y1 + box_height, float(height))]
    inside = max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
    return box if inside > 0 and inside >= _MIN_INSIDE * box_width * box_height else None


def _mend_mask(segmentation: Any, height: int, width: int) -> list[list[float]] | None:
    """Return the good parts of polygons; None if the mask cannot be trusted."""
    if not isinstance(segmentation, list):
        return None
    kept = []
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) % 2 or not _all_finite(polygon):
            return None
        if len(polygon) < 6 or not _polygon_area(polygon):
            continue
        xs = [min(max(float(x), 0.0), float(width)) for x in polygon[0::2]]
        ys = [min(max(float(y), 0.0), float(height)) for y in polygon[1::2]]
        inside = [number for point in zip(xs, ys, strict=True) for number in point]
        if abs(_polygon_area(inside)) < _MIN_INSIDE * abs(_polygon_area(polygon)):
            return None
        kept.append(inside)
    return kept or None


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    is_sequence = hasattr(polygon, "__len__") and not isinstance(polygon, str | bytes | dict)
    if not is_sequence or len(polygon) < 6 or len(polygon) % 2:
        found = f"{len(polygon)} coordinates" if is_sequence else repr(polygon)
        raise AnnotationProblem(
            "polygon_malformed",
            f"segmentation has a polygon of {found:.200}",
            "a list [x, y, x, y, ...] of at least 3 points",
        )
    if not _all_finite(polygon):
        raise AnnotationProblem(
            "polygon_malformed",
            "segmentation has a polygon with NaN, infinity or something that is no number",
            "finite numbers",
        )
    xs, ys = polygon[0::2], polygon[1::2]
    x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    if _is_outside(x1, y1, x2, y2, height, width):
        raise AnnotationProblem(
            "polygon_outside",
            f"segmentation has a polygon from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})",
            f"inside {width}x{height} (width x height), {OUTSIDE_TOLERANCE:g} pixel over at most",
        )


def _polygon_area(polygon: Sequence[float]) -> float:
    """Signed area by the shoelace formula."""
    xs, ys = list(polygon[0::2]), list(polygon[1::2])
    after = zip(xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return sum(x * y1 - x1 * y for x, y, (x1, y1) in zip(xs, ys, after, strict=True)) / 2


def _read_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple | np.ndarray) or list(size) != [height, width]:
        raise AnnotationProblem(
            "rle_size",
            f"RLE has size {size!r:.200}",
            f"the size [height, width] of the image, {[height, width]}",
        )
    num_pixels = height * width
    if num_pixels >= 2**32:
        raise AnnotationProblem(
            "rle_size", f"RLE of {num_pixels} pixels", "below 2^32, as runs are stored in 32 bits"
        )
    runs = runs_of(counts)
    # Each run alone first: a sum of large ones wraps around.
    if runs is None or runs.min() < 0 or runs.max() > num_pixels or runs.sum() != num_pixels:
        total = "cannot be decoded"
        if runs is not None and runs.min() >= 0 and runs.max() <= num_pixels:
            total = f"cover {runs.sum()} pixels"
        raise AnnotationProblem(
            "rle_malformed",
            f"RLE counts {total}",
            f"non-negative runs over all {num_pixels} pixels of the image",
        )
    if not runs[1::2].any():
        raise AnnotationProblem("mask_empty", "RLE has no foreground pixel", "at least one")
    if isinstance(counts, list):
        counts = mask_utils.frPyObjects(rle, height, width)["counts"].decode("ascii")
    return {"size": [height, width], "counts": counts}


def runs_of(counts: Any) -> np.ndarray | None:
    """Decode RLE counts to run lengths (background first), or None if that is impossible."""
    # pycocotools is not asked: it reads past the end of a broken string.
    try:
        if isinstance(counts, list):
            runs = np.asarray(counts)
            return runs.astype(np.int64) if runs.ndim == 1 and runs.dtype.kind in "iu" else None
        code = counts.encode("ascii") if isinstance(counts, str) else counts
        code = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    except (TypeError, ValueError, OverflowError):
        return None
    # A number is a little-endian string of 6-bit digits: 5 bits of value, then one that says
    # whether more follow. The highest value bit of the last digit is the sign.
    last = (code & 0x20) == 0
    if code.size == 0 or code.min() < 0 or code.max() > 63 or not last[-1]:
        return None
    end = np.flatnonzero(last)
    start = np.concatenate([[0], end[:-1] + 1])
    num_digits = end - start + 1
    if num_digits.max() > 7:  # 32-bit runs need 7; more would overflow below
        return None
    place = np.arange(code.size) - np.repeat(start, num_digits)
    runs = np.add.reduceat((code & 0x1F) << (5 * place), start)
    runs -= ((code[end] & 0x10) != 0).astype(np.int64) << (5 * num_digits)
    # From the fourth on, a run is stored as its difference to the last but one.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _is_outside(x1: float, y1: float, x2: float, y2: float, height: int, width: int) -> bool:
    over = OUTSIDE_TOLERANCE
    return x1 < -over or y1 < -over or x2 > width + over or y2 > height + over


def _all_finite(numbers: Sequence[Any]) -> bool:
    try:
        return all(map(math.isfinite, numbers))
    except (TypeError, OverflowError):
        return False
