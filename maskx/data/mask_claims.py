"""What a category split says of masks, compared with the annotations."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from maskx.supervision import CategorySplit

__all__ = ["check_masks"]

logger = logging.getLogger(__name__)


def check_masks(records: Iterable[Mapping[str, Any]], split: CategorySplit) -> None:
    """Compare what a split says of masks with the annotations that will be trained on.

    Categories that have masks by the split, and none in the data, are named in a warning.

    Args:
        records: of the training data, see :func:`maskx.data.coco.load_coco`.
        split: says which categories have masks (A).

    Raises:
        ValueError: none of the categories of A has a mask, so no mask would be learned.
    """
    boxes: Counter[int] = Counter()
    masks: Counter[int] = Counter()
    for record in records:
        for annotation in record["annotations"]:
            if not annotation["iscrowd"]:
                boxes[annotation["class_index"]] += 1
                masks[annotation["class_index"]] += bool(annotation.get("segmentation"))
    names = dict(zip(split.indices_with_masks, split.with_masks, strict=True))
    without = [index for index in names if not masks[index]]
    listed = ", ".join(f"{names[index]!r} ({boxes[index]} boxes)" for index in without[:8])
    if without and len(without) == len(names):
        raise ValueError(
            f"Category split '{split.name}' says that {len(names)} categories have masks (A), but "
            f"no annotation of theirs has one: {listed}{', ...' if len(without) > 8 else ''}. The "
            "mask branch would learn nothing. Add polygons or RLE masks to the annotation file, or "
            "name categories that have some."
        )
    if without:
        logger.warning(
            "Category split '%s' says that %d categories have masks (A), but %d of them have none "
            "in the training data: %s%s. They learn from their boxes alone.",
            *(split.name, len(names), len(without), listed, ", ..." if len(without) > 8 else ""),
        )
