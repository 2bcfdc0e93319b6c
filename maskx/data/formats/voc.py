"""PASCAL VOC folders: for each image an XML file of boxes, and PNG files of masks and of classes.

The masks of an image are one map: pixels of value i are those of the i-th object of the XML file.
The classes are a label map as in `maskx.data.label_maps`, of the classes that `labelmap.txt` lists,
or of VOC's. A box of VOC names pixels from 1 on, its last ones included.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from maskx.data.coco_structure import Report
from maskx.data.formats.dataset import (
    IMAGE_ENDINGS,
    LABEL_MAP,
    Builder,
    Dataset,
    Output,
    count_lost,
    size_of,
)
from maskx.data.images import image_size
from maskx.data.label_maps import label_map_of_instances, voc_palette, write_label_map
from maskx.data.masks import decode_segmentation
from maskx.data.vocabularies import VOC_CLASSES

__all__ = ["MAX_LABELS", "is_of_format", "read", "write"]

MAX_LABELS = 254
"""Objects of an image, or classes, that a map of 8 bits holds: 0 is the background, 255 unknown."""

_OBJECTS, _CLASSES = "SegmentationObject", "SegmentationClass"
_BOX = ("xmin", "ymin", "xmax", "ymax")
_HEADER = "# label:color_rgb:parts:actions"
_LABELS, _PART = "labelmap.txt", "default"


def is_of_format(path: Path) -> bool:
    """Whether a path is such a folder, of boxes or of label maps alone."""
    files = (("Annotations", "*.xml"), (_CLASSES, "*.png"))
    return any(next((path / part).rglob(kind), None) is not None for part, kind in files)


def read(path: Path, images: Path | None, report: Report) -> Dataset:
    """Read the XML files of the folder and its label maps.

    Objects that are "difficult" are read as crowd regions. A label map that says no more than the
    objects beside it is not kept.
    """
    root = images or path / "JPEGImages"
    trees, unreadable = _trees(path / "Annotations", report)
    maps = {_stem(file, path / _CLASSES): file for file in (path / _CLASSES).rglob("*.png")}
    class_names = _listed_labels(path)
    if maps and not class_names and _object_names(trees.values()) <= set(VOC_CLASSES):
        class_names = list(VOC_CLASSES)
    builder = Builder(class_names)
    tags = _read_tags(path, builder)
    stems = []
    for stem in sorted({*trees, *maps}.difference(unreadable)):
        tree = trees.get(stem, ElementTree.Element("annotation"))
        name = _file_name(tree, stem, root)
        size = _size(tree) or image_size(maps.get(stem, "")) or size_of(root / name, report)
        if size is None:
            continue
        builder.add_image(name, *size)
        stems.append(stem)
        numbers = _read_numbers(path / _OBJECTS / f"{stem}.png", builder.images[-1], report)
        for index, found in enumerate(tree.iter("object"), 1):
            where = f"{path / 'Annotations' / stem}.xml, object {index}"
            _read_object(found, index, numbers, where, builder, report)
        builder.add_tags(tags.get(stem, ()))
    dataset = builder.dataset(root, label_map_root=path)
    for stem, (image, objects) in zip(stems, dataset.objects(), strict=True):
        if stem in maps and not class_names:
            report.entry(
                "voc_classes",
                f"{maps[stem]} has labels of classes that nothing names",
                f"Add {_LABELS}, which lists the classes in their order, one a line",
            )
        elif stem in maps:
            image[LABEL_MAP] = f"{_CLASSES}/{stem}.png"
            if (path / _OBJECTS / f"{stem}.png").is_file():
                label_map = dataset.label_map(image, report)
                drawn = _drawn(image, objects, dataset.names())
                if label_map is None or np.array_equal(label_map, drawn):
                    del image[LABEL_MAP]
    return dataset


def write(dataset: Dataset, output: Output, *, copy_images: bool) -> None:
    """Write the folder; crowd regions become "difficult" objects, and unknown in label maps."""
    names = dataset.names()
    lines = [_HEADER, "background:0,0,0::"]
    for index, name in enumerate(names.values(), 1):
        color = ",".join(map(str, voc_palette()[index % 256].tolist()))
        lines.append(f"{name}:{color}::")
    output.write(_LABELS, "\n".join(lines) + "\n")
    stems, with_pixels = [], []
    tagged: dict[int, set[str]] = {}
    for image, objects in dataset.objects():
        tags = dataset.tags(image, objects)
        kept = [id_ for id_ in tags if _is_file_name(names[id_])]
        output.lost["tags whose name is no file name, left out"] += len(tags) - len(kept)
        count_lost(output, image, objects, tags, holds=f"tags crowds boxes {LABEL_MAP}")
        stem = Path(image["file_name"]).with_suffix("").as_posix()
        stems.append(stem)
        for id_ in kept:
            tagged.setdefault(id_, set()).add(stem)
        has_pixels = _write_maps(dataset, image, objects, stem, output)
        with_pixels += [stem] * has_pixels
        tree = _tree(image, objects, names, segmented=has_pixels)
        output.write(f"Annotations/{stem}.xml", tree)
        if copy_images:
            output.copy(dataset.image_file(image), f"JPEGImages/{image['file_name']}")
    output.write(f"ImageSets/Main/{_PART}.txt", "".join(f"{stem}\n" for stem in stems))
    lines = [f"{stem}\n" for stem in with_pixels]
    output.write(f"ImageSets/Segmentation/{_PART}.txt", "".join(lines))
    for id_, own in tagged.items():
        lines = [f"{stem} {1 if stem in own else -1}\n" for stem in stems]
        output.write(f"ImageSets/Main/{names[id_]}_{_PART}.txt", "".join(lines))
    output.lost = +output.lost


def _write_maps(
    dataset: Dataset,
    image: Mapping[str, Any],
    objects: Sequence[Mapping[str, Any]],
    stem: str,
    output: Output,
) -> bool:
    """Write the map of the objects and that of the classes, and return whether there is any."""
    names = dataset.names()
    has_label_map = isinstance(image.get(LABEL_MAP), str)
    has_masks = any(annotation.get("segmentation") for annotation in objects)
    if has_masks:
        numbers = _numbers(image, objects, output)
        path = output.path(f"{_OBJECTS}/{stem}.png")
        write_label_map(path, numbers, num_classes=MAX_LABELS)
    if not has_masks and not has_label_map:
        return False
    if len(names) > MAX_LABELS:
        output.lost[f"maps of more than {MAX_LABELS} classes ({_CLASSES}), left out"] += 1
        return True
    if has_label_map:
        label_map = dataset.label_map(image, Report(output.folder, strict=True))
    else:
        label_map = _drawn(image, objects, names)
    write_label_map(output.path(f"{_CLASSES}/{stem}.png"), label_map, num_classes=len(names))
    return True


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


def _stem(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def _trees(folder: Path, report: Report) -> tuple[dict[str, ElementTree.Element], list[str]]:
    """Parse the XML files of a folder, by stem; and the stems of those that are none."""
    trees, unreadable = {}, []
    for file in sorted(folder.rglob("*.xml")):
        stem = _stem(file, folder)
        try:
            trees[stem] = ElementTree.fromstring(file.read_bytes())
        except ElementTree.ParseError as error:
            report.entry("voc_xml", f"{file} is not valid XML: {error}", "Restore it")
            unreadable.append(stem)
    return trees, unreadable


def _object_names(trees: Iterable[ElementTree.Element]) -> set[str]:
    return {found.findtext("name", "") for tree in trees for found in tree.iter("object")} - {""}


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """Return (height, width), if the file says both."""
    sides = [_number(tree.find("size"), key) for key in ("height", "width")]
    return (int(sides[0]), int(sides[1])) if all(side and side > 0 for side in sides) else None


def _number(element: ElementTree.Element | None, key: str) -> float | None:
    """Return a number that is finite, if it is there."""
    try:
        number = float(element.findtext(key))
    except (TypeError, ValueError, AttributeError):
        return None
    return number if math.isfinite(number) else None


def _read_numbers(file: Path, image: Mapping[str, Any], report: Report) -> np.ndarray | None:
    """Read which object each pixel is of, (H, W); None if nothing says that."""
    if not file.is_file():
        return None
    try:
        with Image.open(file) as opened:
            numbers = np.asarray(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        report.lost_file("voc_map_broken", "map of objects", file, "cannot be read", "Restore it")
        return None
    size = image["height"], image["width"]
    if numbers.shape == size:
        return numbers
    found = f"{file} has the shape {numbers.shape}, its image {size}"
    remedy = "Save numbers of objects, not colours, in the size of the image"
    report.entry("voc_map_size", found, remedy)
    return None


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
    mask = None if numbers is None else numbers == index
    builder.add_object(
        name,
        box=(x1 - 1, y1 - 1, x2, y2),
        mask=mask if mask is not None and mask.any() else None,
        crowd=found.findtext("difficult", "0").strip() == "1",
    )


def _drawn(
    image: Mapping[str, Any], objects: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> np.ndarray:
    """Draw the objects into a label map, as `label_map_of_instances` does."""
    index_of = {id_: index for index, id_ in enumerate(names)}
    annotations = []
    for annotation in objects:
        x, y, width, height = annotation["bbox"]
        kept = {key: annotation[key] for key in ("id", "iscrowd")}
        kept |= {"class_index": index_of[annotation["category_id"]]}
        kept |= {"bbox": [x, y, x + width, y + height]}
        if annotation.get("segmentation"):
            kept["segmentation"] = annotation["segmentation"]
        annotations.append(kept)
    labels = [index_of[id_] for id_ in image.get("image_labels", ())]
    record = {"image_id": image["id"], "height": image["height"], "width": image["width"]}
    record |= {"annotations": annotations, "image_labels": labels}
    return label_map_of_instances(record, len(names))


def _tree(
    image: dict[str, Any], objects: list[dict[str, Any]], names: dict[int, str], *, segmented: bool
) -> str:
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
    add(root, "segmented", int(segmented))
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
    beyond = sum(number > MAX_LABELS for number in masks)
    output.lost[f"masks beyond {MAX_LABELS} objects of an image, left out"] += beyond
    masks = {number: mask for number, mask in masks.items() if number <= MAX_LABELS}
    for number in sorted(masks, key=lambda number: -masks[number].sum()):
        numbers[masks[number]] = number
    for number, mask in masks.items():
        shown = (numbers[mask] == number).sum()
        is_cut = bool(0 < shown < mask.sum())
        output.lost["masks that others cover in part, cut there"] += is_cut
        output.lost["masks that others cover wholly, left out"] += bool(shown == 0)
    return numbers
