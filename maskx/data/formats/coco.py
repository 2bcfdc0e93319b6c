"""COCO's own format, which all others are brought into."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskx.data.coco_structure import Report
from maskx.data.formats.dataset import Dataset, Output
from maskx.data.json_files import read_json

__all__ = ["is_of_format", "read", "write"]

_FILES = ("annotations.json", "annotations/instances_default.json", "_annotations.coco.json")
_LABEL_MAPS = {"stuff_file_name": "stuff", "label_map_file_name": "label_maps"}


def file_of(path: Path) -> Path | None:
    """Return the annotation file of a path; None if it is none and holds none."""
    if path.is_dir():
        return next((path / name for name in _FILES if (path / name).is_file()), None)
    return path


def is_of_format(path: Path) -> bool:
    """Whether a path is a file, or a folder with one of a usual name."""
    return file_of(path) is not None


def read(path: Path, images: Path | None, report: Report) -> Dataset:
    """Read a file."""
    file = file_of(path)
    content = read_json(file, what="annotation file")
    return Dataset(content, images, label_map_root=file.parent)


def write(dataset: Dataset, output: Output, *, copy_images: bool) -> None:
    """Write `annotations.json`; label maps are copied with the images, or found where they are."""
    content = dataset.content_from(output.folder)
    if copy_images:
        images = []
        for image in dataset.content["images"]:
            output.copy(dataset.image_file(image), f"images/{image['file_name']}")
            images.append({**image, **_copied_label_maps(dataset, output, image)})
        content = {**content, "images": images}
    output.write_json(_FILES[0], content)


def _copied_label_maps(
    dataset: Dataset, output: Output, image: Mapping[str, Any]
) -> dict[str, str]:
    copied = {}
    for key, folder in _LABEL_MAPS.items():
        if isinstance(image.get(key), str):
            source = dataset.label_map_root / image[key]
            name = Path(folder, image["file_name"]).with_suffix(source.suffix)
            copied[key] = name.as_posix()
            output.copy(source, copied[key])
    return copied
