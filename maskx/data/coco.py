"""COCO-format annotations in which masks, boxes and image labels may be mixed.

The reader finds every bad entry and names it; nothing is dropped silently. Names of spaces:
`category_id` is an id as in the file, `class_index` counts from 0 in the order of the sorted
category ids (Detectron2's rule, so that indices agree on both hosts).
"""

import contextlib
import itertools
import math
import os
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from maskx.data.coco_claims import BoxesAndMasks, check_label_maps
from maskx.data.coco_shapes import (
    OUTSIDE_TOLERANCE,
    QUALITY_KEY,
    SOURCE_KEY,
    AnnotationProblem,
    is_positive_number,
    mask_extent,
    mend_shapes,
    read_box,
    read_mask,
    read_quality,
)
from maskx.data.coco_structure import Positions, Report, Structure, read_structure
from maskx.data.image_files import find_images
from maskx.data.json_files import MISSING, Rows, paused_collector, read_json, read_json_rows
from maskx.supervision import Supervision

__all__ = [
    "OUTSIDE_TOLERANCE",
    "AnnotationProblem",
    "CocoData",
    "check_coco",
    "check_coco_content",
    "check_coco_structure",
    "checked_entries",
    "in_class_list",
    "load_coco",
    "read_box",
    "read_coco_json",
    "read_mask",
    "supervision_of",
    "with_labels_only",
]

_KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", SOURCE_KEY, QUALITY_KEY)
_CHUNK = 2000  # annotations that are decoded at a time
_WHAT = "annotation file"
_NO_ENTRY = (-1, None)
_NOTHING = {type(MISSING), type(None)}


@dataclass(frozen=True)
class CocoData:
    """An annotation file, checked and in the form that the mappers take.

    Attributes:
        records: One per image, in the order of the file; see `load_coco`.
        category_ids: Ids as in the file, by class index.
        problems: Number of bad entries by kind; always empty after `strict=True`.
        notes: Number of entries by what was read otherwise than it stands in the file, but as it is
            meant, such as an area that is null. Both with `strict` and without.
        more_files: Files that further records are from.
        lost_images: What is wrong with the images that were left out as missing or broken, by path.
        lacking: Keys that COCO's own tools look for, `iscrowd`, `area` and `segmentation`, and that
            not every annotation of the file has.
    """

    json_file: Path
    records: list[dict[str, Any]]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: Mapping[str, int]
    notes: Mapping[str, int] = field(default_factory=dict)
    more_files: tuple[Path, ...] = ()
    lost_images: Mapping[str, str] = field(default_factory=dict)
    lacking: frozenset[str] = frozenset()


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
      `segmentation`: polygons, each a list or array of x, y, x, y, ..., or an RLE dict with
      compressed counts. A missing, empty or null `segmentation` in the file is no error: that
      annotation has a box only. A mask that a model or a teacher made also has
      `segmentation_source` and `segmentation_quality`, from 0 to 1;
    - `image_labels`: sorted class indices known to be present, from the annotations (also those
      left out for their box: what they show is known, only not where) and from an optional key
      `image_labels` of the image, a list of category ids;
    - `boxes_complete` False, only if an object is left out whose place is not known: it may be
      anywhere, so nothing in the image may be taken for background;
    - `supervision`: the highest level in the record. "mask" if there is a label map, "mask" or
      "box" if an annotation has it, else "image" if image labels were given or remain. An image
      with none of these is "box": it is an exhaustively labelled image without objects;
    - `sem_seg_file_name`, only if the image has the key `stuff_file_name`, which is joined to the
      folder of the JSON file;
    - `label_map_file_name`, only if the image has this key, joined in the same way: a label map
      of the classes of the file, see `maskx.data.label_maps`. They are compared with the image
      labels, unless `label_maps` of the file's `info` is "predicted".

    What tools are known to write is read as it is meant, and said: ids as text, `iscrowd` null,
    an `area` that is none, a group category of Roboflow, paths with backslashes and the like.

    Args:
        strict: Whether a bad entry is an error. If False, an annotation with a bad box is mended
            (clipped, or taken from its mask) or left out, one with a bad mask loses the parts of it
            that have no area or the whole mask and keeps its box, and entries that refer to
            nothing, stand twice or whose image is missing or broken are left out. All are counted
            in `CocoData.problems` and reported in one warning.
        check_images: Whether the image root and every file named must exist, and the images be
            whole and of their size, by their header and end. It opens every file.

    Raises:
        FileNotFoundError: If the annotation file, the image root or a file named is missing.
        ValueError: If the file is not valid JSON, its parts do not fit together, most boxes are
            not where their masks are, nothing is left, or, with `strict`, an entry is bad.
    """
    report = Report(Path(json_file), strict=strict)
    with paused_collector():
        dataset, rows = read_json_rows(json_file, "annotations", _KEYS, "segmentation", what=_WHAT)
        return _read(dataset, rows, report, image_root, check_images=check_images)


def check_coco(
    json_file: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None
) -> tuple[CocoData | None, Report]:
    """Read a file as `load_coco` does, but go on wherever that is possible.

    Args:
        json_file: Annotation file.
        image_root: Folder of the images, which are looked at too; None leaves them alone.

    Returns:
        What could be read, with all images, and all that was found; None and why, if nothing could.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    report = Report(Path(json_file), collect=True)
    with paused_collector():
        try:
            dataset, rows = read_json_rows(
                json_file, "annotations", _KEYS, "segmentation", what=_WHAT
            )
        except ValueError as error:
            report.stop(error)
            return None, report
        return _collected(dataset, rows, image_root, report)


