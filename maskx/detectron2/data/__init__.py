"""Data sets and mappers for annotations of which only some have masks."""

from maskx.detectron2.data.dataset_mapper import MaskXDatasetMapper
from maskx.detectron2.data.datasets import (
    class_names_of,
    register_all,
    register_coco,
    register_from_config,
    split_from_config,
    training_class_names,
)

__all__ = [
    "MaskXDatasetMapper",
    "class_names_of",
    "register_all",
    "register_coco",
    "register_from_config",
    "split_from_config",
    "training_class_names",
]
