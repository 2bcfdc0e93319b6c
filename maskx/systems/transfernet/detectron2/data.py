"""Source and target images of TransferNet as training data of Detectron2, and in its test sets.

The source categories (A) have masks, the target categories (B) tags. Both sides are in one data set
with a category split, or in two data sets, whose class lists are united by name. Target images lose
their masks before a mapper sees them. See :mod:`maskx.systems.transfernet.samples`.
"""

import functools
import logging
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from maskx.core.checks import check_choice
from maskx.detectron2 import adapters
from maskx.detectron2.adapters import in_format, seeded_train_loader
from maskx.detectron2.datasets import (
    class_names_of,
    record_from_detectron2,
    records_of,
    split_from_config,
)
from maskx.detectron2.evaluation import MaskXImageLabelEvaluator, MaskXSemSegEvaluator
from maskx.detectron2.hooks import hooks_of
from maskx.supervision import CategorySplit
from maskx.systems.transfernet.baselines import BASELINE_STAGES
from maskx.systems.transfernet.samples import (
    AlternatingBatches,
    TransferMapper,
    TransferSets,
    check_fraction,
    labelled_records,
    labels_in_union,
    labels_of_record,
    records_in_union,
    source_subset,
    transfer_sets,
    union_of_class_lists,
)

logger = logging.getLogger(__name__)


def transfer_split(cfg: CfgNode) -> CategorySplit:
    """Return the class list of the model, with the source (A) and the target categories (B).

    Of one data set in ``DATASETS.TRAIN`` it is the class list of that, split by
    ``DATASETS.MASKX.SPLIT``. Of two, the source and the target, it is
    :func:`~maskx.systems.transfernet.samples.union_of_class_lists`.
    """
    names, spec = cfg.DATASETS.TRAIN, cfg.DATASETS.MASKX.SPLIT
    if len(names) == 2:
        if spec != "all":
            raise ValueError(
                f"DATASETS.MASKX.SPLIT is '{spec}', but DATASETS.TRAIN names two data sets, which "
                "are the source and the target by themselves. Set SPLIT all, or name one data set."
            )
        source, target = (class_names_of(name) for name in names)
        try:
            return union_of_class_lists(source, target)
        except ValueError as error:
            raise ValueError(f"DATASETS.TRAIN {tuple(names)}: {error}") from error
    if len(names) != 1:
        raise ValueError(
            f"DATASETS.TRAIN names {len(names)} data sets: {', '.join(names)}. "
            f"{cfg.MODEL.META_ARCHITECTURE} learns from two, the source and the target in this "
            "order, or from one that DATASETS.MASKX.SPLIT divides."
        )
    split = split_from_config(cfg)
    if not split.without_masks:
        raise ValueError(
            f"DATASETS.MASKX.SPLIT '{spec}' leaves no target category: all "
            f"{len(split.class_names)} of data set '{names[0]}' have masks. Name a split, or two "
            "data sets in DATASETS.TRAIN, the source and the target."
        )
    return split


def labels_of_dataset(name: str, split: CategorySplit) -> list[int]:
    """Return which classes of the model the classes of a data set are, by name."""
    try:
        return labels_in_union(class_names_of(name), split.class_names)
    except ValueError as error:
        raise ValueError(f"Data set '{name}' (DATASETS.TEST): {error}") from error


def check_transfer_data(cfg: CfgNode) -> None:
    """Check what can be checked before any annotation is read."""
    split = transfer_split(cfg)
    if len(split.class_names) != cfg.MODEL.MASKX.NUM_CLASSES:
        raise ValueError(
            f"MODEL.MASKX.NUM_CLASSES is {cfg.MODEL.MASKX.NUM_CLASSES}, but source "
            f"({len(split.with_masks)}) and target ({len(split.without_masks)}) have "
            f"{len(split.class_names)} classes together. Set it to {len(split.class_names)}."
        )
    for name in cfg.DATASETS.TEST:
        labels_of_dataset(name, split)
    keys = cfg.DATASETS.MASKX
    try:
        check_fraction(keys.SOURCE_FRACTION)
    except ValueError as error:
        raise ValueError(f"DATASETS.MASKX.SOURCE_FRACTION: {error}") from error
    if keys.SOURCE_SUBSET < 0:
        raise ValueError(
            f"DATASETS.MASKX.SOURCE_SUBSET is {keys.SOURCE_SUBSET}. Allowed: a seed, 0 or more."
        )
    num_processes = comm.get_world_size()
    if _alternates(cfg) and cfg.SOLVER.IMS_PER_BATCH % (2 * num_processes):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH} for {num_processes} process(es). "
            f"Allowed: multiples of {2 * num_processes}, as half of the images of each are source "
            "and half target images."
        )


def _alternates(cfg: CfgNode) -> bool:
    stage = cfg.MODEL.MASKX.TRANSFERNET.STAGE
    return hooks_of(cfg).learns_label_maps and stage not in BASELINE_STAGES


def transfer_records(cfg: CfgNode) -> TransferSets:
    """Read the source and target images of ``DATASETS.TRAIN``, as ``DATASETS.MASKX`` has it."""
    split, keys = transfer_split(cfg), cfg.DATASETS.MASKX
    names = cfg.DATASETS.TRAIN
    records = []
    for name in names:
        own = labelled_records(records_of(name), len(class_names_of(name)))
        if len(names) == 2:
            own = records_in_union(own, class_names_of(name), split.class_names)
        records += own
    sets = transfer_sets(records, split, use_target_masks=keys.USE_TARGET_MASKS)
    chosen = source_subset(sets.source, keys.SOURCE_FRACTION, keys.SOURCE_SUBSET)
    logger.info(
        "%d of %d source images, %d target images %s masks.",
        len(chosen),
        len(sets.source),
        len(sets.target),
        "with what there is of" if keys.USE_TARGET_MASKS else "without",
    )
    return replace(sets, source=chosen)


