"""Source and target images of TransferNet, and samples and batches of them; on both hosts.

"Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional Neural Network"
(Hong et al., CVPR 2016), section 3. The two sides of a `maskx.supervision.CategorySplit` are the
source categories (A, with masks) and the target categories (B, with tags). They share one class
list: that of one file, or the union of the lists of two, such as COCO-60 and VOC, which
:func:`union_of_class_lists` and :func:`records_in_union` make.

Records are those of `maskx.data.coco.load_coco`.
"""

import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from maskx.core.sample_models import Sample
from maskx.core.seeds import step_seed
from maskx.data.images import ImageMapper
from maskx.data.label_maps import (
    aligned_labels,
    ignore_label,
    label_map_of_instances,
    read_label_map,
)
from maskx.data.vocabularies import VOC_TO_COCO
from maskx.engine.batches import MappedRecords, RecordMapper, SeededBatches
from maskx.supervision import CategorySplit, Supervision

logger = logging.getLogger(__name__)

SOURCE_FRACTIONS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.01)
"""Shares of the source that the paper compares (Fig. 4), each of the smaller with 3 subsets."""

# Keys of a record whose label map file has the labels of its own class list: the length of that
# list, and the new label by the old one.
_OWN_NUM_CLASSES, _NEW_LABELS = "label_map_num_classes", "label_map_new_labels"

Record = dict[str, Any]


@dataclass(frozen=True)
class TransferSets:
    """Training images by what is known of them.

    Attributes:
        source: images without any target category, with their masks.
        target: images with a target category. Unless masks are asked for, tags are all they have:
            the target categories in them; neither masks nor boxes, nor what source categories they
            show.
        num_unlabelled: images without any label, which are in neither.
    """

    source: list[Record]
    target: list[Record]
    num_unlabelled: int

    def counted(self) -> str:
        """Say how many images there are of each side, and how many of the source have masks."""
        with_masks = sum(r["supervision"] == Supervision.MASK.value for r in self.source)
        return (
            f"{len(self.source)} source images, {with_masks} with masks, {len(self.target)} target "
            f"images with tags, {self.num_unlabelled} without a label left out"
        )


def transfer_sets(
    records: Sequence[Mapping[str, Any]],
    split: CategorySplit,
    *,
    use_target_masks: bool = False,
) -> TransferSets:
    """Divide training images into source and target.

    Target records lose all but their target tags here, so that no reader on any host can open or
    decode a mask of them. The records given are not changed.

    Args:
        records: in the class list of the split.
        split: A are the source categories, B the target categories.
        use_target_masks: keep the masks of target images too, for training with some target masks
            (the semi-supervised setting); their labels are the target categories all the same.
    """
    if not split.without_masks:
        raise ValueError(
            f"Category split '{split.name}' leaves no target category: all {len(split.class_names)}"
            " have masks. Name a split in which some categories have tags only."
        )
    is_target = frozenset(split.indices_without_masks)
    source, target = [], []
    for record in records:
        _check_labels(record, record["image_labels"], len(split.class_names))
        tags = [label for label in record["image_labels"] if label in is_target]
        if tags and use_target_masks:
            target.append({**record, "image_labels": tags})
        elif tags:
            kept = {key: record[key] for key in ("file_name", "height", "width", "image_id")}
            kept |= {"annotations": [], "supervision": Supervision.IMAGE.value}
            target.append({**kept, "image_labels": tags})
        elif record["image_labels"]:
            source.append(dict(record))
    num_unlabelled = len(records) - len(source) - len(target)
    if num_unlabelled:
        logger.warning(
            "%d of %d images have no label, so there is nothing to learn from them: left out.",
            num_unlabelled,
            len(records),
        )
    for name, found, rule in (
        ("source", source, "only categories with masks"),
        ("target", target, "a category without masks"),
    ):
        if not found:
            raise ValueError(
                f"Category split '{split.name}' leaves no {name} image: none of the {len(records)} "
                f"images ({num_unlabelled} of them without a label) shows {rule}. Name another "
                "split, or give more images."
            )
    if not any(record["supervision"] == Supervision.MASK.value for record in source):
        raise ValueError(
            f"None of the {len(source)} source images of category split '{split.name}' has a mask. "
            "Give annotations with masks of the source categories."
        )
    return TransferSets(source, target, num_unlabelled)


