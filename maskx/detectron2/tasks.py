"""What a meta-architecture learns: it decides on the mapper, the images and the evaluator."""

from enum import Enum

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["Task", "architecture_of", "is_transfer", "num_classes_of", "task_of"]


class Task(Enum):
    """What a meta-architecture learns and predicts.

    One of maskx, or one that wants the data of maskx, says so by a class attribute ``maskx_task``,
    a member or its value. Others are taken for instance segmentation.
    """

    INSTANCES = "instances"
    """``instances``, as Detectron2's own; the classes are ``MODEL.ROI_HEADS.NUM_CLASSES``."""
    IMAGE_LABELS = "image_labels"
    """``image_labels_prob``, learned from ``image_labels``; ``MODEL.MASKX.NUM_CLASSES``."""
    PIXELS = "pixels"
    """``sem_seg``, learned from label maps; ``MODEL.MASKX.NUM_CLASSES``."""
    LARGE_VOCABULARY = "large_vocabulary"
    """``sem_seg`` without a background, learned from data sets of different supervision together.

    Their class lists make the classes; see :mod:`maskx.systems.larvseg.detectron2.data`.
    """
    CONCEPTS = "concepts"
    """Masks of the concepts of a word table that are asked for, from tags, boxes and masks.

    See :mod:`maskx.systems.concept_mask.detectron2.data`.
    """


def architecture_of(cfg: CfgNode) -> type:
    """Return the meta-architecture of a configuration.

    Raises:
        ValueError: there is none of that name.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        known = ", ".join(sorted(known for known, _ in META_ARCH_REGISTRY))
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is '{name}', which is not registered. Allowed: {known}. One "
            "of another project is there once that is imported."
        )
    return META_ARCH_REGISTRY.get(name)


def task_of(cfg: CfgNode) -> Task:
    """Return what the model of a configuration learns."""
    return Task(getattr(architecture_of(cfg), "maskx_task", Task.INSTANCES))


def is_transfer(cfg: CfgNode) -> bool:
    """Whether the model learns from source images with masks and target images with tags.

    Its meta-architecture says so by a class attribute ``maskx_transfer``, beside ``maskx_task``;
    see :mod:`maskx.systems.transfernet.detectron2.data`.
    """
    return getattr(architecture_of(cfg), "maskx_transfer", False)


def num_classes_of(cfg: CfgNode) -> tuple[str, int]:
    """Return the key that holds the number of classes of the model, and its value.

    That of a large vocabulary, or of concepts, is in no key.
    """
    if task_of(cfg) is Task.INSTANCES:
        return "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return "MODEL.MASKX.NUM_CLASSES", cfg.MODEL.MASKX.NUM_CLASSES
