"""How good proxy masks are: mean IoU against true label maps; and a picture of all steps.

A proxy mask leaves pixels undecided, which its training ignores. There are two ways to count them:

- as missed: each is a false negative of its true label and a false positive of none. It is what
  the masks find of all there is, and falls with every pixel left undecided;
- not at all: only pixels that are decided count. It is how right the labels are that a network
  would be trained on, and a mask that decides little can be best at it.

Pixels that the truth ignores count nowhere.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskx.data.images import read_image_sample
from maskx.data.label_maps import ignore_label, read_label_map, semantic_label_map
from maskx.evaluation.figures import (
    contact_sheet,
    draw_heat_map,
    draw_label_map,
    plain_tile,
    save_png,
)
from maskx.evaluation.mean_iou import MeanIoU
from maskx.systems.class_patterns.projections import read_header, read_projections
from maskx.systems.class_patterns.proxy_masks import MASKS_HEADER, mask_path

_TILE_SIDE = 256


def evaluate_proxy_masks(
    records: Sequence[Mapping[str, Any]],
    masks_folder: str | os.PathLike[str],
    num_classes: int,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare proxy masks to the true label maps of records.

    Returns:
        "undecided_missed" and "decided_only": what `MeanIoU.evaluate` returns, counted in the two
        ways above; "undecided": share of the known pixels that is undecided. All in percent,
        [0, 100]; NaN if no pixel is known.
    """
    ignore = ignore_label(num_classes)
    missed, decided_only = MeanIoU(num_classes), MeanIoU(num_classes)
    for record in tqdm(records, "proxy masks", disable=not progress, unit="img"):
        image_id = record["image_id"]
        truth = semantic_label_map(record, num_classes)
        predicted = read_label_map(
            mask_path(masks_folder, image_id),
            record["height"],
            record["width"],
            num_classes=num_classes,
            image_id=image_id,
        )
        missed.update(predicted, truth, image_id, allow_undecided=True)
        truth = np.where(predicted == ignore, ignore, truth)
        decided_only.update(predicted, truth, image_id, allow_undecided=True)
    num_known, num_decided = int(missed.true.sum()), int(decided_only.true.sum())
    return {
        "undecided_missed": missed.evaluate(),
        "decided_only": decided_only.evaluate(),
        "undecided": 100 * (1 - num_decided / num_known) if num_known else math.nan,
    }


def draw_steps(
    path: Path,
    records: Sequence[Mapping[str, Any]],
    predicted: Mapping[int | str, np.ndarray],
    *,
    class_names: Sequence[str],
    layer: str,
    projections: Path,
    masks: Path,
    stds: Sequence[float],
) -> None:
    """Draw images with labels, from the image over projection and proxy mask to the prediction.

    Args:
        path: PNG file to write.
        records: of the images, such as of :func:`maskx.evaluation.figures.varied_records`.
        predicted: label map by image id.
        layer: whose projections are drawn.
        projections: their folder.
        masks: folder of the proxy masks.
        stds: (K,) standard deviations of the projections.
    """
    num_classes, thresholds = len(class_names), read_header(masks / MASKS_HEADER)["thresholds"]
    names = {"num_classes": num_classes, "names": class_names, "side": _TILE_SIDE}
    tiles, titles = [], []
    for number, record in enumerate(records):
        image_id = record["image_id"]
        image = read_image_sample(record)["image"].permute(1, 2, 0).contiguous().numpy()
        labels, found = read_projections(projections, image_id)
        row = number % len(labels)
        scores = found[row] / float(stds[labels[row]]) - thresholds[labels[row]]
        proxy = read_label_map(
            mask_path(masks, image_id),
            *image.shape[:2],
            num_classes=num_classes,
            image_id=image_id,
        )
        truth = semantic_label_map(record, num_classes)
        tiles += [
            plain_tile(image, _TILE_SIDE),
            draw_heat_map(image, scores, symmetric=True, side=_TILE_SIDE),
            *(draw_label_map(image, m, **names) for m in (proxy, predicted[image_id], truth)),
        ]
        tags = ", ".join(class_names[label] for label in labels)
        titles.append(f"tags: {tags}; projection: {class_names[labels[row]]}")
    columns = ("image", f"projection ({layer})", "proxy mask", "prediction", "truth")
    legend = (
        ((220, 30, 30), "projection above the threshold"),
        ((30, 60, 220), "below"),
        ((150, 150, 150), "hatched: undecided or unknown"),
    )
    sheet = contact_sheet(
        tiles, columns=len(columns), row_titles=titles, column_titles=columns, legend=legend
    )
    save_png(path, sheet)