def classes_of_stage(split: CategorySplit, stage: str) -> Sequence[int] | None:
    """Return the classes that the stage of a baseline learns the labels of; None for another."""
    sides = {"source": split.indices_with_masks, "target": split.indices_without_masks}
    return sides.get(stage)


def source_subset(records: Sequence[Record], fraction: float, seed: int) -> list[Record]:
    """Draw ``fraction`` of the records, rounded, at least one; they keep their order.

    Subsets of one seed are nested: a smaller fraction draws part of what a larger one does.
    """
    check_fraction(fraction)
    count = max(1, math.floor(fraction * len(records) + 0.5))
    chosen = np.random.RandomState(seed).permutation(len(records))[:count]
    return [records[index] for index in np.sort(chosen)]


def check_fraction(fraction: float) -> None:
    """Refuse a share of the source images outside (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"The source fraction is {fraction}. Allowed: above 0, up to 1.")


def union_of_class_lists(source_names: Sequence[str], target_names: Sequence[str]) -> CategorySplit:
    """Make one class list of a source file's (A) and a target file's (B), target classes first.

    Classes of VOC have their names of COCO there.
    """
    lists = (source_names, target_names)
    source, target = ([VOC_TO_COCO.get(name, name) for name in names] for names in lists)
    both = [name for name in target if name in set(source)]
    if both:
        raise ValueError(
            f"{len(both)} categories are source and target: {', '.join(both[:8])}"
            f"{' and more' if len(both) > 8 else ''}. Target categories have no masks; take these "
            "out of one of the files, with their images, as `datasets/prepare.py coco60` does."
        )
    name = f"{len(source)} source and {len(target)} target categories"
    return CategorySplit(name, (*target, *source), tuple(source), tuple(target))


def labels_in_union(names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Return which classes of a union the classes of a file are, by their names of VOC or COCO."""
    index_of = {known: index for index, known in enumerate(class_names)}
    found = [index_of.get(name, index_of.get(VOC_TO_COCO.get(name))) for name in names]
    missing = [name for name, index in zip(names, found, strict=True) if index is None]
    if missing:
        raise ValueError(
            f"{len(missing)} classes are not among the {len(class_names)} of source and target: "
            f"{', '.join(missing[:8])}{' and more' if len(missing) > 8 else ''}. Choose other data."
        )
    return found


def labelled_records(records: Sequence[Mapping[str, Any]], num_classes: int) -> list[Record]:
    """Fill in the image labels of records that have a label map and do not say what it shows."""
    return [{**record, "image_labels": labels_of_record(record, num_classes)} for record in records]


def labels_of_record(record: Mapping[str, Any], num_classes: int) -> list[int]:
    """Return the image labels of a record, or else the classes in its label map."""
    labels = record.get("image_labels", ())
    if labels or "label_map_file_name" not in record:
        return list(labels)
    found = np.unique(transfer_label_map(record, num_classes)).tolist()
    return [label - 1 for label in found if label not in (0, ignore_label(num_classes))]


def records_in_union(
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    class_names: Sequence[str],
) -> list[Record]:
    """Write the records of one file in the class list of a union.

    Label map files are translated when :func:`transfer_label_map` reads them. Their background
    stays background, though objects of the other file's classes may lie there unmarked: a mask of
    TransferNet is one class against everything else (Eq. 8), and a file is evaluated on its own
    classes.

    Args:
        records: of the file; they are not changed.
        names: class names of the file.
        class_names: those of the union.
    """
    new_labels = aligned_labels([VOC_TO_COCO.get(name, name) for name in names], class_names)
    new_labels[0] = 0
    new_index = [int(label) - 1 for label in new_labels[1 : len(names) + 1]]
    aligned = []
    for record in records:
        annotations = record["annotations"]
        labels = [*record["image_labels"], *(a["class_index"] for a in annotations)]
        _check_labels(record, labels, len(names))
        new_record = {
            **record,
            "image_labels": sorted(new_index[label] for label in record["image_labels"]),
            "annotations": [{**a, "class_index": new_index[a["class_index"]]} for a in annotations],
        }
        if "label_map_file_name" in record:
            new_record |= {_OWN_NUM_CLASSES: len(names), _NEW_LABELS: new_labels}
        aligned.append(new_record)
    return aligned


