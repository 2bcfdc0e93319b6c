"""Label maps: one label for each pixel, for data with objects on a background.

A label map is an (H, W) array of integers. Label 0 is the background, c + 1 is class index c, and
one more value marks pixels of which nothing is known: 255 for up to 254 classes, 65535 for more.
So the label maps of PASCAL VOC are label maps as they are. Data in which every pixel belongs to a
class simply have no pixel of label 0.

Files are PNG, of 8 bits for up to 254 classes and of 16 bits for more.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Of the libraries here only Pillow, which torchvision requires, reads the indices of a PNG with a
# palette, as those of VOC are; OpenCV turns them into colours.
from PIL import Image

from maskx.core.files import written_whole
from maskx.data.masks import decode_segmentation
from maskx.supervision import Supervision

__all__ = [
    "LABEL_MAP_KEYS",
    "NUM_THINGS",
    "aligned_labels",
    "has_pixels",
    "ignore_label",
    "label_map_of_instances",
    "moved_label_maps",
    "read_label_map",
    "semantic_label_map",
    "things_and_stuff_label_map",
    "write_label_map",
]

LABEL_MAP_KEYS = ("stuff_file_name", "label_map_file_name")
"""Keys of an image of COCO that name a label map by its path from the annotation file."""

NUM_THINGS = "num_things"
"""Key of a record whose classes are things, then stuff: how many are things."""

_IGNORE_8_BIT, _IGNORE_16_BIT = 255, 65535
_GREY, _PALETTE = 0, 3  # colour types of PNG


def moved_label_maps(image: Mapping[str, Any], old: Path, new: Path) -> dict[str, str]:
    """Return the label maps of an image as they are named from another folder.

    Args:
        image: Of a COCO file.
        old: Folder of that file.
        new: Folder of the file that is written.

    Returns:
        Path by key, of the keys that the image has; empty if the folder is the same.
    """
    if old.resolve() == new.resolve():
        return {}
    return {
        key: Path(os.path.relpath(old / image[key], new)).as_posix()
        for key in LABEL_MAP_KEYS
        if isinstance(image.get(key), str)
    }


def ignore_label(num_classes: int) -> int:
    """Return the label of unknown pixels: 255 for up to 254 classes, else 65535.

    Raises:
        ValueError: label maps cannot hold so many classes.
    """
    if not 1 <= num_classes < _IGNORE_16_BIT:
        raise ValueError(
            f"Label maps of {num_classes} classes cannot be stored. Allowed: 1 to "
            f"{_IGNORE_16_BIT - 1} classes."
        )
    return _IGNORE_8_BIT if num_classes < _IGNORE_8_BIT else _IGNORE_16_BIT


def read_label_map(
    path: str | os.PathLike[str],
    height: int,
    width: int,
    *,
    num_classes: int,
    image_id: int | str,
) -> np.ndarray:
    """Read a label map that is to have a certain size. A palette is not looked at.

    Args:
        path: PNG file, grey or with a palette.

    Returns:
        (H, W) uint8 for up to 254 classes, else int32, as torch computes little with uint16.
        Values are 0 to `num_classes` and `ignore_label(num_classes)`.

    Raises:
        ValueError: the file is no such label map.
    """
    where = f"Label map '{os.fspath(path)}' (image {image_id!r})"
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{where}: there is no such file. Check the folder of the label maps, or remove the "
            "image's label_map_file_name from the annotation file."
        ) from None
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            # Before its pixels take memory: a small file may hold billions of them.
            if image.size != (width, height):
                raise _other_size(where, *image.size, width, height)
            image.load()
            values = np.asarray(image)
    except _OtherSizeError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where} has too many pixels: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for files broken in other ways
        raise ValueError(
            f"{where} cannot be read as PNG. Label maps are PNG files, as other formats may change "
            "values. Is the file complete?"
        ) from error
    # Of the header itself: Pillow multiplies the values of grey images below 8 bits.
    bits, color_type = content[24], content[25]
    if num_classes < _IGNORE_8_BIT:
        allowed, fits = "8 bits, grey or with a palette", color_type == _PALETTE
        fits |= (bits, color_type) == (8, _GREY)
    else:
        allowed, fits = "16 bits, grey", (bits, color_type) == (16, _GREY)
    if not fits:
        kind = {_GREY: "grey", _PALETTE: "palette"}.get(color_type, "colour")
        raise ValueError(
            f"{where} is a {kind} image of {bits} bits. Allowed for {num_classes} classes: "
            f"{allowed}. Write it with maskx.data.label_maps.write_label_map."
        )
    _check_values(values, num_classes, where)
    return values.astype(_memory_type(num_classes))


def write_label_map(
    path: str | os.PathLike[str], label_map: np.ndarray, *, num_classes: int
) -> None:
    """Write a label map as PNG, whole or not at all whenever the process is killed.

    Up to 254 classes get the palette of VOC, so that people can look at the file.

    Args:
        path: file to write, in a folder that exists.
        label_map: (H, W) integers, 0 to `num_classes` and `ignore_label(num_classes)`.

    Raises:
        ValueError: the array is no such label map.
    """
    path = Path(path)
    where = f"Label map for '{path}'"
    label_map = np.asarray(label_map)
    if label_map.ndim != 2 or label_map.dtype.kind not in "iu" or label_map.size == 0:
        raise ValueError(
            f"{where} has shape {label_map.shape} and dtype {label_map.dtype}. Allowed: (H, W) "
            "integers."
        )
    _check_values(label_map, num_classes, where)
    if num_classes < _IGNORE_8_BIT:
        image = Image.fromarray(label_map.astype(np.uint8))
        image.putpalette(voc_palette().tobytes())
    else:
        image = Image.fromarray(label_map.astype(np.uint16))
    with written_whole(path) as scratch:
        image.save(scratch, format="PNG")


def aligned_labels(names: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """Return the labels that label maps have in another class list, matched by name.

    `aligned_labels(names, class_names)[label_map]` is the label map in that list. What was
    background stays so only if `names` has every class of the list; an object of any other class
    may lie there unmarked, so it becomes unknown.

    Args:
        names: names of the classes of the label maps, by class index, as they are called in
            `class_names`; for VOC in COCO's words see `maskx.data.vocabularies.VOC_TO_COCO`.
        class_names: the other class list.

    Returns:
        New labels by old label, up to `ignore_label(len(names))`; types as of `read_label_map`.

    Raises:
        ValueError: a name is not in the class list.
    """
    index_of = {name: index for index, name in enumerate(class_names)}
    missing = [name for name in names if name not in index_of]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} classes of the label maps are not among the "
            f"{len(class_names)} of the class list: {', '.join(missing[:5])}"
            f"{' and more' if len(missing) > 5 else ''}. Add them to it, or give the names they "
            "have there."
        )
    num_classes = len(class_names)
    labels = np.full(
        ignore_label(len(names)) + 1, ignore_label(num_classes), _memory_type(num_classes)
    )
    labels[1 : len(names) + 1] = [index_of[name] + 1 for name in names]
    if index_of.keys() <= set(names):
        labels[0] = 0
    return labels


def label_map_of_instances(record: Mapping[str, Any], num_classes: int) -> np.ndarray:
    """Draw the objects of a record into a label map.

    The larger objects are drawn first, so that smaller ones stay visible on top of them. What is
    not known is not made background: where nothing else is drawn,

    - the box of an object without a mask is ignored, as the object is somewhere in it;
    - so is a crowd region, as it covers what lies between its objects as well;
    - if the record has an image label without any annotation, or its boxes are not complete
      (`boxes_complete` False), an object may be anywhere: no pixel is background.

    Args:
        record: as `maskx.data.coco.load_coco` makes it.

    Returns:
        (H, W), with types and values as of `read_label_map`.

    Raises:
        ValueError: a class index is not below `num_classes`.
    """
    height, width = record["height"], record["width"]
    annotations = record["annotations"]
    for annotation in annotations:
        if not 0 <= annotation["class_index"] < num_classes:
            raise ValueError(
                f"Annotation {annotation.get('id')!r} of image {record['image_id']!r} has class "
                f"index {annotation['class_index']}. Allowed: 0 to {num_classes - 1}."
            )
    ignore = ignore_label(num_classes)
    found = {annotation["class_index"] for annotation in annotations}
    is_complete = record.get("boxes_complete", True) and found.issuperset(record["image_labels"])
    label_map = np.full((height, width), 0 if is_complete else ignore, _memory_type(num_classes))

    objects = []
    for annotation in annotations:
        if "segmentation" not in annotation:
            x1, y1, x2, y2 = annotation["bbox"]
            x1, y1 = max(0, int(x1)), max(0, int(y1))
            label_map[y1 : math.ceil(y2), x1 : math.ceil(x2)] = ignore
            continue
        mask = decode_segmentation(annotation["segmentation"], height, width)
        if annotation["iscrowd"]:
            label_map[mask] = ignore
        else:
            objects.append((mask, annotation["class_index"] + 1))
    for mask, label in sorted(objects, key=lambda item: item[0].sum(), reverse=True):
        label_map[mask] = label
    return label_map


def semantic_label_map(record: Mapping[str, Any], num_classes: int) -> np.ndarray:
    """Read the label map of a record or, where it has no file, draw one from its objects.

    A file has the labels of its own classes; for another class list see `aligned_labels`.

    Args:
        record: as `maskx.data.coco.load_coco` makes it.

    Returns:
        (H, W), with types and values as of `read_label_map`.

    Raises:
        ValueError: the file or a class index does not fit `num_classes`.
    """
    if "label_map_file_name" not in record:
        return label_map_of_instances(record, num_classes)
    return read_label_map(
        record["label_map_file_name"],
        record["height"],
        record["width"],
        num_classes=num_classes,
        image_id=record["image_id"],
    )


def has_pixels(record: Mapping[str, Any]) -> bool:
    """Whether a record has masks, a label map or stuff."""
    return record.get("supervision") == Supervision.MASK.value or NUM_THINGS in record


def things_and_stuff_label_map(record: Mapping[str, Any], num_classes: int) -> np.ndarray:
    """Read or draw the label map of a record, with its stuff where the record says that it has any.

    Args:
        record: of :func:`maskx.data.things_and_stuff.things_and_stuff` or
            :func:`maskx.data.coco.load_coco`.
        num_classes: of the record's class list.

    Returns:
        (H, W), as of :func:`semantic_label_map`. A pixel of neither a thing
        whose mask is known nor stuff is unknown.
    """
    if NUM_THINGS not in record:
        return semantic_label_map(record, num_classes)
    num_things = record[NUM_THINGS]
    stuff = read_label_map(
        record["sem_seg_file_name"],
        record["height"],
        record["width"],
        num_classes=num_classes - num_things,
        image_id=record["image_id"],
    )
    label_map = label_map_of_instances(record, num_classes)
    is_stuff = (stuff > 0) & (stuff != ignore_label(num_classes - num_things))
    label_map[is_stuff] = stuff[is_stuff].astype(label_map.dtype) + num_things
    # Nothing is background here, also where an image has no stuff.
    label_map[label_map == 0] = ignore_label(num_classes)
    return label_map


class _OtherSizeError(ValueError):
    pass


def _other_size(
    where: str, found_width: int, found_height: int, width: int, height: int
) -> ValueError:
    return _OtherSizeError(
        f"{where} is {found_width} x {found_height} pixels, its image is {width} x {height}. "
        "Restore the original, or make it anew; resize it with nearest neighbours only."
    )


def _memory_type(num_classes: int) -> type[np.integer]:
    return np.uint8 if ignore_label(num_classes) == _IGNORE_8_BIT else np.int32


def _check_values(values: np.ndarray, num_classes: int, where: str) -> None:
    ignore = ignore_label(num_classes)
    is_bad = (values < 0) | ((values > num_classes) & (values != ignore))
    if is_bad.any():
        row, column = np.argwhere(is_bad)[0]
        raise ValueError(
            f"{where} has the value {values[row, column]} at row {row}, column {column} and in "
            f"{is_bad.sum()} pixels a value that is not allowed. Allowed: 0 (background), 1 to "
            f"{num_classes} (class index + 1), {ignore} (ignore)."
        )


def voc_palette(num_labels: int = 256) -> np.ndarray:
    """Colours by label, (labels, 3) uint8: bits 0, 3, 6, ... make red, from its highest bit on."""
    labels = np.arange(num_labels)
    palette = np.zeros((num_labels, 3), np.uint8)
    for bit in range(24):
        palette[:, bit % 3] |= ((labels >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return palette
