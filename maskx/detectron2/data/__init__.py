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
from maskx.detectron2.data.joint_data import (
    JointLoader,
    MaskXJointMapper,
    build_joint_loader,
    check_joint_data,
    indices_of_dataset,
    model_class_table,
    scored_indices,
    split_of_dataset,
    trained_indices,
)
from maskx.detectron2.data.transfer_data import (
    MaskXTransferMapper,
    build_transfer_loader,
    check_transfer_data,
    transfer_records,
    transfer_split,
)

__all__ = [
    "JointLoader",
    "MaskXDatasetMapper",
    "MaskXImageMapper",
    "MaskXJointMapper",
    "MaskXTransferMapper",
    "build_joint_loader",
    "build_transfer_loader",
    "check_joint_data",
    "check_transfer_data",
    "class_names_of",
    "image_labels_of",
    "indices_of_dataset",
    "model_class_table",
    "plain_record",
    "register_all",
    "register_coco",
    "register_from_config",
    "scored_indices",
    "split_from_config",
    "split_of_dataset",
    "trained_indices",
    "training_class_names",
    "training_records",
    "transfer_records",
    "transfer_split",
]
