"""Data sets of different supervision as training data of one model, and in its test sets.

The data sets of ``DATASETS.TRAIN`` have masks or image labels alone, and class lists of their own;
each batch is of one of them. See :mod:`maskx.systems.larvseg.joint_sets`, and there for the names
of spaces: class index of a data set, table index of the model, position among the classes that a
data set scores. What a model needs of the data sets comes from their class lists, without any
annotation.

There is no background: pixels of label 0 are of no class, so nothing is learned from them.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from maskx.data.splits import resolve_split
from maskx.detectron2.datasets import class_names_of, records_of
from maskx.detectron2.image_mapper import transform_label_map
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.larvseg.class_table import ClassTable, class_table
from maskx.systems.larvseg.joint_sets import (
    UNKNOWN,
    JointBatches,
    JointDataSet,
    JointSets,
    joint_sets,
    random_crop,
)

__all__ = [
    "JointLoader",
    "MaskXJointMapper",
    "build_joint_loader",
    "check_joint_data",
    "indices_of_dataset",
    "joint_sets_from_config",
    "model_class_table",
    "scored_indices",
    "split_of_dataset",
    "trained_indices",
]

logger = logging.getLogger(__name__)

_KEYS = "DATASETS.MASKX.JOINT"
_CLASSES_OF = "MODEL.MASKX.LARVSEG.CLASSES_OF"
_ENDLESS = sys.maxsize  # step that no training reaches


def model_class_table(cfg: CfgNode) -> ClassTable:
    """Return the classes of the model: those of its data sets, united by name.

    They are those of ``MODEL.MASKX.LARVSEG.CLASSES_OF`` or, where that is empty, of
    ``DATASETS.TRAIN``.

    Raises:
        FileNotFoundError: a data set was not prepared.
        ValueError: there is no data set, or it is not registered or has no class list.
    """
    names = cfg.MODEL.MASKX.LARVSEG.CLASSES_OF
    key = _CLASSES_OF if names else "DATASETS.TRAIN"
    names = names or cfg.DATASETS.TRAIN
    if not names:
        raise ValueError(
            f"DATASETS.TRAIN and {_CLASSES_OF} are empty, so the model has no classes. Name at "
            "least one registered data set in one of them."
        )
    try:
        return class_table({name: class_names_of(name) for name in names})
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def scored_indices(cfg: CfgNode) -> dict[str, tuple[int, ...]]:
    """Return which classes of the model each data set of ``DATASETS.TRAIN`` scores.

    Returns:
        Table indices by position, by name of the data set. A data set with masks does not score
        the classes that ``DATASETS.MASKX.SPLIT`` withholds from it.

    Raises:
        FileNotFoundError: a data set was not prepared, or the split is no name and no file.
        ValueError: a key or a class list does not fit.
    """
    index_of = _table_indices(cfg)
    scored = {}
    data_sets = _joint_data_sets(cfg)
    table = class_table({each.name: each.class_names for each in data_sets})
    order = {name: index for index, name in enumerate(table.names)}
    for each in data_sets:
        chosen = each.class_names if each.with_masks is None else each.with_masks
        _check_known(each.name, "DATASETS.TRAIN", chosen, index_of)
        # Positions count the classes in the order of the table of all training data.
        scored[each.name] = tuple(index_of[name] for name in sorted(set(chosen), key=order.get))
    return scored


def indices_of_dataset(cfg: CfgNode, name: str) -> tuple[int, ...]:
    """Return the table indices of the classes of a data set, in its order, each name once.

    Raises:
        FileNotFoundError: a data set was not prepared.
        ValueError: the model does not have a class of the data set.
    """
    index_of = _table_indices(cfg)
    class_names = tuple(dict.fromkeys(class_names_of(name)))
    _check_known(name, "DATASETS.TEST", class_names, index_of)
    return tuple(index_of[class_name] for class_name in class_names)


def split_of_dataset(cfg: CfgNode, name: str) -> CategorySplit | None:
    """Return the split of the classes of a data set, by ``DATASETS.MASKX.SPLIT``.

    A split is of one class list, such as that of ADE20K. Stuff of generated scenes is in A.

    Returns:
        The split of the unique class names; None where it is of another class list.

    Raises:
        FileNotFoundError: the split is neither a known name nor a file.
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


