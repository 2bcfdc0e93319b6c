"""Source and target images of TransferNet: masks on one side, tags on the other.

"Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional Neural Network"
(Hong et al., CVPR 2016), section 3. The two sides of a `maskx.supervision.CategorySplit` are the
source categories (A, with masks) and the target categories (B, with tags). They share one class
list: that of one file, or the union of the lists of two, such as COCO-60 and VOC, which
:func:`union_of_class_lists` and :func:`records_in_union` make.

Records are those of `maskx.data.coco.load_coco`.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskx.data.label_maps import (
    aligned_labels,
    ignore_label,
    label_map_of_instances,
    read_label_map,
)
from maskx.data.vocabularies import VOC_TO_COCO
from maskx.supervision import CategorySplit, Supervision

__all__ = [
    "SOURCE_FRACTIONS",
    "TransferSets",
    "check_fraction",
    "classes_of_stage",
    "label_pairs",
    "labelled_records",
    "labels_in_union",
    "labels_of_record",
    "records_in_union",
    "source_subset",
    "transfer_label_map",
    "transfer_sets",
    "union_of_class_lists",
    "visible_labels",
]

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

    Raises:
        ValueError: the split has no target category, a label is outside the class list, one side
            has no image, or the source no mask.
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
            target.append(_with_tags_only(record, tags))
        elif record["image_labels"]:
            source.append(dict(record))
    num_unlabelled = len(records) - len(source) - len(target)
    if num_unlabelled:
        logger.warning(
            "%d of %d images have no label, so there is nothing to learn from them: left out.",
            *(num_unlabelled, len(records)),
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
    """Draw a share of the source images.

    Subsets of one seed are nested: a smaller fraction draws part of what a larger one does.

    Returns:
        ``fraction`` of the records, rounded, at least one, in their order; all of them for 1.

    Raises:
        ValueError: the fraction is out of range.
    """
    check_fraction(fraction)
    count = max(1, math.floor(fraction * len(records) + 0.5))
    chosen = np.random.RandomState(seed).permutation(len(records))[:count]
    return [records[index] for index in np.sort(chosen)]


def check_fraction(fraction: float) -> None:
    """Refuse a share of the source images that is none.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"The source fraction is {fraction}. Allowed: above 0, up to 1.")


def union_of_class_lists(source_names: Sequence[str], target_names: Sequence[str]) -> CategorySplit:
    """Make one class list of a source file's and a target file's, target classes first.

    Classes of VOC have their names of COCO there.

    Returns:
        The split of the union, with the source classes as A and the target classes as B.

    Raises:
        ValueError: a class is in both lists.
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
    """Return which classes of a union the classes of a file are, by their names of VOC or COCO.

    Raises:
        ValueError: a class is not in the union.
    """
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

    Raises:
        ValueError: a class is not in the union, or a label is outside the class list of the file.
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
    """Read or draw the (H, W) label map of a record; one of a union gets the labels of the union.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file or a class index does not fit.
    """
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


def label_pairs(image_labels: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """List the pairs of an image and one of its labels, which TransferNet learns from.

    Args:
        image_labels: class indices by image: the tags of target images, the
            :func:`visible_labels` of images with masks. A label that stands twice makes one pair.

    Returns:
        ``pair_images`` and ``pair_labels``, (P,) int64 each, in the order of the images.
    """
    unique = [list(dict.fromkeys(labels)) for labels in image_labels]
    pair_images = np.repeat(np.arange(len(unique)), [len(labels) for labels in unique])
    pair_labels = np.array([label for labels in unique for label in labels], np.int64)
    return pair_images.astype(np.int64), pair_labels


def _with_tags_only(record: Mapping[str, Any], tags: list[int]) -> Record:
    kept = ("file_name", "height", "width", "image_id")
    return {
        **{key: record[key] for key in kept},
        "image_labels": tags,
        "annotations": [],
        "supervision": Supervision.IMAGE.value,
    }


def _check_labels(record: Mapping[str, Any], labels: Sequence[int], num_classes: int) -> None:
    outside = sorted({label for label in labels if not 0 <= label < num_classes})
    if outside:
        raise ValueError(
            f"Image {record['image_id']!r} ({os.fspath(record['file_name'])}) has the labels "
            f"{outside}. Allowed: class indices 0 to {num_classes - 1}. Is it a record of another "
            "class list?"
        )
