"""COCO-format annotations in which masks, boxes and image labels may be mixed.

The reader finds every bad entry and names it; nothing is dropped silently. Names of spaces:
`category_id` is an id as in the file, `class_index` counts from 0 in the order of the sorted
category ids (Detectron2's rule, so that indices agree on both hosts).
"""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pycocotools import mask as mask_utils

from maskx.supervision import Supervision

__all__ = [
    "OUTSIDE_TOLERANCE",
    "AnnotationProblem",
    "CocoData",
    "check_coco_structure",
    "load_coco",
    "read_box",
    "read_coco_json",
    "read_mask",
    "supervision_of",
]

logger = logging.getLogger(__name__)

OUTSIDE_TOLERANCE = 1.0
"""Pixels by which a box or a polygon may leave its image.

Official COCO needs next to none: 0.0 was measured on all 4577 boxes and 100k polygon points of
542 images. One pixel also admits the rounding of x + width to two decimals (0.01) and tools that
count pixels from 1. More than that is another image's annotation or another image size.
"""

_NUM_EXAMPLES = 5  # bad annotations quoted in an error

_REQUIRED_KEYS = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class CocoData:
    """An annotation file, checked and in the form that the mappers take.

    Attributes:
        json_file: The file read.
        records: One per image, in the order of the file; see `load_coco`.
        class_names: Names by class index.
        category_ids: Ids as in the file, by class index.
        problems: Number of bad annotations by kind; always empty after `strict=True`. Kinds that
            start with "box" were left out, all others lost their mask and kept their box.
    """

    json_file: Path
    records: list[dict[str, Any]]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: Mapping[str, int]


class AnnotationProblem(ValueError):
    """A bad box or mask of one annotation.

    Args:
        kind: Short name to count by; it starts with "box" if the box is bad, which makes the
            whole annotation useless.
        found: What the annotation holds.
        allowed: What it may hold.
    """

    def __init__(self, kind: str, found: str, allowed: str) -> None:
        super().__init__(f"{found}; allowed: {allowed}")
        self.kind = kind


def load_coco(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    strict: bool = True,
    check_images: bool = True,
) -> CocoData:
    """Read a COCO-format file whose annotations may lack masks.

    A record holds

    - `file_name` (joined to `image_root`), `height`, `width`, `image_id`;
    - `annotations`: dicts with `id`, `bbox` ([x1, y1, x2, y2], absolute pixels, clipped to the
      image), `class_index`, `iscrowd` (0 or 1) and, only where there is a usable mask,
      `segmentation`: polygons or an RLE dict with compressed counts. A missing, empty or null
      `segmentation` in the file is no error: that annotation has a box only;
    - `image_labels`: sorted class indices known to be present, from the annotations (also those
      left out for their box: what they show is known, only not where) and from an optional key
      `image_labels` of the image, a list of category ids;
    - `supervision`: the highest level in the record. "mask" if there is a label map, "mask" or
      "box" if an annotation has it, else "image" if image labels were given or remain. An image
      with none of these is "box": it is an exhaustively labelled image without objects;
    - `sem_seg_file_name`, only if the image has the key `stuff_file_name`, which is joined to the
      folder of the JSON file;
    - `label_map_file_name`, only if the image has this key, joined in the same way: a label map
      of the classes of the file, see `maskx.data.label_maps`.

    Args:
        json_file: Annotation file.
        image_root: Folder of the images.
        strict: Whether a bad annotation is an error. If False, one with a bad mask keeps its box
            and loses the whole mask (of several polygons the good ones go too: part of a mask
            would teach a wrong shape), and one with a bad box is left out; both are counted in
            `CocoData.problems` and reported in one warning.
        check_images: Whether the image root and every file named must exist.

    Raises:
        FileNotFoundError: If the annotation file, the image root or a file named is missing.
        ValueError: If the file is not valid JSON, its parts do not fit together, or, with
            `strict`, an annotation is bad.
    """
    json_file = Path(json_file)
    dataset = read_coco_json(json_file)
    _check_keys("images", dataset["images"], ("file_name",), json_file)
    categories = sorted(dataset["categories"], key=lambda category: category["id"])
    class_index = {category["id"]: index for index, category in enumerate(categories)}
    records = [
        _new_record(image, class_index, image_root, json_file) for image in dataset["images"]
    ]
    if check_images:
        _check_files(records, Path(image_root), json_file)

    record_of = {record["image_id"]: record for record in records}
    problems: Counter[str] = Counter()
    examples = []
    for annotation in dataset["annotations"]:
        record = record_of[annotation["image_id"]]
        record["image_labels"].add(class_index[annotation["category_id"]])
        entry, problem = _read_annotation(annotation, class_index, record)
        if entry is not None:
            record["annotations"].append(entry)
        if problem is not None:
            problems[problem.kind] += 1
            if len(examples) < _NUM_EXAMPLES:
                name = categories[class_index[annotation["category_id"]]]["name"]
                examples.append(
                    f"annotation {annotation['id']!r} of image {annotation['image_id']!r}, "
                    f"category {name!r}: {problem}"
                )
    if problems:
        _report(problems, examples, strict, json_file)

    for image, record in zip(dataset["images"], records, strict=True):
        record["image_labels"] = sorted(record["image_labels"])
        record["supervision"] = supervision_of(record, tags_given="image_labels" in image)
    return CocoData(
        json_file=json_file,
        records=records,
        class_names=tuple(category["name"] for category in categories),
        category_ids=tuple(category["id"] for category in categories),
        problems=problems,
    )


