"""Registration of data sets. Importing this module registers none."""

import contextlib
import difflib
import functools
import os
import tempfile
from collections.abc import Callable
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
    "training_class_names",
]

# The other ids from 1 to 90 are those of the official files, in the order of the class list.
_UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

_NUM_SCENE_CATEGORIES = 40
_SCENES = {
    "train": {"count": 1000, "size": 128, "num_categories": _NUM_SCENE_CATEGORIES, "seed": 0},
    "val": {"count": 200, "size": 128, "num_categories": _NUM_SCENE_CATEGORIES, "seed": 1},
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
    are read at once, annotations when the data set is used.

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
    _register(
        name, json_file, image_root, strict=strict, categories=lambda: _read_categories(json_file)
    )


def register_all(root: str | os.PathLike | None = None) -> None:
    """Register the data sets that maskx knows. Calling it again does nothing.

    - ``maskx_coco_2017_train`` and ``_val``: COCO in ``root/coco``, laid out as for Detectron2;
    - ``maskx_scenes_train`` and ``_val``: 1000 and 200 generated scenes of 128 pixels with 40
      categories, written to ``root/maskx_scenes`` when first used (6 s on 1 core).

    Args:
        root: folder of the data sets; None for the environment variable ``DETECTRON2_DATASETS``
            or, where that is not set, ``datasets``; after a first call None keeps its folder.
    """
    if root is None and "maskx_coco_2017_train" in DatasetCatalog:
        return
    root = Path(root or os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for part, parameters in _SCENES.items():
        _register(
            f"maskx_coco_2017_{part}",
            root / "coco" / "annotations" / f"instances_{part}2017.json",
            root / "coco" / f"{part}2017",
            strict=False,  # a few boxes of the official files have no width or no height
            categories=_coco_categories,
        )
        folder = root / "maskx_scenes" / part
        _register(
            f"maskx_scenes_{part}",
            folder / "annotations.json",
            folder,
            strict=True,
            categories=_scene_categories,
            prepare=functools.partial(_write_scenes, folder, parameters),
        )


def register_from_config(cfg: CfgNode) -> None:
    """Register the data sets of ``DATASETS.MASKX.REGISTER``. Calling it again does nothing.

    Raises:
        ValueError: an entry is not of the form [name, json_file, image_root].
    """
    for entry in cfg.DATASETS.MASKX.REGISTER:
        is_triple = isinstance(entry, list | tuple) and len(entry) == 3
        if not is_triple or not all(isinstance(part, str) for part in entry):
            raise ValueError(
                f"DATASETS.MASKX.REGISTER holds {entry!r}. Allowed: entries "
                "[name, json_file, image_root], all three strings."
            )
        register_coco(*entry, strict=cfg.DATASETS.MASKX.STRICT)


def class_names_of(dataset_name: str) -> list[str]:
    """Return the class list of a registered data set.

    Raises:
        ValueError: there is no such data set, or it has no class list.
    """
    # Not MetadataCatalog.get: it makes an empty entry for a misspelt name.
    if dataset_name not in DatasetCatalog:
        close = difflib.get_close_matches(dataset_name, DatasetCatalog.list(), n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"There is no data set '{dataset_name}' (DATASETS.TRAIN, DATASETS.TEST).{hint} Add "
            "[name, json_file, image_root] to DATASETS.MASKX.REGISTER, or call "
            "maskx.detectron2.register_all() or register_coco(...) first."
        )
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(dataset_name)  # Detectron2's COCO reader knows them only then
    if not metadata.get("thing_classes"):
        raise ValueError(
            f"Data set '{dataset_name}' has no class list. Set "
            f"MetadataCatalog.get('{dataset_name}').thing_classes to the names by class index."
        )
    return metadata.thing_classes


def training_class_names(cfg: CfgNode) -> list[str]:
    """Return the class list of the (first) data set of ``DATASETS.TRAIN``.

    Raises:
        ValueError: there is none, it is not registered, or it has no class list.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty. Name at least one registered data set.")
    return class_names_of(cfg.DATASETS.TRAIN[0])


def split_from_config(cfg: CfgNode) -> CategorySplit:
    """Resolve ``DATASETS.MASKX.SPLIT`` by the class list of the training data.

    Raises:
        FileNotFoundError: the split is neither a known name nor a file.
        ValueError: it does not fit the class list, or there is no class list.
    """
    return resolve_split(cfg.DATASETS.MASKX.SPLIT, training_class_names(cfg))


def _register(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    strict: bool,
    categories: Callable[[], dict[int, str]],
    prepare: Callable[[], None] | None = None,
) -> None:
    """Register a data set unless it is.

    Args:
        name: name of the data set.
        json_file: annotation file.
        image_root: folder of the images.
        strict: whether a bad annotation is an error.
        categories: returns names by category id, in the order of class indices.
        prepare: called before the annotation file is read.
    """
    source = {
        "json_file": os.fspath(json_file),
        "image_root": os.fspath(image_root),
        "strict": strict,
    }
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        found = {key: metadata.get(key) for key in source}
        if found != source:
            raise ValueError(
                f"Data set '{name}' is already registered with {found}, now {source} is asked "
                "for. Choose another name, or register it once (register_all: pass the root in "
                "its first call)."
            )
        return

    def load() -> list[dict[str, Any]]:
        if prepare is not None:
            prepare()
        return _load_records(json_file, image_root, strict)

    names = categories()
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=list(names.values()),
        thing_dataset_id_to_contiguous_id={id_: index for index, id_ in enumerate(names)},
        evaluator_type="maskx_coco",
        **source,
    )


def _load_records(
    json_file: str | os.PathLike, image_root: str | os.PathLike, strict: bool
) -> list[dict[str, Any]]:
    """Read records in Detectron2's form: ``category_id`` there is a class index."""
    records = load_coco(json_file, image_root, strict=strict).records
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] = annotation.pop("class_index")
            annotation["bbox_mode"] = BoxMode.XYXY_ABS
    return records


def _read_categories(json_file: str | os.PathLike) -> dict[int, str]:
    categories = read_coco_json(json_file)["categories"]
    return {c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}


def _coco_categories() -> dict[int, str]:
    ids = [i for i in range(1, 91) if i not in _UNUSED_COCO_IDS]
    return dict(zip(ids, COCO_THING_CLASSES, strict=True))


def _scene_categories() -> dict[int, str]:
    categories = THING_CATEGORIES[:_NUM_SCENE_CATEGORIES]
    return {index: category.name for index, category in enumerate(categories, start=1)}


def _write_scenes(folder: Path, parameters: dict[str, int]) -> None:
    """Generate scenes unless they are there; several processes may do so at the same time."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "scenes"
            generate_scenes(made, **parameters)
            with contextlib.suppress(OSError):  # another process was first, with the same scenes
                made.rename(folder)
    generate_scenes(folder, **parameters)  # writes nothing, but checks what is there
