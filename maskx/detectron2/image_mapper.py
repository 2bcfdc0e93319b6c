"""Mapper for image classifiers and semantic segmentation, and which records they can learn from."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T

from maskx.data.images import read_record_image
from maskx.data.label_maps import ignore_label, semantic_label_map
from maskx.detectron2.datasets import (
    class_names_of,
    record_from_detectron2,
    records_of,
    split_from_config,
)
from maskx.detectron2.hooks import hooks_of

__all__ = ["MaskXImageMapper", "training_records", "transform_label_map"]

logger = logging.getLogger(__name__)


class MaskXImageMapper:
    """Map records to images with their labels and, for semantic segmentation, their label maps.

    A sample is the record, without its annotations and the names of other files, and

    - ``image``: (3, H, W) uint8, in training augmented, else as it is in the file;
    - ``image_labels``: class indices known to be in the image, given or of its annotations;
    - ``sem_seg``: (H, W) int64, only in training with ``label_maps``: the label map of the record
      or, where it has none, drawn from its objects; see
      :func:`maskx.data.label_maps.semantic_label_map`. Otherwise no mask is read.

    ``height`` and ``width`` stay those of the file.

    Args:
        is_train: whether it is used in training.
        augmentations: what is done to training images.
        image_format: "BGR" or "RGB".
        num_classes: K, without the background.
        label_maps: whether label maps are made.
        classes_with_masks: class indices (A) whose masks are used; None for all. The masks of all
            other classes are removed before a label map is drawn; in a label map of a file their
            pixels become unknown, and with them the background, which would show their outlines.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        num_classes: int,
        label_maps: bool,
        classes_with_masks: Collection[int] | None = None,
    ) -> None:
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations if is_train else [])
        self.image_format = image_format
        self.num_classes = num_classes
        self.label_maps = label_maps
        self.classes_with_masks = (
            None if classes_with_masks is None else frozenset(classes_with_masks)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        size = cfg.INPUT.MASKX.SIZE
        if size < 1:
            raise ValueError(f"INPUT.MASKX.SIZE is {size}. Allowed: a side in pixels, above 0.")
        augmentations = [T.Resize((size, size))]
        if cfg.INPUT.RANDOM_FLIP != "none":
            vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
            augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
        return {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.MASKX.NUM_CLASSES,
            "label_maps": hooks_of(cfg).learns_label_maps,
            "classes_with_masks": _classes_with_masks(cfg) if is_train else None,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Map a record to a sample; the record stays as it is."""
        record = record_from_detectron2(record)
        image = read_record_image(record, image_format=self.image_format)
        left_out = ("annotations", "sem_seg_file_name", "label_map_file_name")
        sample = {key: value for key, value in record.items() if key not in left_out}
        sample["image_labels"] = list(record.get("image_labels", ()))
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        sample["image"] = _to_tensor(augmented.image.transpose(2, 0, 1))
        if self.is_train and self.label_maps:
            label_map = transform_label_map(self._label_map(record), transforms)
            sample["sem_seg"] = _to_tensor(label_map.astype(np.int64))
        return sample

    def _label_map(self, record: dict[str, Any]) -> np.ndarray:
        allowed = self.classes_with_masks
        if allowed is None:
            return semantic_label_map(record, self.num_classes)
        withheld = [
            annotation
            if annotation["class_index"] in allowed
            else {key: value for key, value in annotation.items() if key != "segmentation"}
            for annotation in record["annotations"]
        ]
        label_map = semantic_label_map({**record, "annotations": withheld}, self.num_classes)
        return _withhold(label_map, allowed, self.num_classes)


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


def transform_label_map(label_map: np.ndarray, transforms: T.TransformList) -> np.ndarray:
    """Apply transforms to an (H, W) label map; of integers of more than 8 bits come int32."""
    if label_map.dtype == np.uint8:
        return transforms.apply_segmentation(label_map)
    # As an image of four channels of bytes: other integers are resized by another rule, which
    # takes the neighbour to the upper left instead of the nearest.
    pixels = np.ascontiguousarray(label_map, dtype="<i4").view(np.uint8)
    pixels = transforms.apply_segmentation(pixels.reshape(*label_map.shape, 4))
    return np.ascontiguousarray(pixels).view("<i4")[:, :, 0]


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(array))
