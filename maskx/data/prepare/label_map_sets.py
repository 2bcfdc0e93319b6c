"""COCO-format files of data sets that have masks of every pixel: their label maps and tags."""

import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from maskx.core.files import write_json, written_whole
from maskx.core.processes import run_jobs
from maskx.data.images import read_image
from maskx.data.label_maps import ignore_label, read_label_map, write_label_map

__all__ = [
    "LabelMapSetSummary",
    "MaskedImage",
    "check_counts",
    "format_label_map_summary",
    "image_size",
    "label_table",
    "list_problems",
    "oriented_size",
    "read_values",
    "relabel_by_value",
    "write_label_map_set",
]

_NUM_EXAMPLES = 5  # bad images quoted
_JPEG_QUALITY = 95


class MaskedImage(NamedTuple):
    """An image of a data set and where its masks are.

    Attributes:
        image_id: Of the COCO-format file.
        image: Its file.
        masks: File with the masks, from which `relabel` makes a label map.
        relabel: Function of a module's top level, or a partial one of it: from `masks` to (H, W)
            labels.
        label_map: PNG file to write the label map to.
        small_image: Where an image is to be resized: the file to write.
    """

    image_id: int
    image: Path
    masks: Path
    relabel: Callable[[Path], np.ndarray]
    label_map: Path
    small_image: Path | None = None


@dataclass(frozen=True)
class LabelMapSetSummary:
    """What `write_label_map_set` wrote.

    Attributes:
        class_names: Names by class index.
        num_images: By part.
        num_unlabeled: By part the images of which no pixel has a class.
        num_images_with: By part the number of images with each class, by class index.
        num_reused: Label maps of an earlier run that were taken as they are.
        left_out: What is wrong with the files of each image that was left out, by its path.
    """

    class_names: tuple[str, ...]
    num_images: Mapping[str, int]
    num_unlabeled: Mapping[str, int]
    num_images_with: Mapping[str, tuple[int, ...]]
    num_reused: int
    left_out: Mapping[str, str]


class _Job(NamedTuple):
    part: str
    entry: MaskedImage
    image_root: Path
    output: Path
    num_classes: int
    short_side: int | None


class _Done(NamedTuple):
    part: str
    name: str
    record: dict[str, Any] | None
    was_reused: bool
    problem: str | None


def write_label_map_set(
    parts: Mapping[str, Sequence[MaskedImage]],
    class_names: Sequence[str],
    output: Path,
    *,
    prefix: str,
    image_roots: Mapping[str, Path],
    tags_of: str,
    short_side: int | None = None,
    strict: bool = True,
    workers: int = 1,
    progress: bool = False,
) -> LabelMapSetSummary:
    """Write `PREFIX_PART.json` of each part and `PREFIX_PART_tags.json` of one, and label maps.

    Images have `image_labels`, the ids of the categories anywhere in their label map, and
    `label_map_file_name`. The tags have everything but the label maps. Ids are class indices + 1.
    There are no annotations.

    A label map that is newer than its masks is taken as it is, so an interrupted run goes on.

    Args:
        parts: Images by part, such as "train".
        class_names: Names by class index.
        output: Folder to write to.
        prefix: Start of the names of the JSON files.
        image_roots: By part the folder from which images are named.
        tags_of: The part to write tags of.
        short_side: Pixels; an image whose shorter side is longer is made so small, with its label
            map.
        strict: Whether an image without usable files is an error. If False it is left out, counted.
        workers: Processes.
        progress: Show a progress bar.

    Raises:
        ValueError: With `strict`, files of an image are bad; or no image is left.
    """
    jobs = [
        _Job(part, entry, image_roots[part], output, len(class_names), short_side)
        for part, entries in parts.items()
        for entry in entries
    ]
    for folder in {path.parent for job in jobs for path in _written(job.entry)}:
        folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    problems, num_reused = {}, 0
    finished = run_jobs(_prepare, jobs, workers)
    for done in tqdm(finished, total=len(jobs), unit="image", disable=not progress):
        num_reused += done.was_reused
        if done.record is None:
            problems[done.name] = done.problem
        else:
            records[done.part].append(done.record)
    problems = dict(sorted(problems.items()))
    if problems and strict:
        raise ValueError(
            f"{len(problems)} of {len(jobs)} images cannot be used. Restore their files, or leave "
            f"these images out, counted (strict=False, --skip-bad):{list_problems(problems)}"
        )
    empty = [part for part, found in records.items() if not found]
    if empty:
        raise ValueError(
            f"No image is left for {empty[0]}, of {len(parts[empty[0]])} listed. Restore their "
            f"files.{list_problems(problems)}"
        )
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, start=1)]
    for part, images in records.items():
        images.sort(key=lambda image: image["id"])
        contents = {part: images}
        if part == tags_of:
            contents[f"{part}_tags"] = [
                {key: value for key, value in image.items() if key != "label_map_file_name"}
                for image in images
            ]
        for name, entries in contents.items():
            content = {"images": entries, "annotations": [], "categories": categories}
            write_json(output / f"{prefix}_{name}.json", content)
    return LabelMapSetSummary(
        class_names=tuple(class_names),
        num_images={part: len(images) for part, images in records.items()},
        num_unlabeled={
            part: sum(not image["image_labels"] for image in images)
            for part, images in records.items()
        },
        num_images_with={
            part: _count_classes(images, len(class_names)) for part, images in records.items()
        },
        num_reused=num_reused,
        left_out=problems,
    )


