"""Training on data sets of different supervision together, as LarvSeg does.

"LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic Segmentation via
Category-wise Attentive Classifier" (Yu et al., PRCV 2024), section 4.1: every batch of a worker
comes from one data set; the data sets take turns by given ratios, such as 3:3:2 of 8 workers. The
classes of all of them make one `maskx.systems.larvseg.class_table.ClassTable`, and only those of
the batch's data set are scored.

Names of spaces: a class index is that of the class list of a data set, a table index that of the
class table, a position that among the classes that a data set scores.
"""

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from maskx.core.seeds import step_seed
from maskx.data.coco import CocoData, read_coco_json
from maskx.data.label_maps import (
    ignore_label,
    label_map_of_instances,
    read_label_map,
    semantic_label_map,
)
from maskx.supervision import Supervision
from maskx.systems.larvseg.class_table import ClassTable, class_table

__all__ = [
    "UNKNOWN",
    "JointBatches",
    "JointDataSet",
    "JointSchedule",
    "JointSets",
    "joint_sets",
    "random_crop",
    "things_and_stuff",
    "things_and_stuff_label_map",
]

logger = logging.getLogger(__name__)

Record = dict[str, Any]

UNKNOWN = -1
"""Position of a pixel of which nothing is known."""

_LEVELS = (Supervision.MASK.value, Supervision.IMAGE.value)
_NUM_THINGS = "num_things"  # of a record whose classes are things, then stuff
_SHOWN = 8  # names quoted in a message


