"""How the parts of a COCO file hang together: ids, references, categories, a report of faults."""

import contextlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from maskx.data.coco_shapes import AnnotationProblem
from maskx.data.json_files import MISSING, Rows

__all__ = ["Finding", "Positions", "Report", "Structure", "read_structure"]

logger = logging.getLogger(__name__)

SKIP = "leave it out, counted, with strict=False (--skip-bad)"
_NUM_EXAMPLES = 5  # quoted of bad annotations, and of each kind of finding
_MAX_SIDE = 1_000_000  # pixels; numbers of pixels stay far below 2^63

_REQUIRED_KEYS = {"images": ("id", "height", "width"), "categories": ("id", "name")}
_ROW_KEYS = ("id", "image_id", "category_id")


@dataclass
class Finding:
    """Entries of a file that share a fault, or something else to be said of them.

    Attributes:
        level: "problem", which strict reading refuses, "warning" or "note".
        count: Number of entries.
        examples: The first few.
        remedy: What is allowed, or to be done.
        done: Number of entries by what is done to them without `strict`.
    """

    level: str
    count: int = 0
    examples: list[str] = field(default_factory=list)
    remedy: str = ""
    done: Counter[str] = field(default_factory=Counter)


class Report:
    """What is wrong with a file, and what is read otherwise than it stands there.

    Args:
        source: File, or another name of the data.
        strict: Whether what is wrong is an error.
        quiet: Whether nothing is logged.
        collect: Whether reading goes on wherever it can, so that all is found at once: nothing is
            logged, and what is wrong is an error only where nothing more can be read.

    Attributes:
        findings: By kind, in the order in which they were met.
        lost_files: What is wrong with the images and, where they are needed, the label maps that
            are missing or broken, by path.
    """

    def __init__(
        self, source: Path, *, strict: bool = False, quiet: bool = False, collect: bool = False
    ) -> None:
        self.source, self.strict, self.collect = source, strict, collect
        self._quiet = quiet or collect
        self.findings: dict[str, Finding] = {}
        self.lost_files: dict[str, str] = {}
        self._examples: list[str] = []

    @property
    def problems(self) -> Counter[str]:
        """Numbers of bad entries by kind."""
        return self._counts("problem")

    @property
    def notes(self) -> Counter[str]:
        """Numbers of entries by what they are read as."""
        return self._counts("note")

    def note(self, what: str, example: Any) -> None:
        """Count what is read as it is meant."""
        self._add("note", what, f"{example!r:.60}")

    def warn(self, kind: str, text: str) -> None:
        """Say what is no error, but hardly meant."""
        self._add("warning", kind, text)
        if not self._quiet:
            logger.warning("%s: %s", self.source, text)

    def entry(self, kind: str, found: str, remedy: str) -> None:
        """Count an entry that is left out; raise, if that is an error."""
        if self.strict:
            self.fail(found, remedy)
        self._count(kind, f"{found[0].upper()}{found[1:]}", remedy, "left out")

    def lost_file(self, kind: str, what: str, path: Any, problem: str, remedy: str) -> None:
        """Count a file that is missing or broken and left out; raise, if that is an error."""
        path = os.fspath(path)
        if self.strict:
            remedy += f", or {SKIP}"
        self.entry(kind, f"{what} {path} {problem}", remedy)
        self.lost_files[path] = problem

    def annotation(
        self, annotation: dict[str, Any], name: str, problem: AnnotationProblem, done: str
    ) -> None:
        """Count a bad annotation, with what is done to it without `strict`."""
        text = (
            f"annotation {annotation['id']!r} of image {annotation['image_id']!r}, category "
            f"{name!r}: {problem}"
        )
        self._count(problem.kind, text, "Correct them in the file", done)

    def finish(self) -> None:
        """Raise or log what was counted."""
        problems = self.problems
        total = problems.total()
        kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(problems.items()))
        all_done = sum((finding.done for finding in self.findings.values()), Counter())
        done = ", ".join(f"{count} {done}" for done, count in sorted(all_done.items()))
        if total and self.strict:
            more = [f"and {total - len(self._examples)} more"] * (total > len(self._examples))
            listing = "".join(f"\n  {line}" for line in [*self._examples, *more])
            self.fail(
                f"has {total} bad annotations ({kinds})",
                "Fix the file, or load it with strict=False (--skip-bad, DATASETS.MASKX.STRICT "
                f"False), which takes what can be used: {done}:{listing}",
            )
        if self._quiet:
            return
        if total:
            logger.warning(
                "%s: %d bad entries (%s): %s. Such as: %s",
                self.source,
                total,
                kinds,
                done,
                "; ".join(self._examples[:2]),
            )
        if self.notes:
            listing = "; ".join(
                f"{count} x {what}, such as {self.findings[what].examples[0]}"
                for what, count in sorted(self.notes.items())
            )
            logger.warning("%s is read as it is meant: %s.", self.source, listing)

    def refuse(self, kind: str, found: str, remedy: str) -> None:
        """Raise the error of a bad file, from which reading can only go on to look for more."""
        if not self.collect:
            self.fail(found, remedy)
        self._count(kind, f"{found[0].upper()}{found[1:]}", remedy, "refused")

    def stop(self, error: Exception) -> None:
        """Keep the error that ended the reading."""
        text = str(error).removeprefix(f"{os.fspath(self.source)}: ")
        self._count(
            "not_readable", text, "Nothing more could be read; correct this first", "refused"
        )

    def fail(self, found: str, remedy: str) -> NoReturn:
        """Raise the error of a bad file: where, what was found, what is allowed or to be done."""
        raise ValueError(f"{os.fspath(self.source)}: {found}. {remedy}.")

    def _counts(self, level: str) -> Counter[str]:
        return Counter({k: f.count for k, f in self.findings.items() if f.level == level})

    def _count(self, kind: str, text: str, remedy: str, done: str) -> None:
        finding = self._add("problem", kind, text)
        finding.remedy = finding.remedy or remedy
        finding.done[done] += 1
        if len(self._examples) < _NUM_EXAMPLES:
            self._examples.append(text)

    def _add(self, level: str, kind: str, example: str) -> Finding:
        finding = self.findings.setdefault(kind, Finding(level))
        finding.count += 1
        if len(finding.examples) < _NUM_EXAMPLES:
            finding.examples.append(example)
        return finding


