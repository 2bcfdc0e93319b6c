"""COCO's own format, which all others are brought into."""

from pathlib import Path

from maskx.data.coco import read_coco_json
from maskx.data.coco_structure import Report
from maskx.data.formats.dataset import Dataset, Output

__all__ = ["is_of_format", "read", "write"]

_FILES = ("annotations.json", "annotations/instances_default.json", "_annotations.coco.json")


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
    return Dataset(read_coco_json(file_of(path), strict=report.strict), images)


def write(dataset: Dataset, output: Output, *, copy_images: bool) -> None:
    """Write `annotations.json`."""
    output.write_json(_FILES[0], dataset.content)
    if copy_images:
        for image in dataset.content["images"]:
            output.copy(dataset, image, f"images/{image['file_name']}")