@dataclass(frozen=True)
class JointDataSet:
    """A data set to train on.

    Attributes:
        name: Of the data set.
        records: As of `maskx.data.coco.load_coco`, or of `things_and_stuff`.
        class_names: By class index. A name that is there several times is one class.
        supervision: "mask", to learn from label maps, or "image", from image labels alone.
        image_size: Side in pixels of the squares that images are warped to.
        ratio: Batches of this data set for each `ratio` batches of the others.
        with_masks: With "mask": names of the classes whose masks may be used, None for all. Pixels
            of the others are unknown, and no class of theirs is scored.
        background: Name of the class that the background, label 0, is; it is then present in
            every image. Without it pixels of label 0 are unknown.
        crop_level_labels: With "image": take the labels from the label map of the training crop.
            That is more than image-level supervision, as the reference code of LarvSeg has it:
            pixel labels are read, and what was cropped away is not a label.
        single_label: Images show more than their one label says, as those of ImageNet do.
    """

    name: str
    records: Sequence[Mapping[str, Any]]
    class_names: tuple[str, ...]
    supervision: str
    image_size: int
    ratio: int = 1
    with_masks: Collection[str] | None = None
    background: str | None = None
    crop_level_labels: bool = False
    single_label: bool = False

    def __post_init__(self) -> None:
        where = f"Data set {self.name!r}"
        if self.supervision not in _LEVELS:
            raise ValueError(
                f"{where} has supervision {self.supervision!r}. Allowed: {', '.join(_LEVELS)}."
            )
        for key in ("image_size", "ratio"):
            if getattr(self, key) < 1:
                raise ValueError(f"{where}: {key} must be at least 1, got {getattr(self, key)}.")
        if self.background in self.class_names:
            raise ValueError(
                f"{where} has a class {self.background!r} and calls its background so. Give the "
                "background another name, or none if label 0 does not occur."
            )
        is_mask = self.supervision == Supervision.MASK.value
        if (is_mask and self.crop_level_labels) or (not is_mask and self.with_masks is not None):
            key = "crop_level_labels" if is_mask else "with_masks"
            raise ValueError(f"{where} has supervision {self.supervision!r}: leave {key} out.")
        unknown = sorted(set(self.with_masks or ()) - set(self.class_names))
        if unknown:
            raise ValueError(
                f"{where}: with_masks names {', '.join(unknown[:_SHOWN])}, not among its "
                f"{len(self.class_names)} classes."
            )

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names by class index, then that of the background if it has one."""
        return (*self.class_names, self.background) if self.background else self.class_names


@dataclass(frozen=True)
class JointSets:
    """Data sets in one class table; made by `joint_sets`.

    Attributes:
        data_sets: In the order given, with the records that are trained on: each has its own
            supervision and nothing above it, and its data set under "data_set".
        table: Of the class lists by name of the data set.
        scored: By name of the data set, the table indices of the classes that it scores.
        trained: Table indices of the classes that some image shows; others cannot be learned.
    """

    data_sets: tuple[JointDataSet, ...]
    table: ClassTable
    scored: Mapping[str, tuple[int, ...]]
    trained: tuple[int, ...]
    _by_name: Mapping[str, JointDataSet] = field(init=False, repr=False)
    _positions: Mapping[str, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {each.name: each for each in self.data_sets})
        positions = {
            each.name: _positions(each, [self.table.names[i] for i in self.scored[each.name]])
            for each in self.data_sets
        }
        object.__setattr__(self, "_positions", positions)

    @property
    def num_classes(self) -> int:
        """Number of classes of the table."""
        return len(self.table.names)

    def of_record(self, record: Mapping[str, Any]) -> JointDataSet:
        """Return the data set of a record."""
        return self._by_name[record["data_set"]]

    def label_map(self, record: Mapping[str, Any]) -> np.ndarray:
        """Read or draw what is known of the pixels of a record.

        Returns:
            (H, W) int64 positions, -1 where nothing is known.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file or a class index does not fit.
        """
        data_set = self.of_record(record)
        label_map = things_and_stuff_label_map(record, len(data_set.class_names))
        return self._positions[data_set.name][label_map]

    def image_labels(self, record: Mapping[str, Any]) -> list[int]:
        """Return the positions of the classes that the whole image of a record shows."""
        data_set = self.of_record(record)
        positions = self._positions[data_set.name]
        labels = [0] if data_set.background else []
        labels += [label + 1 for label in record["image_labels"]]
        return sorted(set(positions[labels].tolist()) - {UNKNOWN})


def joint_sets(
    data_sets: Sequence[JointDataSet],
    *,
    synsets: Mapping[str, Mapping[str, str]] | None = None,
) -> JointSets:
    """Put data sets into one class table, and take from records what may not be learned from.

    Args:
        data_sets: At least one.
        synsets: As of `maskx.systems.larvseg.class_table.class_table`, where known.

    Raises:
        ValueError: Two data sets have one name, or mean different things by one class name; a label
            is outside a class list; or a data set has no image that anything can be learned from.
    """
    if not data_sets:
        raise ValueError("There is no data set to train on. Give at least one.")
    names = [each.name for each in data_sets]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"Several data sets are called {repeated[0]!r}. Give each its own name.")
    class_lists = {each.name: each.all_names for each in data_sets}
    table = class_table(class_lists, synsets=synsets)
    if any(table.tied.values()) or table.shared_synsets:
        logger.warning("%s", table.describe())
    usable = tuple(_usable(each) for each in data_sets)
    index_of = {name: index for index, name in enumerate(table.names)}
    scored, trained = {}, set()
    for each in usable:
        background = (each.background,) if each.background else ()
        chosen = each.all_names if each.with_masks is None else (*each.with_masks, *background)
        scored[each.name] = tuple(sorted({index_of[name] for name in chosen}))
        shown = {index_of[name] for name in (*_shown_classes(each), *background)}
        trained |= shown & set(scored[each.name])
    never = [name for index, name in enumerate(table.names) if index not in trained]
    if never:
        logger.warning(
            "%d of %d classes are in no image that is trained on, so they are never predicted: "
            "%s%s.",
            *(len(never), len(table.names), ", ".join(never[:_SHOWN])),
            " and more" if len(never) > _SHOWN else "",
        )
    return JointSets(usable, table, scored, tuple(sorted(trained)))


class JointSchedule:
    """Whose turn it is: each data set as often as its ratio within a period.

    Turns of a data set are spread evenly over the period, their sum.

    Args:
        ratios: By data set, such as (3, 3, 2).
    """

    def __init__(self, ratios: Sequence[int]) -> None:
        if not ratios or min(ratios) < 1:
            raise ValueError(f"Ratios of data sets must be at least 1, got {list(ratios)}.")
        self.ratios = tuple(ratios)
        period = sum(ratios)
        given = [0] * len(ratios)
        turns = []
        for turn in range(1, period + 1):
            # The one that is farthest behind its share; of several the first.
            due = [ratio * turn - period * n for ratio, n in zip(ratios, given, strict=True)]
            turns.append(due.index(max(due)))
            given[turns[-1]] += 1
        self.turns = tuple(turns)

    def turn(self, number: int) -> tuple[int, int]:
        """Return the data set of a turn, and how many turns it had before."""
        rounds, place = divmod(number, len(self.turns))
        which = self.turns[place]
        return which, rounds * self.ratios[which] + self.turns[:place].count(which)


class JointBatches:
    """Batches of the steps ``start`` to ``stop`` of one worker, each of one data set.

    Worker r of n takes turn ``step * n + r`` of the `JointSchedule`: with as many workers as the
    sum of the ratios each keeps its data set, one worker alternates. Every data set is shuffled
    endlessly on its own. What a step sees depends on the seed and its number alone, so a resumed
    run sees what the interrupted one would have seen.

    Args:
        num_records: Of each data set.
        ratios: Of each data set.
        batch_size: Images per step and worker.
        seed: Of the order and of the augmentation.
        start: First step.
        stop: Step after the last.
        rank: r.
        num_workers: n, processes that train.
    """

    def __init__(
        self,
        num_records: Sequence[int],
        ratios: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        if not 0 <= rank < num_workers:
            raise ValueError(f"rank must be in [0, {num_workers}), got {rank}.")
        self.num_records, self.schedule = tuple(num_records), JointSchedule(ratios)
        self.batch_size, self.seed = batch_size, seed
        self.start, self.stop = start, stop
        self.rank, self.num_workers = rank, num_workers

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yield lists of (data set, record index, seed of the augmentation)."""
        orders: dict[int, tuple[int, np.ndarray]] = {}  # of a data set: epoch and its order
        for step in range(self.start, self.stop):
            which, number = self.schedule.turn(step * self.num_workers + self.rank)
            batch = []
            for position in range(number * self.batch_size, (number + 1) * self.batch_size):
                epoch, place = divmod(position, self.num_records[which])
                if which not in orders or orders[which][0] != epoch:
                    shuffle = np.random.RandomState(step_seed(self.seed, which, epoch))
                    orders[which] = epoch, shuffle.permutation(self.num_records[which])
                index = int(orders[which][1][place])
                batch.append((which, index, step_seed(self.seed, which, position, 1)))
            yield batch


