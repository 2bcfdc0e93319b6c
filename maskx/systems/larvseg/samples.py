"""Samples of LarvSeg on both hosts, of data sets of different supervision with one class table.

"LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic Segmentation via
Category-wise Attentive Classifier" (Yu et al., PRCV 2024), section 4.1: every batch of a worker
comes from one data set, and the data sets take turns by given ratios, such as 3:3:2 of 8 workers.
The classes of all of them are united by name, and only those of the batch's data set are scored.

Names of spaces: a label index is that of the class list of a data set, a class index that of the
class table. There is no background: a pixel of label 0 is of no class, so nothing is known of it.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskx.core.images import warp_image, warp_label_map
from maskx.core.sample_models import Sample
from maskx.core.seeds import step_seed
from maskx.core.text import listed
from maskx.data.coco import CocoData, with_labels_only
from maskx.data.images import read_image_sample
from maskx.data.label_maps import has_pixels, ignore_label, things_and_stuff_label_map
from maskx.data.things_and_stuff import things_and_stuff
from maskx.engine.batches import RecordMapper
from maskx.supervision import CategorySplit, Supervision

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

_MASK, _IMAGE = Supervision.MASK.value, Supervision.IMAGE.value


# --- class lists and their table


def class_table(class_lists: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Unite class lists by name: those of the first in its order, then what the next adds.

    A name that a list has several times, as COCO-Stuff's renamed list has "wall", is one class.

    Args:
        class_lists: by data set its names by class index.

    Raises:
        ValueError: there is no list, a list is empty, or a name is not usable.
    """
    if not class_lists:
        raise ValueError("A class table needs at least one class list, got none.")
    for data_set, names in class_lists.items():
        _check_names(names, f"class list {data_set!r}")
    return tuple(dict.fromkeys(name for names in class_lists.values() for name in names))


