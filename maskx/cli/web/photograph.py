"""A photograph on the page: what the model finds in it, and the objects that a person gives."""

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from werkzeug.datastructures import FileStorage

from maskx.core.text import listed
from maskx.data.coco_shapes import QUALITY_KEY, read_box, read_mask
from maskx.data.formats.table import read_dataset
from maskx.data.masks import decode_segmentation
from maskx.engine.results import Prediction

__all__ = ["Photograph", "base_name", "read_annotations"]


class Photograph:
    """What is known of a photograph.

    Args:
        found: what the model finds in it.
        file_name: without its folder.

    Attributes:
        content: COCO dict of this image alone: the objects of an annotation file, then those whose
            boxes were drawn on the page.
    """

    def __init__(self, found: Prediction, file_name: str) -> None:
        self.found = found
        height, width = found.image_size
        names = enumerate(found.class_names, 1)
        self.content: dict[str, Any] = {
            "images": [{"id": 1, "file_name": file_name, "height": height, "width": width}],
            "annotations": [],
            "categories": [{"id": number, "name": name} for number, name in names],
        }
        self._num_of_file = 0

    def take_file(self, content: dict[str, Any], source: str) -> None:
        """Take the objects of an annotation file, in place of those of another file.

        Args:
            content: COCO dict.
            source: name of the file, for messages.

        Raises:
            ValueError: it does not hold this image, or says another size of it.
        """
        image = self._image_in(content["images"], source)
        of_image = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        names, drawn = self._names(), self.content["annotations"][self._num_of_file :]
        self.content = {
            **content,
            "images": [image],
            "annotations": of_image,
            "categories": list(content["categories"]),
        }
        self._num_of_file = len(of_image)
        for annotation in drawn:
            self._add(names[annotation["category_id"]], annotation)

    def box_without_mask(self, number: object) -> tuple[str, list[float]]:
        """Return category and box (x0, y0, x1, y1) of a person's object that has no mask.

        Raises:
            ValueError: it has one, or there is no such object.
        """
        annotations = self.content["annotations"]
        if type(number) is not int or not 0 <= number < len(annotations):
            raise ValueError(
                f"The object is {number!r:.80}. Allowed: the number of one of the "
                f"{len(annotations)} objects that were given, counted from 0."
            )
        given = self._given(annotations[number])
        if not given["needs_mask"]:
            raise ValueError(f"Object {number}, '{given['name']}', needs no mask.")
        return given["name"], given["box"]

    def give_mask(self, number: int, mask: dict[str, Any]) -> None:
        """Give a person's object the keys of a mask."""
        annotations = self.content["annotations"]
        annotations[number] = {**annotations[number], **mask}

    def add_drawn(self, name: str, box: Sequence[float], mask: dict[str, Any]) -> None:
        """Add an object whose box (x0, y0, x1, y1) was drawn on the page."""
        x0, y0, x1, y1 = box
        self._add(name, {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0, **mask})

    def objects(self) -> list[dict[str, Any]]:
        """Say what there is, first what a person gave, by whose position masks are asked for.

        Masks are polygons that the browser fills by the even-odd rule.
        """
        given = [self._given(annotation) for annotation in self.content["annotations"]]
        return given + [self._predicted(entry) for entry in self.found.to_coco(0)]

    def to_coco(self, threshold: float, source: str) -> dict[str, Any]:
        """Make a COCO file of what a person gave and what is found with at least a score.

        ``source`` is what found it.
        """
        shown = self.found.above(threshold)
        categories = list(self.content["categories"])
        ids = {name: _category_id(categories, name) for name in dict.fromkeys(shown.names)}
        found = shown.to_annotations(
            self.content["images"][0]["id"],
            [ids.get(name) for name in shown.class_names],
            source=source,
            first_id=self._next_id(),
        )
        annotations = [*self.content["annotations"], *found]
        return {**self.content, "annotations": annotations, "categories": categories}

    def _image_in(self, images: Sequence[dict[str, Any]], source: str) -> dict[str, Any]:
        own = self.content["images"][0]
        name = base_name(own["file_name"])
        same = [i for i in images if base_name(str(i.get("file_name", ""))) == name]
        if len(images) == 1:
            same = images
        if len(same) != 1:
            names = listed([str(i.get("file_name", i["id"])) for i in same or images], 3)
            count = f"{len(same)} images" if same else f"no image '{name}' among its {len(images)}"
            raise ValueError(
                f"{source} has {count}: {names}. Name the photograph as in the file, or give a "
                "file of this image alone."
            )
        sizes = [(image["width"], image["height"]) for image in (same[0], own)]
        if sizes[0] != sizes[1]:
            (width, height), (own_width, own_height) = sizes
            raise ValueError(
                f"{source} says that '{same[0].get('file_name', name)}' has {width} x {height} "
                f"pixels, but the photograph has {own_width} x {own_height}. Give the photograph "
                "on which the boxes were drawn, in its own size."
            )
        return same[0]

    def _given(self, annotation: dict[str, Any]) -> dict[str, Any]:
        size = self.found.image_size
        mask = read_mask(annotation.get("segmentation"), *size)
        return {
            "name": self._names()[annotation["category_id"]],
            "score": None,
            "quality": annotation.get(QUALITY_KEY),
            "box": read_box(annotation["bbox"], *size),
            "polygons": [] if mask is None else _polygons(decode_segmentation(mask, *size)),
            "needs_mask": mask is None and not annotation["iscrowd"],
        }

    def _predicted(self, entry: dict[str, Any]) -> dict[str, Any]:
        box, mask = None, decode_segmentation(entry["segmentation"], *self.found.image_size)
        if self.found.boxes is not None:
            x, y, width, height = entry["bbox"]
            box = [x, y, x + width, y + height]
        return {
            "name": self.found.class_names[entry["category_id"] - 1],
            "score": entry.get("score"),
            "quality": None,
            "box": box,
            "polygons": _polygons(mask),
            "needs_mask": False,
        }

    def _names(self) -> dict[int, str]:
        return {category["id"]: category["name"] for category in self.content["categories"]}

    def _next_id(self) -> int:
        ids = (annotation["id"] for annotation in self.content["annotations"])
        return 1 + max((id_ for id_ in ids if isinstance(id_, int)), default=0)

    def _add(self, name: str, annotation: dict[str, Any]) -> None:
        own = {
            "id": self._next_id(),
            "image_id": self.content["images"][0]["id"],
            "category_id": _category_id(self.content["categories"], name),
        }
        self.content["annotations"].append({**annotation, **own})