class Positions:
    """Where ids stand in a list of integers and strings.

    Among 118,000 images a sorted array is searched in a third of the time of a dict, whose parts
    are all over the memory.
    """

    def __init__(self, ids: Sequence[Any]) -> None:
        self._by_id = {id_: position for position, id_ in enumerate(ids)}
        largest = np.iinfo(np.int64).max
        short = {i: p for i, p in self._by_id.items() if type(i) is int and abs(i) < largest}
        numbers = np.array([*short, largest], np.int64)  # the last is no id
        order = np.argsort(numbers)
        self._numbers = numbers[order]
        self._positions = np.array([*short.values(), -1])[order]

    def __call__(self, ids: Sequence[Any]) -> np.ndarray:
        """Return (N,) positions: -1 for what is not there, or of another type."""
        if set(map(type, ids)) == {int}:
            with contextlib.suppress(OverflowError):
                numbers = np.array(ids, np.int64)
                found = np.searchsorted(self._numbers, numbers)
                is_there = self._numbers[found] == numbers
                return np.where(is_there, self._positions[found], -1)
        return np.array([self.one(id_) for id_ in ids])

    def one(self, id_: Any) -> int:
        """Return the position of one id, or -1."""
        return self._by_id.get(id_, -1) if type(id_) in (int, str) else -1


