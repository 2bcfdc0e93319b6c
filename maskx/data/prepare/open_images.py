"""Open Images V4 to V7 (Kuznetsova et al., IJCV 2020): tags of millions of images, and boxes.

Labels and boxes are published as CSV files of gigabytes, with a row for each label of an image or
each box. Rows are read one after another.

Labels have ids, such as /m/020lf, and names that differ between releases and are not unique:
"Mouse" is the animal and, in the first release, the computer mouse. Classes that COCO has too are
therefore told by their id.

- A label with confidence 1 of any source but "machine" was verified by people, 0 is one they
  denied. Machine labels have a confidence in between; they are used on request, where people have
  not judged.
- Boxes are in units of the image as its pixels are stored; the sizes of images are not published
  and are read from their headers. Readers turn an image by its EXIF tag, so its boxes are turned,
  too. "GroupOf" boxes, around more than five objects that touch, become crowd regions.
- Image ids are 16 hexadecimal digits, the stem of the file name.
"""

import csv
import io
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

from maskx.core.files import written_text
from maskx.core.processes import run_jobs
from maskx.core.word_table import spelled
from maskx.data.large_vocabularies import vocabulary_rows
from maskx.data.prepare.label_map_sets import check_folder, list_problems, oriented_size
from maskx.data.tag_lists import write_tag_lines

__all__ = [
    "OPEN_IMAGES_NAMES",
    "OpenImagesSummary",
    "csv_rows",
    "prepare_open_images_boxes",
    "prepare_open_images_tags",
    "read_open_images_names",
]

OPEN_IMAGES_NAMES = dict(vocabulary_rows("open_images_concepts.tsv"))
"""Concept names by id: 79 classes of COCO, and parts of the body that later releases call "Human".

COCO's "cup" has no class of its own: Open Images has boxes of "Coffee cup" and "Mug". A "sports
ball" is a "Ball" here, a "dining table" a "Kitchen & dining room table".
"""

_NAMES_HEADER = ["LabelName", "DisplayName"]
_ROWS_PER_UPDATE = 1 << 14  # of the progress bar
_LABEL_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")
_BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
_SIZE_COLUMNS = ("ImageID", "Width", "Height", "Orientation")
_IMAGE_ID = re.compile("[0-9a-f]{16}")
_MACHINE, _VERIFIED, _DENIED = range(3)  # of several verdicts on a label the highest counts
_FILES_PER_JOB = 500
_NUM_EXAMPLES = 10  # classes listed in a summary


@dataclass(frozen=True)
class OpenImagesSummary:
    """What was written, and what was not.

    Attributes:
        kind: "tags" or "boxes".
        num_images: Images in the file written.
        per_class: Tags, or boxes, by name.
        left_out: Number of rows or images that are not in the file, by reason.
    """

    kind: str
    num_images: int
    per_class: Counter[str]
    left_out: Counter[str]

    def __str__(self) -> str:
        most = ", ".join(f"{name} ({n})" for name, n in self.per_class.most_common(_NUM_EXAMPLES))
        return "\n".join(
            [
                f"{self.num_images} images with {self.per_class.total()} {self.kind} of "
                f"{len(self.per_class)} classes.",
                f"Most {self.kind}: {most}.",
                f"Left out:{_reasons(self.left_out)}",
            ]
        )


