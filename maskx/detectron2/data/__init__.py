"""Data sets and mappers for annotations of which only some have masks, and for image labels."""

from maskx.detectron2.data.concept_data import (
    MaskXConceptMapper,
    build_concept_loader,
    check_concept_data,
    concept_split,
    concept_table,
    concept_test_data,
    unseen_words,
)
from maskx.detectron2.data.dataset_mapper import MaskXDatasetMapper
from maskx.detectron2.data.datasets import (
    class_names_of,
    image_labels_of,
    plain_record,
    register_all,
    register_coco,
    register_from_config,
    register_tag_list,
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
    "MaskXConceptMapper",
    "MaskXDatasetMapper",
    "MaskXImageMapper",
    "MaskXJointMapper",
    "MaskXTransferMapper",
    "build_concept_loader",
    "build_joint_loader",
    "build_transfer_loader",
    "check_concept_data",
    "check_joint_data",
    "check_transfer_data",
    "class_names_of",
    "concept_split",
    "concept_table",
    "concept_test_data",
    "image_labels_of",
    "indices_of_dataset",
    "model_class_table",
    "plain_record",
    "register_all",
    "register_coco",
    "register_from_config",
    "register_tag_list",
    "scored_indices",
    "split_from_config",
    "split_of_dataset",
    "trained_indices",
    "training_class_names",
    "training_records",
    "transfer_records",
    "transfer_split",
    "unseen_words",
]