class Structure:
    """The images and categories of a file, and what its annotations refer to.

    Attributes:
        images: Good entries, with whole numbers as sizes.
        category_ids: By class index.
        class_index: By category id.
        index_of: The same, of many at a time.
        has_repeated_ids: Whether annotations share an id.
    """

    def __init__(
        self, images: list[dict], categories: list[dict], rows: Rows, report: Report
    ) -> None:
        self._report = report
        self.folder = report.source.parent
        self.images = images
        self.categories = categories
        by_id = sorted(categories, key=lambda category: category["id"])
        self.class_names = tuple(category["name"] for category in by_id)
        self.category_ids = tuple(category["id"] for category in by_id)
        self.class_index = {id_: index for index, id_ in enumerate(self.category_ids)}
        self.index_of = Positions(self.category_ids)
        self._image_ids = {image["id"] for image in images}
        self._seen: dict[Any, Any] = {}
        ids = rows.column("id")
        numbers = ids
        if set(map(type, ids)) != {int}:
            ids = [id_ for id_ in ids if type(id_) in (int, str)]
            numbers = [id_ for id_ in ids if type(id_) is int]
        self.has_repeated_ids = len(set(ids)) < len(ids)
        if self.has_repeated_ids and report.strict:
            _check_unique("annotations", "id", [{"id": id_} for id_ in ids], report)
        self._next_id = max(numbers, default=0) + 1

    def annotation(self, position: int, row: Any) -> dict[str, Any] | None:
        """Return a copy of an annotation, its ids and `iscrowd` as they are meant.

        None if it is left out, which is reported.
        """
        report = self._report
        if not isinstance(row, dict):
            return report.entry(
                "annotation_malformed", f"annotations[{position}] is {row!r:.80}", "Allowed: a dict"
            )
        for key in _ROW_KEYS:
            if key not in row and (key != "id" or report.strict or report.collect):
                return report.entry(
                    f"annotation_without_{key}",
                    f"annotations[{position}] (id {row.get('id')!r:.80}) lacks the key {key!r}",
                    f"Required are {', '.join(map(repr, (*_ROW_KEYS, 'bbox')))}",
                )
        found = dict(row)
        found["id"] = self._annotation_id(row)
        if found["id"] is None:
            return None
        for key, section, known in (
            ("image_id", "images", self._image_ids),
            ("category_id", "categories", self.class_index),
        ):
            value = _resolved(row[key], known)
            if value is None:
                return report.entry(
                    f"orphan_{key}",
                    f"annotation {found['id']!r} has {key} {row[key]!r:.80}, which is not in "
                    f"{section!r}",
                    f"Add it there, where {len(known)} ids are, or remove the annotation",
                )
            if value != row[key] or type(value) is not type(row[key]):
                report.note(f"{key} of another type (matched by its value)", row[key])
            found[key] = value
        found["iscrowd"] = self._crowd(row, found["id"])
        return found

    def image_of_lost(self, row: Any) -> Any:
        """Return the id of the image of an annotation whose category is not known, or None."""
        if not isinstance(row, dict):
            return None
        if "category_id" in row and _resolved(row["category_id"], self.class_index) is not None:
            return None
        return _resolved(row.get("image_id"), self._image_ids)

    def image_labels(self, image: dict[str, Any]) -> set[int]:
        """Return the class indices of the optional key `image_labels` of an image."""
        category_ids = image.get("image_labels", [])
        labels = set()
        for value in category_ids if isinstance(category_ids, list) else [None]:
            id_ = _resolved(value, self.class_index)
            if id_ is None:
                self._report.refuse(
                    "image_labels_unknown",
                    f"image {image['id']!r} has image_labels {category_ids!r:.200}",
                    f"Allowed: a list of ids of the file's {len(self.class_index)} categories",
                )
                continue
            labels.add(self.class_index[id_])
        return labels

    def _annotation_id(self, row: dict[str, Any]) -> Any:
        """Return the id; a new one where it is missing or stands for another annotation too."""
        id_ = row.get("id", MISSING)
        if id_ is not MISSING and type(id_) not in (int, str):
            self._report.refuse(
                "annotation_id",
                f"annotations have the id {id_!r:.80}",
                "Allowed: integer or string",
            )
            id_ = MISSING
        if not self.has_repeated_ids and id_ is not MISSING:
            return id_
        content = [row.get(key) for key in ("image_id", "category_id", "bbox", "segmentation")]
        if id_ is not MISSING and id_ not in self._seen:
            self._seen[id_] = content
            return id_
        if id_ is not MISSING and self._seen[id_] == content:
            return self._report.entry(
                "annotation_repeated", f"annotation {id_!r} stands twice", "Remove one"
            )
        if self._report.collect and id_ is not MISSING:
            self._report.refuse(
                "annotation_id_repeated",
                f"annotations repeat the id {id_!r}",
                "Give every entry of 'annotations' its own id",
            )
        else:
            self._report.note("annotation without an id of its own (numbered)", row.get("id"))
        self._next_id += 1
        return self._next_id - 1

    def _crowd(self, row: dict[str, Any], id_: Any) -> int:
        value = row.get("iscrowd", 0)
        if type(value) is int and value in (0, 1):
            return value
        if value is None or value in ("0", "1", "", False, True, 0.0, 1.0):
            self._report.note("iscrowd that is no 0 or 1 (null counts as 0)", value)
            return int(value or 0)
        self._report.refuse(
            "iscrowd", f"annotation {id_!r} has iscrowd {value!r:.80}", "Allowed: 0 or 1"
        )
        return 0


