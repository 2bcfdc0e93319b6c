"""Clothing Co-Parsing (CCP) as COCO-format files: photos with masks, and photos with tags only.

Yang, Luo and Lin, "Clothing Co-Parsing by Joint Image Segmentation and Labeling" (CVPR 2014). The
58 classes keep their numbers as category ids; number 0 ("null") is background.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from maskx.core.files import write_json
from maskx.data.label_maps import read_label_map

__all__ = ["CcpSummary", "format_ccp_summary", "prepare_ccp"]

_LISTS = {"train": "pixel_train.txt", "val": "pixel_val.txt", "tags": "image_level.txt"}


@dataclass(frozen=True)
class CcpSummary:
    """What `prepare_ccp` wrote.

    Attributes:
        class_names: by class index.
        num_images: by file.
        num_masks: images with a mask, by file.
        labels_per_image: mean number of image labels, by file.
    """

    class_names: tuple[str, ...]
    num_images: Mapping[str, int]
    num_masks: Mapping[str, int]
    labels_per_image: Mapping[str, float]


def prepare_ccp(
    ccp: str | os.PathLike[str], output: str | os.PathLike[str], *, progress: bool = False
) -> CcpSummary:
    """Write `ccp_train.json`, `ccp_val.json`, `ccp_tags.json` and `ccp_mixed.json`.

    The first two have masks, as label maps (`maskx.data.label_maps`) named relative to the folder
    of the JSON file; the third has tags only; the last is train and tags together. All images have
    `image_labels`: the classes of the mask, or the tags. There are no annotations. File names of
    images are relative to `ccp/photos`, ids are the numbers of the photos.

    Args:
        ccp: Folder with `photos/NNNN.jpg`, `masks/NNNN.png` (8 bits, value = number of the class),
            `classes.json` (`{"classes": [names by number]}`, "null" first),
            `image_level_tags.json` (`{"NNNN": [numbers]}`) and the lists `pixel_train.txt`,
            `pixel_val.txt` and `image_level.txt`.
        output: Folder to write to; it is created, files of an earlier run are replaced.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is not what it should be, or an image is in two lists.
    """
    ccp, output = Path(ccp), Path(output)
    class_names = _read_classes(ccp / "classes.json")
    tags = _read_json(ccp / "image_level_tags.json")
    lists = {part: _read_list(ccp / name) for part, name in _LISTS.items()}
    numbers = [number for part in lists.values() for number in part]
    repeated = sorted({number for number in numbers if numbers.count(number) > 1})
    if repeated:
        raise ValueError(
            f"{ccp}: photo {repeated[0]} is listed more than once in {', '.join(_LISTS.values())}. "
            "Every photo belongs to one list."
        )
    images: dict[str, list[dict[str, Any]]] = {}
    with tqdm(total=len(numbers), desc="photos", unit="img", disable=not progress) as bar:
        for part, found in lists.items():
            images[part] = []
            for number in found:
                entry = _read_size(ccp / "photos" / f"{number}.jpg", number)
                if part == "tags":
                    entry["image_labels"] = _labels_of_tags(number, tags, len(class_names), ccp)
                else:
                    mask = ccp / "masks" / f"{number}.png"
                    entry |= _read_mask(mask, entry, len(class_names), output)
                images[part].append(entry)
                bar.update()
    images["mixed"] = images["train"] + images["tags"]
    categories = [{"id": id_, "name": name} for id_, name in enumerate(class_names, start=1)]
    output.mkdir(parents=True, exist_ok=True)
    for part, entries in images.items():
        content = {"images": entries, "annotations": [], "categories": categories}
        write_json(output / f"ccp_{part}.json", content)
    return CcpSummary(
        class_names=class_names,
        num_images={part: len(entries) for part, entries in images.items()},
        num_masks={
            part: sum("label_map_file_name" in entry for entry in entries)
            for part, entries in images.items()
        },
        labels_per_image={
            part: sum(len(e["image_labels"]) for e in entries) / max(1, len(entries))
            for part, entries in images.items()
        },
    )


def format_ccp_summary(summary: CcpSummary) -> str:
    """Lay out a summary for people."""
    lines = [
        f"{len(summary.class_names)} classes",
        f"{'file':<16}{'images':>8}{'masks':>8}  labels",
    ]
    for part, count in summary.num_images.items():
        masks, labels = summary.num_masks[part], summary.labels_per_image[part]
        lines.append(f"{f'ccp_{part}.json':<16}{count:>8}{masks:>8}{labels:>8.1f} per image")
    return "\n".join(lines)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON text ({error}). Restore the file.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object. Restore the file.")
    return content


def _read_classes(path: Path) -> tuple[str, ...]:
    names = _read_json(path).get("classes")
    if not isinstance(names, list) or names[:1] != ["null"] or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: 'classes' is {names!r:.100}. Allowed: different names by number, 'null' "
            "first."
        )
    return tuple(names[1:])


def _read_list(path: Path) -> list[str]:
    numbers = _read(path).decode("utf-8", errors="replace").split()
    wrong = [number for number in numbers if not number.isdecimal()]
    if wrong or not numbers:
        raise ValueError(
            f"{path}: {f'{wrong[0]!r:.40} is no number of a photo' if wrong else 'is empty'}. "
            "Allowed: one number in a line, such as 0001."
        )
    return numbers


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such file of CCP. See datasets/prepare.py ccp for the files."
        ) from None


def _labels_of_tags(number: str, tags: Mapping[str, Any], num_classes: int, ccp: Path) -> list[int]:
    found = tags.get(number)
    if not isinstance(found, list) or not all(
        isinstance(tag, int) and 0 <= tag <= num_classes for tag in found
    ):
        raise ValueError(
            f"{ccp / 'image_level_tags.json'}: photo {number} has {found!r:.100}. Allowed: a list "
            f"of numbers from 0 (null) to {num_classes}."
        )
    return sorted(set(found) - {0})


def _read_size(path: Path, number: str) -> dict[str, Any]:
    try:
        with Image.open(path) as image:
            size = {"height": image.height, "width": image.width}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such photo, but it is listed. Restore it."
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as image ({error}). Restore it.") from error
    return {"id": int(number), "file_name": path.name, **size}


def _read_mask(
    path: Path, entry: Mapping[str, Any], num_classes: int, output: Path
) -> dict[str, Any]:
    labels = read_label_map(
        *(path, entry["height"], entry["width"]), num_classes=num_classes, image_id=entry["id"]
    )
    present = np.unique(labels)
    # Without symbolic links, through which ".." leads elsewhere.
    folder = os.path.relpath(path.parent.resolve(), output.resolve())
    return {
        "image_labels": present[(present > 0) & (present <= num_classes)].tolist(),
        "label_map_file_name": (Path(folder) / path.name).as_posix(),
    }
