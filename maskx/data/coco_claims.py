"""Claims of an annotation file, compared: boxes with masks, image labels with label maps."""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from maskx.core.text import listed
from maskx.data.coco_structure import Report

__all__ = ["BoxesAndMasks", "check_label_maps"]

_FITS, _DISAGREES = 0.75, 0.5  # IoU of a box and the extent of its mask: from there on, below
_MIN_DISTANCE = 2.0  # pixels that sides must be apart too, as small boxes are rounded
_NUM_EXAMPLES = 3
_NUM_LABEL_MAPS = 16  # that are opened to compare them with the image labels

_READINGS = {
    "corners": "corners [x1, y1, x2, y2]",
    "centres": "centres [x, y, width, height] with x, y in the middle",
    "shares": "shares of the image, from 0 to 1",
}


class BoxesAndMasks:
    """Compares the boxes of a file with the extents of their masks."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._counts: Counter[str] = Counter()
        self._reach = 0.0  # of the boxes, in sides of their images
        self._worst: list[tuple[float, int, str]] = []
        self._rows: list[tuple[Sequence[float], Sequence[float], Sequence[float]]] = []
        self._ids: list[tuple[Any, Any]] = []

    def add_arrays(self, rows: Any) -> None:
        """Add those of a chunk that are usual (`_UsualRows` of `maskx.data.coco`)."""
        usual = np.flatnonzero(rows.usual)
        self._add(rows.given[usual], rows.extents[usual], rows.sizes[usual], usual, rows.ids)

    def add(self, bbox: Any, record: Mapping[str, Any], id_: Any, extent: Any) -> None:
        """Add one annotation, as it is in the file.

        Args:
            bbox: Perhaps of any form.
            extent: (x1, y1, x2, y2) of its mask; None if it has none.
        """
        try:
            box = [float(number) for number in bbox] if isinstance(bbox, list) else []
        except (TypeError, ValueError, OverflowError):
            return
        if len(box) == 4 and np.isfinite(box).all():
            self._rows.append((box, extent or [np.nan] * 4, (record["height"], record["width"])))
            self._ids.append((id_, record["image_id"]))

    def check(self) -> None:
        """Refuse a file in which most boxes are not where their masks are, and warn of some."""
        if self._rows:
            parts = [np.array(part, float) for part in zip(*self._rows, strict=True)]
            ids = self._ids
            self._add(*parts, range(len(ids)), lambda chosen: [ids[i] for i in chosen])
        counts = self._counts
        compared, boxes = counts["compared"], counts["boxes"]
        if boxes and counts["in one pixel"] > boxes / 2:
            return self._refuse(
                f"{counts['in one pixel']} of {boxes} boxes lie within one pixel of the corner of "
                f"their image: they look like {_READINGS['shares']}"
            )
        if compared and counts["fits"] < compared / 2:
            best = max(_READINGS, key=lambda reading: counts[reading])
            if counts[best] >= 0.8 * compared:
                return self._refuse(
                    f"{compared - counts['fits']} of {compared} boxes do not fit their masks, but "
                    f"{counts[best]} would as {_READINGS[best]}"
                )
        if boxes and counts["outside"] > boxes / 2 and counts["inside as corners"] == boxes:
            return self._refuse(
                f"{counts['outside']} of {boxes} boxes leave their image, but none would as "
                f"{_READINGS['corners']}"
            )
        if boxes and counts["outside"] > boxes / 2:
            likely = (
                "All would lie inside with x and y, and width and height, exchanged."
                if counts["inside exchanged"] == boxes
                else f"They reach to {self._reach:.3g} times its size: were they drawn on images "
                "of another size?"
            )
            self._report.warn(
                "boxes_leave_images",
                f"{counts['outside']} of {boxes} boxes leave their image. {likely}",
            )
        examples = "; ".join(text for _, _, text in sorted(self._worst, reverse=True))
        found = f"{counts['disagree']} of {compared} boxes are not where their masks are"
        if compared > 1 and counts["disagree"] > compared / 2:
            return self._report.refuse(
                "boxes_apart_from_masks",
                f"{found}, such as {examples}",
                "Correct the boxes, or remove them: strict=False (--skip-bad) takes missing boxes "
                "from the masks",
            )
        if counts["disagree"]:
            self._report.warn("box_apart_from_mask", f"{found}: {examples}")
        return None

    def _refuse(self, found: str) -> None:
        self._report.refuse(
            "boxes_of_another_form",
            found,
            "Allowed are [x, y, width, height] in pixels, x, y in the upper left; convert them",
        )

    def _add(self, given: Any, extents: Any, sizes: Any, indices: Any, ids_of: Any) -> None:
        counts = self._counts
        x, y, width, height = given.T
        image_height, image_width = sizes.T
        corners = np.stack([x, y, x + width, y + height], 1)
        right, bottom = corners[:, 2], corners[:, 3]
        counts["boxes"] += len(given)
        is_large = np.minimum(image_height, image_width) > 16
        counts["in one pixel"] += int(((right <= 1) & (bottom <= 1) & is_large & (width > 0)).sum())
        counts["outside"] += int(((right > image_width + 1) | (bottom > image_height + 1)).sum())
        counts["inside exchanged"] += int(
            ((bottom <= image_width + 1) & (right <= image_height + 1)).sum()
        )
        reach = np.maximum(right / image_width, bottom / image_height)
        self._reach = max(self._reach, float(reach.max(initial=0)))
        counts["inside as corners"] += int(
            ((width > x) & (height > y) & (width <= image_width) & (height <= image_height)).sum()
        )
        masked = np.flatnonzero(np.isfinite(extents[:, 0]))
        if not len(masked):
            return
        counts["compared"] += len(masked)
        given, extents, corners = given[masked], extents[masked], corners[masked]
        iou = _iou(corners, extents)
        counts["fits"] += int((iou >= _FITS).sum())
        if (iou < _FITS).any():  # else no other reading is asked for
            x, y, width, height = given.T
            side = np.stack([image_width, image_height], 1)[masked]
            readings = {
                "corners": given,
                "centres": corners - np.tile(given[:, 2:] / 2, 2),
                "shares": corners * np.tile(side, 2),
            }
            for name, boxes in readings.items():
                counts[name] += int((_iou(boxes, extents) >= _FITS).sum())
        apart = np.abs(corners - extents).max(1)
        bad = np.flatnonzero((iou < _DISAGREES) & (apart > _MIN_DISTANCE))
        counts["disagree"] += len(bad)
        worst = bad[np.argsort(iou[bad], kind="stable")][:_NUM_EXAMPLES]
        ids = ids_of([indices[masked[index]] for index in worst])
        for index, (id_, image_id) in zip(worst.tolist(), ids, strict=True):
            box, extent = (
                "[" + ", ".join(f"{number:g}" for number in corner) + "]"
                for corner in (corners[index], extents[index])
            )
            text = f"annotation {id_!r} of image {image_id!r}: box from {box}, mask from {extent}"
            heapq.heappush(self._worst, (-float(iou[index]), len(self._worst), text))
        self._worst = heapq.nlargest(_NUM_EXAMPLES, self._worst)


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of each of (N, 4) corners with its counterpart."""
    low = np.maximum(boxes[:, :2], others[:, :2])
    high = np.minimum(boxes[:, 2:], others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    areas = [np.clip(part[:, 2:] - part[:, :2], 0, None).prod(1) for part in (boxes, others)]
    return shared / np.maximum(areas[0] + areas[1] - shared, 1e-9)


def check_label_maps(
    records: Sequence[Mapping[str, Any]], class_names: Sequence[str], report: Report
) -> None:
    """Compare image labels with label maps, in a few images.

    Raises:
        ValueError: Most label maps show none of the classes that their images are said to show.
    """
    mapped = [record for record in records if "label_map_file_name" in record]
    labelled = [record for record in mapped if record["image_labels"]]
    if mapped and not any(record["image_labels"] for record in records):
        report.warn(
            "label_maps_without_image_labels",
            f"{len(mapped)} images have a label map, but none has image_labels. What learns from "
            "tags needs them: the ids of the categories that the label map shows.",
        )
        return
    step = max(1, len(labelled) // _NUM_LABEL_MAPS)
    chosen = labelled[::step][:_NUM_LABEL_MAPS]
    contradicting, values = [], set()
    for record in chosen:
        shown = _values(record["label_map_file_name"])
        if shown is None:
            continue
        values |= shown
        if not shown & {label + 1 for label in record["image_labels"]}:
            contradicting.append(record)
    if not contradicting:
        return
    record = contradicting[0]
    names = listed([class_names[label] for label in record["image_labels"]])
    hint = ""
    if values <= {0, 255}:
        hint = "255 means unknown: is a class drawn as 255? "
    elif all(_values(r["label_map_file_name"]) >= set(r["image_labels"]) for r in contradicting):
        hint = "Do the label maps count the classes from 0? 0 is the background, class index + 1. "
    found = (
        f"{len(contradicting)} of {len(chosen)} label maps show no class that their "
        f"image_labels name, such as {record['label_map_file_name']} of image "
        f"{record['image_id']!r}: {names}; the values there are "
        f"{listed([str(value) for value in sorted(_values(record['label_map_file_name']))])}"
    )
    if len(contradicting) > len(chosen) / 2:
        report.refuse(
            "label_maps_contradict",
            found,
            f"{hint}Correct the label maps or the image labels",
        )
    else:
        report.warn("label_map_contradicts", f"{found}. {hint}".strip())


def _values(path: str) -> set[int] | None:
    """Return the values of a label map, or None if it cannot be read, which its reader will say."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                return None
            return set(np.unique(np.asarray(image)).tolist())
    except (OSError, SyntaxError, ValueError):
        return None
