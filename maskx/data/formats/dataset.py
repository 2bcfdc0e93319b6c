"""What formats are read into and written from: COCO's record form, and a folder of files."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskx.core.files import written_whole
from maskx.data.coco_shapes import mask_extent
from maskx.data.coco_structure import Report
from maskx.data.images import image_size
from maskx.data.label_maps import LABEL_MAP_KEYS, moved_label_maps, read_label_map

__all__ = [
    "IMAGE_ENDINGS",
    "LABEL_MAP",
    "Builder",
    "Dataset",
    "Output",
    "extra_keys",
    "has_own_box",
]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

LABEL_MAP = "label_map_file_name"
"""Of `LABEL_MAP_KEYS` that of the label map of the categories."""

MARKER = "maskx_export.json"
UNFINISHED = "maskx_export.unfinished"  # a name a line, each written before its file is
_BOX_TOLERANCE = 0.05  # pixels; COCO rounds boxes and polygons to 0.01
_KEYS = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}


@dataclass
class Dataset:
    """Annotations in COCO's form, and where their images are.

    Attributes:
        content: COCO dict.
        image_root: Folder that the file names are in; None if that is not known.
        lost_files: What is wrong with the images and label maps that were left out as missing or
            broken, by path.
        label_map_root: Folder that the names of label maps count from; None if there are none.
    """

    content: dict[str, Any]
    image_root: Path | None
    lost_files: Mapping[str, str] = field(default_factory=dict)
    label_map_root: Path | None = None

    def objects(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Give each image with its annotations."""
        own: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in self.content["images"]}
        for annotation in self.content["annotations"]:
            own[annotation["image_id"]].append(annotation)
        for image in self.content["images"]:
            yield image, own[image["id"]]

    def image_file(self, image: Mapping[str, Any]) -> Path:
        """Return the file of an image."""
        return Path(self.image_root, image["file_name"])

    def label_map_file(self, image: Mapping[str, Any], key: str, report: Report) -> Path | None:
        """Return the file of a label map; None if it is not there: the report has it then."""
        file = self.label_map_root / image[key]
        if file.is_file():
            return file
        remedy = f"Restore it, or remove {key} of the image"
        report.lost_file("label_map_missing", "label map", file, "does not exist", remedy)
        return None

    def label_map(self, image: Mapping[str, Any], report: Report) -> np.ndarray | None:
        """Read the label map of the categories, (H, W).

        None if it is not there or cannot be used: the report has it then.
        """
        file = self.label_map_file(image, LABEL_MAP, report)
        if file is None:
            return None
        size = image["height"], image["width"]
        num_classes = len(self.content["categories"])
        try:
            return read_label_map(file, *size, num_classes=num_classes, image_id=image["id"])
        except ValueError as error:
            problem = f"cannot be used: {str(error).rstrip('.')}"
            report.lost_file("label_map_broken", "label map", file, problem, "Restore it")
            return None

    def content_from(self, folder: Path) -> dict[str, Any]:
        """Return the content as a file in another folder has it, which names its label maps."""
        if self.label_map_root is None:
            return self.content
        images = [
            {**image, **moved_label_maps(image, self.label_map_root, folder)}
            for image in self.content["images"]
        ]
        return {**self.content, "images": images}

    def names(self) -> dict[int, str]:
        """Return the names of the categories by id, in the order of the ids."""
        categories = sorted(self.content["categories"], key=lambda category: category["id"])
        return {category["id"]: category["name"] for category in categories}

    def tags(self, image: Mapping[str, Any], objects: Iterable[Mapping[str, Any]]) -> list[int]:
        """Return the category ids that an image is said to show without an object of them."""
        shown = {annotation["category_id"] for annotation in objects}
        return [id_ for id_ in image.get("image_labels", ()) if id_ not in shown]


class Builder:
    """Makes the COCO form of what a format holds.

    Args:
        names: Of the categories, in their order; others are added as they are met.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._ids: dict[str, int] = {}
        self.images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        for name in names:
            self.category(name)

    def category(self, name: str) -> int:
        """Return the id of a category."""
        return self._ids.setdefault(name, len(self._ids) + 1)

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def add_image(self, file_name: str, height: int, width: int) -> None:
        """Begin an image, to which objects are added."""
        id_ = len(self.images) + 1
        self.images.append({"id": id_, "file_name": file_name, "height": height, "width": width})

    def add_tags(self, names: Iterable[str]) -> None:
        """Say what the image shows."""
        ids = {self.category(name) for name in names}
        if ids:
            image = self.images[-1]
            image["image_labels"] = sorted(ids.union(image.get("image_labels", ())))

    def add_object(
        self,
        name: str,
        *,
        box: Sequence[float] | None = None,
        polygons: Sequence[Sequence[float]] = (),
        mask: np.ndarray | None = None,
        crowd: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an object to the image.

        Args:
            name: Of its category.
            box: Corners; None for those of its mask.
            polygons: Or `mask`, or none of them.
            mask: (H, W) bool.
            crowd: Whether it is a crowd region.
            extra: Further keys.
        """
        segmentation: Any = [list(map(float, polygon)) for polygon in polygons]
        if mask is not None:
            rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
            segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
        entry = {
            "id": len(self._annotations) + 1,
            "image_id": self.images[-1]["id"],
            "category_id": self.category(name),
            "iscrowd": int(crowd),
        }
        if box is None and (mask is not None or any(segmentation)):
            box = mask_extent(segmentation)
        if box is not None:
            x1, y1, x2, y2 = map(float, box)
            entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        if segmentation:
            entry["segmentation"] = segmentation
        self._annotations.append({**extra_keys(extra or {}), **entry})

    def dataset(self, image_root: Path | None, label_map_root: Path | None = None) -> Dataset:
        """Return all that was added."""
        categories = [{"id": id_, "name": name} for name, id_ in self._ids.items()]
        content = {
            "images": self.images,
            "annotations": self._annotations,
            "categories": categories,
        }
        return Dataset(content, image_root, label_map_root=label_map_root)


