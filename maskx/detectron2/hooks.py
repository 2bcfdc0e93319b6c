"""What the trainer asks a meta-architecture: its data, its evaluation, its checks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from maskx.detectron2.datasets import class_names_of, split_from_config
from maskx.supervision import CategorySplit

__all__ = [
    "Detectron2Hooks",
    "architecture_of",
    "check_num_classes",
    "hooks_of",
    "set_default_hooks",
]


def _nothing(*_: Any) -> None:
    pass


def _training_class_names(cfg: CfgNode) -> Sequence[str]:
    return class_names_of(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else ()


@dataclass(frozen=True)
class Detectron2Hooks:
    """How a system is trained and evaluated by Detectron2's engine.

    A meta-architecture carries it as the class attribute ``maskx_hooks``. One without, such as
    Detectron2's own, is taken for instance segmentation.

    Attributes:
        system: name of the system, see :func:`maskx.engine.system.find_system`.
        train_loader: makes the training loader of a configuration.
        test_loader: makes the loader of a test set, from a configuration and the set's name.
        evaluator: makes the evaluator of a test set, from the same.
        check: refuses a configuration that would fail or mislead later, before anything is built.
            The data sets of ``DATASETS.MASKX.REGISTER`` are registered by then.
        class_names: class list of the model.
        split: which classes have masks in training; None where that is no matter of classes.
        built: called with the configuration, the model and the training loader once they are made.
        started: called with the configuration, the model and the names of the weights that it
            lacks, after ``MODEL.WEIGHTS`` were loaded for a training that does not resume.
        for_inference: clears the keys of a configuration that only training reads, such as files
            to start from.
        learns_label_maps: whether it learns from pixels, not from image labels alone; see
            :func:`maskx.detectron2.image_mapper.image_mapper`.
        files: dotted keys of the files, beside ``MODEL.WEIGHTS``, that a run is made from.
        matches_class_names: whether its model finds the classes of a checkpoint by name, so that
            it may be evaluated with another class list than it was trained with.
    """

    system: str
    train_loader: Callable[[CfgNode], Iterable]
    test_loader: Callable[[CfgNode, str], Iterable]
    evaluator: Callable[[CfgNode, str], DatasetEvaluator]
    check: Callable[[CfgNode], None] = _nothing
    class_names: Callable[[CfgNode], Sequence[str]] = _training_class_names
    split: Callable[[CfgNode], CategorySplit | None] = split_from_config
    built: Callable[[CfgNode, nn.Module, Iterable], None] = _nothing
    started: Callable[[CfgNode, nn.Module, Sequence[str]], None] = _nothing
    for_inference: Callable[[CfgNode], None] = _nothing
    learns_label_maps: bool = False
    files: tuple[str, ...] = ()
    matches_class_names: bool = False


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


_default: list[Detectron2Hooks] = []


def set_default_hooks(hooks: Detectron2Hooks) -> None:
    """Say what meta-architectures without hooks of their own are trained with."""
    _default[:] = [hooks]


def hooks_of(cfg: CfgNode) -> Detectron2Hooks:
    """Return what the meta-architecture of a configuration is trained with."""
    return getattr(architecture_of(cfg), "maskx_hooks", None) or _default[0]


def check_num_classes(cfg: CfgNode, key: str) -> None:
    """Refuse data sets whose number of classes is not the model's, and a split that does not fit.

    Args:
        cfg: the configuration.
        key: that holds the number of classes, such as "MODEL.ROI_HEADS.NUM_CLASSES".
    """
    num_classes = cfg
    for part in key.split("."):
        num_classes = num_classes[part]
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        found = len(class_names_of(name))
        if found != num_classes:
            raise ValueError(
                f"{key} is {num_classes}, but data set '{name}' has {found} classes. Set {key} "
                f"{found}, or choose another data set."
            )
    split_from_config(cfg)
