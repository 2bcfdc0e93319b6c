"""labelme folders: a JSON file beside each image, with shapes in groups."""

import base64
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskx.core.text import listed
from maskx.data.coco_shapes import mask_extent
from maskx.data.coco_structure import Report
from maskx.data.formats.dataset import (
    Builder,
    Dataset,
    Output,
    count_lost,
    extra_keys,
    has_own_box,
    size_of,
)
from maskx.data.json_files import read_json
from maskx.data.masks import decode_segmentation

__all__ = ["is_of_format", "read", "write"]

_NO_CLASSES = ("__ignore__", "_background_")
_SHAPE_KEYS = {"label", "points", "group_id", "shape_type", "flags", "description", "mask"}
_LABELS = "labels.txt"
_CIRCLE = 64  # corners
_NUM_LOOKED_AT = 100  # JSON files of a folder, to see what they are


def is_of_format(path: Path) -> bool:
    """Whether a path is such a file, or a folder of them."""
    if path.is_dir():
        return any(map(_is_file, itertools.islice(path.rglob("*.json"), _NUM_LOOKED_AT)))
    return path.suffix == ".json" and _is_file(path)


def read(path: Path, images: Path | None, report: Report) -> Dataset:
    """Read a folder, those below it too, or one file.

    Shapes of one label and group are one object. Flags of an image that are on and have the name of
    a label are tags.
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    contents = [(file, _content(file)) for file in files]
    contents = [(file, content) for file, content in contents if content is not None]
    builder = Builder(_listed_labels(folder))
    for _, content in contents:
        for shape in content["shapes"]:
            if isinstance(shape, dict) and isinstance(shape.get("label"), str):
                builder.category(shape["label"])
    root = images or folder
    for file, content in contents:
        image_file = file.parent / str(content["imagePath"]).replace("\\", "/")
        name = Path(os.path.relpath(image_file, folder)).as_posix()
        size = content.get("imageHeight"), content.get("imageWidth")
        if not all(isinstance(side, int) and side > 0 for side in size):
            size = size_of(root / name, report)
        if size is None:
            continue
        builder.add_image(name, *size)
        for shapes in _groups(content["shapes"], file, report):
            _read_object(shapes, file, builder, report)
        flags = content.get("flags")
        flags = flags.items() if isinstance(flags, dict) else ()
        flags = [name for name, is_on in flags if is_on is True]
        builder.add_tags(name for name in flags if name in builder)
        for name in flags:
            if name not in builder:
                report.note("flag of an image that is no label (no tag)", name)
    return builder.dataset(root)


def write(dataset: Dataset, output: Output, *, copy_images: bool) -> None:
    """Write the folder; the images are copied beside the files, or named where they are."""
    names = dataset.names()
    output.write(_LABELS, "".join(f"{name}\n" for name in names.values()))
    for image, objects in dataset.objects():
        tags = dataset.tags(image, objects)
        count_lost(output, image, objects, tags, holds="tags crowds boxes extra")
        name = Path(image["file_name"])
        file = name.with_suffix(".json")
        if copy_images:
            output.copy(dataset.image_file(image), name.as_posix())
            image_path = name.name
        else:
            root = dataset.image_root or output.folder
            image_path = os.path.relpath(root / name, (output.folder / file).parent)
        shapes = []
        for number, annotation in enumerate(objects, 1):
            taken = extra_keys(annotation).keys() & (_SHAPE_KEYS - {"description"})
            output.lost.update(f"values of {key}, left out" for key in taken)
            shapes += _shapes(annotation, names[annotation["category_id"]], number, image)
        content = {
            "version": "5.5.0",
            "flags": {names[id_]: True for id_ in tags},
            "shapes": shapes,
            "imagePath": image_path,
            "imageData": None,
            "imageHeight": image["height"],
            "imageWidth": image["width"],
        }
        output.write(file.as_posix(), json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def _is_file(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(1 << 16)
    return head.lstrip().startswith(b"{") and re.search(rb'"shapes"\s*:', head) is not None


def _content(file: Path) -> dict[str, Any] | None:
    """Return what a file holds; None for JSON files of something else."""
    if not _is_file(file):
        return None
    content = read_json(file, what="labelme file")
    if not isinstance(content.get("shapes"), list) or not isinstance(content.get("imagePath"), str):
        raise ValueError(f"{file}: lacks the list 'shapes' or the path 'imagePath'. Restore it.")
    return content


def _listed_labels(folder: Path) -> list[str]:
    file = folder / _LABELS
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    return [line for line in lines if line.strip() and line not in _NO_CLASSES]


def _groups(shapes: list[Any], file: Path, report: Report) -> Iterator[list[dict[str, Any]]]:
    found: dict[Any, list[dict[str, Any]]] = {}
    for position, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            report.entry("labelme_shape", f"{file}: shapes[{position}] has no label", "Give it one")
            continue
        group = shape.get("group_id")
        key = position if group is None else (shape["label"], str(group))
        found.setdefault(key, []).append(shape)
    yield from found.values()


def _read_object(
    shapes: list[dict[str, Any]], file: Path, builder: Builder, report: Report
) -> None:
    image = builder.images[-1]
    box, polygons, mask = None, [], None
    for shape in shapes:
        kind = shape.get("shape_type", "polygon")
        try:
            points = np.array(shape.get("points"), float).reshape(-1, 2)
        except (TypeError, ValueError):
            points = np.empty((0, 2))
        if not np.isfinite(points).all():
            points = np.empty((0, 2))
        if kind == "rectangle" and len(points) >= 2:
            box = [*points.min(0), *points.max(0)]
        elif kind == "polygon" and len(points) >= 3:
            polygons.append(points.ravel())
        elif kind == "circle" and len(points) == 2:
            polygons.append(_circle(*points))
        elif (part := _read_mask(kind, shape.get("mask"), points, image)) is not None:
            mask = part if mask is None else mask | part
        else:
            report.entry(
                "labelme_shape",
                f"{file}: label {shape['label']!r:.60} has a {kind!r:.20} of {len(points)} points",
                f"Allowed: {listed(['polygon', 'rectangle', 'circle', 'mask'])}, whole",
            )
    if mask is not None and polygons:
        mask |= decode_segmentation([p.tolist() for p in polygons], image["height"], image["width"])
        polygons = []
    if box is None and mask is None and not polygons:
        return
    first = shapes[0]
    extra = {key: value for key, value in first.items() if key not in _SHAPE_KEYS}
    if first.get("description"):
        extra["description"] = first["description"]
    flags = first.get("flags")
    crowd = isinstance(flags, dict) and bool(flags.get("crowd"))
    builder.add_object(
        first["label"], box=box, polygons=polygons, mask=mask, crowd=crowd, extra=extra
    )


def _circle(centre: np.ndarray, edge: np.ndarray) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, _CIRCLE, endpoint=False)
    radius = np.hypot(*(edge - centre))
    return (centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)).ravel()


def _read_mask(
    kind: str, text: Any, points: np.ndarray, image: Mapping[str, Any]
) -> np.ndarray | None:
    """Read a mask, (H, W) bool; None if it is none, or has no pixel in its image."""
    if kind != "mask" or len(points) != 2 or not isinstance(text, str):
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            part = np.asarray(picture.convert("L")) > 0
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    x, y = np.round(points.min(0)).astype(int).tolist()
    part = part[max(0, -y) :, max(0, -x) :]
    mask = np.zeros((image["height"], image["width"]), bool)
    place = mask[max(0, y) :, max(0, x) :][: part.shape[0], : part.shape[1]]
    place |= part[: place.shape[0], : place.shape[1]]
    return mask if mask.any() else None


def _shapes(
    annotation: dict[str, Any], name: str, number: int, image: Mapping[str, Any]
) -> list[dict[str, Any]]:
    extra = extra_keys(annotation)
    segmentation = annotation.get("segmentation")
    parts: list[tuple[str, list[list[float]], str | None]] = []
    if isinstance(segmentation, dict):
        x1, y1, x2, y2 = map(int, mask_extent(segmentation))
        mask = decode_segmentation(segmentation, image["height"], image["width"])
        file = io.BytesIO()
        Image.fromarray(mask[y1:y2, x1:x2].astype(np.uint8) * 255).save(file, "PNG")
        text = base64.b64encode(file.getvalue()).decode("ascii")
        parts.append(("mask", [[x1, y1], [x2 - 1, y2 - 1]], text))
    elif segmentation:
        for polygon in segmentation:
            parts.append(("polygon", np.reshape(polygon, (-1, 2)).tolist(), None))
    if has_own_box(annotation):
        x, y, width, height = annotation["bbox"]
        parts.append(("rectangle", [[x, y], [x + width, y + height]], None))
    group = number if len(parts) > 1 else None
    return [
        {
            **extra,
            "label": name,
            "points": points,
            "group_id": group,
            "description": extra.get("description", ""),
            "shape_type": kind,
            "flags": {"crowd": True} if annotation["iscrowd"] else {},
            "mask": mask,
        }
        for kind, points, mask in parts
    ]
