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
from maskx.detectron2.data.transfer_data import (
    MaskXTransferMapper,
    build_transfer_loader,
    check_transfer_data,
    transfer_records,
    transfer_split,
)

__all__ = [
    "MaskXDatasetMapper",
    "MaskXImageMapper",
    "MaskXTransferMapper",
    "build_transfer_loader",
    "check_transfer_data",
    "class_names_of",
    "image_labels_of",
    "plain_record",
    "register_all",
    "register_coco",
    "register_from_config",
    "split_from_config",
    "training_class_names",
    "training_records",
    "transfer_records",
    "transfer_split",
]
