"""Clothing Co-Parsing (CCP) as COCO-format files: photos with masks, and photos with tags only.

Yang, Luo and Lin, "Clothing Co-Parsing by Joint Image Segmentation and Labeling" (CVPR 2014). The
58 classes keep their numbers as category ids; number 0 ("null") is background.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskx.data.json_files import read_json
from maskx.data.label_maps import read_label_map
from maskx.data.prepare.label_map_sets import image_size, relative_name, write_images

__all__ = ["CcpSummary", "prepare_ccp"]

_LISTS = {"train": "pixel_train.txt", "val": "pixel_val.txt", "tags": "image_level.txt"}


@dataclass(frozen=True)
class CcpSummary:
    """What `prepare_ccp` wrote.

    Attributes:
        num_images: by file.
        labels_per_image: mean number of image labels, by file.
    """

    class_names: tuple[str, ...]
    num_images: Mapping[str, int]
    num_masks: Mapping[str, int]
    labels_per_image: Mapping[str, float]

    def __str__(self) -> str:
        lines = [
            f"{len(self.class_names)} classes",
            f"{'file':<16}{'images':>8}{'masks':>8}  labels",
        ]
        for part, count in self.num_images.items():
            masks, labels = self.num_masks[part], self.labels_per_image[part]
            lines.append(f"{f'ccp_{part}.json':<16}{count:>8}{masks:>8}{labels:>8.1f} per image")
        return "\n".join(lines)


def prepare_ccp(ccp: str | os.PathLike[str], output: str | os.PathLike[str]) -> CcpSummary:
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

    Raises:
        ValueError: A file is not what it should be, or an image is in two lists.
    """
    ccp, output = Path(ccp), Path(output)
    class_names = _read_classes(ccp / "classes.json")
    tags = _read_object(ccp / "image_level_tags.json")
    lists = {part: _read_list(ccp / name) for part, name in _LISTS.items()}
    numbers = [number for part in lists.values() for number in part]
    repeated = sorted({number for number in numbers if numbers.count(number) > 1})
    if repeated:
        raise ValueError(
            f"{ccp}: photo {repeated[0]} is listed more than once in {', '.join(_LISTS.values())}. "
            "Every photo belongs to one list."
        )
    images: dict[str, list[dict[str, Any]]] = {}
    for part, found in lists.items():
        images[part] = []
        for number in tqdm(found, desc=part, unit="photo", disable=None):
            path = ccp / "photos" / f"{number}.jpg"
            height, width = image_size(path)
            entry = {"id": int(number), "file_name": path.name, "height": height, "width": width}
            if part == "tags":
                entry["image_labels"] = _labels_of_tags(number, tags, len(class_names), ccp)
            else:
                mask = ccp / "masks" / f"{number}.png"
                labels = read_label_map(
                    mask, height, width, num_classes=len(class_names), image_id=entry["id"]
                )
                present = np.unique(labels)
                is_class = (present > 0) & (present <= len(class_names))
                entry["image_labels"] = present[is_class].tolist()
                entry["label_map_file_name"] = relative_name(mask, output)
            images[part].append(entry)
    images["mixed"] = images["train"] + images["tags"]
    for part, entries in images.items():
        write_images(output / f"ccp_{part}.json", entries, class_names)
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


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path, what="file of CCP")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object. Restore the file.")
    return content


def _read_classes(path: Path) -> tuple[str, ...]:
    names = _read_object(path).get("classes")
    if not isinstance(names, list) or names[:1] != ["null"] or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: 'classes' is {names!r:.100}. Allowed: different names by number, 'null' "
            "first."
        )
    return tuple(names[1:])


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of CCP. Unpack it again.")
    numbers = path.read_text(encoding="utf-8", errors="replace").split()
    wrong = [number for number in numbers if not number.isdecimal()]
    if wrong or not numbers:
        raise ValueError(
            f"{path}: {f'{wrong[0]!r:.40} is no number of a photo' if wrong else 'is empty'}. "
            "Allowed: one number in a line, such as 0001."
        )
    return numbers


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
