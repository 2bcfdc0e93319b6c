"""Samples of image classifiers and semantic segmentation, and which records they learn from."""

import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from maskx.data.images import ImageMapper
from maskx.data.label_maps import ignore_label, semantic_label_map
from maskx.detectron2.datasets import class_names_of, records_of, split_from_config
from maskx.detectron2.hooks import hooks_of

__all__ = ["allowed_label_map", "image_mapper", "training_records"]

logger = logging.getLogger(__name__)


def image_mapper(cfg: CfgNode) -> ImageMapper:
    """Make what makes samples of records; see :func:`maskx.detectron2.adapters.in_format`.

    Where the split withholds masks, label maps are those of :func:`allowed_label_map`.

    Raises:
        ValueError: a key has no meaning for it.
    """
    flip = cfg.INPUT.RANDOM_FLIP
    if flip not in ("none", "horizontal"):
        raise ValueError(
            f"INPUT.RANDOM_FLIP is {flip!r}, but {cfg.MODEL.META_ARCHITECTURE} mirrors images "
            "horizontally or not at all. Allowed: horizontal, none."
        )
    num_classes, allowed = cfg.MODEL.MASKX.NUM_CLASSES, _classes_with_masks(cfg)
    read = functools.partial(allowed_label_map, num_classes=num_classes, allowed=allowed)
    return ImageMapper(
        num_classes,
        size=cfg.INPUT.MASKX.SIZE,
        flip=flip == "horizontal",
        label_maps=hooks_of(cfg).learns_label_maps,
        read_label_map=None if allowed is None else read,
    )


def allowed_label_map(
    record: Mapping[str, Any], *, num_classes: int, allowed: Collection[int]
) -> np.ndarray:
    """Make the label map of a record without the masks of other classes.

    Of objects they are removed before it is drawn; in a label map of a file their pixels become
    unknown, and with them the background, which would show their outlines.

    Args:
        record: as of :func:`maskx.data.coco.load_coco`; it stays as it is.
        num_classes: K.
        allowed: class indices whose masks are used.
    """
    withheld = [
        annotation
        if annotation["class_index"] in allowed
        else {key: value for key, value in annotation.items() if key != "segmentation"}
        for annotation in record["annotations"]
    ]
    label_map = semantic_label_map({**record, "annotations": withheld}, num_classes)
    return _withhold(label_map, allowed, num_classes)


def training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """Read the data sets of ``DATASETS.TRAIN``, without the images that teach the model nothing.

    An image classifier learns from every image whose labels are known, also from one that is known
    to have none. Semantic segmentation learns from every image of which a pixel is known; image
    labels without any annotation or label map tell nothing of a pixel.

    Detectron2's own rule, ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``, leaves out every image without
    a box, so all those that have only image labels or a label map; it is not used.

    Args:
        cfg: the configuration.

    Raises:
        ValueError: no image is left, or the data sets have different class lists.
    """
    names = cfg.DATASETS.TRAIN
    for name in names[1:]:
        if class_names_of(name) != class_names_of(names[0]):
            raise ValueError(
                f"Data sets '{names[0]}' and '{name}' (DATASETS.TRAIN) have different class lists. "
                "To train on both at once, give both the same names in the same order."
            )
    records = [record for name in names for record in records_of(name)]
    if hooks_of(cfg).learns_label_maps:
        allowed, what = _classes_with_masks(cfg), "a label map or a mask"
        kept = [record for record in records if _has_known_pixels(record, allowed)]
    else:
        what = "image labels"
        kept = [record for record in records if "image_labels" in record]
    if not kept:
        raise ValueError(
            f"None of the {len(records)} images of {', '.join(names)} (DATASETS.TRAIN) has {what}, "
            f"which {cfg.MODEL.META_ARCHITECTURE} learns from. Choose another data set."
        )
    if len(kept) < len(records):
        logger.warning(
            "%d of the %d images of DATASETS.TRAIN are left out: they do not have %s, which the "
            "model learns from.",
            *(len(records) - len(kept), len(records), what),
        )
    return kept


def _classes_with_masks(cfg: CfgNode) -> frozenset[int] | None:
    """Class indices whose masks may be used; None for all, or where none is read."""
    if not hooks_of(cfg).learns_label_maps:
        return None
    split = split_from_config(cfg)
    return frozenset(split.indices_with_masks) if split.indices_without_masks else None


def _has_known_pixels(record: dict[str, Any], allowed: Collection[int] | None) -> bool:
    if "label_map_file_name" in record:
        return True
    if "image_labels" not in record:
        return False
    annotations = record["annotations"]
    if any(
        "segmentation" in a and (allowed is None or a["class_index"] in allowed)
        for a in annotations
        if not a["iscrowd"]
    ):
        return True
    # The background is known only where all objects have a box.
    return record.get("boxes_complete", True) and {
        a["class_index"] for a in annotations
    }.issuperset(record["image_labels"])


def _withhold(label_map: np.ndarray, allowed: Collection[int], num_classes: int) -> np.ndarray:
    """Make the classes that are not allowed unknown and, where there are any, the background."""
    ignore = ignore_label(num_classes)
    is_withheld = np.ones(ignore + 1, bool)
    is_withheld[[0, ignore, *(index + 1 for index in allowed)]] = False
    withheld = is_withheld[label_map]
    if withheld.any():
        withheld |= label_map == 0
        return np.where(withheld, label_map.dtype.type(ignore), label_map)
    return label_map