def check_joint_data(cfg: CfgNode) -> None:
    """Check what can be checked before any annotation is read.

    Raises:
        FileNotFoundError: a data set was not prepared, or the split is no name and no file.
        ValueError: data sets, keys, class lists, split or batch do not fit.
    """
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    model_class_table(cfg)
    if cfg.DATASETS.TRAIN:
        scored_indices(cfg)
    for name in cfg.DATASETS.TEST:
        indices_of_dataset(cfg, name)
    splits = {name: split_of_dataset(cfg, name) for name in names}
    if names and not any(splits.values()):
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


def joint_sets_from_config(cfg: CfgNode) -> JointSets:
    """Read the data sets of ``DATASETS.TRAIN``, each with its own supervision and nothing above it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a key or a class list does not fit, or a data set has no image to learn from.
    """
    _warn_of_novel_masks(cfg)
    data_sets = [replace(each, records=records_of(each.name)) for each in _joint_data_sets(cfg)]
    for each in data_sets:
        for record in each.records:
            if not {"image_id", "height", "width"} <= record.keys():
                raise ValueError(
                    f"Data set '{each.name}' (DATASETS.TRAIN): '{record['file_name']}' lacks "
                    "image_id, height or width. Give each record all three."
                )
    sets = joint_sets(data_sets)
    for each in sets.data_sets:
        logger.info(
            "%s: %d images, supervision %r, %d of %d classes scored, ratio %d, %d pixels.",
            *(each.name, len(each.records), each.supervision, len(sets.scored[each.name])),
            *(len(set(each.class_names)), each.ratio, each.image_size),
        )
    return sets


def trained_indices(cfg: CfgNode, sets: JointSets) -> tuple[int, ...]:
    """Return the table indices of the classes that some training image shows."""
    index_of = _table_indices(cfg)
    return tuple(sorted(index_of[sets.table.names[index]] for index in sets.trained))