def read_coco_json(json_file: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse an annotation file and check that its parts fit together.

    Returns:
        The COCO dict as it is in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON or `check_coco_structure` refuses it.
    """
    json_file = Path(json_file)
    if not json_file.is_file():
        raise FileNotFoundError(
            f"{json_file}: there is no such annotation file. Check the path and the root folder "
            "of the data sets."
        )
    try:
        text = json_file.read_bytes().decode("utf-8-sig")
        dataset = json.loads(text)
    except UnicodeDecodeError as error:
        _fail(json_file, f"is not UTF-8 text ({error})", "Give the COCO JSON file, unpacked")
    except json.JSONDecodeError as error:
        ended = "" if text.rstrip().endswith("}") else "; it does not end with '}': truncated?"
        _fail(
            json_file,
            f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            f"the file has {json_file.stat().st_size} bytes{ended}",
            "Download or write it again",
        )
    check_coco_structure(dataset, json_file)
    return dataset


def check_coco_structure(dataset: Any, source: str | os.PathLike[str]) -> None:
    """Check that a COCO dict has all its parts and that ids are unique and refer to something.

    Boxes and masks are not looked at; `read_box` and `read_mask` do that.

    Args:
        dataset: What was read.
        source: File, or another name of the data, for the error.

    Raises:
        ValueError: Naming the first bad entry.
    """
    if not isinstance(dataset, dict):
        _fail(source, f"holds a {type(dataset).__name__}", "Allowed is a COCO dict, {'images': ...")
    for section, keys in _REQUIRED_KEYS.items():
        if not isinstance(dataset.get(section), list):
            found = f"it has {sorted(dataset)}" if section not in dataset else "it is no list"
            _fail(
                source,
                f"lacks the list {section!r} ({found})",
                "A COCO file needs the lists 'images', 'annotations' and 'categories'",
            )
        _check_keys(section, dataset[section], keys, source)
        _check_unique(section, "id", dataset[section], source)
    _check_unique("categories", "name", dataset["categories"], source)

    for category in dataset["categories"]:
        if not isinstance(category["id"], int) or not isinstance(category["name"], str):
            _fail(source, f"has the category {category}", "Allowed: an integer id, a string name")
    kinds = sorted({type(image["id"]).__name__ for image in dataset["images"]})
    if kinds not in ([], ["int"], ["str"]):
        _fail(source, f"has image ids of the kinds {kinds}", "Allowed: all int, or all str")
    for image in dataset["images"]:
        for key in ("height", "width"):
            if not _is_positive_integer(image[key]):
                _fail(
                    source,
                    f"image {image['id']!r} has {key} {image[key]!r}",
                    "Allowed: a positive whole number of pixels",
                )
    for annotation in dataset["annotations"]:
        if annotation.get("iscrowd", 0) not in (0, 1):
            _fail(
                source,
                f"annotation {annotation['id']!r} has iscrowd {annotation['iscrowd']!r}",
                "Allowed: 0 or 1",
            )
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        _check_references(key, section, dataset, source)


def read_box(bbox: Any, height: int, width: int) -> list[float]:
    """Check a COCO box and turn it into corners.

    Args:
        bbox: [x, y, width, height] in absolute pixels, as in the file.
        height: Of the image.
        width: Of the image.

    Returns:
        [x1, y1, x2, y2] with positive area, clipped to the image.

    Raises:
        AnnotationProblem: If it is no box, is empty, or leaves the image by more than
            `OUTSIDE_TOLERANCE`.
    """
    if not isinstance(bbox, list | tuple) or len(bbox) != 4 or not _all_finite(bbox):
        raise AnnotationProblem(
            "box_malformed", f"bbox is {bbox!r}", "4 finite numbers [x, y, width, height]"
        )
    x1, y1, box_width, box_height = map(float, bbox)
    if box_width <= 0 or box_height <= 0:
        raise AnnotationProblem("box_empty", f"bbox is {bbox!r}", "width and height above 0")
    x2, y2 = x1 + box_width, y1 + box_height
    outside = _is_outside(x1, y1, x2, y2, height, width)
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if outside or x1 >= x2 or y1 >= y2:
        raise AnnotationProblem(
            "box_outside",
            f"bbox {bbox!r} leaves its image",
            f"inside {width}x{height} (width x height), {OUTSIDE_TOLERANCE:g} pixel over at most",
        )
    return [x1, y1, x2, y2]


def read_mask(segmentation: Any, height: int, width: int) -> list[list[float]] | dict | None:
    """Check a COCO mask.

    Args:
        segmentation: As in the file: polygons [[x, y, x, y, ...], ...], an RLE dict with counts
            compressed (str or bytes) or not (list), or nothing (None, []).
        height: Of the image.
        width: Of the image.

    Returns:
        The polygons as they are, an RLE dict with compressed counts, or None if there is no mask.

    Raises:
        AnnotationProblem: If there is a mask and any part of it cannot be used.
    """
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon, height, width)
        if not any(_polygon_area(polygon) for polygon in segmentation):
            raise AnnotationProblem("mask_empty", "polygons without any area", "at least one pixel")
        return segmentation
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, height, width)
    raise AnnotationProblem(
        "mask_malformed",
        f"segmentation is a {type(segmentation).__name__}",
        "a list of polygons, an RLE dict, or no such key",
    )


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    # Built-in min, max and sum: for polygons of COCO's length (a mask has 22 points on average)
    # twice as fast as making an array.
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        found = f"{len(polygon)} coordinates" if isinstance(polygon, list) else repr(polygon)
        raise AnnotationProblem(
            "polygon_malformed",
            f"segmentation has a polygon of {found}",
            "a list [x, y, x, y, ...] of at least 3 points",
        )
    if not _all_finite(polygon):
        raise AnnotationProblem(
            "polygon_malformed",
            "segmentation has a polygon with NaN, infinity or something that is no number",
            "finite numbers",
        )
    xs, ys = polygon[0::2], polygon[1::2]
    x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    if _is_outside(x1, y1, x2, y2, height, width):
        raise AnnotationProblem(
            "polygon_outside",
            f"segmentation has a polygon from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})",
            f"inside {width}x{height} (width x height), {OUTSIDE_TOLERANCE:g} pixel over at most",
        )


def _polygon_area(polygon: list[float]) -> float:
    """Signed area by the shoelace formula."""
    xs, ys = polygon[0::2], polygon[1::2]
    after = zip(xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return sum(x * y1 - x1 * y for x, y, (x1, y1) in zip(xs, ys, after, strict=True)) / 2


def _read_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple | np.ndarray) or list(size) != [height, width]:
        raise AnnotationProblem(
            "rle_size",
            f"RLE has size {size!r}",
            f"the size [height, width] of the image, {[height, width]}",
        )
    runs = _run_lengths(counts)
    if runs is None or runs.min() < 0 or runs.sum() != height * width:
        total = "cannot be decoded" if runs is None else f"cover {runs.sum()} pixels"
        raise AnnotationProblem(
            "rle_malformed",
            f"RLE counts {total}",
            f"non-negative runs over all {height * width} pixels of the image",
        )
    if not runs[1::2].any():
        raise AnnotationProblem("mask_empty", "RLE has no foreground pixel", "at least one")
    if isinstance(counts, list):
        return mask_utils.frPyObjects(rle, height, width)
    return {"size": [height, width], "counts": counts}


def _run_lengths(counts: Any) -> np.ndarray | None:
    """Decode RLE counts to run lengths (background first), or None if that is impossible.

    pycocotools is not asked: it reads past the end of a broken string.
    """
    try:
        if isinstance(counts, list):
            runs = np.asarray(counts)
            return runs.astype(np.int64) if runs.ndim == 1 and runs.dtype.kind in "iu" else None
        code = counts.encode("ascii") if isinstance(counts, str) else counts
        code = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    except (TypeError, ValueError):
        return None
    # A number is a little-endian string of 6-bit digits: 5 bits of value, then one that says
    # whether more follow. The highest value bit of the last digit is the sign.
    last = (code & 0x20) == 0
    if code.size == 0 or code.min() < 0 or code.max() > 63 or not last[-1]:
        return None
    end = np.flatnonzero(last)
    start = np.concatenate([[0], end[:-1] + 1])
    num_digits = end - start + 1
    if num_digits.max() > 7:  # 32-bit runs need 7; more would overflow below
        return None
    place = np.arange(code.size) - np.repeat(start, num_digits)
    runs = np.add.reduceat((code & 0x1F) << (5 * place), start)
    runs -= ((code[end] & 0x10) != 0).astype(np.int64) << (5 * num_digits)
    # From the fourth on, a run is stored as its difference to the last but one.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _is_outside(x1: float, y1: float, x2: float, y2: float, height: int, width: int) -> bool:
    over = OUTSIDE_TOLERANCE
    return x1 < -over or y1 < -over or x2 > width + over or y2 > height + over


def _all_finite(numbers: Sequence[Any]) -> bool:
    try:
        return math.isfinite(sum(numbers))  # NaN and infinity survive a sum
    except (TypeError, OverflowError):
        return False


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0 and value % 1 == 0


def _new_record(
    image: dict[str, Any],
    class_index: dict[int, int],
    image_root: str | os.PathLike[str],
    json_file: Path,
) -> dict[str, Any]:
    for key in ("file_name", "stuff_file_name", "label_map_file_name"):
        if not isinstance(image.get(key, ""), str):
            _fail(json_file, f"image {image['id']!r} has {key} {image[key]!r}", "Allowed: a path")
    record = {
        "file_name": os.path.join(image_root, image["file_name"]),
        "height": int(image["height"]),
        "width": int(image["width"]),
        "image_id": image["id"],
        "image_labels": _given_labels(image, class_index, json_file),
        "annotations": [],
    }
    if "stuff_file_name" in image:
        record["sem_seg_file_name"] = os.path.join(json_file.parent, image["stuff_file_name"])
    if "label_map_file_name" in image:
        record["label_map_file_name"] = os.path.join(json_file.parent, image["label_map_file_name"])
    return record


def _given_labels(image: dict[str, Any], class_index: dict[int, int], json_file: Path) -> set[int]:
    """Class indices of the optional key `image_labels` of an image."""
    category_ids = image.get("image_labels", [])
    try:
        return {class_index[category_id] for category_id in category_ids}
    except (KeyError, TypeError):
        _fail(
            json_file,
            f"image {image['id']!r} has image_labels {category_ids!r}",
            f"Allowed: a list of ids of the file's {len(class_index)} categories",
        )


def _read_annotation(
    annotation: dict[str, Any], class_index: dict[int, int], record: dict[str, Any]
) -> tuple[dict[str, Any] | None, AnnotationProblem | None]:
    """Return the annotation as it can be used (None: not at all) and what is wrong with it."""
    height, width = record["height"], record["width"]
    try:
        box = read_box(annotation["bbox"], height, width)
    except AnnotationProblem as problem:
        return None, problem
    entry = {
        "id": annotation["id"],
        "bbox": box,
        "class_index": class_index[annotation["category_id"]],
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }
    try:
        mask = read_mask(annotation.get("segmentation"), height, width)
    except AnnotationProblem as problem:
        return entry, problem
    if mask is not None:
        entry["segmentation"] = mask
    return entry, None


def supervision_of(record: Mapping[str, Any], *, tags_given: bool) -> str:
    """Return the highest level in a record, as described under `load_coco`.

    Args:
        record: With `annotations` and `image_labels`.
        tags_given: Whether image labels were given beside the annotations.
    """
    has_mask = any("segmentation" in annotation for annotation in record["annotations"])
    if has_mask or "label_map_file_name" in record:
        return Supervision.MASK.value
    if not record["annotations"] and (tags_given or record["image_labels"]):
        return Supervision.IMAGE.value
    return Supervision.BOX.value


def _report(problems: Counter[str], examples: list[str], strict: bool, json_file: Path) -> None:
    """Raise (strict) or log what is wrong with the annotations of a file."""
    total = problems.total()
    kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(problems.items()))
    num_boxes = sum(count for kind, count in problems.items() if kind.startswith("box"))
    if not strict:
        logger.warning(
            "%s: %d bad annotations (%s): %d left out for their box, %d without their mask.",
            *(json_file, total, kinds, num_boxes, total - num_boxes),
        )
        return
    more = [f"and {total - len(examples)} more"] if total > len(examples) else []
    listing = "".join(f"\n  {line}" for line in [*examples, *more])
    _fail(
        json_file,
        f"has {total} bad annotations ({kinds})",
        "Fix the file, or load it with strict=False, which leaves out the "
        f"{num_boxes} with a bad box and keeps only the box of the {total - num_boxes} with a bad "
        f"mask:{listing}",
    )


def _check_keys(
    section: str, entries: list[Any], keys: Sequence[str], source: str | os.PathLike[str]
) -> None:
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            _fail(source, f"{section}[{position}] is {entry!r}", "Allowed: a dict")
        for key in keys:
            if key not in entry:
                _fail(
                    source,
                    f"{section}[{position}] (id {entry.get('id')!r}) lacks the key {key!r}",
                    f"Required are {', '.join(map(repr, keys))}",
                )


def _check_unique(
    section: str, key: str, entries: list[dict[str, Any]], source: str | os.PathLike[str]
) -> None:
    for entry in entries:
        if not isinstance(entry[key], int | str):
            _fail(source, f"{section} have the {key} {entry[key]!r}", "Allowed: integer or string")
    repeated = [value for value, n in Counter(entry[key] for entry in entries).items() if n > 1]
    if repeated:
        _fail(
            source,
            f"{section} repeat the {key} {repeated[0]!r} ({len(repeated)} are not unique)",
            f"Give every entry of {section!r} its own {key}",
        )


def _check_references(
    key: str, section: str, dataset: dict[str, Any], source: str | os.PathLike[str]
) -> None:
    known = {entry["id"] for entry in dataset[section]}
    for annotation in dataset["annotations"]:
        value = annotation[key]
        if not isinstance(value, int | str) or value not in known:
            _fail(
                source,
                f"annotation {annotation['id']!r} has {key} {value!r}, which is not in {section!r}",
                f"Add it there, where {len(known)} ids are, or remove the annotation",
            )


def _check_files(records: list[dict[str, Any]], image_root: Path, json_file: Path) -> None:
    if not image_root.is_dir():
        raise FileNotFoundError(
            f"{image_root}: there is no such image folder, but {json_file} names "
            f"{len(records)} images in it. Check the path."
        )
    keys = ("file_name", "sem_seg_file_name", "label_map_file_name")
    files = [record[key] for record in records for key in keys if key in record]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise FileNotFoundError(
            f"{json_file}: {len(missing)} of {len(files)} files named do not exist, the first is "
            f"{missing[0]}. Check the image root {image_root} or, for label maps, the folder of "
            "the annotation file; or remove these images from the annotation file."
        )


def _fail(source: str | os.PathLike[str], found: str, remedy: str) -> NoReturn:
    """Raise the error of a bad file: where, what was found, what is allowed or to be done."""
    raise ValueError(f"{os.fspath(source)}: {found}. {remedy}.")
