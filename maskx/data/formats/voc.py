"""PASCAL VOC folders: an XML file of boxes and a PNG file of masks for each image.

The masks of an image are one map: pixels of value i are those of the i-th object of the XML file.
A box of VOC names pixels from 1 on, its last ones included.
"""

import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from maskx.data.coco_structure import Report
from maskx.data.formats.dataset import (
    IMAGE_ENDINGS,
    Builder,
    Dataset,
    Output,
    count_lost,
    size_of,
)
from maskx.data.label_maps import voc_palette
from maskx.data.masks import decode_segmentation

__all__ = ["is_of_format", "read", "write"]

_MAX_OBJECTS = 254  # of a map with 8 bits; 255 is of no object
_BOX = ("xmin", "ymin", "xmax", "ymax")
_HEADER = "# label:color_rgb:parts:actions"
_LABELS, _PART = "labelmap.txt", "default"


def is_of_format(path: Path) -> bool:
    """Whether a path is such a folder."""
    return next((path / "Annotations").rglob("*.xml"), None) is not None


def read(path: Path, images: Path | None, report: Report) -> Dataset:
    """Read all XML files of the folder. Objects that are "difficult" are read as crowd regions."""
    root = images or path / "JPEGImages"
    builder = Builder(_listed_labels(path))
    files = sorted((path / "Annotations").rglob("*.xml"))
    trees = {}
    for file in files:
        try:
            trees[file] = ElementTree.fromstring(file.read_bytes())
        except ElementTree.ParseError as error:
            report.entry("voc_xml", f"{file} is not valid XML: {error}", "Restore it")
    tags = _read_tags(path, builder)
    for file, tree in trees.items():
        stem = file.relative_to(path / "Annotations").with_suffix("").as_posix()
        name = _file_name(tree, stem, root)
        size = tree.find("size")
        sides = [_number(size, key) for key in ("height", "width")] if size is not None else [None]
        sides = list(map(int, sides)) if all(sides) else size_of(root / name, report)
        if sides is None:
            continue
        builder.add_image(name, *sides)
        numbers = _read_map(path / "SegmentationObject" / f"{stem}.png")
        for index, found in enumerate(tree.iter("object"), 1):
            _read_object(found, index, numbers, f"{file}, object {index}", builder, report)
        builder.add_tags(tags.get(stem, ()))
    return builder.dataset(root)


def write(dataset: Dataset, output: Output, *, copy_images: bool) -> None:
    """Write the folder; crowd regions become "difficult" objects."""
    names = dataset.names()
    lines = [_HEADER, "background:0,0,0::"]
    for index, name in enumerate(names.values(), 1):
        color = ",".join(map(str, voc_palette()[index % 256].tolist()))
        lines.append(f"{name}:{color}::")
    output.write(_LABELS, "\n".join(lines) + "\n")
    stems, with_masks = [], []
    tagged: dict[int, set[str]] = {}
    for image, objects in dataset.objects():
        tags = dataset.tags(image, objects)
        kept = [id_ for id_ in tags if _is_file_name(names[id_])]
        output.lost["tags whose name is no file name, left out"] += len(tags) - len(kept)
        count_lost(output, image, objects, tags, holds="tags crowds boxes")
        stem = Path(image["file_name"]).with_suffix("").as_posix()
        stems.append(stem)
        for id_ in kept:
            tagged.setdefault(id_, set()).add(stem)
        tree = _tree(image, objects, names)
        output.write(f"Annotations/{stem}.xml", tree)
        if any(annotation.get("segmentation") for annotation in objects):
            with_masks.append(stem)
            index_of = {id_: index for index, id_ in enumerate(names, 1)}
            numbers = _numbers(image, objects, output)
            classes = np.array(
                [0, *(index_of[o["category_id"]] for o in objects[:_MAX_OBJECTS])], np.uint8
            )
            output.write(f"SegmentationObject/{stem}.png", _png(numbers))
            if len(names) <= _MAX_OBJECTS:
                output.write(f"SegmentationClass/{stem}.png", _png(classes[numbers]))
        if copy_images:
            output.copy(dataset.image_file(image), f"JPEGImages/{image['file_name']}")
    output.write(f"ImageSets/Main/{_PART}.txt", "".join(f"{stem}\n" for stem in stems))
    output.write(f"ImageSets/Segmentation/{_PART}.txt", "".join(f"{stem}\n" for stem in with_masks))
    for id_, own in tagged.items():
        lines = [f"{stem} {1 if stem in own else -1}\n" for stem in stems]
        output.write(f"ImageSets/Main/{names[id_]}_{_PART}.txt", "".join(lines))
    output.lost = +output.lost


def _is_file_name(name: str) -> bool:
    return bool(name) and not set(name) & set('/\\:*?"<>|\0\n') and len(name.encode()) < 200