def read_structure(
    dataset: Any, rows: Rows | None, report: Report, *, need_files: bool = False
) -> Structure:
    """Check everything but the annotations.

    Args:
        dataset: A COCO dict without its annotations.
        rows: These; None if they are missing.
        need_files: Whether images need a `file_name`.

    Raises:
        ValueError: A part is missing or nothing is left of it; with `strict`, an entry is bad.
    """
    if not isinstance(dataset, dict):
        report.fail(f"holds a {type(dataset).__name__}", "Allowed is a COCO dict, {'images': ...")
    for section in ("images", "annotations", "categories"):
        if isinstance(dataset.get(section), list) or (
            section == "annotations" and rows is not None
        ):
            continue
        sections = sorted({*dataset, *["annotations"] * (rows is not None)})
        found = f"it has {sections}" if section not in dataset else "it is no list"
        report.fail(
            f"lacks the list {section!r} ({found})",
            "A COCO file needs the lists 'images', 'annotations' and 'categories'",
        )
    images = _images(dataset["images"], report, need_files)
    categories = _categories(dataset["categories"], dataset["images"], rows, report)
    return Structure(images, categories, rows, report)


def _images(entries: list[Any], report: Report, need_files: bool) -> list[dict[str, Any]]:
    images, seen = [], {}
    for position, entry in enumerate(entries):
        problem = _image_problem(position, entry, need_files)
        if problem is not None:
            report.entry(*problem)
            continue
        id_ = entry["id"]
        if type(id_) is float:
            report.note("image id that is no integer (read as one)", id_)
            id_ = int(id_)
        image = {**entry, "id": id_, "height": int(entry["height"]), "width": int(entry["width"])}
        if id_ in seen:
            number = sum(isinstance(e, dict) and e.get("id") == id_ for e in entries) - 1
            report.entry(
                "image_repeated",
                f"images repeat the id {id_!r} ({number} are not unique)",
                "Give every entry of 'images' its own id",
            )
            continue
        seen[id_] = image
        images.append(image)
    kinds = sorted({type(image["id"]).__name__ for image in images})
    if len(kinds) > 1:
        report.refuse(
            "image_ids_of_two_kinds",
            f"has image ids of the kinds {kinds}",
            "Allowed: all int, or all str",
        )
    if not images:
        report.refuse(
            "no_images",
            f"has no images ({len(entries)} entries in 'images')",
            "Give a file with at least one",
        )
    return images


