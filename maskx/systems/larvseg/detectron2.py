"""LarvSeg in Detectron2: the model of a configuration, its data sets, loaders and evaluator.

The data sets of ``DATASETS.TRAIN`` have masks or image labels alone, and class lists of their own;
see :mod:`maskx.systems.larvseg.samples`. What a model needs of them comes from their class
lists, without any annotation.
"""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from maskx.core.extra_state import EXTRA_STATE
from maskx.core.text import listed
from maskx.data.images import read_image_sample
from maskx.data.splits import check_masks, resolve_split
from maskx.detectron2.adapters import in_format, seed_of, test_loader
from maskx.detectron2.checkpointer import read_weights
from maskx.detectron2.datasets import class_names_of, records_of
from maskx.detectron2.evaluation import MaskXSemSegEvaluator
from maskx.detectron2.hooks import Detectron2Hooks
from maskx.detectron2.whole_images import choose_feature, pixel_arguments
from maskx.engine.batches import SeededLoader
from maskx.evaluation.mean_iou import format_table
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.larvseg.evaluation import LarvSegScores
from maskx.systems.larvseg.model import LarvSegModel, read_extra_state
from maskx.systems.larvseg.network import LarvSeg
from maskx.systems.larvseg.samples import (
    JointDataSet,
    JointMapper,
    JointSets,
    MappedSets,
    class_table,
    classes_to_predict,
    joint_sets,
    scored_classes,
    true_label_map,
)

logger = logging.getLogger(__name__)

_KEYS = "DATASETS.MASKX.JOINT"
_CLASSES_OF = "MODEL.MASKX.LARVSEG.CLASSES_OF"
_MASK = Supervision.MASK.value


# --- classes


def model_class_names(cfg: CfgNode) -> tuple[str, ...]:
    """Return the classes of the model, the class table.

    They are those of the data sets ``MODEL.MASKX.LARVSEG.CLASSES_OF`` or, where that is empty, of
    ``DATASETS.TRAIN``, united by name; where that is empty too, those of the checkpoint
    ``MODEL.WEIGHTS``.

    """
    names = cfg.MODEL.MASKX.LARVSEG.CLASSES_OF
    key = _CLASSES_OF if names else "DATASETS.TRAIN"
    names = names or cfg.DATASETS.TRAIN
    if not names:
        if cfg.MODEL.WEIGHTS:
            weights = read_weights(cfg.MODEL.WEIGHTS)
            return read_extra_state(weights)["class_names"]
        raise ValueError(
            f"DATASETS.TRAIN and {_CLASSES_OF} are empty, so the model has no classes. Name at "
            "least one registered data set in one of them, or a checkpoint in MODEL.WEIGHTS."
        )
    try:
        return class_table({name: class_names_of(name) for name in names})
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _test_classes(cfg: CfgNode, dataset_name: str) -> tuple[int, ...]:
    """Class index in the model of each class of a data set."""
    try:
        return classes_to_predict(class_names_of(dataset_name), model_class_names(cfg))
    except ValueError as error:
        raise ValueError(
            f"Data set '{dataset_name}' (DATASETS.TEST, TEST.MASKX.CLASSES_OF): {error} Name the "
            f"data sets of all classes in {_CLASSES_OF}, '{dataset_name}' among them."
        ) from error


def split_of_dataset(cfg: CfgNode, name: str) -> CategorySplit | None:
    """Return the split of the classes of a data set, by ``DATASETS.MASKX.SPLIT``.

    A split is of one class list, such as that of ADE20K. Stuff of generated scenes is in A.

    Returns:
        The split of the unique class names; None where it is of another class list.
    """
    class_names = tuple(dict.fromkeys(class_names_of(name)))
    stuff = tuple(MetadataCatalog.get(name).get("stuff_list") or ())
    things = class_names[: len(class_names) - len(stuff)]
    try:
        split = resolve_split(cfg.DATASETS.MASKX.SPLIT, things)
    except ValueError:
        return None
    with_masks = (*split.with_masks, *stuff)
    return CategorySplit(split.name, class_names, with_masks, split.without_masks)


# --- data


