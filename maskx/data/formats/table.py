"""The formats, and the one door into COCO's record form."""

import importlib
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from maskx.core.files import write_json
from maskx.data.coco import CocoData, check_coco, check_coco_content, checked_entries
from maskx.data.coco_shapes import mend_shapes
from maskx.data.coco_structure import Report
from maskx.data.formats.coco import file_of
from maskx.data.formats.dataset import LABEL_MAP, Dataset, Output, extra_keys
from maskx.data.formats.voc import MAX_LABELS
from maskx.data.image_files import find_images
from maskx.data.label_maps import LABEL_MAP_KEYS

__all__ = [
    "FORMATS",
    "as_coco",
    "check_annotations",
    "find_format",
    "label_maps_read",
    "read_dataset",
    "write_dataset",
]

# By name; the first one that a path is of is taken. A module has `is_of_format`, `read`, `write`.
FORMATS = {
    "yolo": "maskx.data.formats.yolo",
    "voc": "maskx.data.formats.voc",
    "cvat": "maskx.data.formats.cvat",
    "label-studio": "maskx.data.formats.label_studio",
    "labelme": "maskx.data.formats.labelme",
    "coco": "maskx.data.formats.coco",
}

_KINDS = (
    "a COCO file, a YOLO folder with its data.yaml, a folder of labelme files or of PASCAL VOC, "
    "an XML file of CVAT for images, or a JSON export of Label Studio"
)