def prepare_open_images_tags(
    label_files: Sequence[str | os.PathLike[str]],
    names: Mapping[str, str],
    output: str | os.PathLike[str],
    *,
    min_machine_confidence: float | None = None,
    existing_images: str | os.PathLike[str] | None = None,
) -> OpenImagesSummary:
    """Write the image-level labels as a tag list, JSON lines.

    Rows may come in any order, those of an image in several files. Images are sorted by id, tags
    by name. Measured on a million made-up rows: 45 bytes of memory and 2.3 microseconds of one
    core for each.

    Args:
        label_files: CSV files of labels: verified ones, machine labels, or both.
        min_machine_confidence: Take machine labels of at least this confidence too, unless people
            have denied them. None: verified labels only.
        existing_images: Folder of images; those that are not there are left out, counted.

    Raises:
        ValueError: A file is not what it should be, or no tag is left.
    """
    if min_machine_confidence is not None and not 0 < min_machine_confidence <= 1:
        raise ValueError(
            f"min_machine_confidence is {min_machine_confidence}. Allowed: above 0, up to 1."
        )
    left_out: Counter[str] = Counter()
    words = sorted(set(names.values()))
    place = {name: index for index, name in enumerate(words)}
    place_of = {label: place[name] for label, name in names.items()}
    verdicts = _read_verdicts(label_files, place_of, min_machine_confidence, left_out)
    images, tags = _positive_labels(*verdicts, left_out)
    if existing_images is not None:
        present = np.array(sorted(_existing(Path(existing_images))), np.uint64)
        kept = np.isin(images, present)
        left_out["images that are not there"] += len(np.unique(images[~kept]))
        images, tags = images[kept], tags[kept]
    if not len(images):
        raise ValueError(
            f"{_listing(label_files)}: no tag is left.{_reasons(left_out)} Give the verified "
            "labels of Open Images, or a lower min_machine_confidence for machine labels."
        )
    num_images = write_tag_lines(output, _tag_lines(images, tags), words)
    uses = np.bincount(tags, minlength=len(words)).tolist()
    per_class = Counter({word: uses[index] for index, word in enumerate(words) if uses[index]})
    return OpenImagesSummary("tags", num_images, per_class, +left_out)


def prepare_open_images_boxes(
    box_file: str | os.PathLike[str],
    names: Mapping[str, str],
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    sizes: str | os.PathLike[str],
    existing_only: bool = False,
    workers: int = 1,
) -> OpenImagesSummary:
    """Write boxes as a COCO file without masks; annotations are written as they are read.

    The file is read twice, first for the ids of images. Image ids of the result count the images,
    by file name; categories have their label in the key `label`. An image without a usable box is
    not listed: labels of Open Images are not exhaustive, so it would not be one without objects.

    Args:
        box_file: CSV file of boxes.
        images: Folder of the images, ID.jpg.
        sizes: CSV file ImageID,Width,Height,Orientation, of images as readers turn them. Images
            that are not in it are read and added to it, also when the run is interrupted, so that
            a repeated run reads no image twice.
        existing_only: Leave images out that are not there, counted. Otherwise that is an error.
        workers: Processes that read images.

    Raises:
        FileNotFoundError: A file, the folder or, unless `existing_only`, an image is missing.
        ValueError: A file or an image is not what it should be, or no box is left.
    """
    box_file, images, left_out = Path(box_file), Path(images), Counter()
    numbers, labels = _boxed_images(box_file)
    if existing_only:
        present = _existing(images)
        num_images = len(numbers)
        numbers = [number for number in numbers if number in present]
        left_out["images that are not there"] = num_images - len(numbers)
    size_of = _image_sizes(numbers, images, Path(sizes), workers)
    in_order = sorted((names[label], label) for label in labels if label in names)
    categories = [
        {"id": index, "name": name, "label": label}
        for index, (name, label) in enumerate(in_order, start=1)
    ]
    with written_text(output) as file:
        rows = csv_rows(box_file, _BOX_COLUMNS)
        boxes = _read_boxes(box_file, rows, size_of, categories, left_out)
        used, per_category = _write_annotations(file, boxes)
        if not used:
            raise ValueError(
                f"{box_file}: no box is left.{_reasons(left_out)} Give the boxes and the images of "
                "one split, and the class descriptions of Open Images."
            )
        _write_rest(file, used, size_of, categories)
    per_class = Counter({c["name"]: n for c in categories if (n := per_category[c["id"]])})
    left_out["images without a usable box"] = len(size_of) - len(used)
    return OpenImagesSummary("boxes", len(used), per_class, +left_out)


