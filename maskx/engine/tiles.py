"""Predictions of large images in overlapping tiles, which the model sees at their own size.

Instances of the tiles, and of the whole image for objects larger than a tile, are merged where they
overlap. Of label maps each pixel is taken from the tile in which it lies most inside.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskx.data.masks import decode_segmentation
from maskx.engine.results import Prediction

__all__ = ["predict_tiles"]

_OVERLAP = 0.25  # of the side of a tile
_SAME = 0.5  # share of the smaller of two masks from which they are of one object
_EDGE = 2  # pixels from the side of a tile within which an object is cut off


def predict_tiles(
    predict: Callable[[Sequence[np.ndarray]], Sequence[Prediction]],
    image: np.ndarray,
    side: int,
    *,
    batch_size: int = 1,
) -> Prediction:
    """Predict an image by tiles; one that is no larger than a tile is predicted as it is.

    Args:
        predict: predicts images of one shape.
        image: (H, W, 3) uint8 RGB.
        side: of the tiles in pixels; they overlap by at least a quarter of it.
        batch_size: tiles that are predicted at a time.
    """
    size = image.shape[:2]
    if max(size) <= side:
        return predict([image])[0]
    windows = list(itertools.product(*(_spans(length, side) for length in size)))
    found: list[Prediction] = []
    for start in range(0, len(windows), batch_size):
        tiles = [
            np.ascontiguousarray(image[rows.start : rows.stop, columns.start : columns.stop])
            for rows, columns in windows[start : start + batch_size]
        ]
        found += predict(tiles)
    parts: dict[str, Any] = {"image": image}
    for key in ("label_map", "label_scores"):
        if getattr(found[0], key) is None:
            continue
        parts[key] = np.zeros(size, getattr(found[0], key).dtype)
        for (rows, columns), each in zip(windows, found, strict=True):
            own = getattr(each, key)[rows.own(), columns.own()]
            parts[key][slice(*rows.inside), slice(*columns.inside)] = own
    if found[0].class_indices is not None:
        views = [predict([image])[0]]
        is_cut = [np.zeros(len(views[0].class_indices), bool)]
        for (rows, columns), each in zip(windows, found, strict=True):
            views.append(_placed(each, rows.start, columns.start, size))
            is_cut.append(_cut_off(each.boxes, rows, columns, size))
        parts |= _merged(views, np.concatenate(is_cut))
    return replace(found[0], **parts)


@dataclass(frozen=True)
class _Span:
    """A tile along an axis, and the pixels that lie deeper in it than in its neighbours."""

    start: int
    stop: int
    inside: tuple[int, int]

    def own(self) -> slice:
        return slice(self.inside[0] - self.start, self.inside[1] - self.start)


def _spans(length: int, side: int) -> list[_Span]:
    side = min(side, length)
    count = 1 + math.ceil((length - side) / (side - round(_OVERLAP * side)))
    starts = [round(i * (length - side) / max(1, count - 1)) for i in range(count)]
    seams = [(last + side + start) // 2 for last, start in itertools.pairwise(starts)]
    insides = itertools.pairwise([0, *seams, length])
    return [_Span(s, s + side, inside) for s, inside in zip(starts, insides, strict=True)]


def _cut_off(boxes: np.ndarray, rows: _Span, columns: _Span, size: tuple[int, int]) -> np.ndarray:
    """Say which boxes of a tile end at a side of it that is none of the image."""
    x1, y1, x2, y2 = boxes.T
    is_cut = np.zeros(len(boxes), bool)
    for low, high, span, length in ((y1, y2, rows, size[0]), (x1, x2, columns, size[1])):
        is_cut |= (low <= _EDGE) & (span.start > 0)
        is_cut |= (high >= span.stop - span.start - _EDGE) & (span.stop < length)
    return is_cut


def _placed(found: Prediction, top: int, left: int, size: tuple[int, int]) -> Prediction:
    """Move the instances of a tile to where they are in the image."""
    masks = found.segmentations
    if masks is not None:
        masks = [_moved(decode_segmentation(m, *m["size"]), top, left, size) for m in masks]
    boxes = found.boxes + np.array([left, top, left, top])
    return replace(found, image=None, label_map=None, boxes=boxes, segmentations=masks)


def _moved(mask: np.ndarray, top: int, left: int, size: tuple[int, int]) -> dict[str, Any]:
    """Encode a mask that lies in a larger image, whose pixels are never made."""
    edges = np.diff(np.pad(mask.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    places = [
        (column + left) * size[0] + row + top
        for column, row in (np.nonzero(edges == sign) for sign in (1, -1))
    ]
    places = np.stack(places, axis=1).ravel()  # start, stop, start, ...
    repeated = np.flatnonzero(places[1:] == places[:-1])  # a column goes on in the next one
    borders = np.delete(places, np.concatenate([repeated, repeated + 1]))
    counts = np.diff(np.concatenate([[0], borders, [size[0] * size[1]]]))
    encoded = mask_api.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    return {"size": list(size), "counts": encoded["counts"].decode("ascii")}


def _merged(views: Sequence[Prediction], is_cut: np.ndarray) -> dict[str, Any]:
    """Keep of the masks of one object in several views that of the surest view that has it whole.

    Instances of one view never rule each other out: the model has done that.
    """
    boxes = np.concatenate([each.boxes for each in views])
    scores = np.concatenate([each.scores for each in views])
    classes = np.concatenate([each.class_indices for each in views])
    view = np.repeat(np.arange(len(views)), [len(each.class_indices) for each in views])
    has_masks = views[0].segmentations is not None
    shapes = list(itertools.chain.from_iterable(v.segmentations or () for v in views))
    if not has_masks:
        shapes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    kept: list[int] = []
    for index in np.lexsort((-scores, is_cut)).tolist():
        others = [k for k in kept if classes[k] == classes[index] and view[k] != view[index]]
        if not any(share >= _SAME for share in _shares(shapes, index, others)):
            kept.append(index)
    kept.sort(key=lambda index: -scores[index])
    return {
        "boxes": boxes[kept],
        "scores": scores[kept],
        "class_indices": classes[kept],
        "segmentations": [shapes[index] for index in kept] if has_masks else None,
    }


def _shares(shapes: Sequence[Any], index: int, others: Sequence[int]) -> Iterator[float]:
    """How much of the smaller one a shape and each of some others have in common."""
    if others:
        one, rest = [shapes[index]], [shapes[other] for other in others]
        # As of crowds, the intersection is divided by the area of the first alone.
        yield from mask_api.iou(one, rest, [1] * len(rest)).ravel()
        yield from mask_api.iou(rest, one, [1]).ravel()
