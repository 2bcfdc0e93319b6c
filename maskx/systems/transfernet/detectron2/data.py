"""Source and target images of TransferNet as training data of Detectron2, and in its test sets.

The source categories (A) have masks, the target categories (B) tags. Both sides are in one data set
with a category split, or in two data sets, whose class lists are united by name. Target images lose
their masks before a mapper sees them. See :mod:`maskx.systems.transfernet.transfer_sets`.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler

from maskx.data.vocabularies import VOC_TO_COCO
from maskx.detectron2.datasets import class_names_of, records_of, split_from_config
from maskx.detectron2.hooks import hooks_of
from maskx.detectron2.image_mapper import MaskXImageMapper
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.transfernet.transfer_sets import (
    TransferSets,
    check_fraction,
    records_in_union,
    source_subset,
    transfer_label_map,
    transfer_sets,
    union_of_class_lists,
    visible_labels,
)

__all__ = [
    "AlternatingSampler",
    "MaskXTransferMapper",
    "build_transfer_loader",
    "check_transfer_data",
    "labels_of_dataset",
    "transfer_records",
    "transfer_split",
]

logger = logging.getLogger(__name__)


def transfer_split(cfg: CfgNode) -> CategorySplit:
    """Return the class list of the model, with the source (A) and the target categories (B).

    Of one data set in ``DATASETS.TRAIN`` it is the class list of that, split by
    ``DATASETS.MASKX.SPLIT``. Of two, the source and the target, it is the union of their class
    lists: the classes of the target first, then those of the source, classes of VOC by their names
    in COCO.

    Raises:
        FileNotFoundError: the split is neither a known name nor a file.
        ValueError: there are other data sets, a class is source and target, or there is no target.
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
    """Return which classes of the model the classes of a data set are, by name.

    Args:
        name: a registered data set; classes may have their names of VOC or of COCO.
        split: of :func:`transfer_split`.

    Returns:
        Class indices of the model, by class index of the data set.

    Raises:
        ValueError: the model does not know a class of the data set.
    """
    index_of = {known: index for index, known in enumerate(split.class_names)}
    class_names = class_names_of(name)
    found = [index_of.get(c, index_of.get(VOC_TO_COCO.get(c))) for c in class_names]
    missing = [c for c, index in zip(class_names, found, strict=True) if index is None]
    if missing:
        raise ValueError(
            f"Data set '{name}' (DATASETS.TEST) has {len(missing)} classes that are not among the "
            f"{len(split.class_names)} of source and target: {', '.join(missing[:8])}"
            f"{' and more' if len(missing) > 8 else ''}. Choose another data set."
        )
    return found


def check_transfer_data(cfg: CfgNode) -> None:
    """Check what can be checked before any annotation is read.

    Raises:
        ValueError: data sets, split, number of classes, batch or share of the source do not fit.
    """
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
    if hooks_of(cfg).learns_label_maps and cfg.SOLVER.IMS_PER_BATCH % (2 * num_processes):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH} for {num_processes} process(es). "
            f"Allowed: multiples of {2 * num_processes}, as half of the images of each are source "
            "and half target images."
        )


def transfer_records(cfg: CfgNode) -> TransferSets:
    """Read the source and target images of ``DATASETS.TRAIN``.

    Returns:
        Records in the class list of :func:`transfer_split`: the source
        reduced to ``DATASETS.MASKX.SOURCE_FRACTION``, target images with their tags only unless
        ``DATASETS.MASKX.USE_TARGET_MASKS``.

    Raises:
        ValueError: there is no source or no target image, or no mask.
    """
    split, keys = transfer_split(cfg), cfg.DATASETS.MASKX
    names = cfg.DATASETS.TRAIN
    records = []
    for name in names:
        own = records_of(name)
        if len(names) == 2:
            own = records_in_union(own, class_names_of(name), split.class_names)
        records += own
    sets = transfer_sets(records, split, use_target_masks=keys.USE_TARGET_MASKS)
    chosen = source_subset(sets.source, keys.SOURCE_FRACTION, keys.SOURCE_SUBSET)
    logger.info(
        "%d of %d source images, %d target images %s masks.",
        *(len(chosen), len(sets.source), len(sets.target)),
        "with what there is of" if keys.USE_TARGET_MASKS else "without",
    )
    return TransferSets(source=chosen, target=sets.target, num_unlabelled=sets.num_unlabelled)


