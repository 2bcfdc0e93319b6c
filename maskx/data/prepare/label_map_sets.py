"""COCO-format files of data sets that have masks of every pixel: their label maps and tags."""

import contextlib
import functools
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    "check_folder",
    "image_size",
    "label_table",
    "left_out_line",
    "list_problems",
    "oriented_size",
    "read_values",
    "refuse_problems",
    "relabel_by_value",
    "relative_name",
    "some_of",
    "write_images",
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
            labels. None where `masks` are a label map, which stays where it is.
        label_map: PNG file to write the label map to; `masks` where these are one.
        small_image: Where an image is to be resized: the file to write.
    """

    image_id: int
    image: Path
    masks: Path
    relabel: Callable[[Path], np.ndarray] | None
    label_map: Path
    small_image: Path | None = None


@dataclass(frozen=True)
class LabelMapSetSummary:
    """What `write_label_map_set` wrote; as text, numbers of images and the rarest classes.

    Attributes:
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

    def __str__(self) -> str:
        lines = [f"{len(self.class_names)} classes."]
        for part, number in self.num_images.items():
            counts = self.num_images_with[part]
            absent = [name for name, n in zip(self.class_names, counts, strict=True) if n == 0]
            lines.append(
                f"{part}: {number} images, {sum(counts) / number:.1f} classes in each on average, "
                f"{self.num_unlabeled[part]} images without any; classes without an image: "
                f"{some_of(absent)}."
            )
        lines.append(f"Label maps of an earlier run: {self.num_reused}.")
        return "\n".join([*lines, left_out_line(self.left_out)])


class _Made(NamedTuple):
    part: str
    name: str
    record: dict[str, Any] | None
    was_reused: bool = False
    problem: str = ""


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
) -> LabelMapSetSummary:
    """Write `PREFIX_PART.json` of each part and `PREFIX_PART_tags.json` of one, and label maps.

    Images have `image_labels`, the ids of the categories anywhere in their label map, and
    `label_map_file_name`, relative to the JSON file. The tags have everything but the label maps.
    Ids are class indices + 1. There are no annotations. Files of an earlier run are replaced, but
    a label map that is newer than its masks is taken as it is, so an interrupted run goes on.

    Args:
        parts: Images by part, such as "train".
        output: Folder to write to; it is created.
        prefix: Start of the names of the JSON files.
        image_roots: By part the folder from which images are named.
        tags_of: The part to write tags of.
        short_side: Pixels; an image whose shorter side is longer is made so small, with its label
            map.
        strict: Whether an image without usable files is an error. If False it is left out, counted.

    Raises:
        ValueError: With `strict`, files of an image are bad; or no image is left.
    """
    jobs = [(part, entry) for part, entries in parts.items() for entry in entries]
    for folder in {path.parent for _, entry in jobs for path in _written(entry)}:
        folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    problems, num_reused = {}, 0
    make = functools.partial(
        _made, roots=image_roots, output=output, num_classes=len(class_names), short_side=short_side
    )
    for made in tqdm(run_jobs(make, jobs, workers), total=len(jobs), unit="image", disable=None):
        num_reused += made.was_reused
        if made.record is None:
            problems[made.name] = made.problem
        else:
            records[made.part].append(made.record)
    problems = dict(sorted(problems.items()))
    if strict:
        refuse_problems(problems, len(jobs))
    empty = [part for part, found in records.items() if not found]
    if empty:
        raise ValueError(
            f"No image is left for {empty[0]}, of {len(parts[empty[0]])} listed. Restore their "
            f"files.{list_problems(problems)}"
        )
    for part, images in records.items():
        images.sort(key=lambda image: image["id"])
        write_images(output / f"{prefix}_{part}.json", images, class_names)
        if part == tags_of:
            tags = [{k: v for k, v in i.items() if k != "label_map_file_name"} for i in images]
            write_images(output / f"{prefix}_{part}_tags.json", tags, class_names)
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


def write_images(
    path: Path, images: Sequence[Mapping[str, Any]], class_names: Sequence[str]
) -> None:
    """Write a COCO file of images without annotations; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, start=1)]
    write_json(path, {"images": images, "annotations": [], "categories": categories})


def check_counts(
    found: Mapping[str, int], known: Mapping[str, int], where: Path, *, allow_other: bool
) -> None:
    """Raise a ValueError where the parts have other numbers of images than known."""
    if allow_other or dict(found) == dict(known):
        return
    counts = ", ".join(f"{part} {n} (known: {known[part]})" for part, n in found.items())
    raise ValueError(
        f"{where}: images listed: {counts}. Give the data set as a whole, or say that it is a "
        "part (allow_other_counts=True, --allow-other-counts)."
    )


def check_folder(folder: Path, what: str) -> Path:
    """Return a folder that is there.

    Raises:
        FileNotFoundError: It is not.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no such folder of {what}. datasets/README.md says where files lie."
        )
    return folder