def build_joint_loader(cfg: CfgNode) -> "JointLoader":
    """Make the training loader of ``DATASETS.TRAIN``."""
    sets = joint_sets_from_config(cfg)
    return JointLoader(
        sets,
        MaskXJointMapper(cfg, is_train=True, sets=_without_records(sets)),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        seed=comm.shared_random_seed() if cfg.SEED < 0 else cfg.SEED,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


class JointLoader:
    """Endless batches of this process, each of one data set.

    Which data set a batch is of, its images and their augmentation depend on the seed and the
    number of the step alone; see :class:`maskx.systems.larvseg.joint_sets.JointBatches`.

    Args:
        sets: what to train on.
        mapper: makes a sample of a record and a ``RandomState``.
        batch_size: images per step and process.
        seed: of all that is random; the same in all processes.
        num_workers: processes that read images; 0 reads them in this one.

    Attributes:
        sets: as given, without the records.
        start: step of the first batch that an iterator gives; to be set before it is made, so that
            a resumed training sees what the interrupted one would have seen.
    """

    def __init__(
        self,
        sets: JointSets,
        mapper: "MaskXJointMapper",
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        # The records are held once, serialised.
        self.sets, self.start = _without_records(sets), 0
        self._mapped = _MappedSets(sets, mapper)
        self._batch_size, self._seed, self._num_workers = batch_size, seed, num_workers

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Begin with the batch of step `start`."""
        batches = JointBatches(
            self._mapped.num_records,
            [each.ratio for each in self.sets.data_sets],
            batch_size=self._batch_size,
            seed=self._seed,
            start=self.start,
            stop=_ENDLESS,
            rank=comm.get_rank(),
            num_workers=comm.get_world_size(),
        )
        return iter(
            DataLoader(
                self._mapped,
                batch_sampler=batches,
                num_workers=self._num_workers,
                collate_fn=list,
            )
        )


class MaskXJointMapper:
    """Map records of joint data sets to samples, each with the supervision of its data set.

    A training sample has ``image`` (3, S, S) uint8 with S of the data set, ``height``, ``width``,
    ``image_id``, ``file_name``, ``data_set`` and ``single_label``. Of a data set with supervision
    "mask" it has ``label_map`` (S, S) int64, positions among the classes that the data set scores
    and -1 where nothing is known; of one with "image" ``image_labels``, the positions of those
    classes that the whole image shows or, with crop-level labels, the crop.

    A test sample has ``image`` (3, H, W), as it is in the file, ``height``, ``width``,
    ``image_id``, ``file_name`` and ``class_indices``, table indices of the classes to choose from.

    Args:
        is_train: whether it is used in training.
        image_format: "BGR" or "RGB".
        sets: data sets that are trained on together; their records are not read. None in
            evaluation.
        flip: "horizontal", "vertical" or "none": how half of the training images are mirrored.
        min_crop: smallest side of a random crop as a share of the image's; 1 takes whole images.
        class_indices: of the test set.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        image_format: str,
        sets: JointSets | None = None,
        flip: str = "horizontal",
        min_crop: float = 1.0,
        class_indices: Sequence[int] = (),
    ) -> None:
        self.is_train = is_train
        self.image_format = image_format
        self.sets = sets
        self.flip = flip
        self.min_crop = min_crop
        self.class_indices = tuple(class_indices)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        is_train: bool = True,
        *,
        sets: JointSets | None = None,
        dataset_name: str | None = None,
    ) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Args:
            cfg: the configuration.
            is_train: whether it is for training.
            sets: of :func:`joint_sets_from_config`; None reads them. In training only.
            dataset_name: the test set, in evaluation only.

        Raises:
            ValueError: no test set is given in evaluation, or the model lacks a class of it.
        """
        shared = {"is_train": is_train, "image_format": cfg.INPUT.FORMAT}
        if not is_train:
            if dataset_name is None:
                raise ValueError(
                    "MaskXJointMapper needs to know which test set it is for: give dataset_name."
                )
            return shared | {"class_indices": indices_of_dataset(cfg, dataset_name)}
        return shared | {
            "sets": _without_records(joint_sets_from_config(cfg)) if sets is None else sets,
            "flip": cfg.INPUT.RANDOM_FLIP,
            "min_crop": cfg.DATASETS.MASKX.JOINT.MIN_CROP,
        }

    def __call__(
        self, record: dict[str, Any], random_state: np.random.RandomState | None = None
    ) -> dict[str, Any]:
        """Map a record to a sample; the record stays as it is.

        Args:
            record: in training of :func:`joint_sets_from_config`, else of a data set.
            random_state: source of the augmentation, in training only.
        """
        image = utils.read_image(record["file_name"], format=self.image_format)
        sample = {key: record[key] for key in ("file_name", "image_id", "height", "width")}
        utils.check_image_size(sample, image)
        if not self.is_train:
            return sample | {"image": _to_tensor(image), "class_indices": self.class_indices}
        data_set = self.sets.of_record(record)
        sample |= {"data_set": data_set.name, "single_label": data_set.single_label}
        transforms = self._transforms(image.shape[:2], data_set.image_size, random_state)
        sample["image"] = _to_tensor(transforms.apply_image(image))
        is_mask = data_set.supervision == Supervision.MASK.value
        if not is_mask and not data_set.crop_level_labels:
            return sample | {"image_labels": self.sets.image_labels(record)}
        positions = self.sets.label_map(record).astype(np.int32)
        label_map = transform_label_map(positions, transforms).astype(np.int64)
        if is_mask:
            return sample | {"label_map": torch.from_numpy(label_map)}
        labels = np.unique(label_map)
        return sample | {"image_labels": labels[labels != UNKNOWN].tolist()}

    def _transforms(
        self, image_size: tuple[int, int], size: int, random_state: np.random.RandomState
    ) -> T.TransformList:
        rows, columns = random_crop(image_size, self.min_crop, random_state)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        transforms = [
            T.CropTransform(columns.start, rows.start, width, height, *image_size[::-1]),
            T.ResizeTransform(height, width, size, size),
        ]
        if self.flip != "none" and random_state.randint(2):
            is_vertical = self.flip == "vertical"
            transforms.append((T.VFlipTransform if is_vertical else T.HFlipTransform)(size))
        return T.TransformList(transforms)


class _MappedSets(Dataset):
    """Samples by data set, record and seed of the augmentation."""

    def __init__(self, sets: JointSets, mapper: MaskXJointMapper) -> None:
        # Serialised: processes that read images would otherwise each end up with a copy.
        self._records = [DatasetFromList(each.records, copy=False) for each in sets.data_sets]
        self._mapper = mapper

    @property
    def num_records(self) -> list[int]:
        return [len(records) for records in self._records]

    def __len__(self) -> int:
        return sum(self.num_records)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        which, index, seed = key
        return self._mapper(self._records[which][index], np.random.RandomState(seed))


def _joint_data_sets(cfg: CfgNode) -> list[JointDataSet]:
    """Make the data sets of ``DATASETS.TRAIN``, still without records."""
    names, keys = cfg.DATASETS.TRAIN, cfg.DATASETS.MASKX.JOINT
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"DATASETS.TRAIN names '{repeated[0]}' more than once. To see it more often set "
            f"{_KEYS}.RATIOS; to learn from it in two ways register it under a second name."
        )
    columns = {
        "supervision": _per_data_set(cfg, "SUPERVISION", Supervision.MASK.value, str),
        "ratio": _per_data_set(cfg, "RATIOS", 1, int),
        "image_size": _per_data_set(cfg, "SIZES", cfg.INPUT.MASKX.SIZE, int),
        "single_label": _per_data_set(cfg, "SINGLE_LABEL", False, bool),
    }
    data_sets = []
    for index, name in enumerate(names):
        own = {key: values[index] for key, values in columns.items()}
        is_mask = own["supervision"] == Supervision.MASK.value
        split = split_of_dataset(cfg, name) if is_mask else None
        if split is not None and split.without_masks:
            own["with_masks"] = split.with_masks
        own["crop_level_labels"] = keys.CROP_LEVEL_LABELS and not is_mask
        try:
            data_sets.append(JointDataSet(name, (), tuple(class_names_of(name)), **own))
        except ValueError as error:
            raise ValueError(f"{_KEYS}: {error}") from error
    return data_sets


def _per_data_set(cfg: CfgNode, key: str, default: Any, kind: type) -> Sequence[Any]:
    """Return a value for each data set of ``DATASETS.TRAIN``."""
    values, names = cfg.DATASETS.MASKX.JOINT[key], cfg.DATASETS.TRAIN
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


def _table_indices(cfg: CfgNode) -> dict[str, int]:
    return {name: index for index, name in enumerate(model_class_table(cfg).names)}


def _check_known(
    dataset: str, key: str, class_names: Sequence[str], index_of: dict[str, int]
) -> None:
    missing = [name for name in class_names if name not in index_of]
    if missing:
        raise ValueError(
            f"Data set '{dataset}' ({key}) has {len(missing)} classes that are not among the "
            f"{len(index_of)} of the model: {', '.join(missing[:8])}"
            f"{' and more' if len(missing) > 8 else ''}. Name the data sets of all classes in "
            f"{_CLASSES_OF}, '{dataset}' among them."
        )


def _warn_of_novel_masks(cfg: CfgNode) -> None:
    """Say which masks are used of classes that the split of another data set withholds."""
    names = dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    splits = [split for split in (split_of_dataset(cfg, name) for name in names) if split]
    novel = {name for split in splits for name in split.without_masks}
    for each in _joint_data_sets(cfg):
        if each.supervision != Supervision.MASK.value or each.with_masks is not None:
            continue
        found = [name for name in dict.fromkeys(each.class_names) if name in novel]
        if found:
            logger.warning(
                "DATASETS.MASKX.SPLIT %s is not of the classes of '%s', so its masks are all "
                "used, also those of %d classes that are novel by it: %s%s.",
                *(cfg.DATASETS.MASKX.SPLIT, each.name, len(found), ", ".join(found[:8])),
                " and more" if len(found) > 8 else "",
            )


def _without_records(sets: JointSets) -> JointSets:
    return replace(sets, data_sets=tuple(replace(each, records=()) for each in sets.data_sets))


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
