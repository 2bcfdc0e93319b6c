"""How models of one list of classes for whole images are trained by Detectron2's engine."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from maskx.detectron2.adapters import in_format, seeded_train_loader, test_loader
from maskx.detectron2.hooks import Detectron2Hooks, check_num_classes
from maskx.detectron2.image_classifier import MaskXImageClassifier
from maskx.detectron2.image_label_evaluation import (
    MaskXImageLabelEvaluator,
    check_all_classes_known,
)
from maskx.detectron2.image_mapper import image_mapper, training_records

__all__ = ["image_hooks"]


def image_hooks(
    system: str,
    evaluator: Callable[..., DatasetEvaluator],
    *,
    learns_label_maps: bool,
    check: Callable[[CfgNode], None] | None = None,
) -> Detectron2Hooks:
    """Make the hooks of a model that :func:`image_mapper` makes samples for.

    Args:
        system: its name.
        evaluator: made with the name of a test set and the keyword ``split``.
        learns_label_maps: whether it learns from pixels, not from image labels alone.
        check: more that a configuration must fulfil.
    """

    def train_loader(cfg: CfgNode) -> Any:
        mapper = in_format(image_mapper(cfg), cfg.INPUT.FORMAT)
        return seeded_train_loader(cfg, training_records(cfg), mapper)

    def check_all(cfg: CfgNode) -> None:
        if cfg.MODEL.MASKX.FREEZE_DETECTOR:
            raise ValueError(
                "MODEL.MASKX.FREEZE_DETECTOR is True, but MODEL.META_ARCHITECTURE "
                f"{cfg.MODEL.META_ARCHITECTURE} has no detector. Set it to False."
            )
        check_num_classes(cfg, "MODEL.MASKX.NUM_CLASSES")
        if check is not None:
            check(cfg)

    return Detectron2Hooks(
        system=system,
        train_loader=train_loader,
        test_loader=lambda cfg, name: test_loader(cfg, name, image_mapper(cfg).read_image),
        evaluator=lambda cfg, name: evaluator(name, split=cfg.DATASETS.MASKX.SPLIT),
        check=check_all,
        learns_label_maps=learns_label_maps,
    )


def _labels_are_known(cfg: CfgNode) -> None:
    for name in cfg.DATASETS.TRAIN:
        check_all_classes_known(name)


MaskXImageClassifier.maskx_hooks = image_hooks(
    "image_classifier",
    MaskXImageLabelEvaluator,
    learns_label_maps=False,
    check=_labels_are_known,
)