def transfer_label_map(record: Mapping[str, Any], num_classes: int) -> np.ndarray:
    """Read or draw the (H, W) label map of a record, in the labels of the union if it is of one."""
    if "label_map_file_name" not in record:
        return label_map_of_instances(record, num_classes)
    label_map = read_label_map(
        record["label_map_file_name"],
        record["height"],
        record["width"],
        num_classes=record.get(_OWN_NUM_CLASSES, num_classes),
        image_id=record["image_id"],
    )
    return record[_NEW_LABELS][label_map] if _NEW_LABELS in record else label_map


def visible_labels(image_labels: Sequence[int], label_map: np.ndarray) -> list[int]:
    """Return the image labels that have at least one pixel in a label map.

    The others have no mask to learn: a crowd region, say, or an object that is covered or too small
    for the size of the images.
    """
    found = set(np.unique(label_map).tolist())
    return [label for label in image_labels if label + 1 in found]


def _check_labels(record: Mapping[str, Any], labels: Sequence[int], num_classes: int) -> None:
    outside = sorted({label for label in labels if not 0 <= label < num_classes})
    if outside:
        raise ValueError(
            f"Image {record['image_id']!r} ({os.fspath(record['file_name'])}) has the labels "
            f"{outside}. Allowed: class indices 0 to {num_classes - 1}. Is it a record of another "
            "class list?"
        )


# --- samples and batches


class TransferMapper:
    """Makes samples of the records of :func:`maskx.systems.transfernet.samples`.

    Args:
        num_classes: number of classes K of source and target, without the background.
        size: side in pixels of the squares that images and label maps are warped to.
        flip: mirror half of the samples.
        masks: make label maps where the record has masks; without, no mask is opened or decoded.
    """

    def __init__(
        self, num_classes: int, *, size: int, flip: bool = True, masks: bool = True
    ) -> None:
        form = {"size": size, "flip": flip}
        self._tags = ImageMapper(num_classes, label_maps=False, **form)
        read_label_map = functools.partial(transfer_label_map, num_classes=num_classes)
        self._masks = ImageMapper(
            num_classes, label_maps=True, read_label_map=read_label_map, **form
        )
        self.masks = masks

    def __call__(self, record: Record, random_state: np.random.RandomState) -> Sample:
        """Make a training sample, as :class:`maskx.data.images.ImageMapper` does.

        Returns:
            With ``sem_seg`` where the record has masks; ``image_labels`` are then the labels of at
            least one pixel of it. The label map of a record that only has tags is not made.
        """
        if not self.masks or record["supervision"] != Supervision.MASK.value:
            return self._tags(record, random_state)
        sample = self._masks(record, random_state)
        sample["image_labels"] = visible_labels(sample["image_labels"], sample["sem_seg"].numpy())
        return sample

    def read(self, record: Record) -> Sample:
        """Read the image of a record and its true labels, for evaluation; it is not warped."""
        return self._tags.read_image(record)


def alternating_batches(
    source: Sequence[Record],
    target: Sequence[Record],
    mapper: RecordMapper,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    num_workers: int = 0,
) -> DataLoader:
    """Batches of the iterations ``start`` to ``stop``, half source and half target images.

    As with :func:`maskx.engine.batches.training_batches`, what an iteration sees depends on the
    seed and its number alone. Source images come first.
    """
    return DataLoader(
        MappedRecords([*source, *target], mapper),
        batch_sampler=AlternatingBatches(len(source), len(target), batch_size, seed, start, stop),
        num_workers=num_workers,
        collate_fn=list,
    )


def check_batch_size(batch_size: int) -> None:
    """Refuse batches that cannot be half source, half target images."""
    if batch_size % 2:
        raise ValueError(
            f"The batch size is {batch_size}. Allowed: even numbers, as half of a batch are source "
            "images and half target images."
        )


class AlternatingBatches(Sampler):
    """Keys as of :class:`maskx.engine.batches.SeededBatches`, half source and half target images.

    Each half is shuffled endlessly on its own. Every process gets as many of either. The source
    images come first in the list of records.
    """

    def __init__(
        self,
        num_source: int,
        num_target: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        **processes: int,
    ) -> None:
        check_batch_size(batch_size)
        self.num_source = num_source
        self.halves = [
            SeededBatches(number, batch_size // 2, step_seed(seed, side), start, stop, **processes)
            for side, number in enumerate((num_source, num_target))
        ]

    def __len__(self) -> int:
        return len(self.halves[0])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for source, target in zip(*self.halves, strict=True):
            yield source + [(index + self.num_source, seed) for index, seed in target]
