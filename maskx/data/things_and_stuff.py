"""Label maps of files whose categories are things and whose ground is of classes too, stuff."""

from typing import Any

from maskx.data.coco import CocoData, read_coco_json
from maskx.data.label_maps import NUM_THINGS

Record = dict[str, Any]

_SHOWN = 8  # ids quoted in a message


def things_and_stuff(data: CocoData) -> tuple[list[Record], tuple[str, ...]]:
    """Append the stuff categories of a file to its classes, so that every pixel has a class.

    Of the file are needed ``stuff_categories``, with the ids 1 to their number, and of each image
    ``stuff_file_name``, a label map of these ids, 0 where a thing is, and ``stuff_labels``, the ids
    in it. Files of generated scenes have them.

    Returns:
        Records with the classes of both in ``image_labels``, for
        :func:`maskx.data.label_maps.things_and_stuff_label_map`; the names of things, then stuff.

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
        records.append({**record, "image_labels": labels, NUM_THINGS: num_things})
    return records, (*data.class_names, *(category["name"] for category in categories))