def _read_verdicts(
    paths: Iterable[str | os.PathLike[str]],
    place_of: Mapping[str, int],
    min_machine_confidence: float | None,
    left_out: Counter[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read which labels of which images are told: image numbers, places, verdicts."""
    # 60 million rows: arrays, as a list of tuples would take 100 bytes for each.
    images, places, verdicts = array("Q"), array("i"), array("b")
    for path in paths:
        for line, (image_id, source, label, given) in csv_rows(path, _LABEL_COLUMNS):
            confidence = _number(given)
            of_machine = source == "machine"
            if not (0 <= confidence <= 1 if of_machine else confidence in (0, 1)):
                raise ValueError(
                    f"{os.fspath(path)}, line {line} has the source {source!r} and the confidence "
                    f"{given!r}. Allowed: 0 or 1, or between for the source 'machine'."
                )
            if of_machine and (min_machine_confidence or 2) > confidence:
                left_out["machine labels of low confidence or not asked for"] += 1
                continue
            if label not in place_of:
                left_out["labels of classes without a name"] += 1
                continue
            images.append(_image_number(image_id, path, line))
            places.append(place_of[label])
            verdicts.append(_MACHINE if of_machine else _VERIFIED if confidence else _DENIED)
    return tuple(
        np.frombuffer(values, dtype) if values else np.zeros(0, dtype)
        for values, dtype in ((images, np.uint64), (places, np.int32), (verdicts, np.int8))
    )


def _positive_labels(
    images: np.ndarray, places: np.ndarray, verdicts: np.ndarray, left_out: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Keep each label of an image once, sorted, unless it was denied."""
    order = np.lexsort((verdicts, places, images))
    images, places, verdicts = images[order], places[order], verdicts[order]
    is_last = np.ones(len(images), bool)
    is_last[:-1] = (images[1:] != images[:-1]) | (places[1:] != places[:-1])
    denied = verdicts == _DENIED
    left_out["labels that people denied"] += int(denied.sum())
    kept = is_last & ~denied
    left_out["labels given twice, or denied in another row"] += int((~denied & ~kept).sum())
    return images[kept], places[kept]


def _tag_lines(images: np.ndarray, tags: np.ndarray) -> Iterator[tuple[str, list[int]]]:
    starts = np.flatnonzero(np.diff(images, prepend=images[0] ^ np.uint64(1)))
    ends = np.append(starts[1:], len(images))
    bar = tqdm(total=len(starts), desc="tags", unit="image", disable=None)
    with bar:
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield _file_name(int(images[start])), tags[start:end].tolist()
            bar.update()


class _Size(NamedTuple):
    """Size of an image as it is read, and the EXIF orientation by which it is turned then."""

    height: int
    width: int
    orientation: int


class _Box(NamedTuple):
    image: int
    category: int
    bbox: list[float]
    is_group: bool


def _boxed_images(path: Path) -> tuple[list[int], set[str]]:
    """Return the numbers of all images in a file of boxes, sorted, and its labels."""
    images, labels = set(), set()
    last = None  # rows of an image stand together
    for line, (image_id, label) in csv_rows(path, ("ImageID", "LabelName")):
        labels.add(label)
        if image_id != last:
            images.add(_image_number(image_id, path, line))
            last = image_id
    if not images:
        raise ValueError(f"{path} has no box. Download it again.")
    return sorted(images), labels


def _read_boxes(
    path: Path,
    rows: Iterable[tuple[int, Sequence[str]]],
    size_of: Mapping[int, _Size],
    categories: Sequence[Mapping[str, Any]],
    left_out: Counter[str],
) -> Iterator[_Box]:
    id_of = {category["label"]: category["id"] for category in categories}
    for line, (image_id, label, *corners, group) in rows:
        number = _image_number(image_id, path, line)
        x1, x2, y1, y2 = map(_number, corners)
        if not all(0 <= corner <= 1 for corner in (x1, x2, y1, y2)):
            raise ValueError(
                f"{path}, line {line} (image {image_id}) has the box {', '.join(corners)} (XMin, "
                "XMax, YMin, YMax). Allowed: numbers from 0 to 1, in units of the image."
            )
        if number not in size_of:
            left_out["boxes in images that are not there"] += 1
        elif label not in id_of:
            left_out["boxes of classes without a name"] += 1
        elif x1 >= x2 or y1 >= y2:
            left_out["boxes without width or height"] += 1
        else:
            height, width, orientation = size_of[number]
            x1, x2, y1, y2 = _turned(x1, x2, y1, y2, orientation)
            box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
            # -1 says that nobody has looked.
            yield _Box(number, id_of[label], box, group == "1")


def _turned(
    x1: float, x2: float, y1: float, y2: float, orientation: int
) -> tuple[float, float, float, float]:
    """Turn a box, in units of the image, as the EXIF orientation turns the image."""
    if orientation in (2, 3, 7, 8):
        x1, x2 = 1 - x2, 1 - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = 1 - y2, 1 - y1
    return (y1, y2, x1, x2) if orientation > 4 else (x1, x2, y1, y2)


def _write_annotations(file: TextIO, boxes: Iterable[_Box]) -> tuple[dict[int, int], Counter[int]]:
    """Write annotations; return image ids by number of the image, and boxes by category."""
    image_ids: dict[int, int] = {}
    per_category: Counter[int] = Counter()
    file.write('{"annotations":[')
    for number, box in enumerate(boxes, start=1):
        per_category[box.category] += 1
        annotation = {
            "id": number,
            "image_id": image_ids.setdefault(box.image, len(image_ids) + 1),
            "category_id": box.category,
            "bbox": [round(value, 3) for value in box.bbox],
            "area": round(box.bbox[2] * box.bbox[3], 3),
            "iscrowd": int(box.is_group),
        }
        file.write(f"{',' if number > 1 else ''}\n{json.dumps(annotation)}")
    return image_ids, per_category


def _write_rest(
    file: TextIO,
    image_ids: Mapping[int, int],
    size_of: Mapping[int, _Size],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    file.write('\n],\n"images":[')
    for position, (number, image_id) in enumerate(image_ids.items()):
        image = {
            "id": image_id,
            "file_name": _file_name(number),
            "width": size_of[number].width,
            "height": size_of[number].height,
        }
        file.write(f"{',' if position else ''}\n{json.dumps(image)}")
    file.write(f'\n],\n"categories":{json.dumps(categories)}}}\n')


def _image_sizes(
    numbers: Sequence[int], images: Path, sizes: Path, workers: int
) -> dict[int, _Size]:
    """Return sizes by image number, from the file of sizes or the images."""
    known = _read_sizes(sizes) if sizes.is_file() else {}
    unread = [number for number in numbers if number not in known]
    if unread and not images.is_dir():
        raise FileNotFoundError(
            f"{images}: there is no such folder of images, but {sizes} lacks the size of "
            f"{len(unread)}. datasets/README.md says where files lie."
        )
    jobs = [
        [str(images / _file_name(number)) for number in unread[start : start + _FILES_PER_JOB]]
        for start in range(0, len(unread), _FILES_PER_JOB)
    ]
    problems: dict[str, str] = {}
    num_read = 0
    try:
        with tqdm(total=len(unread), desc="sizes", unit="image", disable=None) as bar:
            for found, bad in run_jobs(_read_headers, jobs, workers):
                known |= found
                num_read += len(found)
                problems |= bad
                bar.update(len(found) + len(bad))
    finally:
        if num_read:
            _write_sizes(sizes, known)
    if problems:
        raise ValueError(
            f"{images}: the size of {len(problems)} of {len(numbers)} images cannot be read. "
            "Restore their files, or leave images out that are not there, counted "
            "(existing_only=True, --existing-images):"
            f"{list_problems(dict(sorted(problems.items())))}"
        )
    return {number: known[number] for number in numbers}


def _read_headers(files: Sequence[str]) -> tuple[dict[int, _Size], dict[str, str]]:
    """Read the sizes of images; return them by number, and what is wrong with a file by path."""
    found, bad = {}, {}
    for file in files:
        try:
            found[int(Path(file).stem, 16)] = _Size(*oriented_size(Path(file)))
        except (ValueError, FileNotFoundError) as error:
            bad[file] = str(error)
    return found, bad


def _read_sizes(path: Path) -> dict[int, _Size]:
    sizes = {}
    for line, (image_id, *values) in csv_rows(path, _SIZE_COLUMNS):
        width, height, orientation = (int(v) if v.isdecimal() else 0 for v in values)
        if not (width and height and 1 <= orientation <= 8):
            raise ValueError(
                f"{path}, line {line} (image {image_id}) has the size {' x '.join(values[:2])} and "
                f"the orientation {values[2]}. Allowed: pixels, above 0; 1 to 8. Delete the file "
                "to have it made again."
            )
        sizes[_image_number(image_id, path, line)] = _Size(height, width, orientation)
    return sizes


def _write_sizes(path: Path, sizes: Mapping[int, _Size]) -> None:
    with written_text(path) as file:
        file.write(",".join(_SIZE_COLUMNS) + "\n")
        file.writelines(
            f"{number:016x},{size.width},{size.height},{size.orientation}\n"
            for number, size in sizes.items()
        )


def _existing(folder: Path) -> set[int]:
    """Return the numbers of the images in a folder."""
    check_folder(folder, "images")
    with os.scandir(folder) as entries:
        stems = (entry.name[:-4] for entry in entries if entry.name.endswith(".jpg"))
        return {int(stem, 16) for stem in stems if _IMAGE_ID.fullmatch(stem)}


def _image_number(image_id: str, path: str | os.PathLike[str], line: int) -> int:
    if not _IMAGE_ID.fullmatch(image_id):
        raise ValueError(
            f"{os.fspath(path)}, line {line} has the image id {image_id!r}. Allowed: 16 "
            "hexadecimal digits in lower case, such as 000060e3121c7305."
        )
    return int(image_id, 16)


def _file_name(number: int) -> str:
    return f"{number:016x}.jpg"


def _number(text: str) -> float:
    """Return a number, or NaN, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _reasons(left_out: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items() if number)
    return f" {reasons or 'nothing'}."


def _listing(paths: Sequence[str | os.PathLike[str]]) -> str:
    return ", ".join(map(os.fspath, paths))


def read_open_images_names(
    descriptions: str | os.PathLike[str], boxable: str | os.PathLike[str]
) -> dict[str, str]:
    """Read the names of classes: unique, in lower case, with spaces for underscores.

    Those of `OPEN_IMAGES_NAMES` have the name there. Of other classes with one name, the one that
    has boxes takes it; the rest, and all if none has boxes or several have, get their id behind it,
    such as "mouse (/m/04rmv)".

    Args:
        descriptions: `class-descriptions.csv`, `oidv6-class-descriptions.csv` or that of another
            release: ids and names of all classes.
        boxable: `class-descriptions-boxable.csv`, the same for the classes with boxes.

    Returns:
        Names by id.

    Raises:
        ValueError: A file is no list of classes, or gives an id twice.
    """
    with_boxes = _read_descriptions(boxable)
    given = with_boxes | _read_descriptions(descriptions)
    names = {label: name for label, name in OPEN_IMAGES_NAMES.items() if label in given}
    taken = set(OPEN_IMAGES_NAMES.values())
    for labels in (with_boxes, given):
        rest = {label: given[label] for label in labels if label not in names}
        names |= _unique_names(rest, taken)
        taken.update(rest.values())
    return names


def _unique_names(names: Mapping[str, str], taken: set[str]) -> dict[str, str]:
    """Put its id behind each name that is taken or shared."""
    uses = Counter(names.values())
    return {
        label: f"{name} ({label})" if name in taken or uses[name] > 1 else name
        for label, name in names.items()
    }


def _read_descriptions(path: str | os.PathLike[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for line, row in csv_rows(path):
        if line == 1 and row[:2] == _NAMES_HEADER:  # releases up to V4 have none
            continue
        if len(row) < 2 or not row[0].startswith("/") or not spelled(row[1]) or row[0] in names:
            raise ValueError(
                f"{os.fspath(path)}, line {line} is {','.join(row)!r:.80}. Allowed: the id of a "
                "class, which no other line has, and its name, such as '/m/0199g,Bicycle'. Take "
                "the class descriptions of Open Images."
            )
        names[row[0]] = spelled(row[1]).lower()
    if not names:
        raise ValueError(f"{os.fspath(path)} has no class. Download it again.")
    return names


def csv_rows(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[tuple[int, Sequence[str]]]:
    """Read rows of a CSV file; only one is in memory at a time.

    Args:
        path: File in UTF-8.
        columns: At least two names of its header, in any order: what to return of each row. None
            for all of every row, the first one too.

    Yields:
        Line number, counted from 1, and fields. Empty lines are passed over.

    Raises:
        ValueError: It is no CSV file, lacks a column, or a row is shorter than the columns need.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file. datasets/README.md says where files lie."
        )
    size = path.stat().st_size
    bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None)
    with path.open("rb") as file, bar:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        try:
            pick = None if columns is None else _picker(path, next(reader, []), columns)
            for number, row in enumerate(reader):
                if number % _ROWS_PER_UPDATE == 0:
                    bar.update(file.tell() - bar.n)
                if row:
                    yield reader.line_num, row if pick is None else pick(row)
        except IndexError:
            raise ValueError(
                f"{path}, line {reader.line_num} has fewer fields than its header. Download the "
                "file again."
            ) from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{path}, after line {reader.line_num}: is no CSV text ({error}). Download it "
                "again, and unpack it."
            ) from None
        bar.update(file.tell() - bar.n)


def _picker(path: Path, header: Sequence[str], columns: Sequence[str]) -> itemgetter:
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the column {', '.join(missing)}; its first line is "
            f"{','.join(header)!r:.120}. Required are {', '.join(columns)}."
        )
    return itemgetter(*map(header.index, columns))
