"""Label Studio: a JSON list of tasks, whose results are polygons, rectangles, brushes and choices.

What is written are predictions, which Label Studio shows as what a person can take over.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import numpy as np

from maskx.data.coco_structure import Report
from maskx.data.formats.dataset import (
    Builder,
    Dataset,
    Output,
    count_lost,
    extra_keys,
    size_of,
)
from maskx.data.formats.outlines import exact_shares, has_one_outline
from maskx.data.json_files import read_json
from maskx.data.masks import decode_segmentation

__all__ = ["is_of_format", "read", "write"]

_TASKS, _CONFIG = "tasks.json", "label_config.xml"
_LOCAL = "/data/local-files/?d="
_RUN_BITS = (3, 4, 8, 16)  # of run lengths, in four sizes


def is_of_format(path: Path) -> bool:
    """Whether a path is such a file, or a folder that was written here."""
    file = path / _TASKS if path.is_dir() else path
    if file.suffix != ".json" or not file.is_file():
        return False
    with file.open("rb") as opened:
        return re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", opened.read(1024)) is not None


def read(path: Path, images: Path | None, report: Report) -> Dataset:
    """Read the annotations of each task, or its predictions where there are none."""
    file = path / _TASKS if path.is_dir() else path
    tasks = read_json(file, what="export of Label Studio")
    builder = Builder(_configured_labels(file.parent / _CONFIG))
    for position, task in enumerate(tasks):
        where = f"task {task.get('id', position) if isinstance(task, dict) else position}"
        data = task.get("data") if isinstance(task, dict) else None
        url = _image_of(data) if isinstance(data, dict) else None
        if url is None:
            report.entry("label_studio_task", f"{where} has no image", "Give its data an 'image'")
            continue
        results = _results(task, where, report)
        name = _file_name(url)
        size = _size(results, data)
        if size is None and images is not None and (images / name).is_file():
            size = size_of(images / name, report)
            if size is None:
                continue
        if size is None:
            report.entry(
                "label_studio_size",
                f"{where} says no size of its image {name}",
                "Name the folder of the images, from which sizes are read",
            )
            continue
        builder.add_image(name, *size)
        for result in results:
            _read_result(result, where, builder, report)
    return builder.dataset(images)


def write(dataset: Dataset, output: Output, *, copy_images: bool) -> None:
    """Write `tasks.json` and the labelling interface that its results are made for."""
    names = dataset.names()
    tasks = []
    for image, objects in dataset.objects():
        tags = dataset.tags(image, objects)
        count_lost(output, image, objects, tags, holds="tags extra boxes")
        height, width = image["height"], image["width"]
        common = {"to_name": "image", "original_width": width, "original_height": height}
        common["image_rotation"] = 0
        results = []
        for annotation in objects:
            if annotation["iscrowd"]:
                continue
            label = names[annotation["category_id"]]
            kind, value = _value(annotation, label, height, width)
            result = {"id": f"o{annotation['id']}", "type": kind, "from_name": kind, **common}
            extra = extra_keys(annotation)
            if "segmentation_quality" in extra or "score" in extra:
                result["score"] = extra.get("segmentation_quality", extra.get("score"))
            if kind != "rectanglelabels":
                x, y, w, h = annotation["bbox"]
                extra["bbox"] = [x, y, w, h]
            results.append({**result, "value": value, **({"meta": extra} if extra else {})})
        if tags:
            value = {"choices": [names[id_] for id_ in tags]}
            results.append(
                {"id": "tags", "type": "choices", "from_name": "choices", **common, "value": value}
            )
        if copy_images:
            output.copy(dataset.image_file(image), f"images/{image['file_name']}")
        tasks.append(
            {
                "data": {
                    "image": _LOCAL + quote(image["file_name"]),
                    "width": width,
                    "height": height,
                },
                "predictions": [{"model_version": "maskx", "result": results}],
            }
        )
    output.write_json(_TASKS, tasks)
    output.write(_CONFIG, _config(list(names.values())))


def _config(names: list[str]) -> str:
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    for tag in ("PolygonLabels", "RectangleLabels", "BrushLabels"):
        control = ElementTree.SubElement(view, tag, name=tag.lower(), toName="image")
        for name in names:
            ElementTree.SubElement(control, "Label", value=name)
    choices = ElementTree.SubElement(view, "Choices", name="choices", toName="image")
    choices.set("choice", "multiple")
    for name in names:
        ElementTree.SubElement(choices, "Choice", value=name)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _configured_labels(file: Path) -> list[str]:
    if not file.is_file():
        return []
    labels = ElementTree.fromstring(file.read_text(encoding="utf-8")).iter("Label")
    return list(dict.fromkeys(label.get("value", "") for label in labels))


def _image_of(data: Mapping[str, Any]) -> str | None:
    texts = [value for value in (data.get("image"), *data.values()) if isinstance(value, str)]
    return texts[0] if texts else None


def _file_name(url: str) -> str:
    if _LOCAL in url:
        return unquote(url.partition(_LOCAL)[2])
    return url.removeprefix("/data/") if url.startswith("/data/upload/") else url


def _results(task: Mapping[str, Any], where: str, report: Report) -> list[dict[str, Any]]:
    annotations = _dicts(task, "annotations", where, report)
    annotations = [each for each in annotations if not each.get("was_cancelled")]
    if len(annotations) > 1:
        report.note("task with several annotations (the last is read)", where)
    chosen = annotations[-1:] or _dicts(task, "predictions", where, report)[-1:]
    return _dicts(chosen[0], "result", where, report) if chosen else []


def _dicts(parent: Mapping[str, Any], key: str, where: str, report: Report) -> list[dict[str, Any]]:
    """Return the list of dicts of a key; what is none is counted."""
    values = parent.get(key) or []
    values = values if isinstance(values, list) else [values]
    for value in values:
        if not isinstance(value, dict):
            report.entry(
                "label_studio_task", f"{where} has {value!r:.80} in {key!r}", "Allowed: dicts"
            )
    return [value for value in values if isinstance(value, dict)]


def _size(results: list[dict[str, Any]], data: Mapping[str, Any]) -> tuple[int, int] | None:
    sides = [(r.get("original_height"), r.get("original_width")) for r in results]
    sides.append((data.get("height"), data.get("width")))
    whole = (pair for pair in sides if all(isinstance(side, int) and side > 0 for side in pair))
    return next(whole, None)


def _read_result(result: Mapping[str, Any], where: str, builder: Builder, report: Report) -> None:
    image = builder.images[-1]
    kind, value = str(result.get("type", "")), result.get("value")
    value = value if isinstance(value, dict) else {}
    if kind == "choices" and _are_texts(value.get("choices", [])):
        builder.add_tags(value.get("choices", ()))
        return
    if kind == "labels":  # of a control that leaves the form open
        kind = next((f"{k}labels" for k in ("polygon", "brush", "rectangle") if k in value), kind)
    labels = value.get(str(result.get("type"))) or value.get("labels")
    is_shape = kind in ("polygonlabels", "rectanglelabels", "brushlabels")
    if not is_shape or not labels or not _are_texts(labels):
        report.entry(
            "label_studio_result",
            f"{where} has a result of the type {kind!r:.40} with the labels {labels!r:.40}",
            "Allowed: a label and a polygon, a rectangle, a brush; or choices",
        )
        return
    if value.get("rotation"):
        report.entry("label_studio_result", f"{where} has a rotated rectangle", "Draw it upright")
        return
    meta = result.get("meta")
    meta = dict(meta) if isinstance(meta, dict) else {}
    meta.pop("text", None)
    try:
        shape = _read_shape(kind, value, image["height"], image["width"])
        if "bbox" in meta:
            x, y, width, height = meta.pop("bbox")
            shape["box"] = [x, y, x + width, y + height]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        report.entry(
            "label_studio_result",
            f"{where} has a result of the type {kind!r} that is not whole ({error!r:.200})",
            "Draw it anew, or export the task again",
        )
        return
    builder.add_object(labels[0], **shape, extra=meta)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _read_shape(kind: str, value: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """Return what `Builder.add_object` takes."""
    percent = np.array([width, height]) / 100
    if kind == "polygonlabels":
        return {"polygons": [(np.reshape(value["points"], (-1, 2)) * percent).ravel()]}
    if kind == "brushlabels":
        return {"mask": decode_brush(value["rle"], height, width)}
    corner = np.array([value["x"], value["y"]]) * percent
    extent = np.array([value["width"], value["height"]]) * percent
    return {"box": [*corner, *(corner + extent)]}


def _value(
    annotation: Mapping[str, Any], label: str, height: int, width: int
) -> tuple[str, dict[str, Any]]:
    percent = np.array([width, height]) / 100
    mask = annotation.get("segmentation")
    if not mask:
        x, y, w, h = annotation["bbox"]
        (x, y), (w, h) = np.array([[x, y], [w, h]]) / percent
        value = {"x": x, "y": y, "width": w, "height": h, "rotation": 0}
        return "rectanglelabels", {**value, "rectanglelabels": [label]}
    if has_one_outline(mask):
        points = exact_shares(np.reshape(mask[0], (-1, 2)), percent).tolist()
        return "polygonlabels", {"points": points, "closed": True, "polygonlabels": [label]}
    runs = encode_brush(decode_segmentation(mask, height, width))
    return "brushlabels", {"format": "rle", "rle": runs, "brushlabels": [label]}


def encode_brush(mask: np.ndarray) -> list[int]:
    """Pack a mask as Label Studio's brush does: run lengths of the bytes of an RGBA image.

    All four bytes of a pixel have the same value here.

    Args:
        mask: (H, W) bool.

    Returns:
        Bytes, as numbers.
    """
    values = np.repeat(mask.ravel(), 4)
    bits = [f"{len(values):032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in _RUN_BITS)]
    for value, length in _runs(values):
        while length > 0:
            taken = min(length, 1 << _RUN_BITS[-1])
            kind = next(i for i, size in enumerate(_RUN_BITS) if taken <= 1 << size)
            bits.append(f"1{kind:02b}{taken - 1:0{_RUN_BITS[kind]}b}{255 * value:08b}")
            length -= taken
    packed = np.packbits(np.frombuffer("".join(bits).encode(), np.uint8) - ord("0"))
    return packed.tolist()


def decode_brush(runs: list[int], height: int, width: int) -> np.ndarray:
    """Unpack what `encode_brush` packs, or Label Studio itself.

    Returns:
        (height, width) bool: where the picture is not transparent.

    Raises:
        ValueError: It is of another size.
    """
    bits = "".join(f"{number:08b}" for number in runs)
    place = 0

    def take(size: int) -> int:
        nonlocal place
        place += size
        return int(bits[place - size : place], 2)

    number = take(32)
    word = take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    if number != 4 * height * width:
        raise ValueError(
            f"A brush holds {number} numbers, but its image has {height} x {width} pixels of four. "
            "Export the task again."
        )
    values = np.zeros(number, np.uint8)
    start = 0
    while start < number:
        is_run = take(1)
        stop = start + 1 + take(sizes[take(2)])
        if is_run:
            values[start:stop] = take(word)
        else:
            values[start:stop] = [take(word) for _ in range(stop - start)]
        start = stop
    return values.reshape(height, width, 4)[:, :, 3] > 0


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Give the values and lengths of runs."""
    ends = np.flatnonzero(np.diff(values, append=~values[-1:])) + 1
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        yield int(values[start]), end - start
