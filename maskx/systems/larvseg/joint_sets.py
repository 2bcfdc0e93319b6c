"""Data sets of different supervision, and their classes in one table, as LarvSeg trains on them.

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

from maskx.core.seeds import step_seed
from maskx.core.text import listed
from maskx.data.label_maps import has_pixels, ignore_label, things_and_stuff_label_map
from maskx.supervision import Supervision

logger = logging.getLogger(__name__)

Record = dict[str, Any]

_MASK = Supervision.MASK.value
_LEVELS = (_MASK, Supervision.IMAGE.value)


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
    records: Sequence[Mapping[str, Any]]
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
        if self.supervision not in _LEVELS:
            raise ValueError(
                f"{where} has supervision {self.supervision!r}. Allowed: {', '.join(_LEVELS)}."
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

    def of_record(self, record: Mapping[str, Any]) -> JointDataSet:
        """Return the data set of a record."""
        return next(each for each in self.data_sets if each.name == record["data_set"])

    def without_records(self) -> "JointSets":
        """Return the same without the records, for a mapper in a process of its own."""
        empty = tuple(replace(each, records=()) for each in self.data_sets)
        return replace(self, data_sets=empty)

    def label_map(self, record: Mapping[str, Any]) -> np.ndarray:
        """Read or draw what is known of the pixels of a record.

        Returns:
            (H, W) int64: class index + 1, and ``ignore_label`` where nothing is known. No pixel is
            0.
        """
        data_set = self.of_record(record)
        label_map = things_and_stuff_label_map(record, len(data_set.class_names))
        return self._labels[data_set.name][label_map]

    def image_labels(self, record: Mapping[str, Any]) -> list[int]:
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
                *(each.name, len(each.class_names), len(set(each.class_names)), merged),
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
            *(len(never), len(class_names), listed(never)),
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
            taught = _without_masks(record, withheld) if reads_pixels else _with_labels_only(record)
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
            *(data_set.name, len(data_set.records) - len(kept), len(data_set.records), what),
        )
    return replace(data_set, records=kept)


def _without_masks(record: Mapping[str, Any], withheld: Collection[int]) -> Record:
    """Take the masks of some classes out; the boxes that are left keep their pixels unknown."""
    annotations = [
        {key: value for key, value in a.items() if key != "segmentation"}
        if a["class_index"] in withheld
        else a
        for a in record.get("annotations", [])
    ]
    return {**record, "annotations": annotations}


def _with_labels_only(record: Mapping[str, Any]) -> Record:
    kept = ("file_name", "height", "width", "image_id", "image_labels")
    nothing_else = {"annotations": [], "supervision": Supervision.IMAGE.value}
    return {key: record[key] for key in kept} | nothing_else


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
