"""Sample pictures of annotations: the images of a file that show most of its categories."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from maskx.core.text import listed
from maskx.data.coco import CocoData
from maskx.data.coco_structure import Report
from maskx.data.images import read_record_image
from maskx.data.label_maps import semantic_label_map
from maskx.data.masks import decode_at_size
from maskx.evaluation.figures import draw_instances, draw_label_map
from maskx.evaluation.html import picture

__all__ = ["sample_pictures"]

_SIDE = 400  # pixels, as wide as the page shows them


def sample_pictures(data: CocoData, report: Report, *, most: int = 12) -> Iterator[str]:
    """Draw the annotations of some images, as HTML.

    Args:
        data: Read with its image folder.
        report: Takes what cannot be read.
        most: Number of pictures at most.
    """
    number = 0
    for record in _in_order(data.records, most):
        if number == most:
            return
        try:
            drawn = _drawn(record, data.class_names)
        except FileNotFoundError:
            continue  # which the reader has said
        except ValueError as error:
            if (
                "image_broken" not in report.problems
                and "image_of_other_size" not in report.problems
            ):
                report.refuse("image_not_readable", str(error), "Restore the file")
            continue
        number += 1
        yield drawn


def _in_order(records: list[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """Give those first that show a category or a kind of label not seen before, then the others."""
    seen: set[Any] = set()
    later = []
    for record in records:
        own = {*record["image_labels"], record["supervision"]}
        own |= {"segmentation" in annotation for annotation in record["annotations"]}
        if own <= seen:
            if len(later) < 4 * most:
                later.append(record)
            continue
        seen |= own
        yield record
    yield from later


def _drawn(record: Mapping[str, Any], class_names: tuple[str, ...]) -> str:
    image = read_record_image(record, image_format="RGB")
    height, width = image.shape[:2]
    objects = record["annotations"]
    tags = [class_names[index] for index in record["image_labels"]]
    caption = f"{record['file_name']}: {listed(tags)}" if tags else record["file_name"]
    if "label_map_file_name" in record and not objects:
        label_map = semantic_label_map(record, len(class_names))
        names = {"num_classes": len(class_names), "names": class_names}
        return picture(draw_label_map(image, label_map, **names, side=_SIDE), caption)
    scale = _SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    empty = np.zeros(size, bool)
    masks = [
        decode_at_size(o["segmentation"], height, width, size) if "segmentation" in o else empty
        for o in objects
    ]
    tile = draw_instances(
        image,
        boxes=np.array([o["bbox"] for o in objects]).reshape(-1, 4),
        masks=np.array(masks).reshape(-1, *size),
        labels=[class_names[o["class_index"]] + " (crowd)" * o["iscrowd"] for o in objects],
        with_masks=["segmentation" in o for o in objects],
        side=_SIDE,
    )
    return picture(tile[: size[0], : size[1]], caption)