def check_coco_content(
    content: Mapping[str, Any], image_root: str | os.PathLike[str] | None, report: Report
) -> tuple[CocoData | None, Report]:
    """Check a COCO dict as `check_coco` checks a file, into a report that collects."""
    rest = {key: value for key, value in content.items() if key != "annotations"}
    return _collected(rest, Rows(list(content["annotations"])), image_root, report)


def _collected(
    dataset: Any, rows: Rows | None, image_root: str | os.PathLike[str] | None, report: Report
) -> tuple[CocoData | None, Report]:
    looked_at = image_root is not None
    try:
        return _read(dataset, rows, report, image_root or "", check_images=looked_at), report
    except ValueError as error:
        report.stop(error)
        return None, report


def _read(
    dataset: Any,
    rows: Rows | None,
    report: Report,
    image_root: str | os.PathLike[str],
    *,
    check_images: bool,
) -> CocoData:
    json_file = report.source
    structure = read_structure(dataset, rows, report, need_files=True)
    records = [_new_record(image, structure, image_root) for image in structure.images]
    if check_images:
        records = find_images(records, Path(image_root), report)
    num_found, num_rows = len(records), len(rows)
    claims = BoxesAndMasks(report)
    lacking = _read_annotations(rows, records, structure, report, claims)
    claims.check()
    report.finish()
    for record in records:
        tags_given = record.pop("tags_given")
        record["supervision"] = supervision_of(record, tags_given=tags_given)
    _check_something_is_left(records, num_found, num_rows, report)
    about = dataset.get("info")
    is_guess = isinstance(about, Mapping) and about.get("label_maps") == "predicted"
    if check_images and not is_guess:  # those of people claim what they show
        check_label_maps(records, structure.class_names, report)
    return CocoData(
        json_file=json_file,
        records=records,
        class_names=structure.class_names,
        category_ids=structure.category_ids,
        problems=report.problems,
        notes=report.notes,
        lost_images=report.lost_files,
        lacking=lacking,
    )


