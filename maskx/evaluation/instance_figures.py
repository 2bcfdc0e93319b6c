"""Pictures of detections, which show categories with and without masks in training apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskx.data.coco import CocoData
from maskx.data.images import read_record_image
from maskx.data.masks import decode_segmentation
from maskx.evaluation.figures import contact_sheet, draw_instances, save_png
from maskx.supervision import CategorySplit

__all__ = ["confident_detections", "interesting_records", "save_pictures"]

_IMAGES, _COLUMNS, _SCORE = 8, 4, 0.5


def save_pictures(
    folder: Path,
    data: CocoData,
    detections: Mapping[str, Sequence[dict[str, Any]]],
    split: CategorySplit,
) -> list[Path]:
    """Draw the images on which a method is surest; with several methods, side by side as well.

    Args:
        folder: of ``predictions.png`` and, of several methods, ``comparison.png``.
        detections: in COCO's results format, by method; the first decides on the images.
        split: categories of A are drawn in another colour than those of B.

    Returns:
        The files.
    """
    confident = {name: confident_detections(data, found) for name, found in detections.items()}
    first = next(iter(confident.values()))
    records = interesting_records(data, first, split)
    paths = [folder / "predictions.png"]
    save_png(paths[0], contact_sheet(_draw_tiles(data, records, first, split)))
    if len(confident) > 1:
        rows = [
            tile
            for by_image in confident.values()
            for tile in _draw_tiles(data, records[:_COLUMNS], by_image, split)
        ]
        paths.append(folder / "comparison.png")
        columns = min(_COLUMNS, len(records))
        save_png(paths[1], contact_sheet(rows, columns=columns, row_titles=list(confident)))
    return paths


def confident_detections(
    data: CocoData, detections: Sequence[dict[str, Any]]
) -> dict[Any, list[dict[str, Any]]]:
    """Keep confident detections that no surer one covers, by image, the surest first."""
    by_image: dict[Any, list] = {record["image_id"]: [] for record in data.records}
    for detection in sorted(detections, key=lambda d: -d["score"]):
        others = by_image[detection["image_id"]]
        if detection["score"] >= _SCORE and not _is_repeated(detection, others):
            others.append(detection)
    return by_image


def interesting_records(
    data: CocoData, by_image: Mapping[Any, Sequence[dict[str, Any]]], split: CategorySplit
) -> list[dict[str, Any]]:
    """Choose the surest images that show both A and B."""
    in_a = {data.category_ids[index] for index in split.indices_with_masks}

    def interest(record: dict) -> tuple[int, float]:
        found = by_image[record["image_id"]]
        sides = [d["category_id"] in in_a for d in found]
        shown = min(2, sides.count(True)) + min(2, sides.count(False))
        return shown, sum(d["score"] for d in found) / max(1, len(found))

    return sorted(data.records, key=interest, reverse=True)[:_IMAGES]


def _draw_tiles(
    data: CocoData,
    records: Sequence[dict[str, Any]],
    by_image: Mapping[Any, Sequence[dict[str, Any]]],
    split: CategorySplit,
) -> list[np.ndarray]:
    class_index = {category: index for index, category in enumerate(data.category_ids)}
    in_a = set(split.indices_with_masks)
    tiles = []
    for record in records:
        found = by_image[record["image_id"]]
        indices = [class_index[d["category_id"]] for d in found]
        boxes = np.array([d["bbox"] for d in found], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        height, width = record["height"], record["width"]
        tile = draw_instances(
            read_record_image(record, image_format="RGB"),
            boxes=boxes,
            masks=(decode_segmentation(d["segmentation"], height, width) for d in found),
            labels=[
                f"{data.class_names[i]} {d['score']:.2f}"
                for i, d in zip(indices, found, strict=True)
            ],
            with_masks=[i in in_a for i in indices],
        )
        tiles.append(tile)
    return tiles


def _is_repeated(detection: dict[str, Any], surer: Sequence[dict[str, Any]]) -> bool:
    """Whether a surer detection, of any category, covers nearly the same pixels."""
    masks = [other["segmentation"] for other in surer]
    overlaps = mask_api.iou([detection["segmentation"]], masks, [0] * len(masks))
    return len(masks) > 0 and bool(np.max(overlaps) > 0.5)