def format_label_map_summary(summary: LabelMapSetSummary) -> str:
    """Lay out a summary for people: numbers of images, and the rarest classes."""
    lines = [f"{len(summary.class_names)} classes."]
    for part, number in summary.num_images.items():
        counts = summary.num_images_with[part]
        absent = [name for name, n in zip(summary.class_names, counts, strict=True) if n == 0]
        some = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        lines.append(
            f"{part}: {number} images, {sum(counts) / number:.1f} classes in each on average, "
            f"{summary.num_unlabeled[part]} images without any; classes without an image: "
            f"{f'{len(absent)} ({some})' if absent else 'none'}."
        )
    lines.append(f"Label maps of an earlier run: {summary.num_reused}.")
    left_out = list_problems(summary.left_out)
    lines.append(f"Images left out: {len(summary.left_out) or 'none'}.{left_out}")
    return "\n".join(lines)


def check_counts(
    found: Mapping[str, int], known: Mapping[str, int], where: Path, *, allow_other: bool
) -> None:
    """Check the number of images of each part.

    Raises:
        ValueError: There are others than known, and that is not allowed.
    """
    if allow_other or dict(found) == dict(known):
        return
    counts = ", ".join(f"{part} {n} (known: {known[part]})" for part, n in found.items())
    raise ValueError(
        f"{where}: images listed: {counts}. Give the data set as a whole, or say that it is a "
        "part (allow_other_counts=True, --allow-other-counts)."
    )


def list_problems(problems: Mapping[str, str]) -> str:
    """Quote the first problems, one in a line."""
    more = len(problems) - _NUM_EXAMPLES
    lines = [*list(problems.values())[:_NUM_EXAMPLES], *([f"and {more} more"] if more > 0 else [])]
    return "".join(f"\n  {line}" for line in lines)


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image as it is read, see `oriented_size`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no image.
    """
    return oriented_size(path)[:2]


def oriented_size(path: Path) -> tuple[int, int, int]:
    """Return height, width and orientation (EXIF, 1 to 8) of an image, from its header.

    Readers turn images by this tag, so height and width are those of the turned image.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no image.
    """
    try:
        with Image.open(path) as image:
            (width, height), orientation = image.size, _orientation(image)
        return (width, height, orientation) if orientation > 4 else (height, width, orientation)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such image, but it is listed. Unpack the images again."
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: cannot be read as image ({error}). Unpack the images again."
        ) from error


def _orientation(image: Image.Image) -> int:
    # Not getexif, which also takes the tag from XMP, as OpenCV does not, and from TIFF files, which
    # Pillow turns itself.
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif"))
        orientation = exif.get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, struct.error):  # OpenCV passes over a damaged tag, too
        return 1
    return orientation if orientation in range(1, 9) else 1


def read_values(path: Path, *, kind: str) -> np.ndarray:
    """Read the values of a file of masks.

    Args:
        path: Image file in a format that keeps values.
        kind: "grey" for (H, W) integers or "colour" for (H, W, 3) uint8.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no such image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            values = np.asarray(image)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there are no such masks, but there is an image. Unpack the masks again."
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: cannot be read as masks ({error}). Unpack the masks again."
        ) from error
    dimensions, allowed = {
        "grey": (2, "(H, W) integers"),
        "colour": (3, "(H, W, 3) uint8"),
    }[kind]
    fits = values.ndim == dimensions and values.dtype.kind in "iu"
    if dimensions == 3:
        fits = fits and values.shape[2] == 3 and values.dtype == np.uint8
    if not fits:
        raise ValueError(
            f"{path}: has shape {values.shape} and dtype {values.dtype}. Allowed: {allowed}. Give "
            "the masks as they were published."
        )
    return values


