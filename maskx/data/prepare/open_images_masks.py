"""Masks of Open Images (Benenson et al., CVPR 2019), put to the boxes that they were drawn in.

They are published as a CSV file with the box of each mask, and PNG files of sizes of their own. A
mask belongs to the box of its class and place in the file of boxes that
:func:`maskx.data.prepare.open_images.prepare_open_images_boxes` writes. Boxes without a mask stay,
such as those around a group: a class of which an object has none is no truth in that image.

An image that readers turn by its EXIF tag is left out: its masks are those of the pixels as stored.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from maskx.core.files import write_json
from maskx.data.coco import read_coco_json
from maskx.data.masks import encode_masks
from maskx.data.prepare.label_map_sets import check_folder
from maskx.data.prepare.open_images import OpenImagesSummary, csv_rows

__all__ = ["prepare_open_images_masks"]

_COLUMNS = ("MaskPath", "ImageID", "LabelName", "BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax")
_TOLERANCE = 2e-3  # of the sides of the image; boxes of the file are rounded


def prepare_open_images_masks(
    mask_file: str | os.PathLike[str],
    masks: str | os.PathLike[str],
    boxes: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    sizes: str | os.PathLike[str],
) -> OpenImagesSummary:
    """Write the images of which an object has a mask, with their masks and boxes.

    Args:
        mask_file: CSV file of masks.
        masks: Folder of their PNG files.
        boxes: File of the boxes of the same split, with the key `label` of categories.
        sizes: CSV file of sizes that was written beside it, which says which images are turned.

    Raises:
        ValueError: A file is not what it should be, or no mask is left.
    """
    masks, boxes = Path(masks), Path(boxes)
    check_folder(masks, "masks")
    dataset = read_coco_json(boxes, strict=False)
    label_of = {category["id"]: category.get("label") for category in dataset["categories"]}
    image_of = {image["id"]: image for image in dataset["images"]}
    turned = {
        i
        for _, (i, orientation) in csv_rows(sizes, ("ImageID", "Orientation"))
        if orientation != "1"
    }
    drawn_in: dict[tuple[str, Any], list[dict[str, Any]]] = defaultdict(list)
    for annotation in dataset["annotations"]:
        stem = Path(image_of[annotation["image_id"]]["file_name"]).stem
        drawn_in[stem, label_of[annotation["category_id"]]].append(annotation)
    left_out: Counter[str] = Counter()
    for line, (name, image_id, label, *corners) in csv_rows(mask_file, _COLUMNS):
        if image_id in turned:
            left_out["masks of images that are turned"] += 1
            continue
        candidates = drawn_in.get((image_id, label), [])
        annotation = _of_box(candidates, image_of, corners, f"{mask_file}, line {line}")
        if annotation is None:
            left_out["masks without their box"] += 1
            continue
        image = image_of[annotation["image_id"]]
        mask = _read_mask(masks / name, image["height"], image["width"])
        if mask.any():
            annotation["segmentation"] = encode_masks(mask[None])[0]
        else:
            left_out["empty masks"] += 1
    shown = {a["image_id"] for a in dataset["annotations"] if "segmentation" in a}
    if not shown:
        raise ValueError(
            f"{mask_file}: no mask is left; {dict(left_out)}. Give the masks and the boxes of one "
            "split."
        )
    annotations = [a for a in dataset["annotations"] if a["image_id"] in shown]
    images = [image for image in dataset["images"] if image["id"] in shown]
    write_json(
        Path(output), {**dataset, "images": images, "annotations": annotations}, compact=True
    )
    name_of = {category["id"]: category["name"] for category in dataset["categories"]}
    masked = [a for a in annotations if "segmentation" in a]
    left_out["boxes without mask, which stay as boxes"] = len(annotations) - len(masked)
    per_class = Counter(name_of[a["category_id"]] for a in masked)
    return OpenImagesSummary("masks", len(shown), per_class, +left_out)


def _of_box(
    candidates: Sequence[dict[str, Any]],
    image_of: Mapping[Any, Mapping[str, Any]],
    corners: Sequence[str],
    where: str,
) -> dict[str, Any] | None:
    """The annotation whose box, in units of the image, is that of a mask."""
    try:
        x1, x2, y1, y2 = map(float, corners)
    except ValueError:
        raise ValueError(
            f"{where} has the box {', '.join(corners)} (XMin, XMax, YMin, YMax). Allowed: numbers, "
            "in units of the image. Download the file again."
        ) from None
    for annotation in candidates:
        image = image_of[annotation["image_id"]]
        left, top, width, height = annotation["bbox"]
        found = np.array([left, left + width, top, top + height])
        found /= [image["width"], image["width"], image["height"], image["height"]]
        is_free = "segmentation" not in annotation and not annotation["iscrowd"]
        if is_free and np.abs(found - [x1, x2, y1, y2]).max() <= _TOLERANCE:
            return annotation
    return None


def _read_mask(path: Path, height: int, width: int) -> np.ndarray:
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) if path.is_file() else None
    if mask is None:
        problem = "cannot be read" if path.is_file() else "is not there"
        raise ValueError(f"{path}: this mask {problem}. Download and unpack the masks again.")
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST) > 0