def _listed_labels(path: Path) -> list[str]:
    file = path / _LABELS
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    lines = [line for line in lines if line.strip()]
    names = [line.rsplit(":", 3)[0] for line in lines[lines[:1] == [_HEADER] :]]
    return names[names[:1] == ["background"] :]


def _read_tags(path: Path, builder: Builder) -> dict[str, list[str]]:
    """Read which images show a class by the lists of Main, one for each class and part."""
    tags: dict[str, list[str]] = {}
    for file in sorted((path / "ImageSets" / "Main").glob("*_*.txt")):
        name = file.stem.rpartition("_")[0]
        for line in file.read_text(encoding="utf-8").split("\n"):
            stem, _, sign = line.rpartition(" ")
            if sign == "1":
                tags.setdefault(stem.strip(), []).append(name)
                builder.category(name)
    return tags


def _file_name(tree: ElementTree.Element, stem: str, root: Path) -> str:
    given = (tree.findtext("filename") or "").strip()
    parent = Path(stem).parent
    if given and (Path(given).suffix or not root.is_dir()):
        return given if "/" in given else (parent / given).as_posix()
    for ending in IMAGE_ENDINGS:
        if (root / f"{stem}{ending}").is_file():
            return f"{stem}{ending}"
    return f"{stem}.jpg"


def _number(element: ElementTree.Element | None, key: str) -> float | None:
    try:
        return float(element.findtext(key))
    except (TypeError, ValueError, AttributeError):
        return None


def _read_map(file: Path) -> np.ndarray | None:
    if not file.is_file():
        return None
    with Image.open(file) as image:
        return np.asarray(image)


def _read_object(
    found: ElementTree.Element,
    index: int,
    numbers: np.ndarray | None,
    where: str,
    builder: Builder,
    report: Report,
) -> None:
    name = found.findtext("name")
    corners = [_number(found.find("bndbox"), key) for key in _BOX]
    if not name or None in corners:
        report.entry("voc_object", f"{where} lacks its name or bndbox", "Give it both")
        return
    x1, y1, x2, y2 = corners
    image = builder.images[-1]
    mask = None
    if numbers is not None and numbers.shape == (image["height"], image["width"]):
        mask = numbers == index
    elif numbers is not None:
        report.entry(
            "voc_map_size",
            f"{where}: its map has {numbers.shape}, its image {image['height']}, {image['width']}",
            "Draw it in the size of the image",
        )
    builder.add_object(
        name,
        box=(x1 - 1, y1 - 1, x2, y2),
        mask=mask if mask is not None and mask.any() else None,
        crowd=found.findtext("difficult", "0").strip() == "1",
    )


def _tree(image: dict[str, Any], objects: list[dict[str, Any]], names: dict[int, str]) -> str:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, key: str, value: Any) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, key)
        element.text = str(value)
        return element

    ElementTree.SubElement(root, "folder").text = "JPEGImages"
    add(root, "filename", image["file_name"])
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
        add(size, key, value)
    has_mask = any(annotation.get("segmentation") for annotation in objects)
    add(root, "segmented", int(has_mask))
    for annotation in objects:
        found = ElementTree.SubElement(root, "object")
        add(found, "name", names[annotation["category_id"]])
        add(found, "difficult", annotation["iscrowd"])
        x, y, width, height = annotation["bbox"]
        box = ElementTree.SubElement(found, "bndbox")
        for key, value in zip(_BOX, (x + 1, y + 1, x + width, y + height), strict=True):
            add(box, key, f"{value:.10g}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _numbers(image: dict[str, Any], objects: list[dict[str, Any]], output: Output) -> np.ndarray:
    """Draw the masks into one map, smaller ones on top of larger ones."""
    height, width = image["height"], image["width"]
    numbers = np.zeros((height, width), np.uint8)
    masks = {
        number: decode_segmentation(annotation["segmentation"], height, width)
        for number, annotation in enumerate(objects, 1)
        if annotation.get("segmentation")
    }
    beyond = sum(number > _MAX_OBJECTS for number in masks)
    output.lost[f"masks beyond {_MAX_OBJECTS} objects of an image, left out"] += beyond
    masks = {number: mask for number, mask in masks.items() if number <= _MAX_OBJECTS}
    for number in sorted(masks, key=lambda number: -masks[number].sum()):
        numbers[masks[number]] = number
    for number, mask in masks.items():
        shown = (numbers[mask] == number).sum()
        output.lost["masks that others cover in part, cut there"] += 0 < shown < mask.sum()
        output.lost["masks that others cover wholly, left out"] += bool(shown == 0)
    return numbers


def _png(values: np.ndarray) -> bytes:
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette(voc_palette().astype(np.uint8).ravel().tolist())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