def _image_problem(position: int, entry: Any, need_files: bool) -> tuple[str, str, str] | None:
    """Return what is wrong with the entry of an image: kind, what was found, what is allowed."""
    if not isinstance(entry, dict):
        return "image_malformed", f"images[{position}] is {entry!r:.80}", "Allowed: a dict"
    keys = (*_REQUIRED_KEYS["images"], *["file_name"] * need_files)
    for key in keys:
        if key not in entry:
            return (
                "image_malformed",
                f"images[{position}] (id {entry.get('id')!r:.80}) lacks the key {key!r}",
                f"Required are {', '.join(map(repr, keys))}",
            )
    id_ = entry["id"]
    is_whole = type(id_) is float and id_.is_integer()
    if type(id_) not in (int, str) and not is_whole:
        return "image_malformed", f"images have the id {id_!r:.80}", "Allowed: integer or string"
    for key in ("height", "width"):
        value = entry[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= _MAX_SIDE or value % 1:
            return (
                "image_malformed",
                f"image {id_!r} has {key} {value!r:.80}",
                f"Allowed: a positive whole number of pixels, {_MAX_SIDE} at most",
            )
    for key in ("file_name", "stuff_file_name", "label_map_file_name") if need_files else ():
        if key in entry and (not isinstance(entry[key], str) or not entry[key]):
            return (
                "image_malformed",
                f"image {id_!r} has {key} {entry[key]!r:.80}",
                "Allowed: a path",
            )
    return None


def _categories(
    entries: list[Any], images: list[Any], rows: Rows, report: Report
) -> list[dict[str, Any]]:
    categories = []
    for position, entry in enumerate(entries):
        problem = _category_problem(position, entry)
        if problem is not None:
            report.refuse("category_malformed", *problem)
            continue
        if type(entry["id"]) is not int:
            report.note("category id that is no integer (read as one)", entry["id"])
        name = unicodedata.normalize("NFC", entry["name"])
        categories.append({**entry, "id": _as_integer(entry["id"]), "name": name})
    if not categories:
        report.refuse(
            "no_categories", "has no categories", "Give the list of the classes, with id and name"
        )
    _check_unique("categories", "id", categories, report)
    categories = _without_groups(categories, images, rows, report)
    _check_unique("categories", "name", categories, report)
    return categories


def _category_problem(position: int, entry: Any) -> tuple[str, str] | None:
    """Return what is wrong with a category: what was found, what is allowed."""
    if not isinstance(entry, dict):
        return f"categories[{position}] is {entry!r:.80}", "Allowed: a dict"
    keys = _REQUIRED_KEYS["categories"]
    for key in keys:
        if key not in entry:
            return (
                f"categories[{position}] (id {entry.get('id')!r:.80}) lacks the key {key!r}",
                f"Required are {', '.join(map(repr, keys))}",
            )
    if _as_integer(entry["id"]) is None or not isinstance(entry["name"], str):
        return f"has the category {entry}", "Allowed: an integer id, a string name"
    return None


def _without_groups(
    categories: list[dict[str, Any]], images: list[Any], rows: Rows, report: Report
) -> list[dict[str, Any]]:
    """Leave out group categories, as Roboflow writes them."""
    groups = [
        category
        for category in categories
        if category.get("supercategory") in (None, "", "none")
        and any(
            other is not category and other.get("supercategory") == category["name"]
            for other in categories
        )
    ]
    if not groups:
        return categories
    used = {_as_integer(value) for value in rows.column("category_id")}
    for image in images:
        labels = image.get("image_labels") if isinstance(image, dict) else None
        used.update(map(_as_integer, labels if isinstance(labels, list) else ()))
    left_out = [category for category in groups if category["id"] not in used]
    for category in left_out:
        report.note("group category without annotations (left out)", category["name"])
    return [category for category in categories if category not in left_out]


def _check_unique(
    section: str, key: str, entries: Sequence[dict[str, Any]], report: Report
) -> None:
    repeated = [value for value, n in Counter(entry[key] for entry in entries).items() if n > 1]
    if repeated:
        report.refuse(
            f"{section}_repeat_{key}",
            f"{section} repeat the {key} {repeated[0]!r} ({len(repeated)} are not unique)",
            f"Give every entry of {section!r} its own {key}",
        )


def _as_integer(value: Any) -> int | None:
    """Return an id that is meant as an integer, or None."""
    if type(value) is int:
        return value if abs(value) < 2**63 else None
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is str and value.strip().isascii() and value.strip().lstrip("-").isdigit():
        return int(value) if len(value) < 20 else None
    return None


def _resolved(value: Any, known: Any) -> Any:
    """Return the id among the known ones that a value stands for, or None."""
    if type(value) in (int, str) and value in known:
        return value
    number = _as_integer(value)
    if number is None:
        return None
    return number if number in known else str(number) if str(number) in known else None
