"""CVAT: writes COCO 1.0 as CVAT imports it, reads that and "CVAT for images" in XML."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from maskx.data.coco_structure import Report
from maskx.data.formats.dataset import Builder, Dataset, Output, count_lost
from maskx.data.label_maps import LABEL_MAP_KEYS
from maskx.data.masks import decode_segmentation

__all__ = ["is_of_format", "read", "write"]

_FILE = "annotations/instances_default.json"


def is_of_format(path: Path) -> bool:
    """Whether a path is an XML file of CVAT."""
    if path.suffix.lower() != ".xml" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b"<annotations" in file.read(4096)


def read(path: Path, images: Path | None, report: Report) -> Dataset:
    """Read an XML file.

    Shapes of one label and group are one object. Tags become image labels.

    Raises:
        ValueError: It is no XML, or of a video.
    """
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: is not valid XML: {error}. Export the task again.") from error
    if root.find("track") is not None:
        report.fail(
            f"holds {len(root.findall('track'))} tracks of a video",
            "Export the task as 'CVAT for images 1.1'",
        )
    builder = Builder(name for name in _labels(root) if name)
    for image in root.iter("image"):
        name = image.get("name", "")
        sides = image.get("height", ""), image.get("width", "")
        if not all(side.isascii() and side.isdigit() and int(side) for side in sides):
            report.entry("cvat_image", f"image {name!r} has no size", "Export the task again")
            continue
        builder.add_image(name, *map(int, sides))
        for shapes in _groups(image):
            _read_object(shapes, f"image {name!r}", builder, report)
        builder.add_tags(tag.get("label", "") for tag in image.iter("tag"))
    return builder.dataset(images)


def write(dataset: Dataset, output: Output, *, copy_images: bool) -> None:
    """Write the folder. What CVAT does not read of COCO 1.0 stays in the file, and is counted."""
    images, annotations = [], []
    for image, objects in dataset.objects():
        images.append({key: image[key] for key in image if key not in LABEL_MAP_KEYS})
        tags = dataset.tags(image, objects)
        output.lost["tags, which stay in the file but CVAT does not read"] += len(tags)
        own = sum(bool(extra) for extra in map(_unread, objects))
        output.lost["objects with further keys, which CVAT does not read"] += own
        count_lost(output, image, objects, tags, holds="tags crowds boxes extra")
        for annotation in objects:
            mask = annotation.get("segmentation") or []
            area = annotation.get("area")
            if area is None and mask:
                area = float(decode_segmentation(mask, image["height"], image["width"]).sum())
            elif area is None:
                area = annotation["bbox"][2] * annotation["bbox"][3]
            annotations.append({**annotation, "segmentation": mask, "area": area})
        if copy_images:
            output.copy(dataset.image_file(image), f"images/{image['file_name']}")
    categories = [{"supercategory": "", **c} for c in dataset.content["categories"]]
    parts = {"images": images, "annotations": annotations, "categories": categories}
    output.write_json(_FILE, {**dataset.content, **parts})
    # What CVAT's form for a new task takes as its labels.
    output.write_json("labels.json", [{"name": c["name"], "attributes": []} for c in categories])
    output.lost = +output.lost


def _unread(annotation: dict[str, Any]) -> set[str]:
    known = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}
    return annotation.keys() - known


def _labels(root: ElementTree.Element) -> Iterator[str]:
    for label in root.iter("label"):
        if label.get("name") is None and label.findtext("name"):
            yield label.findtext("name")


def _groups(image: ElementTree.Element) -> Iterator[list[ElementTree.Element]]:
    found: dict[Any, list[ElementTree.Element]] = {}
    for position, shape in enumerate(image):
        if shape.tag == "tag":
            continue
        group = shape.get("group_id", "0")
        key = position if group in ("0", "") else (shape.get("label"), group)
        found.setdefault(key, []).append(shape)
    yield from found.values()


def _read_object(
    shapes: list[ElementTree.Element], where: str, builder: Builder, report: Report
) -> None:
    image = builder.images[-1]
    box, polygons, mask = None, [], None
    for shape in shapes:
        try:
            if shape.tag == "box" and not float(shape.get("rotation", 0)):
                box = [float(shape.get(key)) for key in ("xtl", "ytl", "xbr", "ybr")]
                continue
            if shape.tag == "polygon":
                pairs = [pair.split(",") for pair in shape.get("points").split(";")]
                polygons.append(np.array(pairs, float).ravel())
                continue
            if shape.tag == "mask":
                part = _read_mask(shape, image)
                mask = part if mask is None else mask | part
                continue
        except (AttributeError, TypeError, ValueError):
            pass
        report.entry(
            "cvat_shape",
            f"{where} has a {shape.tag} of the label {shape.get('label')!r:.60}",
            "Allowed: upright boxes, polygons and masks, whole",
        )
    if mask is not None and polygons:
        mask |= decode_segmentation([p.tolist() for p in polygons], image["height"], image["width"])
        polygons = []
    if box is not None or mask is not None or polygons:
        label = shapes[0].get("label", "")
        builder.add_object(label, box=box, polygons=polygons, mask=mask)


def _read_mask(shape: ElementTree.Element, image: dict[str, Any]) -> np.ndarray:
    """Read run lengths of the rows of a box, of the background first."""
    left, top, width, height = (int(shape.get(key)) for key in ("left", "top", "width", "height"))
    runs = np.array(shape.get("rle").split(","), int)
    values = np.repeat(np.arange(len(runs)) % 2, runs).astype(bool).reshape(height, width)
    if top < 0 or left < 0:
        raise ValueError("a mask begins outside its image")
    mask = np.zeros((image["height"], image["width"]), bool)
    place = mask[top : top + height, left : left + width]
    place[:] = values[: place.shape[0], : place.shape[1]]
    if not mask.any():
        raise ValueError("a mask has no pixel in its image")
    return mask