def train_loader(cfg: CfgNode) -> Any:
    """Make the training loader.

    Batches of MaskXTransferNet are half source, half target images in every process, but in the
    stages of a baseline of either alone; those of a classifier, which reads no mask, are drawn from
    all images alike.
    """
    sets, masks = transfer_records(cfg), hooks_of(cfg).learns_label_maps
    mapper = in_format(_mapper(cfg, masks=masks), cfg.INPUT.FORMAT)
    records, batches = [*sets.source, *sets.target], None
    stage = cfg.MODEL.MASKX.TRANSFERNET.STAGE
    split = transfer_split(cfg) if masks and stage != "target" else None
    if _alternates(cfg):
        batches = functools.partial(AlternatingBatches, len(sets.source), len(sets.target))
    elif masks:
        records = getattr(sets, stage)
    return seeded_train_loader(cfg, records, mapper, batches, split=split)


def test_loader(cfg: CfgNode, dataset_name: str) -> Any:
    """Make the loader of a test set.

    Its labels are translated into the class list of the model, and ``candidate_labels`` are the
    class indices of the data set: no other label is predicted of an image.
    """
    labels = labels_of_dataset(dataset_name, transfer_split(cfg))
    return adapters.test_loader(cfg, dataset_name, _TestReader(_mapper(cfg), labels))


def _mapper(cfg: CfgNode, *, masks: bool = True) -> TransferMapper:
    flip = cfg.INPUT.RANDOM_FLIP
    check_choice("INPUT.RANDOM_FLIP", flip, ("none", "horizontal"))
    num_classes, size = cfg.MODEL.MASKX.NUM_CLASSES, cfg.INPUT.MASKX.SIZE
    return TransferMapper(num_classes, size=size, flip=flip == "horizontal", masks=masks)


class _TestReader:  # a class, as other processes read images
    def __init__(self, mapper: TransferMapper, labels: list[int]) -> None:
        self.mapper, self.labels = mapper, labels

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = record_from_detectron2(record)
        own = [self.labels[label] for label in labels_of_record(record, len(self.labels))]
        sample = self.mapper.read({**record, "image_labels": own})
        return sample | {"candidate_labels": self.labels}


class MaskXTransferSemSegEvaluator(MaskXSemSegEvaluator):
    """Mean IoU on the classes of a data set of label maps in the class list of the model.

    The model is asked for the classes of the data set alone (``candidate_labels`` of its samples);
    any other label in a prediction is an error.
    """

    def __init__(
        self, dataset_name: str, *, split: CategorySplit, distributed: bool = True
    ) -> None:
        super().__init__(dataset_name, distributed=distributed)
        labels = labels_of_dataset(dataset_name, split)
        self._groups = _groups(labels, split)
        self._split = split
        self._own_labels = torch.full((len(split.class_names) + 1,), -1)
        self._own_labels[0] = 0
        self._own_labels[torch.tensor(labels) + 1] = torch.arange(1, len(labels) + 1)

    def _label_map(self, sem_seg: torch.Tensor, image_id: int | str) -> torch.Tensor:
        if sem_seg.is_floating_point() or sem_seg.ndim != 2:
            raise ValueError(
                f"sem_seg of image {image_id!r} has shape {tuple(sem_seg.shape)} and dtype "
                f"{sem_seg.dtype}. Allowed: a label map (H, W) of integers, in the class list of "
                "the model."
            )
        own = self._own_labels[sem_seg.cpu()]
        if (own < 0).any():
            foreign = sem_seg.cpu()[own < 0].unique().tolist()
            names = ", ".join(self._split.class_names[label - 1] for label in foreign)
            raise ValueError(
                f"sem_seg of image {image_id!r} has {names}, which data set "
                f"'{self._dataset_name}' does not have. Make its samples with "
                "Trainer.build_test_loader, which name the classes that may be predicted."
            )
        return own


class MaskXTransferLabelEvaluator(MaskXImageLabelEvaluator):
    """Average precision of the classes of a data set, of probabilities for those of the model."""

    def __init__(
        self, dataset_name: str, *, split: CategorySplit, distributed: bool = True
    ) -> None:
        super().__init__(dataset_name, distributed=distributed)
        self._own_classes = labels_of_dataset(dataset_name, split)
        self._groups = _groups(self._own_classes, split)
        records = labelled_records(records_of(dataset_name), len(self._own_classes))
        self._labels = {record["image_id"]: record["image_labels"] for record in records}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take in the predictions of a batch: ``image_labels_prob`` (K,), K of the model."""
        own = [{"image_labels_prob": o["image_labels_prob"][self._own_classes]} for o in outputs]
        super().process(inputs, own)


def _groups(labels: list[int], split: CategorySplit) -> dict[str, tuple[int, ...]]:
    """Class indices of a data set by group, as `CategorySplit.groups` has them of its own list."""
    return {
        name: tuple(index for index, label in enumerate(labels) if label in side)
        for name, side in split.groups().items()
    }