def find_format(path: str | os.PathLike[str]) -> str:
    """Return the name of the format of a file or folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is of none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder. Give {_KINDS}.")
    for name in FORMATS:
        if _module(name).is_of_format(path):
            return name
    raise ValueError(f"{path}: is of no format that can be read. Give {_KINDS}.")


def check_annotations(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> tuple[CocoData | None, Report, Path | None]:
    """Read annotations of any format as `maskx.data.coco.check_coco` does.

    Returns:
        What that does, and the folder of the images; None if it is not known.
    """
    path, images = Path(path), None if images is None else Path(images)
    name = find_format(path)
    if name == "coco":
        return *check_coco(file_of(path), images), images
    report = Report(path, collect=True)
    try:
        dataset = _module(name).read(path, images, report)
    except ValueError as error:
        report.stop(error)
        return None, report, images
    root = dataset.image_root
    content = dataset.content_from(report.source.parent)
    return *check_coco_content(content, root, report), root


def read_dataset(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    strict: bool = True,
    check_images: bool = False,
    check_label_maps: Collection[str] = (),
) -> Dataset:
    """Read annotations of any format.

    Args:
        path: File or folder.
        images: Folder of the images, where the format does not say it or another is meant.
        strict: Whether what is wrong is an error; else it is mended or left out, in one warning.
        check_images: Whether the images must be there, whole and of their size, if their folder is
            known. Names get the form that their files have.
        check_label_maps: Keys of the label maps that must be there, and those of the categories
            whole; see `label_maps_read`.

    Raises:
        FileNotFoundError: There is no such file, or an image is missing.
        ValueError: It is of no format, or what it holds is wrong.
    """
    path, images = Path(path), None if images is None else Path(images)
    report = Report(path, strict=strict)
    dataset = _module(find_format(path)).read(path, images, report)
    if report.lost_files and not dataset.content["images"]:
        lost = "; ".join(f"{file} {problem}" for file, problem in report.lost_files.items())
        report.fail(f"has no image that can be read: {lost:.1000}", "Restore them")
    content = checked_entries(dataset.content, report, need_files=True)
    dataset = replace(dataset, content=content)
    if check_images and dataset.image_root is not None:
        dataset = _with_files(dataset, report)
    dataset = _with_label_maps(dataset, check_label_maps, report)
    image_of = {image["id"]: image for image in dataset.content["images"]}
    names = dataset.names()
    kept = []
    for annotation in dataset.content["annotations"]:
        image = image_of[annotation["image_id"]]
        given = annotation.get("bbox"), annotation.get("segmentation")
        shapes = mend_shapes(*given, image["height"], image["width"])
        for problem in shapes.problems:
            done = "left out" if shapes.box is None else "mended"
            report.annotation(annotation, names[annotation["category_id"]], problem, done)
        if shapes.box is None:
            continue
        if shapes.problems:
            x1, y1, x2, y2 = shapes.box
            annotation = {**annotation, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        if "segmentation" in annotation:  # run lengths in one form only
            annotation = {**annotation, "segmentation": shapes.mask or []}
        kept.append(annotation)
    report.finish()
    content = {**dataset.content, "annotations": kept}
    return replace(dataset, content=content, lost_files=report.lost_files)


def _with_files(dataset: Dataset, report: Report) -> Dataset:
    """Keep the images whose files are there and whole, and their annotations."""
    root = dataset.image_root
    content = dataset.content
    keys = ("id", "height", "width")
    records = [
        {key: image[key] for key in keys} | {"file_name": os.path.join(root, image["file_name"])}
        for image in content["images"]
    ]
    found = {record["id"]: record["file_name"] for record in find_images(records, root, report)}
    images = [
        {**image, "file_name": Path(os.path.relpath(found[image["id"]], root)).as_posix()}
        for image in content["images"]
        if image["id"] in found
    ]
    annotations = [a for a in content["annotations"] if a["image_id"] in found]
    kept = {**content, "images": images, "annotations": annotations}
    return replace(dataset, content=kept)


def _with_label_maps(dataset: Dataset, keys: Collection[str], report: Report) -> Dataset:
    """Keep, of the label maps that these keys name, those that can be used."""
    images = []
    for image in dataset.content["images"]:
        image = dict(image)
        for key in keys:
            if not isinstance(image.get(key), str):
                continue
            if key == LABEL_MAP:
                found = dataset.label_map(image, report)
            else:
                found = dataset.label_map_file(image, key, report)
            if found is None:
                del image[key]
        images.append(image)
    return replace(dataset, content={**dataset.content, "images": images})


def label_maps_read(name: str, *, copy_images: bool) -> tuple[str, ...]:
    """Return the keys of the label maps that are read to write a format."""
    if name == "voc":
        return (LABEL_MAP,)
    return LABEL_MAP_KEYS if name == "coco" and copy_images else ()


def as_coco(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    strict: bool = True,
) -> tuple[Path, Path]:
    """Return a COCO file of annotations of any format: the same file, if it is one.

    Args:
        path: As of `read_dataset`.
        images: Likewise; None is the folder that the format says, or else that of the annotations.
        output: JSON file to write, if one has to be made.
        strict: As of `read_dataset`.

    Returns:
        The file, and the folder of the images.
    """
    path, images = Path(path), None if images is None else Path(images)
    if find_format(path) == "coco":
        path = file_of(path)
        return path, images or path.parent
    dataset = read_dataset(path, images, strict=strict)
    write_json(output, dataset.content_from(Path(output).parent), compact=True)
    return Path(output), dataset.image_root or images or (path if path.is_dir() else path.parent)


def write_dataset(
    dataset: Dataset,
    folder: str | os.PathLike[str],
    name: str,
    *,
    copy_images: bool = False,
    overwrite: bool = False,
) -> Counter[str]:
    """Write annotations in a format.

    Args:
        dataset: What to write.
        folder: To write into.
        name: Of the format.
        copy_images: Copy the images too.
        overwrite: Replace what was exported into the folder before.

    Returns:
        What the format cannot hold, by what became of it.

    Raises:
        FileExistsError: The folder is not empty, or holds something else.
        ValueError: There is no such format, or the names of the images cannot be used.
    """
    if name not in FORMATS:
        raise ValueError(f"There is no format {name!r}. Allowed: {', '.join(FORMATS)}.")
    if copy_images and dataset.image_root is None:
        raise ValueError("To copy the images, their folder must be named.")
    for label in dataset.names().values():
        if not label.strip() or any(unicodedata.category(sign) in ("Cc", "Cs") for sign in label):
            raise ValueError(
                f"The category {label!r} has a name that text files cannot hold. Rename it."
            )
    _check_names(dataset, name, copy_images=copy_images)
    _check_numbers(dataset)
    has_label_map = any(isinstance(i.get(LABEL_MAP), str) for i in dataset.content["images"])
    if name == "voc" and has_label_map and len(dataset.names()) > MAX_LABELS:
        raise ValueError(
            f"There are label maps of {len(dataset.names())} classes, and voc holds at most "
            f"{MAX_LABELS}, of 8 bits. Write coco, or label maps of fewer classes."
        )
    output = Output(Path(folder), overwrite=overwrite)
    _module(name).write(dataset, output, copy_images=copy_images)
    lost = +output.lost
    output.finish(format=name, lost=dict(lost))
    return lost


def _check_names(dataset: Dataset, name: str, *, copy_images: bool) -> None:
    """Check, before anything is written, that each image has files of its own in the folder."""
    has_own_file = name in ("labelme", "voc", "yolo")
    if not has_own_file and not copy_images:
        return
    image_of: dict[str, str] = {}
    for image in dataset.content["images"]:
        file_name = image["file_name"]
        path = Path(file_name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"The files of image {file_name!r} would lie outside the folder. Name images by "
                "paths below their folder, or give that folder and --copy-images."
            )
        key = os.path.normpath(path.with_suffix("") if has_own_file else path)
        if key in image_of:
            raise ValueError(
                f"Two images would share the file {key}: {image_of[key]!r} and {file_name!r}. "
                "Rename one of them."
            )
        image_of[key] = file_name


def _check_numbers(dataset: Dataset) -> None:
    """Check what annotations hold beside COCO's own keys, which JSON has to hold too."""
    for annotation in dataset.content["annotations"]:
        for key, value in extra_keys(annotation).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"Annotation {annotation['id']!r} of image {annotation['image_id']!r} has the "
                    f"{key} {value}. Allowed: a finite number. Correct or remove it."
                )


def _module(name: str) -> ModuleType:
    return importlib.import_module(FORMATS[name])