def tied_classes(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the names that stand in a class list several times, and their class indices."""
    found = defaultdict(list)
    for index, name in enumerate(names):
        found[name].append(index)
    return {name: tuple(places) for name, places in found.items() if len(places) > 1}


class RowMatch(NamedTuple):
    """Rows of one class list that another has under the same name.

    Attributes:
        new_rows: rows to fill, ascending.
        old_rows: for each of them the row to take: ``new[new_rows] = old[old_rows]``.
        only_new: names without an old row, in their order.
        only_old: names whose row nothing takes, in their order.
    """

    new_rows: tuple[int, ...]
    old_rows: tuple[int, ...]
    only_new: tuple[str, ...]
    only_old: tuple[str, ...]


def match_rows(old_names: Sequence[str], new_names: Sequence[str]) -> RowMatch:
    """Match the rows of two class lists by name, such as those of a checkpoint and of a model.

    Raises:
        ValueError: a list is empty, a name is not usable, or is in a list twice.
    """
    for names, what in ((old_names, "old"), (new_names, "new")):
        _check_names(names, f"{what} class list")
        tied = tied_classes(names)
        if tied:
            name, rows = next(iter(tied.items()))
            raise ValueError(
                f"The {what} class list has {len(tied)} names several times, such as {name!r} in "
                f"the rows {', '.join(map(str, rows))}. Give a list of unique names, as "
                "class_table makes it."
            )
    old_row = {name: row for row, name in enumerate(old_names)}
    wanted = set(new_names)
    return RowMatch(
        new_rows=tuple(row for row, name in enumerate(new_names) if name in old_row),
        old_rows=tuple(old_row[name] for name in new_names if name in old_row),
        only_new=tuple(name for name in new_names if name not in old_row),
        only_old=tuple(name for name in old_names if name not in wanted),
    )


def take_rows(own: Tensor, found: Tensor, match: RowMatch, *, what: str) -> Tensor:
    """Return a copy of (K, ...) ``own`` with rows of (K', ...) ``found``, of another class list.

    Raises:
        ValueError: rows of ``what`` have another shape.
    """
    if found.shape[1:] != own.shape[1:]:
        raise ValueError(
            f"A row of {what} has shape {tuple(found.shape[1:])} in the checkpoint, but "
            f"{tuple(own.shape[1:])} in this model. Give both the same channels and bank size."
        )
    rows = own.detach().clone()
    rows[torch.tensor(match.new_rows)] = found[torch.tensor(match.old_rows)].to(rows)
    return rows


def _check_names(names: Sequence[str], where: str) -> None:
    if not names:
        raise ValueError(f"The {where} is empty. Give at least one name.")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name or name != name.strip():
            raise ValueError(
                f"The {where} has the name {name!r} at index {index}. Allowed: text without "
                "white space around it."
            )


# --- data sets


@dataclass(frozen=True)
class JointDataSet:
    """A data set to train on.

    Attributes:
        name: of the data set.
        records: as of :func:`maskx.data.coco.load_coco`, or of
            :func:`maskx.data.things_and_stuff.things_and_stuff`.
        class_names: by label index. A name that is there several times is one class.
        supervision: "mask", to learn from label maps, or "image", from image labels alone.
        image_size: side in pixels of the squares that images are warped to.
        ratio: batches of this data set for each ``ratio`` batches of the others.
        with_masks: with "mask": names of the classes whose masks may be used, None for all. Pixels
            of the others are unknown, and no class of theirs is scored.
        crop_level_labels: with "image": take the labels from the label map of the training crop.
            That is more than image-level supervision, as the reference code of LarvSeg has it:
            pixel labels are read, and what was cropped away is not a label.
        single_label: images show more than their one label says, as those of ImageNet do.
        attention: with "image": learn the labels with attention too, as far as the network has it;
            the paper's Table 4 leaves it out on one of two data sets.
    """

    name: str
    records: Sequence[Record]
    class_names: tuple[str, ...]
    supervision: str
    image_size: int
    ratio: int = 1
    with_masks: Collection[str] | None = None
    crop_level_labels: bool = False
    single_label: bool = False
    attention: bool = True

    def __post_init__(self) -> None:
        where = f"Data set {self.name!r}"
        if self.supervision not in (_MASK, _IMAGE):
            raise ValueError(
                f"{where} has supervision {self.supervision!r}. Allowed: {_MASK}, {_IMAGE}."
            )
        for key in ("image_size", "ratio"):
            if getattr(self, key) < 1:
                raise ValueError(f"{where}: {key} must be at least 1, got {getattr(self, key)}.")
        is_mask = self.supervision == _MASK
        if (is_mask and self.crop_level_labels) or (not is_mask and self.with_masks is not None):
            key = "crop_level_labels" if is_mask else "with_masks"
            raise ValueError(f"{where} has supervision {self.supervision!r}: leave {key} out.")
        unknown = sorted(set(self.with_masks or ()) - set(self.class_names))
        if unknown:
            raise ValueError(
                f"{where}: with_masks names {listed(unknown)}, not among its "
                f"{len(self.class_names)} classes."
            )

    @property
    def reads_pixels(self) -> bool:
        """Whether label maps are read."""
        return self.supervision == _MASK or self.crop_level_labels

    @property
    def scored_names(self) -> set[str]:
        """Names of the classes that are scored."""
        return set(self.class_names if self.with_masks is None else self.with_masks)


@dataclass(frozen=True)
class JointSets:
    """Data sets in one class table; made by :func:`joint_sets`.

    Attributes:
        data_sets: in the order given, with the records that are trained on: each has its own
            supervision and nothing above it, and its data set under "data_set".
        class_names: of the class table.
        scored: by name of the data set, the class indices that it scores, ascending.
        trained: class indices that some image shows; others cannot be learned.
    """

    data_sets: tuple[JointDataSet, ...]
    class_names: tuple[str, ...]
    scored: Mapping[str, tuple[int, ...]]
    trained: tuple[int, ...]
    _labels: Mapping[str, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Make the labels in the class table by label of the label maps of each data set."""
        ignore, tables = ignore_label(self.num_classes), {}
        for each in self.data_sets:
            label_of = {self.class_names[index]: index + 1 for index in self.scored[each.name]}
            tables[each.name] = np.full(ignore_label(len(each.class_names)) + 1, ignore, np.int64)
            known = [label_of.get(name, ignore) for name in each.class_names]
            tables[each.name][1 : len(known) + 1] = known
        object.__setattr__(self, "_labels", tables)

    @property
    def num_classes(self) -> int:
        """Number of classes of the table."""
        return len(self.class_names)

    def of_record(self, record: Record) -> JointDataSet:
        """Return the data set of a record."""
        return next(each for each in self.data_sets if each.name == record["data_set"])

    def without_records(self) -> "JointSets":
        """Return the same without the records, for a mapper in a process of its own."""
        empty = tuple(replace(each, records=()) for each in self.data_sets)
        return replace(self, data_sets=empty)

    def label_map(self, record: Record) -> np.ndarray:
        """Read or draw what is known of the pixels of a record.

        Returns:
            (H, W) int64: class index + 1, and ``ignore_label`` where nothing is known. No pixel is
            0.
        """
        data_set = self.of_record(record)
        label_map = things_and_stuff_label_map(record, len(data_set.class_names))
        return self._labels[data_set.name][label_map]

    def image_labels(self, record: Record) -> list[int]:
        """Return the class indices that the whole image of a record shows, ascending."""
        labels = self._labels[record["data_set"]][[label + 1 for label in record["image_labels"]]]
        return sorted(label - 1 for label in {*labels.tolist()} - {ignore_label(self.num_classes)})


def joint_sets(
    data_sets: Sequence[JointDataSet], *, class_names: Sequence[str] | None = None
) -> JointSets:
    """Put data sets into one class table, and take from records what may not be learned from.

    Args:
        data_sets: at least one.
        class_names: the class table; None unites the class lists, see :func:`class_table`.

    Raises:
        ValueError: two data sets have one name, the class table lacks a class, a label is outside a
            class list, or a data set has no image that anything can be learned from.
    """
    repeated = tied_classes([each.name for each in data_sets])
    if repeated:
        raise ValueError(f"Several data sets are called {min(repeated)!r}. Give each its own name.")
    if not data_sets:
        raise ValueError("There is no data set to train on. Give at least one.")
    class_names = tuple(
        class_names or class_table({each.name: each.class_names for each in data_sets})
    )
    for each in data_sets:
        tied = tied_classes(each.class_names)
        if tied:
            merged = ", ".join(f"{name} x{len(them)}" for name, them in tied.items())
            logger.warning(
                "Data set %r: %d labels of %d names; merged: %s.",
                each.name,
                len(each.class_names),
                len(set(each.class_names)),
                merged,
            )
    usable = tuple(_usable(each) for each in data_sets)
    scored, trained = scored_classes(usable, class_names), set()
    for each in usable:
        shown = _shown_classes(each)
        trained |= {index for index in scored[each.name] if class_names[index] in shown}
    never = [name for index, name in enumerate(class_names) if index not in trained]
    if never:
        logger.warning(
            "%d of %d classes are in no image that is trained on, so they are never predicted: %s.",
            len(never),
            len(class_names),
            listed(never),
        )
    return JointSets(usable, class_names, scored, tuple(sorted(trained)))


def scored_classes(
    data_sets: Sequence[JointDataSet], class_names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the class indices that each data set scores; the records are not looked at.

    Raises:
        ValueError: the class table lacks a class.
    """
    index_of = {name: index for index, name in enumerate(class_names)}
    scored = {}
    for each in data_sets:
        missing = sorted(each.scored_names - index_of.keys())
        if missing:
            raise ValueError(
                f"Data set {each.name!r} has {len(missing)} classes that are not among the "
                f"{len(index_of)} of the model: {listed(missing)}. Take its classes into the class "
                "table."
            )
        scored[each.name] = tuple(sorted(index_of[name] for name in each.scored_names))
    return scored


def _shown_classes(data_set: JointDataSet) -> set[str]:
    """Names of the classes that images show; all of them where label maps alone would say."""
    if any("label_map_file_name" in r and not r["image_labels"] for r in data_set.records):
        return set(data_set.class_names)
    return {data_set.class_names[i] for record in data_set.records for i in record["image_labels"]}


def _usable(data_set: JointDataSet) -> JointDataSet:
    """Return the data set with the records that teach something, without what they may not."""
    num_classes, reads_pixels = len(data_set.class_names), data_set.reads_pixels
    scored = data_set.scored_names
    withheld = {i for i, name in enumerate(data_set.class_names) if name not in scored}
    kept = []
    for record in data_set.records:
        annotations = record.get("annotations", [])
        labels = {*record["image_labels"], *(a["class_index"] for a in annotations)}
        outside = sorted(label for label in labels if not 0 <= label < num_classes)
        if outside:
            raise ValueError(
                f"Data set {data_set.name!r}: image {record['image_id']!r} "
                f"({os.fspath(record['file_name'])}) has the labels {outside}. Allowed: class "
                f"indices 0 to {num_classes - 1}. Is it a record of another class list?"
            )
        if has_pixels(record) if reads_pixels else record["image_labels"]:
            taught = _without_masks(record, withheld) if reads_pixels else with_labels_only(record)
            kept.append(taught | {"data_set": data_set.name})
    what = "pixel labels" if reads_pixels else "image labels"
    if not kept:
        raise ValueError(
            f"Data set {data_set.name!r} with supervision {data_set.supervision!r}: none of its "
            f"{len(data_set.records)} images has {what}. Give some, or another supervision."
        )
    if len(kept) < len(data_set.records):
        logger.warning(
            "Data set %r: %d of %d images have no %s, so there is nothing to learn from them: "
            "left out.",
            data_set.name,
            len(data_set.records) - len(kept),
            len(data_set.records),
            what,
        )
    return replace(data_set, records=kept)


def _without_masks(record: Record, withheld: Collection[int]) -> dict[str, Any]:
    """Take the masks of some classes out; the boxes that are left keep their pixels unknown."""
    annotations = [
        {key: value for key, value in a.items() if key != "segmentation"}
        if a["class_index"] in withheld
        else a
        for a in record.get("annotations", [])
    ]
    return {**record, "annotations": annotations}


# --- the order in which they are seen


class JointSchedule:
    """Whose turn it is: each data set as often as its ratio within a period, spread evenly.

    Args:
        ratios: by data set, such as (3, 3, 2); their sum is the period.
    """

    def __init__(self, ratios: Sequence[int]) -> None:
        if not ratios or min(ratios) < 1:
            raise ValueError(f"Ratios of data sets must be at least 1, got {list(ratios)}.")
        self.ratios = tuple(ratios)
        period, turns = sum(ratios), []
        for turn in range(1, period + 1):
            # The one that is farthest behind its share; of several the first.
            due = [ratio * turn - period * turns.count(i) for i, ratio in enumerate(ratios)]
            turns.append(due.index(max(due)))
        self.turns = tuple(turns)

    def turn(self, number: int) -> tuple[int, int]:
        """Return the data set of a turn, and how many turns it had before."""
        rounds, place = divmod(number, len(self.turns))
        which = self.turns[place]
        return which, rounds * self.ratios[which] + self.turns[:place].count(which)


class JointBatches:
    """Batches of the steps ``start`` to ``stop`` of one worker, each of one data set.

    Worker r of n takes turn ``step * n + r`` of the :class:`JointSchedule`: with as many workers as
    the sum of the ratios each keeps its data set, one worker alternates. Every data set is shuffled
    endlessly on its own. What a step sees depends on the seed and its number alone, so a resumed
    run sees what the interrupted one would have seen.

    Args:
        num_records: of each data set.
        ratios: of each data set.
        start: first step.
        stop: step after the last.
        batch_size: images per step and worker.
        seed: of the order and of the augmentation.
        rank: r.
        num_processes: n, workers.
    """

    def __init__(
        self,
        num_records: Sequence[int],
        ratios: Sequence[int],
        start: int,
        stop: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if not 0 <= rank < num_processes:
            raise ValueError(f"rank must be in [0, {num_processes}), got {rank}.")
        self.num_records, self.schedule = tuple(num_records), JointSchedule(ratios)
        self.batch_size, self.seed = batch_size, seed
        self.start, self.stop = start, stop
        self.rank, self.num_processes = rank, num_processes

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yield lists of (data set, record index, seed of the augmentation)."""
        orders: dict[int, tuple[int, np.ndarray]] = {}  # of a data set: epoch and its order
        for step in range(self.start, self.stop):
            which, number = self.schedule.turn(step * self.num_processes + self.rank)
            batch = []
            for position in range(number * self.batch_size, (number + 1) * self.batch_size):
                epoch, place = divmod(position, self.num_records[which])
                if which not in orders or orders[which][0] != epoch:
                    shuffle = np.random.RandomState(step_seed(self.seed, which, epoch))
                    orders[which] = epoch, shuffle.permutation(self.num_records[which])
                index = int(orders[which][1][place])
                batch.append((which, index, step_seed(self.seed, which, position, 1)))
            yield batch


# --- samples


class JointMapper:
    """Reads the records of joint sets, each with the supervision of its data set.

    Args:
        sets: data sets that are trained on together; their records are not read.
        flip: mirror half of the samples from left to right.
        min_crop: smallest side of a random crop as a share of the image's; 1 takes whole images.

    """

    def __init__(self, sets: JointSets, *, flip: bool = True, min_crop: float = 1.0) -> None:
        if not 0 < min_crop <= 1:
            raise ValueError(
                f"min_crop (DATASETS.MASKX.JOINT.MIN_CROP) is {min_crop}. Allowed: above 0 and at "
                "most 1."
            )
        self.sets, self.flip, self.min_crop = sets.without_records(), flip, min_crop

    def __call__(self, record: Record, random_state: np.random.RandomState) -> Sample:
        """Make a training sample.

        Returns:
            ``image`` (3, S, S) uint8 RGB with S of the data set, ``height``, ``width``,
            ``image_id``, ``file_name``, ``data_set``, ``single_label``, ``attention``; of "image"
            data sets ``image_labels``, class indices; of "mask" data sets ``sem_seg`` (S, S) int64,
            class index + 1 and ``ignore_label`` where nothing is known.
        """
        data_set = self.sets.of_record(record)
        sample = read_image_sample(record) | {
            "file_name": record["file_name"],
            "data_set": data_set.name,
            "single_label": data_set.single_label,
            "attention": data_set.attention,
        }
        maps = {"image": sample["image"]}
        if data_set.reads_pixels:
            maps["sem_seg"] = torch.from_numpy(self.sets.label_map(record))
        where = random_crop(maps["image"].shape[-2:], self.min_crop, random_state)
        maps = {name: values[(..., *where)] for name, values in maps.items()}
        sample["image"] = warp_image(maps["image"], data_set.image_size)
        if data_set.reads_pixels:
            sem_seg = warp_label_map(maps["sem_seg"], data_set.image_size)
        if data_set.supervision == _MASK:
            sample["sem_seg"] = sem_seg
        elif data_set.crop_level_labels:
            found = set(sem_seg.unique().tolist()) - {ignore_label(self.sets.num_classes)}
            sample["image_labels"] = sorted(label - 1 for label in found)
        else:
            sample["image_labels"] = self.sets.image_labels(record)
        if self.flip and random_state.randint(2):
            for key in sample.keys() & {"image", "sem_seg"}:
                sample[key] = sample[key].flip(-1)
        return sample


def random_crop(
    size: tuple[int, int], min_crop: float, random_state: np.random.RandomState
) -> tuple[slice, slice]:
    """Draw the rows and columns of a random part of an image of size (H, W), of its aspect ratio.

    ``min_crop`` is its smallest side as a share of the image's, above 0; 1 draws nothing and is
    all.
    """
    if min_crop == 1:
        return slice(0, size[0]), slice(0, size[1])
    share = random_state.uniform(min_crop, 1)
    lengths = [max(1, round(share * side)) for side in size]
    starts = [
        random_state.randint(side - length + 1) for side, length in zip(size, lengths, strict=True)
    ]
    rows, columns = (slice(a, a + n) for a, n in zip(starts, lengths, strict=True))
    return rows, columns


class MappedSets(Dataset):
    """Training samples by data set, record and seed of the augmentation."""

    def __init__(self, sets: JointSets, mapper: RecordMapper) -> None:
        self.sets, self.mapper = sets, mapper

    def __len__(self) -> int:
        return sum(len(each.records) for each in self.sets.data_sets)

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        which, index, seed = key
        return self.mapper(self.sets.data_sets[which].records[index], np.random.RandomState(seed))

    def batches(self, start: int, stop: int, **order: int) -> JointBatches:
        """Lists of keys of the steps ``start`` to ``stop``, see :class:`JointBatches`."""
        num_records = [len(each.records) for each in self.sets.data_sets]
        ratios = [each.ratio for each in self.sets.data_sets]
        return JointBatches(num_records, ratios, start, stop, **order)


def joint_batches(
    sets: JointSets, mapper: JointMapper, *, start: int, stop: int, num_workers: int, **order: int
) -> DataLoader:
    """Lists of samples of the steps ``start`` to ``stop``, each of one data set.

    ``num_workers`` processes read images, 0 reads them in this one; for ``order`` see
    :class:`JointBatches`.
    """
    mapped = MappedSets(sets, mapper)
    batches = mapped.batches(start, stop, **order)
    return DataLoader(mapped, batch_sampler=batches, num_workers=num_workers, collate_fn=list)


@dataclass(frozen=True)
class LabelledImages:
    """Records with true label maps to evaluate on, and their class list."""

    records: Sequence[Record]
    class_names: tuple[str, ...]


def labelled_images(data: CocoData) -> LabelledImages:
    """Take the stuff of a file as classes if it has any."""
    if data.records and all("sem_seg_file_name" in record for record in data.records):
        return LabelledImages(*things_and_stuff(data))
    return LabelledImages(data.records, tuple(data.class_names))


def true_label_map(record: Record, class_names: Sequence[str]) -> np.ndarray:
    """Read or draw the label map of a record to compare with.

    Returns:
        (H, W), class index + 1, the first of those that share a name, and ``ignore_label`` where
        nothing is known. A pixel of label 0 is of no class, so it is unknown.
    """
    first = {name: index for index, name in reversed([*enumerate(class_names)])}
    ignore = ignore_label(len(class_names))
    labels = np.full(ignore + 1, ignore)
    labels[1 : len(class_names) + 1] = [first[name] + 1 for name in class_names]
    return labels[things_and_stuff_label_map(record, len(class_names))]


def classes_to_predict(class_names: Sequence[str], table_names: Sequence[str]) -> tuple[int, ...]:
    """Return the class index in the table of each class of a test set.

    Raises:
        ValueError: the table lacks one.
    """
    index_of = {name: index for index, name in enumerate(table_names)}
    missing = [name for name in dict.fromkeys(class_names) if name not in index_of]
    if missing:
        raise ValueError(
            f"{len(missing)} of the classes to predict are not among the {len(index_of)} of the "
            f"model: {listed(missing)}. Give images of its classes, or a model of these."
        )
    return tuple(index_of[name] for name in class_names)


def sets_of_one_file(train_data: CocoData, split: CategorySplit, *, image_size: int) -> JointSets:
    """Make two data sets of one file: masks of base classes, and image labels.

    Images with masks teach those of the base classes, and the stuff if the file has any. Images
    with image labels alone teach these, and so do those with masks; the stuff is among them, as
    walls and floors are among the labels of the paper's images. If the file has no images with
    image labels alone, every second image keeps its masks and the others only their image labels.

    ``split`` has the base classes in A, the novel ones in B.
    """
    images = labelled_images(train_data)
    masks = [r for r in images.records if r["supervision"] == _MASK]
    tagged = [r for r in images.records if r["supervision"] == _IMAGE]
    masks, tagged = (masks, tagged + masks) if tagged else (masks[::2], masks[1::2])
    novel = set(split.without_masks)
    shared = {"class_names": images.class_names, "image_size": image_size}
    with_masks = [name for name in images.class_names if name not in novel]
    return joint_sets(
        [
            JointDataSet("masks", masks, supervision=_MASK, with_masks=with_masks, **shared),
            JointDataSet("image labels", tagged, supervision=_IMAGE, **shared),
        ]
    )