def _data_sets(cfg: CfgNode) -> list[JointDataSet]:
    """Make the data sets of ``DATASETS.TRAIN``, still without records."""
    names = cfg.DATASETS.TRAIN
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(
            f"DATASETS.TRAIN names '{min(repeated)}' more than once. To see it more often set "
            f"{_KEYS}.RATIOS; to learn from it in two ways register it under a second name."
        )
    columns = {
        "supervision": _per_data_set(cfg, "SUPERVISION", _MASK),
        "ratio": _per_data_set(cfg, "RATIOS", 1),
        "image_size": _per_data_set(cfg, "SIZES", cfg.INPUT.MASKX.SIZE),
        "single_label": _per_data_set(cfg, "SINGLE_LABEL", False),
        "attention": _per_data_set(cfg, "ATTENTION", True),
    }
    data_sets = []
    for index, name in enumerate(names):
        own = {key: values[index] for key, values in columns.items()}
        is_mask = own["supervision"] == _MASK
        split = split_of_dataset(cfg, name) if is_mask else None
        if split is not None and split.without_masks:
            own["with_masks"] = split.with_masks
        own["crop_level_labels"] = cfg.DATASETS.MASKX.JOINT.CROP_LEVEL_LABELS and not is_mask
        try:
            data_sets.append(JointDataSet(name, (), tuple(class_names_of(name)), **own))
        except ValueError as error:
            raise ValueError(f"{_KEYS}: {error}") from error
    return data_sets


def _per_data_set(cfg: CfgNode, key: str, default: Any) -> Sequence[Any]:
    """Return a value, of the type of the default, for each data set of ``DATASETS.TRAIN``."""
    values, names, kind = cfg.DATASETS.MASKX.JOINT[key], cfg.DATASETS.TRAIN, type(default)
    if not values:
        return [default] * len(names)
    if len(values) != len(names):
        raise ValueError(
            f"{_KEYS}.{key} has {len(values)} entries, {tuple(values)}, but DATASETS.TRAIN names "
            f"{len(names)} data sets: {', '.join(names)}. Give one for each, or () for {default!r}."
        )
    wrong = [value for value in values if type(value) is not kind]
    if wrong:
        raise ValueError(
            f"{_KEYS}.{key} has the entry {wrong[0]!r}. Allowed: values of type {kind.__name__}."
        )
    return values


def _scored(cfg: CfgNode) -> dict[str, tuple[int, ...]]:
    """Return which classes of the model each data set of ``DATASETS.TRAIN`` scores."""
    if not cfg.DATASETS.TRAIN:
        return {}
    data_sets, class_names = _data_sets(cfg), model_class_names(cfg)
    try:
        return scored_classes(data_sets, class_names)
    except ValueError as error:
        raise ValueError(f"DATASETS.TRAIN ({_CLASSES_OF}): {error}") from error


def joint_sets_from_config(cfg: CfgNode) -> JointSets:
    """Read the data sets of ``DATASETS.TRAIN``, each with its supervision and nothing above it."""
    _warn_of_novel_masks(cfg)
    data_sets = [replace(each, records=records_of(each.name)) for each in _data_sets(cfg)]
    for each in data_sets:
        for record in each.records:
            if not {"image_id", "height", "width"} <= record.keys():
                raise ValueError(
                    f"Data set '{each.name}' (DATASETS.TRAIN): '{record['file_name']}' lacks "
                    "image_id, height or width. Give each record all three."
                )
        split = split_of_dataset(cfg, each.name) if each.supervision == _MASK else None
        if split is not None and split.class_names == each.class_names:
            check_masks(each.records, split)
    sets = joint_sets(data_sets, class_names=model_class_names(cfg))
    for each in sets.data_sets:
        logger.info(
            "%s: %d images, supervision %r, %d of %d classes scored, ratio %d, %d pixels.",
            each.name,
            len(each.records),
            each.supervision,
            len(sets.scored[each.name]),
            len(set(each.class_names)),
            each.ratio,
            each.image_size,
        )
    return sets


