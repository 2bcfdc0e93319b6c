"""Label maps for the images of an annotation file that have tags alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskx.data.coco import CocoData
from maskx.data.images import read_rgb
from maskx.data.label_maps import ignore_label, write_label_map
from maskx.engine.predictor import Predictor
from maskx.engine.results import Prediction
from maskx.supervision import Supervision

__all__ = ["complete_label_maps", "images_with_tags", "label_map_folder"]


def label_map_folder(output: Path) -> Path:
    """Folder of the label maps of a completed file, beside it."""
    return output.with_name(f"{output.stem}_label_maps")


def images_with_tags(data: CocoData) -> list[dict[str, Any]]:
    """Return the records that have tags alone."""
    return [
        record
        for record in data.records
        if record["supervision"] == Supervision.IMAGE.value and record["image_labels"]
    ]


def complete_label_maps(
    predictor: Predictor, data: CocoData, folder: Path
) -> tuple[dict[int | str, str], dict[str, str], int]:
    """Write a label map for each image with tags alone.

    Tags say what is in an image: pixels of any other class are unknown, as are those of an image
    that the model finds no class for.

    Args:
        predictor: of a system that makes label maps, or finds concepts.
        data: with images of the level "image".
        folder: to write to; it is made when the first is written.

    Returns:
        By image id the path from the folder above; by file name what could not be read; the number
        of images that the model knows no tag of.
    """
    written: dict[int | str, str] = {}
    failures: dict[str, str] = {}
    num_unknown = 0
    for number, record in enumerate(tqdm(images_with_tags(data), desc="label maps", unit="img")):
        tags = [data.class_names[index] for index in record["image_labels"]]
        known = [name for name in tags if name in predictor.class_names]
        if not known:
            num_unknown += 1
            continue
        try:
            image = read_rgb(record["file_name"])
        except (ValueError, OSError) as error:
            failures[record["file_name"]] = str(error)
            continue
        asked = {
            "image_labels": [predictor.class_names.index(name) for name in known],
            "concepts": known,
        }
        label_map = _in_classes_of_the_file(predictor(image, **asked), tags, data.class_names)
        name = f"{number:06d}_{Path(record['file_name']).stem}.png"
        folder.mkdir(parents=True, exist_ok=True)
        write_label_map(folder / name, label_map, num_classes=len(data.class_names))
        written[record["image_id"]] = f"{folder.name}/{name}"
    return written, failures, num_unknown


def _in_classes_of_the_file(
    found: Prediction, tags: Sequence[str], class_names: Sequence[str]
) -> np.ndarray:
    """Bring a prediction into the class list of a file; what has no tag is unknown."""
    unknown = ignore_label(len(class_names))
    # An object that the model does not know may lie in what it takes for background.
    background = 0 if set(tags) <= set(found.class_names) else unknown
    if found.label_map is not None:
        table = np.full(ignore_label(len(found.class_names)) + 1, unknown)
        table[0] = background
        for index, name in enumerate(found.class_names):
            if name in tags:
                table[index + 1] = class_names.index(name) + 1
        return table[found.label_map]
    labels = np.full(found.image_size, background)
    masks = found.masks
    for index in np.argsort(found.scores, kind="stable"):  # the surest on top
        labels[masks[index]] = class_names.index(found.names[index]) + 1
    return labels
