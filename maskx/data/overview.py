"""What an annotation file holds, by category, and what kind of half-labelled data that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["KINDS", "CategoryCounts", "Overview", "overview_of"]

KINDS = {
    "nothing": "no labels",
    "tags": "tags alone: what is in an image, but not where",
    "boxes": "boxes, but not one mask",
    "boxes_and_masks": "boxes of all objects, masks of some",
    "tags_and_masks": "masks of some categories, tags of others",
    "many_tags_and_masks": "masks of some categories, tags of hundreds of others",
    "tags_boxes_and_masks": "tags of some categories, boxes of others, masks of others again",
    "masks": "a mask for every object: nothing is half-labelled",
    "label_maps": "a label map for every image: nothing is half-labelled",
}
"""Kinds of data by what is labelled, and in words."""

_MANY = 200  # categories with tags alone


@dataclass(frozen=True)
class CategoryCounts:
    """What there is of a category.

    Attributes:
        images: That show it.
        boxes: Objects whose place is known, crowd regions not counted.
        masks: Those of them that have a mask.
        tags: Images that are said to show it without an object of it.
        label_maps: Those of these images that have a label map.
        crowds: Crowd regions.
    """

    name: str
    images: int
    boxes: int
    masks: int
    tags: int
    label_maps: int
    crowds: int

    @property
    def has_pixels(self) -> bool:
        """Whether something says which pixels are of it."""
        return self.masks + self.label_maps > 0


@dataclass(frozen=True)
class Overview:
    """What there is of all categories.

    Attributes:
        categories: By class index.
        num_images: Of the file.
        num_unlabelled: Images without objects, tags or label map.
        num_label_maps: Images that have one.
    """

    categories: tuple[CategoryCounts, ...]
    num_images: int
    num_unlabelled: int
    num_label_maps: int

    @property
    def kind(self) -> str:
        """Key of `KINDS`."""
        used = [c for c in self.categories if c.boxes or c.tags]
        if not used:
            return "label_maps" if self.num_label_maps else "nothing"
        tagged = [c for c in used if not c.boxes and not c.has_pixels]
        boxed = [c for c in used if c.boxes and not c.has_pixels]
        if len(tagged) == len(used):
            return "tags"
        if len(tagged) + len(boxed) == len(used):
            return "boxes"
        if tagged:
            if boxed:
                return "tags_boxes_and_masks"
            return "many_tags_and_masks" if len(tagged) >= _MANY else "tags_and_masks"
        num_boxes = sum(c.boxes for c in used)
        if not num_boxes:
            return "label_maps"
        return "boxes_and_masks" if sum(c.masks for c in used) < num_boxes else "masks"


def overview_of(records: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> Overview:
    """Count what records hold.

    Args:
        records: Of `maskx.data.coco.load_coco`.
        class_names: By class index.
    """
    images, boxes, masks, tags, label_maps, crowds = np.zeros((6, len(class_names)), np.int64)
    num_unlabelled = num_label_maps = 0
    for record in records:
        has_label_map = "label_map_file_name" in record
        num_label_maps += has_label_map
        shown = set()
        for annotation in record["annotations"]:
            index = annotation["class_index"]
            shown.add(index)
            if annotation["iscrowd"]:
                crowds[index] += 1
                continue
            boxes[index] += 1
            masks[index] += "segmentation" in annotation
        for index in record["image_labels"]:
            images[index] += 1
            if index not in shown:
                tags[index] += 1
                label_maps[index] += has_label_map
        num_unlabelled += not record["image_labels"] and not has_label_map
    columns = (images, boxes, masks, tags, label_maps, crowds)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    categories = [CategoryCounts(n, *row) for n, row in zip(class_names, rows, strict=True)]
    return Overview(tuple(categories), len(records), num_unlabelled, num_label_maps)