@dataclass
class Output:
    """A folder that a data set is written into, whole files only.

    It says of itself what is written, also after an interruption: so that can be written over.

    Attributes:
        folder: Must not exist or be empty, unless it is written over.
        overwrite: Replace what an export wrote here before, be it whole or interrupted.
        lost: Numbers of what the format cannot hold, and what became of it.
    """

    folder: Path
    overwrite: bool = False
    lost: Counter[str] = field(default_factory=Counter)
    _written: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        earlier = self._earlier() if self.folder.exists() else []
        self.folder.mkdir(parents=True, exist_ok=True)
        self._unfinished.touch()
        for name in [*earlier, MARKER]:
            (self.folder / name).unlink(missing_ok=True)
        self._unfinished.write_bytes(b"")

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of a path below the folder."""
        if isinstance(content, str):
            content = content.encode("utf-8")
        with written_whole(self.path(name)) as scratch:
            scratch.write_bytes(content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.write(name, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")

    def copy(self, source: Path, name: str) -> None:
        """Copy a file to a path below the folder."""
        with written_whole(self.path(name)) as scratch:
            shutil.copyfile(source, scratch)

    def path(self, name: str) -> Path:
        """Return the path of a file below the folder, which is then written in its place."""
        path = os.path.normpath(name)
        if path in self._written:
            raise ValueError(
                f"Two files of the export would be {path}. Rename the image of that name."
            )
        self._written.append(path)
        with self._unfinished.open("a", encoding="utf-8") as file:
            file.write(json.dumps(path) + "\n")
        return self.folder / path

    def finish(self, **about: Any) -> None:
        """Write down which files are of this export."""
        path = self.folder / MARKER
        with written_whole(path) as scratch:
            text = json.dumps({**about, "files": self._written}, ensure_ascii=False, indent=1)
            scratch.write_text(text + "\n", encoding="utf-8")
        self._unfinished.unlink()

    @property
    def _unfinished(self) -> Path:
        return self.folder / UNFINISHED

    def _earlier(self) -> list[str]:
        """Return the files of an earlier export, if they may be replaced."""
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            return []
        if not self.overwrite:
            raise FileExistsError(f"{self.folder} exists. Name another folder, or add --overwrite.")
        marker, files = self.folder / MARKER, []
        if not marker.is_file() and not self._unfinished.is_file():
            raise FileExistsError(
                f"{self.folder} holds no export of maskx, so nothing in it is overwritten. Name "
                "another folder."
            )
        if marker.is_file():
            files += json.loads(marker.read_text(encoding="utf-8"))["files"]
        if self._unfinished.is_file():
            lines = self._unfinished.read_text(encoding="utf-8").rpartition("\n")[0]
            files += map(json.loads, lines.splitlines())  # a kill may have cut the last line
        return files


def extra_keys(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an annotation holds beside COCO's own keys."""
    return {key: value for key, value in annotation.items() if key not in _KEYS}


def has_own_box(annotation: Mapping[str, Any]) -> bool:
    """Whether a box is not just that of its mask."""
    if not annotation.get("segmentation"):
        return True
    x, y, width, height = annotation["bbox"]
    box = np.array([x, y, x + width, y + height])
    return bool(np.abs(box - mask_extent(annotation["segmentation"])).max() > _BOX_TOLERANCE)


def count_lost(
    output: Output,
    image: Mapping[str, Any],
    objects: Sequence[Mapping[str, Any]],
    tags: Sequence[int],
    *,
    holds: str,
) -> None:
    """Count what no format but COCO holds, of an image.

    Args:
        output: Whose `lost` takes it.
        image: As in the COCO form.
        objects: That are written.
        tags: Of the image.
        holds: Words for what the format holds: "tags", "crowds", "boxes", "extra" or keys of label
            maps.
    """
    lost = output.lost
    if "tags" not in holds:
        lost["tags, left out"] += len(tags)
    if "crowds" not in holds:
        lost["crowd regions, left out"] += sum(o["iscrowd"] for o in objects)
    kept = [o for o in objects if "crowds" in holds or not o["iscrowd"]]
    if "boxes" not in holds:
        own = sum(bool(o.get("segmentation")) and has_own_box(o) for o in kept)
        lost["boxes that are not those of their masks, replaced by these"] += own
    if "extra" not in holds:
        for annotation in kept:
            lost.update(f"values of {key}, left out" for key in extra_keys(annotation))
    for key in LABEL_MAP_KEYS:
        if key not in holds:
            lost[f"label maps ({key}), left out"] += isinstance(image.get(key), str)
    output.lost = +lost


def list_images(folder: Path) -> list[Path]:
    """Return the images below a folder, sorted, as paths from it."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    return sorted(path.relative_to(folder) for path in paths)


def size_of(path: Path, report: Report) -> tuple[int, int] | None:
    """Return (height, width) of an image, as it is when turned by its EXIF tag.

    None if there is no such image that can be read: the report has it then.
    """
    found = image_size(path)
    if found is None and path.is_file():
        report.lost_file("image_broken", "image", path, "cannot be read", "Restore it")
    elif found is None:
        remedy = "Check the folder of the images, or name it"
        report.lost_file("image_missing", "image", path, "does not exist", remedy)
    return found