def relabel_by_value(path: Path, labels: np.ndarray, allowed: str) -> np.ndarray:
    """Read grey masks and look every value up.

    Args:
        path: File of masks.
        labels: (V,) labels by value; -1 for values that are not allowed.
        allowed: What values are allowed, for errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no such image, or a value is not allowed.
    """
    values = read_values(path, kind="grey")
    inside = (values >= 0) & (values < len(labels))
    found = np.where(inside, labels[np.where(inside, values, 0)], -1)
    if (found < 0).any():
        row, column = np.argwhere(found < 0)[0]
        raise ValueError(
            f"{path}: has the value {values[row, column]} at row {row}, column {column}. Allowed: "
            f"{allowed}. Give the masks as they were published."
        )
    return found


def label_table(
    labels: Mapping[int, int], num_values: int, num_classes: int, *, unlabeled: Iterable[int]
) -> np.ndarray:
    """Return labels by value for `relabel_by_value`.

    Args:
        labels: Labels (class index + 1) by value.
        num_values: Length of the table.
        num_classes: Number of classes.
        unlabeled: Values of pixels of which nothing is known.
    """
    table = np.full(num_values, -1, np.int32)
    table[list(unlabeled)] = ignore_label(num_classes)
    table[list(labels)] = list(labels.values())
    return table


def _written(entry: MaskedImage) -> Iterable[Path]:
    return (path for path in (entry.label_map, entry.small_image) if path is not None)


def _prepare(job: _Job) -> _Done:
    entry = job.entry
    try:
        record, was_reused = _make_record(job)
    except (FileNotFoundError, ValueError) as error:
        return _Done(job.part, str(entry.image), None, False, str(error))
    return _Done(job.part, str(entry.image), record, was_reused, None)


def _make_record(job: _Job) -> tuple[dict[str, Any], bool]:
    entry = job.entry
    height, width = full_size = image_size(entry.image)
    shorter = min(height, width)
    if job.short_side is not None and shorter > job.short_side:
        height, width = (round(side / shorter * job.short_side) for side in full_size)
    if entry.small_image is not None:
        _write_small_image(entry, full_size, (height, width))
    labels = _reused(entry, height, width, job.num_classes)
    was_reused = labels is not None
    if labels is None:
        labels = entry.relabel(entry.masks)
        if labels.shape != full_size:
            raise ValueError(
                f"{entry.masks}: the masks are {labels.shape[1]} x {labels.shape[0]} pixels, the "
                f"image is {full_size[1]} x {full_size[0]}. Restore both as they were published."
            )
        if (height, width) != full_size:
            labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
        write_label_map(entry.label_map, labels, num_classes=job.num_classes)
    is_present = np.bincount(labels.ravel(), minlength=job.num_classes + 1) > 0
    is_present[0] = False
    image = entry.image if entry.small_image is None else entry.small_image
    folder = os.path.relpath(entry.label_map.parent.resolve(), job.output.resolve())
    record = {
        "id": entry.image_id,
        "file_name": image.relative_to(job.image_root).as_posix(),
        "height": height,
        "width": width,
        "image_labels": np.flatnonzero(is_present[: job.num_classes + 1]).tolist(),
        "label_map_file_name": (Path(folder) / entry.label_map.name).as_posix(),
    }
    return record, was_reused


def _reused(entry: MaskedImage, height: int, width: int, num_classes: int) -> np.ndarray | None:
    """Read the label map of an earlier run, if there is one that fits."""
    if not entry.masks.is_file() or not _is_newer(entry.label_map, entry.masks):
        return None
    try:
        return read_label_map(
            entry.label_map, height, width, num_classes=num_classes, image_id=entry.image_id
        )
    except ValueError:  # of another size, or of other classes: it is made anew
        return None


def _is_newer(written: Path, source: Path) -> bool:
    return written.is_file() and written.stat().st_mtime_ns >= source.stat().st_mtime_ns


def _write_small_image(
    entry: MaskedImage, full_size: tuple[int, int], size: tuple[int, int]
) -> None:
    written = entry.small_image
    if _is_newer(written, entry.image) and image_size(written) == size:
        return
    with written_whole(written) as scratch:
        if size == full_size:
            shutil.copyfile(entry.image, scratch)
        else:
            image = read_image(entry.image, *full_size, entry.image_id)
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
            _, content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            scratch.write_bytes(content.tobytes())


def _count_classes(images: Sequence[Mapping[str, Any]], num_classes: int) -> tuple[int, ...]:
    labels = [label for image in images for label in image["image_labels"]]
    return tuple(np.bincount(labels, minlength=num_classes + 1)[1:].tolist())