def _warn_of_novel_masks(cfg: CfgNode) -> None:
    """Say which masks are used of classes that the split of another data set withholds."""
    names = dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    splits = [split for split in (split_of_dataset(cfg, name) for name in names) if split]
    novel = {name for split in splits for name in split.without_masks}
    for each in _data_sets(cfg):
        found = [name for name in dict.fromkeys(each.class_names) if name in novel]
        if found and each.supervision == _MASK and each.with_masks is None:
            logger.warning(
                "DATASETS.MASKX.SPLIT %s is not of the classes of '%s', so its masks are all "
                "used, also those of %d classes that are novel by it: %s.",
                cfg.DATASETS.MASKX.SPLIT,
                each.name,
                len(found),
                listed(found),
            )


def _train_loader(cfg: CfgNode) -> SeededLoader:
    sets = joint_sets_from_config(cfg)
    mapper = JointMapper(
        sets, flip=cfg.INPUT.RANDOM_FLIP != "none", min_crop=cfg.DATASETS.MASKX.JOINT.MIN_CROP
    )
    # Serialised: processes that read images would otherwise each end up with a copy.
    held = (replace(each, records=DatasetFromList(each.records)) for each in sets.data_sets)
    sets = replace(sets, data_sets=tuple(held))
    mapped = MappedSets(sets, in_format(mapper, cfg.INPUT.FORMAT))
    batches = functools.partial(
        mapped.batches,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        seed=seed_of(cfg),
        rank=comm.get_rank(),
        num_processes=comm.get_world_size(),
    )
    return SeededLoader(mapped, batches, num_workers=cfg.DATALOADER.NUM_WORKERS)


def _test_loader(cfg: CfgNode, dataset_name: str) -> Any:
    read = functools.partial(_test_sample, _test_classes(cfg, dataset_name))
    return test_loader(cfg, dataset_name, read)


def _test_sample(class_indices: tuple[int, ...], record: Mapping[str, Any]) -> dict[str, Any]:
    return read_image_sample(record) | {
        "file_name": record["file_name"],
        "class_indices": class_indices,
    }


def _check(cfg: CfgNode) -> None:
    """Check what can be checked before any annotation is read."""
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    model_class_names(cfg)
    _scored(cfg)
    for name in cfg.DATASETS.TEST:
        _test_classes(cfg, name)
    if names and not any(split_of_dataset(cfg, name) for name in names):
        try:
            resolve_split(cfg.DATASETS.MASKX.SPLIT, class_names_of(names[0]))
        except ValueError as error:
            raise ValueError(
                f"DATASETS.MASKX.SPLIT fits the classes of none of {', '.join(names)}: {error}"
            ) from error
    num_processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}. Allowed: multiples of "
            f"{num_processes}, the number of processes."
        )
    min_crop = cfg.DATASETS.MASKX.JOINT.MIN_CROP
    if not 0 < min_crop <= 1:
        raise ValueError(f"{_KEYS}.MIN_CROP is {min_crop}. Allowed: above 0 and at most 1.")
    if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
        raise ValueError(
            f"INPUT.RANDOM_FLIP is '{cfg.INPUT.RANDOM_FLIP}'. Allowed for MaskXLarvSeg: "
            "horizontal, none."
        )


# --- evaluation


class MaskXLargeVocabularyEvaluator(MaskXSemSegEvaluator):
    """Mean IoU without a background, on all classes, on base (with masks) and on novel ones.

    Pixels of label 0 are of no class, so they count nowhere, as unknown ones. Of labels with one
    name the first stands for the class.

    Args:
        dataset_name: a registered data set.
        split: A the base and B the novel classes, see :func:`split_of_dataset`. None knows neither.
        distributed: see :class:`maskx.detectron2.MaskXSemSegEvaluator`.
    """

    def __init__(
        self, dataset_name: str, *, split: CategorySplit | None = None, distributed: bool = True
    ) -> None:
        super().__init__(dataset_name, distributed=distributed)
        novel = None if split is None else split.without_masks
        self._scores = LarvSegScores(self._class_names, novel)
        self._groups = {name: self._scores.groups.get(name, ()) for name in ("base", "novel")}
        self._rule = "no split" if split is None else f"split {split.name}"

    def _truth(self, record: Mapping[str, Any]) -> np.ndarray:
        return true_label_map(record, self._class_names)

    def _measures(self, result: Mapping[str, Any]) -> dict[str, float]:
        """Under "mIoU", "mIoU_base" and "mIoU_novel"; there is no background."""
        means, classes = result["mIoU"], self._scores.classes
        counts = [f"{len(indices)} {name}" for name, indices in self._groups.items()]
        logger.info(
            "%s: %d classes, %s (%s)\n%s",
            self._dataset_name,
            len(classes),
            " and ".join(counts),
            self._rule,
            format_table(result),
        )
        return {
            "mIoU": means["all"],
            "mIoU_base": means["base"],
            "mIoU_novel": means["novel"],
            "pixel_accuracy": result["pixel_accuracy"],
            **{f"IoU-{self._class_names[i]}": result["per_class"][i] for i in classes},
        }