def refuse_problems(problems: Mapping[str, str], number: int) -> None:
    """Raise a ValueError that quotes what is wrong with images, if there is anything."""
    if problems:
        raise ValueError(
            f"{len(problems)} of {number} images cannot be used. Restore their files, or leave "
            f"these images out, counted (strict=False, --skip-bad):{list_problems(problems)}"
        )


def some_of(names: Sequence[str]) -> str:
    """Count names and quote the first."""
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} ({some})" if names else "none"


def left_out_line(problems: Mapping[str, str]) -> str:
    """Say in a summary how many images were left out, and quote the first."""
    return f"Images left out: {len(problems) or 'none'}.{list_problems(problems)}"


def list_problems(problems: Mapping[str, str]) -> str:
    """Quote the first problems, one in a line."""
    more = len(problems) - _NUM_EXAMPLES
    lines = [*list(problems.values())[:_NUM_EXAMPLES], *([f"and {more} more"] if more > 0 else [])]
    return "".join(f"\n  {line}" for line in lines)


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image as it is read, see `oriented_size`."""
    return oriented_size(path)[:2]


def oriented_size(path: Path) -> tuple[int, int, int]:
    """Return height, width and orientation (EXIF, 1 to 8) of an image, from its header.

    Readers turn images by this tag, so height and width are those of the turned image.

    Raises:
        ValueError: The file is no image.
    """
    with _opened(path, "image", "there is no such image, but it is listed") as image:
        (width, height), orientation = image.size, _orientation(image)
    return (width, height, orientation) if orientation > 4 else (height, width, orientation)


@contextlib.contextmanager
def _opened(path: Path, what: str, missing: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: {missing}. Unpack the {what}s again.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: cannot be read as {what} ({error}). Unpack the {what}s again."
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
        ValueError: The file is no such image.
    """
    with _opened(path, "mask", "there are no such masks, but there is an image") as image:
        image.load()
        values = np.asarray(image)
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
        labels: (V,) labels by value; -1 for values that are not allowed.

    Raises:
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
        unlabeled: Values of pixels of which nothing is known.
    """
    table = np.full(num_values, -1, np.int32)
    table[list(unlabeled)] = ignore_label(num_classes)
    table[list(labels)] = list(labels.values())
    return table


def _written(entry: MaskedImage) -> Iterable[Path]:
    label_map = None if entry.relabel is None else entry.label_map
    return (path for path in (label_map, entry.small_image) if path is not None)


def _made(
    job: tuple[str, MaskedImage],
    roots: Mapping[str, Path],
    output: Path,
    num_classes: int,
    short_side: int | None,
) -> _Made:
    part, entry = job
    try:
        size, labels, was_reused = _label_map(entry, num_classes, short_side)
    except (FileNotFoundError, ValueError) as error:
        return _Made(part, str(entry.image), None, problem=str(error))
    is_present = np.bincount(labels.ravel(), minlength=num_classes + 1)[: num_classes + 1] > 0
    is_present[0] = False  # background
    image = entry.image if entry.small_image is None else entry.small_image
    record = {
        "id": entry.image_id,
        "file_name": image.relative_to(roots[part]).as_posix(),
        "height": size[0],
        "width": size[1],
        "image_labels": np.flatnonzero(is_present).tolist(),
        "label_map_file_name": relative_name(entry.label_map, output),
    }
    return _Made(part, str(entry.image), record, was_reused)


def relative_name(path: Path, folder: Path) -> str:
    """Name a file from a folder, without symbolic links, through which ".." leads elsewhere."""
    parent = os.path.relpath(path.parent.resolve(), folder.resolve())
    return (Path(parent) / path.name).as_posix()


def _label_map(
    entry: MaskedImage, num_classes: int, short_side: int | None
) -> tuple[tuple[int, int], np.ndarray, bool]:
    """Make the label map of an image, unless there is one; also its size, and whether there was."""
    height, width = full_size = image_size(entry.image)
    shorter = min(height, width)
    if short_side is not None and shorter > short_side:
        height, width = (round(side / shorter * short_side) for side in full_size)
    if entry.small_image is not None:
        _write_small_image(entry, full_size, (height, width))
    if entry.relabel is None:
        labels = read_label_map(
            entry.masks, height, width, num_classes=num_classes, image_id=entry.image.stem
        )
        return (height, width), labels, False
    labels = _reused(entry, height, width, num_classes)
    if labels is not None:
        return (height, width), labels, True
    labels = entry.relabel(entry.masks)
    if labels.shape != full_size:
        raise ValueError(
            f"{entry.masks}: the masks are {labels.shape[1]} x {labels.shape[0]} pixels, the "
            f"image is {full_size[1]} x {full_size[0]}. Restore both as they were published."
        )
    if (height, width) != full_size:
        labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
    try:
        write_label_map(entry.label_map, labels, num_classes=num_classes)
    except ValueError as error:
        raise ValueError(f"{entry.masks}: {error}") from None
    return (height, width), labels, False


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