def random_crop(
    size: tuple[int, int], min_crop: float, random_state: np.random.RandomState
) -> tuple[slice, slice]:
    """Draw the rows and columns of a random part of an image, of its aspect ratio.

    Args:
        size: Height and width of the image.
        min_crop: Smallest side as a share of the image's, above 0; 1 draws nothing and is all.
        random_state: Source of size and place.
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


def things_and_stuff(data: CocoData) -> tuple[list[Record], tuple[str, ...]]:
    """Append the stuff categories of a file to its classes, so that every pixel has a class.

    Of the file are needed `stuff_categories`, with the ids 1 to their number, and of each image
    `stuff_file_name`, a label map of these ids, 0 where a thing is, and `stuff_labels`, the ids in
    it. Files of generated scenes have them.

    Returns:
        Records with the classes of both in `image_labels`, for `things_and_stuff_label_map`; and
        the names of things, then stuff.

    Raises:
        ValueError: One of these is missing or does not fit.
    """
    content = read_coco_json(data.json_file)
    categories = content.get("stuff_categories", [])
    ids = [category.get("id") for category in categories]
    if not ids or ids != list(range(1, len(ids) + 1)):
        raise ValueError(
            f"'{data.json_file}' has stuff_categories of the ids {ids[:_SHOWN]}. Allowed: "
            "1, 2, and so on, at least one."
        )
    num_things = len(data.class_names)
    labels_of = {image["id"]: image.get("stuff_labels") for image in content["images"]}
    records = []
    for record in data.records:
        found = labels_of[record["image_id"]]
        if "sem_seg_file_name" not in record or found is None or not set(found) <= set(ids):
            raise ValueError(
                f"'{data.json_file}': image {record['image_id']!r} has stuff_file_name "
                f"{record.get('sem_seg_file_name')!r} and stuff_labels {found!r:.80}. Every image "
                f"needs both, labels from 1 to {len(ids)}."
            )
        labels = [*record["image_labels"], *(num_things - 1 + label for label in sorted(found))]
        records.append({**record, "image_labels": labels, _NUM_THINGS: num_things})
    return records, (*data.class_names, *(category["name"] for category in categories))


def things_and_stuff_label_map(record: Mapping[str, Any], num_classes: int) -> np.ndarray:
    """Read or draw the label map of a record, with its stuff if it is of `things_and_stuff`.

    Args:
        record: Of `things_and_stuff`, or of `maskx.data.coco.load_coco`.
        num_classes: Of the record's class list.

    Returns:
        (H, W), as of `maskx.data.label_maps.semantic_label_map`. A pixel of neither a thing whose
        mask is known nor stuff is unknown.
    """
    if _NUM_THINGS not in record:
        return semantic_label_map(record, num_classes)
    num_things = record[_NUM_THINGS]
    stuff = read_label_map(
        *(record["sem_seg_file_name"], record["height"], record["width"]),
        num_classes=num_classes - num_things,
        image_id=record["image_id"],
    )
    label_map = label_map_of_instances(record, num_classes)
    is_stuff = (stuff > 0) & (stuff != ignore_label(num_classes - num_things))
    label_map[is_stuff] = stuff[is_stuff].astype(label_map.dtype) + num_things
    # Nothing is background here, also where an image has no stuff.
    label_map[label_map == 0] = ignore_label(num_classes)
    return label_map


def _shown_classes(data_set: JointDataSet) -> set[str]:
    """Names of the classes that images show; all of them where label maps alone would say."""
    if any("label_map_file_name" in r and not r["image_labels"] for r in data_set.records):
        return set(data_set.class_names)
    return {data_set.class_names[i] for record in data_set.records for i in record["image_labels"]}


def _positions(data_set: JointDataSet, scored_names: Sequence[str]) -> np.ndarray:
    """Positions by label of the data set's own label maps, -1 where it is not scored."""
    place = {name: position for position, name in enumerate(scored_names)}
    num_classes = len(data_set.class_names)
    positions = np.full(ignore_label(num_classes) + 1, UNKNOWN, np.int64)
    positions[: num_classes + 1] = [
        place.get(name, UNKNOWN) for name in (data_set.background, *data_set.class_names)
    ]
    return positions


def _usable(data_set: JointDataSet) -> JointDataSet:
    """Return the data set with the records that teach something, without what they may not."""
    num_classes = len(data_set.class_names)
    is_mask = data_set.supervision == Supervision.MASK.value
    masks = frozenset(data_set.class_names if data_set.with_masks is None else data_set.with_masks)
    withheld = {i for i, name in enumerate(data_set.class_names) if name not in masks}
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
        has_pixels = record.get("supervision") == Supervision.MASK.value or _NUM_THINGS in record
        if (is_mask or data_set.crop_level_labels) and has_pixels:
            kept.append(_without_masks(record, withheld) | {"data_set": data_set.name})
        elif not is_mask and not data_set.crop_level_labels and record["image_labels"]:
            kept.append(_with_labels_only(record) | {"data_set": data_set.name})
    what = "pixel labels" if is_mask or data_set.crop_level_labels else "image labels"
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
    return {key: record[key] for key in kept} | {
        "annotations": [],
        "supervision": Supervision.IMAGE.value,
    }
