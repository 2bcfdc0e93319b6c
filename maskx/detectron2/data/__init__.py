"""Data sets and mappers for annotations of which only some have masks, and for image labels."""

from maskx.detectron2.data.dataset_mapper import MaskXDatasetMapper
from maskx.detectron2.data.datasets import (
    class_names_of,
    image_labels_of,
    plain_record,
    register_all,
    register_coco,
    register_from_config,
    split_from_config,
    training_class_names,
)
from maskx.detectron2.data.image_mapper import MaskXImageMapper, training_records

__all__ = [
    "MaskXDatasetMapper",
    "MaskXImageMapper",
    "class_names_of",
    "image_labels_of",
    "plain_record",
    "register_all",
    "register_coco",
    "register_from_config",
    "split_from_config",
    "training_class_names",
    "training_records",
]