def with_labels_only(record: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of a record its image and ``image_labels``: all that image-level supervision has."""
    kept = ("file_name", "height", "width", "image_id", "image_labels")
    nothing_else = {"annotations": [], "supervision": Supervision.IMAGE.value}
    return {key: record[key] for key in kept} | nothing_else


@paused_collector()
def read_coco_json(json_file: str | os.PathLike[str], *, strict: bool = True) -> dict[str, Any]:
    """Parse an annotation file and check that its parts fit together.

    Args:
        strict: Whether an entry that refers to nothing or stands twice is an error. If False,
            annotations are mended or left out as `load_coco` does it, so that what is scored is
            what was read; nothing is logged.

    Returns:
        The COCO dict as it is in the file, but for what was mended, or is read as it is meant:
        annotations have an `iscrowd`, and an `area` only if it is a number above 0.

    Raises:
        ValueError: If it is not JSON or `check_coco_structure` refuses it.
    """
    dataset = read_json(json_file, what=_WHAT)
    return _normalised(dataset, Report(Path(json_file), strict=strict, quiet=True))


def check_coco_structure(dataset: Any, source: str | os.PathLike[str]) -> dict[str, Any]:
    """Check that a COCO dict has all its parts and that ids are unique and refer to something.

    Boxes and masks are not looked at; `read_box` and `read_mask` do that.

    Args:
        source: File, or another name of the data, for the error.

    Returns:
        The dict as `read_coco_json` returns it.

    Raises:
        ValueError: Naming the first bad entry.
    """
    return _normalised(dataset, Report(Path(source), strict=True, quiet=True))


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


def check_same_categories(
    names: Mapping[int, str], reference: Mapping[int, str], *, files: Sequence[str | os.PathLike]
) -> None:
    """Refuse categories of two files that cannot be matched by name.

    Args:
        names: By category id.
        reference: Those of the other file.
        files: What the two are called in messages.

    Raises:
        ValueError: A name is in one of the two only, or both have an id under different names, so
            that one of them may be mistaken.
    """
    own, other = map(os.fspath, files)
    pair = f"{own} and {other}"
    for (side, file), (against, second) in (
        ((names, own), (reference, other)),
        ((reference, other), (names, own)),
    ):
        plain = {name.strip().casefold(): name for name in against.values()}
        for name in side.values():
            if name not in against.values():
                close = plain.get(name.strip().casefold())
                hint = f", which has {close!r}" if close else ""
                raise ValueError(
                    f"{pair} must have the same categories: {name!r} of {file} is not in "
                    f"{second}{hint}. Rename or add it; a category needs no annotation."
                )
    for id_, name in reference.items():
        if names.get(id_, name) != name:
            raise ValueError(
                f"{pair} give other names to the same category id: {id_} is {names[id_]!r} in the "
                f"first, {name!r} in the second. Correct the one that is wrong, or number the "
                "categories of both alike."
            )


def in_class_list(data: CocoData, reference: CocoData) -> CocoData:
    """Return data in the class list of another file, matched by name.

    Args:
        data: Such as of a validation file.
        reference: Such as of the training file, which has the same names.

    Raises:
        ValueError: See :func:`check_same_categories`; or the order differs, and there are label
            maps.
    """
    if data.class_names == reference.class_names:
        return data
    pair = f"{data.json_file} and {reference.json_file}"
    check_same_categories(
        *(dict(zip(d.category_ids, d.class_names, strict=True)) for d in (data, reference)),
        files=(data.json_file, reference.json_file),
    )
    position = {name: index for index, name in enumerate(reference.class_names)}
    new_index = [position[name] for name in data.class_names]
    for record in data.records:
        record["image_labels"] = sorted(new_index[label] for label in record["image_labels"])
        for annotation in record["annotations"]:
            annotation["class_index"] = new_index[annotation["class_index"]]
    mapped = next((r for r in data.records if "label_map_file_name" in r), None)
    if mapped is not None:
        raise ValueError(
            f"{pair} have their categories in another order, but image {mapped['image_id']!r} has "
            "a label map, whose labels count the categories of its own file. Number them alike."
        )
    ids = dict(zip(data.class_names, data.category_ids, strict=True))
    return replace(
        data,
        class_names=reference.class_names,
        category_ids=tuple(ids[name] for name in reference.class_names),
    )


def _normalised(dataset: Any, report: Report) -> dict[str, Any]:
    content = checked_entries(dataset, report)
    if report.strict:
        return content
    size_of = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    annotations = []
    for found in content["annotations"]:
        shapes = mend_shapes(
            found.get("bbox"), found.get("segmentation"), *size_of[found["image_id"]]
        )
        if shapes.box is None:
            continue
        if shapes.problems:
            x1, y1, x2, y2 = shapes.box
            found |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": shapes.mask}
        annotations.append(found)
    return {**content, "annotations": annotations}


def checked_entries(dataset: Any, report: Report, *, need_files: bool = False) -> dict[str, Any]:
    """Check of a COCO dict all but boxes and masks.

    Args:
        dataset: As parsed.
        report: Takes what is wrong, and what is read as it is meant.
        need_files: Whether images need a `file_name`; their `image_labels` are checked then too.

    Returns:
        The dict with good entries alone; its annotations are copies.

    Raises:
        ValueError: A part is missing or nothing is left of it; with strict reading, an entry is
            bad.
    """
    if not isinstance(dataset, dict) or not isinstance(dataset.get("annotations"), list):
        structure = read_structure(dataset, None, report)
        rows = []
    else:
        rows = dataset["annotations"]
        rest = {key: value for key, value in dataset.items() if key != "annotations"}
        structure = read_structure(rest, Rows(rows), report, need_files=need_files)
    images = structure.images
    if need_files:
        for image in images:
            if "image_labels" in image:
                labels = sorted(structure.image_labels(image))
                image["image_labels"] = [structure.category_ids[label] for label in labels]
    known = {image["id"] for image in images}
    annotations = []
    for position, row in enumerate(rows):
        found = structure.annotation(position, row)
        if found is None or found["image_id"] not in known:
            continue
        if not is_positive_number(found.get("area", MISSING)):
            found.pop("area", None)
        annotations.append(found)
    return {
        **dataset,
        "images": images,
        "annotations": annotations,
        "categories": structure.categories,
    }


def _new_record(
    image: dict[str, Any], structure: Structure, image_root: str | os.PathLike[str]
) -> dict[str, Any]:
    record = {
        "file_name": os.path.join(image_root, image["file_name"]),
        "height": image["height"],
        "width": image["width"],
        "image_id": image["id"],
        "image_labels": structure.image_labels(image),
        "annotations": [],
        "tags_given": "image_labels" in image,
    }
    folder = structure.folder
    for key, own in (
        ("stuff_file_name", "sem_seg_file_name"),
        ("label_map_file_name", "label_map_file_name"),
    ):
        if image.get(key) is not None:
            record[own] = os.path.join(folder, image[key])
    return record


def _read_annotations(
    rows: Rows,
    records: list[dict[str, Any]],
    structure: Structure,
    report: Report,
    claims: BoxesAndMasks,
) -> frozenset[str]:
    """Read the annotations into the records, those that are as usual many at a time.

    Returns:
        `CocoData.lacking`.
    """
    images = _Images(records)
    lacking: set[str] = set()
    for start in range(0, len(rows), _CHUNK):
        chunk = rows.take(start, min(start + _CHUNK, len(rows)))
        found = _UsualRows(chunk, images, structure)
        claims.add_arrays(found)
        lacking |= found.lacking
        owners, entries = found.image_index, found.entries()
        for index in np.flatnonzero(~found.usual).tolist():
            owners[index], entries[index] = _read_row(
                start + index, chunk[index], images, structure, report, claims
            )
        images.add_annotations(owners, entries)
    images.give_labels()
    images.give_annotations()
    return frozenset(lacking)


def _read_row(
    position: int,
    row: Any,
    images: "_Images",
    structure: Structure,
    report: Report,
    claims: BoxesAndMasks,
) -> tuple[int, dict[str, Any] | None]:
    """Read one annotation in which something may be unusual.

    Returns:
        The position of its image and its entry; -1 and None if there is none.
    """
    found = structure.annotation(position, row)
    image_id = structure.image_of_lost(row) if found is None else found["image_id"]
    owner = images.index_of.one(image_id)
    if owner < 0:
        return _NO_ENTRY
    record = images.records[owner]
    if found is None:
        record["boxes_complete"] = False
        return _NO_ENTRY
    if "area" in found and not is_positive_number(found["area"]):
        report.note("area that is no number above 0 (computed from the mask)", found["area"])
    if found.get("segmentation") == [[]]:
        report.note("segmentation of one polygon without points (read as no mask)", [[]])
    height, width = record["height"], record["width"]
    shapes = mend_shapes(found.get("bbox"), found.get("segmentation"), height, width)
    index = structure.class_index[found["category_id"]]
    quality = None
    if shapes.mask is not None:
        try:
            quality = read_quality(found)
        except AnnotationProblem as problem:
            shapes = shapes._replace(mask=None, problems=[*shapes.problems, problem])
    for problem in shapes.problems:
        is_box = problem.kind.startswith("box")
        if is_box:
            done = "left out" if shapes.box is None else "mended"
        else:
            done = "without their mask" if shapes.mask is None else "mended"
        report.annotation(found, structure.class_names[index], problem, done)
    extent = None if shapes.mask is None else mask_extent(shapes.mask)
    claims.add(found.get("bbox"), record, found["id"], extent)
    if shapes.is_placeholder:
        return _NO_ENTRY
    record["image_labels"].add(index)
    if shapes.box is None:
        # A box without area hides nothing; any other may be anywhere.
        if shapes.problems[-1].kind != "box_empty":
            record["boxes_complete"] = False
        return _NO_ENTRY
    entry = {
        "id": found["id"],
        "bbox": shapes.box,
        "class_index": index,
        "iscrowd": found["iscrowd"],
    }
    if shapes.mask is not None:
        is_list = isinstance(shapes.mask, list)
        entry["segmentation"] = [array("d", p) for p in shapes.mask] if is_list else shapes.mask
        if quality is not None:
            entry |= {SOURCE_KEY: found[SOURCE_KEY], QUALITY_KEY: quality}
    return owner, entry


class _Images:
    """Records by image id, their sizes, and what their annotations give them."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records
        self.index_of = Positions([record["image_id"] for record in records])
        sizes = [(record["height"], record["width"]) for record in records]
        self.sizes = np.array([*sizes, (0, 0)], np.float64)  # the last is of no image
        self._labels = []
        self._owners, self._entries = [], []

    def add_labels(self, image_index: np.ndarray, class_index: np.ndarray) -> None:
        """Note that images show classes."""
        self._labels.append(image_index << 32 | class_index)

    def give_labels(self) -> None:
        """Add the labels to those that the records have, sorted."""
        found = np.sort(np.concatenate([np.empty(0, np.int64), *self._labels]))
        found = found[np.diff(found, prepend=-1) > 0]
        ends = np.searchsorted(found >> 32, np.arange(len(self.records)), side="right").tolist()
        labels, start = (found & 0xFFFFFFFF).tolist(), 0
        for record, end in zip(self.records, ends, strict=True):
            given, own = record["image_labels"], labels[start:end]
            record["image_labels"] = sorted(given.union(own)) if given else own
            start = end

    def add_annotations(self, image_index: np.ndarray, entries: Sequence[Any]) -> None:
        """Note the entries of images, in the order of the file; those of -1 are left out."""
        self._owners.append(image_index)
        self._entries += entries

    def give_annotations(self) -> None:
        """Put the entries into the records."""
        # Sorted first: to append each to its list takes twice as long, as all lie elsewhere.
        owners = np.concatenate([np.empty(0, np.int64), *self._owners])
        order = np.argsort(owners, kind="stable").tolist()
        num_left_out, *counts = np.bincount(owners + 1, minlength=len(self.records) + 1).tolist()
        in_order = map(self._entries.__getitem__, order[num_left_out:])
        for record, count in zip(self.records, counts, strict=True):
            record["annotations"] = list(itertools.islice(in_order, count))


class _UsualRows:
    """Annotations of a chunk, of which those that are as usual are found with arrays."""

    # Usual is what `_read_row` would find nothing to say of. Both must make the same entry.

    def __init__(self, rows: Rows, images: _Images, structure: Structure) -> None:
        self._images = images
        self.image_index = image_index = images.index_of(rows.column("image_id"))
        self._class_index = class_index = structure.index_of(rows.column("category_id"))
        self.sizes = images.sizes[image_index]
        self._ids = rows.column("id")
        crowd, areas = rows.column("iscrowd"), rows.column("area")
        self._crowd = _numbers(crowd, {int}, missing=0)
        area = _numbers(areas, {int, float}, missing=1)
        self.usual = (image_index >= 0) & (class_index >= 0)
        self.usual &= ((self._crowd == 0) | (self._crowd == 1)) & (area > 0) & (area < 1e18)
        if structure.has_repeated_ids:
            self.usual[:] = False
        elif set(map(type, self._ids)) != {int}:
            self.usual &= [type(id_) is int for id_ in self._ids]
        self._read_boxes(rows.column("bbox"))
        sources = rows.column(SOURCE_KEY)
        if sources.count(MISSING) < len(sources):
            self.usual &= [value in (MISSING, None) for value in sources]
        numbers, sizes, num_parts = rows.number_lists("segmentation")
        self.lacking = {
            key
            for key, is_lacking in (
                ("iscrowd", not _NOTHING.isdisjoint(map(type, crowd))),
                ("area", not _NOTHING.isdisjoint(map(type, areas))),
                ("segmentation", not num_parts.all()),
            )
            if is_lacking
        }
        self._read_polygons(numbers, sizes, np.maximum(num_parts, 0))
        for index in np.flatnonzero(self.usual & (num_parts < 0)).tolist():
            self._read_other_mask(index, rows)
        images.add_labels(image_index[self.usual], class_index[self.usual])

    def _read_boxes(self, column: list[Any]) -> None:
        self.given = given = np.frombuffer(_pack_boxes(column), np.float64).reshape(-1, 4)
        x1, y1, width, height = given.T
        x2, y2 = x1 + width, y1 + height
        height_of, width_of = self.sizes.T
        over = OUTSIDE_TOLERANCE
        boxes = [np.maximum(x1, 0), np.maximum(y1, 0)]
        boxes += [np.minimum(x2, width_of), np.minimum(y2, height_of)]
        self._boxes = np.stack(boxes, 1)
        with np.errstate(invalid="ignore"):
            fits = (width > 0) & (height > 0) & (x1 >= -over) & (y1 >= -over)
            fits &= (x2 <= width_of + over) & (y2 <= height_of + over)
            fits &= (boxes[0] < boxes[2]) & (boxes[1] < boxes[3])
        self.usual &= fits

    def _read_polygons(self, numbers: array, sizes: np.ndarray, num_parts: np.ndarray) -> None:
        """See which polygons are in their image and have an area."""
        self.extents = np.full((len(num_parts), 4), np.nan)
        ends = np.cumsum(sizes)
        starts = ends - sizes
        parts = [numbers[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        last = np.cumsum(num_parts)
        spans = zip((last - num_parts).tolist(), last.tolist(), strict=True)
        self._masks: list[Any] = [parts[a:b] for a, b in spans]
        owner = np.repeat(np.arange(len(num_parts)), num_parts)
        malformed = (sizes < 6) | (sizes % 2 > 0)
        points = np.frombuffer(numbers)
        if malformed.any():
            self.usual[owner[malformed]] = False
            points = points[np.repeat(~malformed, sizes)]
            owner, sizes = owner[~malformed], sizes[~malformed]
            ends = np.cumsum(sizes)
            starts = ends - sizes
        if not len(owner):
            return
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        masked = owner[first]
        x, y = points.reshape(-1, 2).T.copy()
        starts, last = starts // 2, ends // 2 - 1
        cross = np.empty_like(x)
        cross[:-1] = x[:-1] * y[1:] - x[1:] * y[:-1]
        cross[last] = x[last] * y[starts] - x[starts] * y[last]
        area = np.add.reduceat(cross, starts)
        low, high = (np.minimum, np.maximum)
        extents = [
            function.reduceat(values, starts[first])
            for function, values in ((low, x), (low, y), (high, x), (high, y))
        ]
        x1, y1, x2, y2 = extents
        over, (height_of, width_of) = OUTSIDE_TOLERANCE, self.sizes[masked].T
        fits = (x1 >= -over) & (y1 >= -over) & (x2 <= width_of + over) & (y2 <= height_of + over)
        fits &= np.logical_or.reduceat(area != 0, first) & np.isfinite(np.add.reduceat(area, first))
        self.usual[masked] &= fits
        self.extents[masked] = np.stack(extents, 1)

    def _read_other_mask(self, index: int, rows: Rows) -> None:
        """See whether an annotation has run lengths that are good, which is not looked at again."""
        mask = None
        height, width = self.sizes[index].astype(int).tolist()
        with contextlib.suppress(ValueError):  # it is for `_read_row` to say, in its turn
            mask = read_mask(rows[index]["segmentation"], height, width)
        self.usual[index] = isinstance(mask, dict)
        if self.usual[index]:
            self._masks[index] = mask
            self.extents[index] = mask_extent(mask)

    def ids(self, indices: Iterable[int]) -> list[tuple[Any, Any]]:
        """Return the ids of annotations and of their images."""
        images = self._images.records
        return [(self._ids[i], images[self.image_index[i]]["image_id"]) for i in indices]

    def entries(self) -> list[dict[str, Any]]:
        """Return an entry of each annotation, which is right if it is usual."""
        columns = (
            self._ids,
            self._boxes.tolist(),
            self._class_index.tolist(),
            np.where(self.usual, self._crowd, 0).astype(np.int8).tolist(),
            self._masks,
        )
        return [
            {"id": id_, "bbox": box, "class_index": index, "iscrowd": crowd, "segmentation": mask}
            if mask
            else {"id": id_, "bbox": box, "class_index": index, "iscrowd": crowd}
            for id_, box, index, crowd, mask in zip(*columns, strict=True)
        ]


def _numbers(values: Sequence[Any], kinds: set[type], *, missing: float) -> np.ndarray:
    """Return (N,) float64: NaN for what is of another type or too large."""
    if set(map(type, values)) <= kinds:
        with contextlib.suppress(OverflowError):
            return np.array(values, np.float64)
    found = [missing if v is MISSING else v if type(v) in kinds else math.nan for v in values]
    return np.array([v if -1e300 < v < 1e300 else math.nan for v in found], np.float64)


_PACK_BOX = struct.Struct("4d").pack
_NAN_BOX = _PACK_BOX(*[math.nan] * 4)


def _pack_boxes(column: list[Any]) -> bytes:
    """Pack lists of four numbers, NaN where one is of another length or holds something else."""
    if set(map(type, column)) == {list}:
        with contextlib.suppress(struct.error, OverflowError):
            return b"".join(itertools.starmap(_PACK_BOX, column))
    packed = []
    for row in column:
        try:
            packed.append(_PACK_BOX(*row) if type(row) is list else _NAN_BOX)
        except (struct.error, OverflowError):
            packed.append(_NAN_BOX)
    return b"".join(packed)


def _check_something_is_left(
    records: list[dict[str, Any]], num_images: int, num_rows: int, report: Report
) -> None:
    """Name a file that nothing can be learned from."""
    some = any(record["annotations"] for record in records)
    has_other = any(r["image_labels"] or "label_map_file_name" in r for r in records)
    if num_rows and not some and not has_other:
        report.refuse(
            "nothing_left",
            f"none of its {num_rows} annotations can be used",
            "Correct the file, or remove them if the images show nothing",
        )
    elif num_images and not some and not has_other:
        report.warn(
            "no_labels",
            "it has no annotation, image label or label map: nothing but background can be "
            "learned from it.",
        )
    elif some and all(a["iscrowd"] for record in records for a in record["annotations"]):
        number = sum(len(record["annotations"]) for record in records)
        report.warn(
            "all_crowd",
            f"all of its {number} annotations are crowd regions (iscrowd 1), which teach "
            "no object.",
        )