# --- model


def _built(cfg: CfgNode, model: nn.Module, loader: Iterable) -> None:
    if isinstance(getattr(loader, "dataset", None), MappedSets):
        model.network.classifier.set_trained(loader.dataset.sets.trained)
        model.register_forward_hook(_log_losses)


def _log_losses(model: nn.Module, _: Any, losses: Any) -> dict[str, Tensor] | None:
    """Log each loss where a process has it, and train on their sum.

    A batch has the losses of its data set, the others are zero. Detectron2's own writers would show
    the median over all steps, and that of a loss that most steps lack is zero.
    """
    if not model.training:
        return None
    values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
    gathered = comm.gather(dict(zip(losses, values, strict=True)))
    for name in losses if comm.is_main_process() else ():
        found = [each[name] for each in gathered if each[name] != 0]
        if found:
            get_event_storage().put_scalar(name, sum(found) / len(found))
    return {"loss": sum(losses.values())}


def _started(cfg: CfgNode, model: nn.Module, missing: Sequence[str]) -> None:
    """Take the rows of a class list of another length, which Detectron2 left out."""
    if cfg.MODEL.WEIGHTS and model.lacks_class_rows(missing):
        state = read_weights(cfg.MODEL.WEIGHTS)
        if EXTRA_STATE in state:
            model.load_state_dict(dict(state), strict=False)


def _for_inference(cfg: CfgNode) -> None:
    """Predict the classes of the run, which its checkpoint names where no data set does."""
    cfg.TEST.MASKX.CLASSES_OF = ""
    try:
        model_class_names(cfg)
        _scored(cfg)
    except (FileNotFoundError, ValueError):
        cfg.DATASETS.TRAIN = cfg.MODEL.MASKX.LARVSEG.CLASSES_OF = ()


@META_ARCH_REGISTRY.register()
class MaskXLarvSeg(LarvSegModel):
    """:class:`maskx.systems.larvseg.model.LarvSegModel` of a configuration."""

    maskx_hooks = Detectron2Hooks(
        system="larvseg",
        matches_class_names=True,
        train_loader=_train_loader,
        test_loader=_test_loader,
        evaluator=lambda cfg, name: MaskXLargeVocabularyEvaluator(
            name, split=split_of_dataset(cfg, name)
        ),
        check=_check,
        class_names=model_class_names,
        split=lambda cfg: split_of_dataset(cfg, cfg.DATASETS.TRAIN[0]),
        built=_built,
        started=_started,
        for_inference=_for_inference,
    )

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration, and of its data sets the class lists alone."""
        keys, test = cfg.MODEL.MASKX.LARVSEG, cfg.TEST.MASKX
        names, scored = model_class_names(cfg), _scored(cfg)
        backbone = build_backbone(cfg)
        in_feature, in_channels = choose_feature(backbone, cfg.MODEL.MASKX.IN_FEATURE)
        network = LarvSeg(
            backbone,
            in_feature=in_feature,
            in_channels=in_channels,
            num_classes=len(names),
            **{key.lower(): value for key, value in keys.items() if key != "CLASSES_OF"},
        )
        if scored:
            # Until the trainer knows which of them some image shows.
            network.classifier.set_trained(sorted(set().union(*scored.values())))
        return {
            "network": network,
            "class_names": names,
            "scored": scored,
            "test_classes": _test_classes(cfg, test.CLASSES_OF) if test.CLASSES_OF else None,
            "image_size": cfg.INPUT.MASKX.SIZE,
            "window": test.WINDOW,
            "stride": test.STRIDE,
            "top_k": test.TOP_K,
            **pixel_arguments(cfg),
        }
