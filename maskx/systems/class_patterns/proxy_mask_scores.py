"""How good proxy masks are: mean IoU against true label maps.

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
from typing import Any

import numpy as np
from tqdm import tqdm

from maskx.data.label_maps import ignore_label, read_label_map, semantic_label_map
from maskx.evaluation.mean_iou import MeanIoU
from maskx.systems.class_patterns.proxy_masks import mask_path

__all__ = ["evaluate_proxy_masks"]


def evaluate_proxy_masks(
    records: Sequence[Mapping[str, Any]],
    masks_folder: str | os.PathLike[str],
    num_classes: int,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare proxy masks to true label maps.

    Args:
        records: as `maskx.data.coco.load_coco` makes them, with true masks or label maps.
        masks_folder: of `maskx.systems.class_patterns.proxy_masks.make_proxy_masks`, with the
            masks of all records.
        num_classes: number of classes K, without the background.
        progress: show a progress bar.

    Returns:
        "undecided_missed" and "decided_only": what `MeanIoU.evaluate` returns, counted in the two
        ways above; "undecided": share of the known pixels that is undecided. All in percent,
        [0, 100]; NaN if no pixel is known.

    Raises:
        FileNotFoundError: a mask or a true label map is missing.
        ValueError: a mask or a true label map is none of `num_classes` classes, or damaged.
    """
    ignore = ignore_label(num_classes)
    missed, decided_only = MeanIoU(num_classes), MeanIoU(num_classes)
    for record in tqdm(records, "proxy masks", disable=not progress, unit="img"):
        image_id = record["image_id"]
        truth = semantic_label_map(record, num_classes)
        predicted = read_label_map(
            *(mask_path(masks_folder, image_id), record["height"], record["width"]),
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