def read_annotations(upload: FileStorage, *, strict: bool) -> tuple[dict[str, Any], list[str]]:
    """Read an uploaded annotation file, of any format that is one file.

    Args:
        upload: the file.
        strict: whether what is wrong in it is an error; else it is mended or left out.

    Returns:
        A COCO dict, and what there is to say of how it was read.

    Raises:
        ValueError: it cannot be read, or what it holds is wrong.
    """
    name = base_name(upload.filename)
    with tempfile.TemporaryDirectory() as folder, _warnings() as warnings:
        # The name is not trusted; what is told by it is told by its ending.
        path = Path(folder, f"annotations{'.xml' if name.lower().endswith('.xml') else '.json'}")

        def shown(text: str) -> str:
            return text.replace(str(path), name).replace(f"{folder}{os.sep}", "")

        upload.save(path)
        try:
            content = read_dataset(path, strict=strict).content
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(shown(str(error))) from error
        return content, [shown(text) for text in warnings]


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what this thread is warned of by the package, which its log has as well."""
    texts: list[str] = []
    handler, thread = logging.Handler(logging.WARNING), threading.get_ident()
    handler.filter = lambda record: record.thread == thread
    handler.emit = lambda record: texts.append(record.getMessage())
    package = logging.getLogger("maskx")
    package.addHandler(handler)
    try:
        yield texts
    finally:
        package.removeHandler(handler)


def base_name(file_name: str) -> str:
    """Return a file name without its folder, of any system."""
    return PurePosixPath(file_name.replace("\\", "/")).name


def _category_id(categories: list[dict[str, Any]], name: str) -> int:
    """Return the id of a category, which is added if it is new."""
    ids = {category["name"]: category["id"] for category in categories}
    if name not in ids:
        ids[name] = 1 + max(ids.values(), default=0)
        categories.append({"id": ids[name], "name": name})
    return ids[name]


def _polygons(mask: np.ndarray) -> list[list[int]]:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [contour.ravel().tolist() for contour in contours if len(contour) > 2]