def build_transfer_loader(cfg: CfgNode) -> Any:
    """Make the training loader.

    Batches of MaskXTransferNet are half source, half target images on every GPU; those of a
    classifier are drawn from all images alike.
    """
    sets = transfer_records(cfg)
    sampler = None
    if hooks_of(cfg).learns_label_maps:
        sampler = AlternatingSampler(
            len(sets.source), len(sets.target), seed=None if cfg.SEED < 0 else cfg.SEED
        )
    return build_detection_train_loader(
        cfg,
        mapper=MaskXTransferMapper(cfg, is_train=True),
        dataset=[*sets.source, *sets.target],
        sampler=sampler,
        aspect_ratio_grouping=False,  # it would sort source from target
    )


class AlternatingSampler(Sampler):
    """Endless indices of source and target images in turn, each side shuffled on its own.

    So any even number of indices in a row has as many of either side. Processes share the stream.

    Args:
        num_source: number of source images, which come first in the list of records.
        num_target: number of target images.
        seed: of the order; None draws one that all processes share.
    """

    def __init__(self, num_source: int, num_target: int, *, seed: int | None) -> None:
        if seed is None:
            seed = comm.shared_random_seed()
        self._num_source = num_source
        self._source = TrainingSampler(num_source, seed=seed)
        self._target = TrainingSampler(num_target, seed=seed + 1)

    def __iter__(self) -> Iterator[int]:
        for source, target in zip(self._source, self._target, strict=True):
            yield source
            yield self._num_source + target


class MaskXTransferMapper:
    """Map records to samples in the class list of source and target.

    As of :class:`MaskXImageMapper`, but

    - in training, of records of :func:`transfer_records`, ``sem_seg`` is there only where the
      record has masks, and ``image_labels`` are then those of at least one pixel of it;
    - in evaluation, records are those of a test set in its own class list, and labels are
      translated;
    - in evaluation ``candidate_labels`` are the class indices of the data set. No other label is
      predicted of the image.

    Args:
        is_train: whether it is used in training.
        augmentations: what is done to training images.
        image_format: "BGR" or "RGB".
        num_classes: number of source and target classes.
        label_maps: whether label maps are made in training.
        dataset_labels: class indices of the model by class index of the test set; not in training.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        num_classes: int,
        label_maps: bool,
        dataset_labels: Sequence[int] = (),
    ) -> None:
        shared = {
            "augmentations": augmentations,
            "image_format": image_format,
            "num_classes": num_classes,
        }
        self.is_train = is_train
        self.dataset_labels = list(dataset_labels)
        self._with_tags = MaskXImageMapper(is_train, label_maps=False, **shared)
        self._with_masks = _UnionImageMapper(is_train, label_maps=label_maps, **shared)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, is_train: bool = True, dataset_name: str | None = None
    ) -> dict[str, Any]:
        """Read the arguments from a configuration; ``dataset_name`` is the test set."""
        arguments = MaskXImageMapper.from_config(cfg, is_train)
        del arguments["classes_with_masks"]  # transfer_records has removed what must not be used
        if not is_train:
            arguments["dataset_labels"] = labels_of_dataset(dataset_name, transfer_split(cfg))
        return arguments

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Map a record to a sample; the record stays as it is."""
        if not self.is_train:
            sample = self._with_tags(record)
            labels = [self.dataset_labels[label] for label in sample["image_labels"]]
            return sample | {"image_labels": labels, "candidate_labels": self.dataset_labels}
        labels = record["image_labels"]
        has_masks = record["supervision"] == Supervision.MASK.value
        sample = (self._with_masks if has_masks else self._with_tags)(record)
        # Not those of all annotations: a target image with masks has some of source categories.
        sample["image_labels"] = list(labels)
        if "sem_seg" in sample:
            sample["image_labels"] = visible_labels(labels, sample["sem_seg"].numpy())
        return sample


class _UnionImageMapper(MaskXImageMapper):
    """Reads label maps of either file of a union in the class list of the union."""

    def _label_map(self, record: dict[str, Any]) -> Any:
        return transfer_label_map(record, self.num_classes)
