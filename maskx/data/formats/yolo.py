"""YOLO segmentation folders: `data.yaml`, images, and a text file of polygons for each.

A line is a class and either a polygon or, in labels for detection, a box, in shares of the image.
Ultralytics drops all polygons of a data set in which one object has a box alone, so none is
written.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maskx.core.files import parse_yaml
from maskx.data.coco_structure import Report
from maskx.data.formats.dataset import (
    Builder,
    Dataset,
    Output,
    count_lost,
    list_images,
    size_of,
)
from maskx.data.formats.outlines import as_one_outline, exact_shares, has_one_outline

__all__ = ["is_of_format", "read", "write"]


def is_of_format(path: Path) -> bool:
    """Whether a path is such a folder, or its YAML file."""
    return _yaml_of(path) is not None


def read(path: Path, images: Path | None, report: Report) -> Dataset:
    """Read the labels of one part, by default that of training.

    Args:
        path: Folder or its YAML file.
        images: Folder of the images, for another part; the labels lie beside it.
        report: Takes what is wrong.
    """
    file = _yaml_of(path)
    settings, names = _settings(file)
    root = images or _image_root(file, settings)
    builder = Builder(names)
    folder = _labels_folder(root)
    if not folder.is_dir():
        parts = [file.parent / "labels" / "train", file.parent / "labels", folder]
        folder = next(part for part in parts if part.is_dir() or part == folder)
    num_labelled = 0
    names_of_images = list_images(root)
    for name in names_of_images:
        labels = folder / name.with_suffix(".txt")
        num_labelled += labels.is_file()
        size = size_of(root / name, report)
        if size is None:
            continue
        builder.add_image(name.as_posix(), *size)
        if labels.is_file():
            for number, line in enumerate(
                labels.read_text(encoding="utf-8", errors="replace").splitlines(), 1
            ):
                if line.strip():
                    _read_line(line, f"{labels}, line {number}", names, builder, report)
    if not num_labelled:
        report.fail(
            f"none of {len(names_of_images)} images in {root} has labels in {folder}",
            "Name the folder of the images; labels lie beside it",
        )
    return builder.dataset(root)


def write(dataset: Dataset, output: Output, *, copy_images: bool) -> None:
    """Write the folder."""
    names = dataset.names()
    index = {id_: number for number, id_ in enumerate(names)}
    for image, objects in dataset.objects():
        count_lost(output, image, objects, dataset.tags(image, objects), holds="")
        lines = []
        for annotation in objects:
            mask = annotation.get("segmentation")
            if annotation["iscrowd"]:
                continue
            if not mask:
                output.lost["boxes without a mask, left out: their images seem to lack them"] += 1
                continue
            if not has_one_outline(mask):
                output.lost["masks of several parts or with holes, joined to one outline"] += 1
            outline = as_one_outline(mask, image["height"], image["width"])
            size = np.array([image["width"], image["height"]])
            inside = np.clip(outline, 0, size)
            output.lost["outlines cut at the edge of the image"] += bool((inside != outline).any())
            numbers = " ".join(_numbers(inside, size))
            lines.append(f"{index[annotation['category_id']]} {numbers}\n")
        name = Path(image["file_name"])
        output.write(f"labels/train/{name.with_suffix('.txt').as_posix()}", "".join(lines))
        if copy_images:
            output.copy(dataset.image_file(image), f"images/train/{name.as_posix()}")
    output.lost = +output.lost
    settings = {"train": "images/train", "val": "images/train"}
    settings["names"] = dict(enumerate(names.values()))
    output.write("data.yaml", yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))


def _numbers(outline: np.ndarray, size: np.ndarray) -> Iterator[str]:
    """Give shares of the image with 9 digits, or more where those are of another point."""
    shares = exact_shares(outline, size)
    for row, point in zip(shares.tolist(), outline.tolist(), strict=True):
        for share, side, number in zip(row, size.tolist(), point, strict=True):
            short = f"{share:.9g}"
            yield short if float(short) * side == number else repr(share)


def _yaml_of(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    for name in ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml"):
        if (path / name).is_file():
            return path / name
    return None


def _settings(file: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        settings = parse_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not valid YAML: {error}. Correct it.") from error
    names = settings.get("names") if isinstance(settings, dict) else None
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(
            f"{file}: names is {names!r:.200}. Allowed: a list of the names of the classes, or a "
            "dict of them by number from 0 on."
        )
    names = [str(name) for name in names]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise ValueError(f"{file}: names holds {twice[0]!r} twice. Give every class its own name.")
    return settings, names


def _image_root(file: Path, settings: dict[str, Any]) -> Path:
    base = file.parent / str(settings.get("path") or "")
    if not base.is_dir():  # as a tool writes it for its own machine
        base = file.parent
    parts = [settings.get(part) for part in ("train", "val")]
    for part in [*(part for part in parts if isinstance(part, str)), "images/train", "images"]:
        for folder in (base / part, file.parent / part.removeprefix("../")):
            if folder.is_dir():
                return folder
    raise ValueError(
        f"{file}: the images of train ({settings.get('train')!r}) are no folder that is there. "
        "Name the folder of the images."
    )


def _labels_folder(images: Path) -> Path:
    """Return the folder in which Ultralytics looks: the last "images" becomes "labels"."""
    parts = images.parts
    if "images" not in parts:
        return images
    last = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 :])


def _read_line(line: str, where: str, names: list[str], builder: Builder, report: Report) -> None:
    image = builder.images[-1]
    try:
        label, *numbers = map(float, line.split())
    except ValueError:
        label, numbers = math.nan, []
    is_whole = math.isfinite(label) and label.is_integer()
    if not is_whole or not 0 <= label < len(names):
        report.entry(
            "yolo_class",
            f"{where} is {line!r:.80}",
            f"Allowed: a class from 0 to {len(names) - 1}, then numbers",
        )
        return
    size = np.array([image["width"], image["height"]])
    if len(numbers) == 4:
        centre, extent = np.reshape(numbers, (2, 2)) * size
        box = np.concatenate([centre - extent / 2, centre + extent / 2])
        builder.add_object(names[int(label)], box=box)
    elif len(numbers) >= 6 and len(numbers) % 2 == 0 and np.isfinite(numbers).all():
        polygon = (np.reshape(numbers, (-1, 2)) * size).ravel()
        builder.add_object(names[int(label)], polygons=[polygon])
    else:
        report.entry(
            "yolo_line",
            f"{where} has {len(numbers)} numbers after the class",
            "Allowed: 4 of a box, or x and y of at least 3 points",
        )
