"""Label maps of files whose categories are things and whose ground is of classes too, stuff."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from maskx.data.coco import CocoData, read_coco_json
from maskx.data.label_maps import (
    ignore_label,
    label_map_of_instances,
    read_label_map,
    semantic_label_map,
)
from maskx.supervision import Supervision

__all__ = ["has_pixels", "things_and_stuff", "things_and_stuff_label_map"]

Record = dict[str, Any]

_NUM_THINGS = "num_things"  # of a record whose classes are things, then stuff
_SHOWN = 8  # ids quoted in a message


def has_pixels(record: Mapping[str, Any]) -> bool:
    """Whether a record has masks, a label map or stuff."""
    return record.get("supervision") == Supervision.MASK.value or _NUM_THINGS in record


def things_and_stuff(data: CocoData) -> tuple[list[Record], tuple[str, ...]]:
    """Append the stuff categories of a file to its classes, so that every pixel has a class.

    Of the file are needed ``stuff_categories``, with the ids 1 to their number, and of each image
    ``stuff_file_name``, a label map of these ids, 0 where a thing is, and ``stuff_labels``, the ids
    in it. Files of generated scenes have them.

    Returns:
        Records with the classes of both in ``image_labels``, for
        :func:`things_and_stuff_label_map`; and the names of things, then stuff.

    Raises:
        ValueError: one of these is missing or does not fit.
    """
    content = read_coco_json(data.json_file, strict=False)
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
    """Read or draw the label map of a record, with its stuff if it is of :func:`things_and_stuff`.

    Args:
        record: of :func:`things_and_stuff`, or of :func:`maskx.data.coco.load_coco`.
        num_classes: of the record's class list.

    Returns:
        (H, W), as of :func:`maskx.data.label_maps.semantic_label_map`. A pixel of neither a thing
        whose mask is known nor stuff is unknown.
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
