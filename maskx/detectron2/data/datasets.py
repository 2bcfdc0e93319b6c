"""Registration of data sets. Nothing is registered by importing this module."""

import contextlib
import difflib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from maskx.data.coco import load_coco, read_coco_json
from maskx.data.scenes import THING_CATEGORIES, generate_scenes
from maskx.data.vocabularies import COCO_THING_CLASSES
from maskx.supervision import CategorySplit, resolve_split

__all__ = [
    "class_names_of",
    "register_all",
    "register_coco",
    "register_from_config",
    "split_from_config",
]

# The ids of the official files by class index; the others from 1 to 90 were never used.
_UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in _UNUSED_COCO_IDS)

_SCENES = {
    "train": {"count": 1000, "size": 128, "num_categories": 16, "seed": 0},
    "val": {"count": 200, "size": 128, "num_categories": 16, "seed": 1},
}


def register_coco(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    strict: bool = True,
) -> None:
    """Register a COCO-format data set whose annotations may lack masks.

    Detectron2's own reader drops a box whose polygons are all bad; this one does not. Categories
    are read at once, annotations and images when the data set is used.

    Args:
        name: name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``. Registering it again with the same
            arguments does nothing.
        json_file: annotation file.
        image_root: folder of the images.
        strict: whether a bad annotation is an error; see :func:`maskx.data.coco.load_coco`.

    Raises:
        FileNotFoundError: there is no such annotation file.
        ValueError: the name stands for another data set, or the file cannot be used.
    """
    if not _is_registered(name, json_file, image_root, strict):
        categories = sorted(read_coco_json(json_file)["categories"], key=lambda c: c["id"])
        class_names, category_ids = zip(*((c["name"], c["id"]) for c in categories), strict=True)
        _register(name, json_file, image_root, strict, class_names, category_ids)


def register_all(root: str | os.PathLike | None = None) -> None:
    """Register the data sets that maskx knows. Calling it again does nothing.

    - ``maskx_coco_2017_train`` and ``_val``: COCO in ``root/coco``, laid out as for Detectron2;
    - ``maskx_scenes_train`` and ``_val``: 1000 and 200 generated scenes of 128 pixels with 16
      categories, written to ``root/maskx_scenes`` when first used (about 20 s).

    Args:
        root: folder of the data sets; None for the environment variable ``DETECTRON2_DATASETS``
            or, where that is not set, ``datasets``.
    """
    root = Path(root or os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for part, parameters in _SCENES.items():
        name = f"maskx_coco_2017_{part}"
        json_file = root / "coco" / "annotations" / f"instances_{part}2017.json"
        image_root = root / "coco" / f"{part}2017"
        # Not strict: a few boxes of the official files have no width or height.
        if not _is_registered(name, json_file, image_root, strict=False):
            _register(name, json_file, image_root, False, COCO_THING_CLASSES, _COCO_CATEGORY_IDS)

        name, folder = f"maskx_scenes_{part}", root / "maskx_scenes" / part
        json_file = folder / "annotations.json"
        if not _is_registered(name, json_file, folder, strict=True):
            class_names = [c.name for c in THING_CATEGORIES[: parameters["num_categories"]]]
            category_ids = range(1, len(class_names) + 1)
            prepare = _SceneWriter(folder, parameters)
            _register(name, json_file, folder, True, class_names, category_ids, prepare)
