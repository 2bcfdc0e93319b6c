"""What the trainer asks a meta-architecture: its data, its evaluation, its checks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from maskx.detectron2.datasets import check_class_list, class_names_of, split_from_config
from maskx.supervision import CategorySplit


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
        check: refuses a configuration that would fail or mislead later, before anything is built.
            The data sets of ``DATASETS.MASKX.REGISTER`` are registered by then.
        split: which classes have masks in training; None where that is no matter of classes.
        built: called with the configuration, the model and the training loader once they are made.
        started: called with the configuration, the model and the names of the weights that it
            lacks, after ``MODEL.WEIGHTS`` were loaded for a training that does not resume.
        for_inference: clears the keys of a configuration that only training reads, such as files
            to start from.
        learns_label_maps: whether it learns from pixels, not from image labels alone; see
            :func:`maskx.detectron2.whole_images.image_mapper`.
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
    """Return the meta-architecture of a configuration."""
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


def check_classes(cfg: CfgNode, key: str, class_names: Sequence[str] = ()) -> None:
    """Refuse data sets of other classes than those of the model, and a split that does not fit.

    Args:
        key: that holds their number, such as "MODEL.ROI_HEADS.NUM_CLASSES".
        class_names: of the model where they are not those of the training data, which then need
            only be as many.
    """
    names, num_classes = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), cfg
    for part in key.split("."):
        num_classes = num_classes[part]
    source = "" if class_names else "".join(names[:1])
    for name in cfg.DATASETS.TRAIN if class_names else names[:1]:
        found = len(class_names_of(name))
        if found != num_classes:
            raise ValueError(
                f"{key} is {num_classes}, but data set '{name}' has {found} classes. Set {key} "
                f"{found}, or choose another data set."
            )
    for name in cfg.DATASETS.TEST if class_names else names[1:]:
        check_class_list(name, class_names or class_names_of(source), source)
    split_from_config(cfg)
