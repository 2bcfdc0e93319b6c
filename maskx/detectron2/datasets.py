"""Registration of data sets. Importing this module registers none."""

import contextlib
import difflib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from maskx.data.coco import load_coco, read_coco_json, supervision_of
from maskx.data.large_vocabularies import ade20k_150_classes, ade20k_847_classes
from maskx.data.prepare.coco_stuff import coco_stuff_names
from maskx.data.prepare.imagenet import IMAGENET_CLASS_LISTS
from maskx.data.prepare.visual_genome import CATEGORIES_FILE, SPLITS, read_class_names
from maskx.data.scenes.generator import STUFF_CATEGORIES, generate_scenes, scene_categories
from maskx.data.splits import resolve_split
from maskx.data.tag_lists import read_tag_list
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES, VOC_CLASSES_IN_COCO
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.concept_mask.scenes import generate_concept_scenes, scene_concept_kinds
from maskx.systems.larvseg.joint_sets import things_and_stuff

__all__ = [
    "add_detectron2_keys",
    "check_file",
    "check_registered",
    "class_names_of",
    "record_from_detectron2",
    "records_of",
    "register_all",
    "register_coco",
    "register_from_config",
    "register_tag_list",
    "split_from_config",
    "training_class_names",
]

# The other ids from 1 to 90 are those of the official files, in the order of the class list.
_UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

_CROWDED = {"size": 128, "num_categories": 40, "style": "crowded"}
_SPARSE = {"size": 128, "num_categories": 12, "style": "sparse"}
# Folder of the scenes, with the parameters of their generator, by the name of the data set.
_SCENES = {
    "maskx_scenes_train": ("maskx_scenes/train", _CROWDED | {"count": 1000, "seed": 0}),
    "maskx_scenes_val": ("maskx_scenes/val", _CROWDED | {"count": 200, "seed": 1}),
    "maskx_scenes_sparse_train": (
        "maskx_scenes_sparse/train",
        _SPARSE | {"count": 1500, "seed": 0},
    ),
    "maskx_scenes_sparse_val": ("maskx_scenes_sparse/val", _SPARSE | {"count": 200, "seed": 1}),
}

# The same where the ground is of classes too, so that every pixel has one.
_SCENES_WITH_STUFF = {
    "maskx_scenes_sparse_stuff_train": (
        "maskx_scenes_sparse_stuff/train",
        _SPARSE | {"count": 750, "seed": 2},
    ),
    "maskx_scenes_sparse_stuff_tags": _SCENES["maskx_scenes_sparse_train"],
    "maskx_scenes_sparse_stuff_val": _SCENES["maskx_scenes_sparse_val"],
}

# Scenes with concepts of every kind, in which training may see what scene_concept_split() says.
_SCENES_WITH_CONCEPTS = {
    "maskx_scenes_concepts_train": (
        "maskx_scenes_concepts/train",
        {"size": 128, "count": 1500, "seed": 0},
    ),
    "maskx_scenes_concepts_val": (
        "maskx_scenes_concepts/val",
        {"size": 128, "count": 200, "seed": 1},
    ),
}

# Tags and boxes of large vocabularies: file and folder of the images, and the script that writes
# the file. Their class lists are read with them.
_OPEN_IMAGES = ("open_images/annotations", "prepare_open_images.py")
_VG_CONCEPTS = ("visual_genome/annotations", "prepare_visual_genome_concepts.py")
_CONCEPT_FILES = {
    f"maskx_{name}_{part}_{what}": (f"{folder}/{prefix}{part}_{what}{ending}", images, script)
    for name, (folder, script), prefix, images_of in (
        (
            *("open_images", _OPEN_IMAGES, ""),
            {"train": "open_images/train", "val": "open_images/validation"},
        ),
        (
            *("visual_genome", _VG_CONCEPTS, "concepts_"),
            {"train": "visual_genome", "val": "visual_genome"},
        ),
    )
    for part, images in images_of.items()
    for what, ending in (("tags", ".jsonl"), ("boxes", ".json"))
}

_COCO_IN_VG = tuple(f"maskx_coco_2017_vg3k_{part}" for part in ("train", "val"))
_COCO60 = "maskx_coco60_train2014"
_VOC = {f"maskx_voc_2012_{part}": part for part in ("trainaug", "trainaug_tags", "val")}
_VISUAL_GENOME = (*(f"maskx_vg3k_{part}" for part in SPLITS), *_COCO_IN_VG)
_IMAGENET = {f"maskx_imagenet_{classes}": classes for classes in IMAGENET_CLASS_LISTS}


class _Prepared(NamedTuple):
    """A data set that a script of datasets/ writes.

    Attributes:
        json_file: from the folder of the data sets.
        image_root: likewise.
        script: its name.
        class_names: makes the class list.
    """

    json_file: str
    image_root: str
    script: str
    class_names: Callable[[], Sequence[str]]


def _ade20k_150_names() -> list[str]:
    return [entry.name for entry in ade20k_150_classes()]


def _ade20k_847_names() -> list[str]:
    return [entry.name for entry in ade20k_847_classes()]


# Data sets without a background, whose class lists are known before they are prepared.
_LABEL_MAP_SETS = {
    f"maskx_{name}_{part}": _Prepared(f"{folder}/{json_file}.json", images, *made)
    for name, folder, parts, *made in (
        (
            *("coco_stuff", "coco_stuff"),
            {
                "train": ("coco_stuff_train2017", "coco/train2017"),
                "train_tags": ("coco_stuff_train2017_tags", "coco/train2017"),
                "val": ("coco_stuff_val2017", "coco/val2017"),
            },
            *("prepare_coco_stuff.py", coco_stuff_names),
        ),
        (
            *("ade20k_150", "ade20k_150"),
            {
                "train": ("ade20k_150_train", "ADEChallengeData2016/images/training"),
                "train_tags": ("ade20k_150_train_tags", "ADEChallengeData2016/images/training"),
                "val": ("ade20k_150_val", "ADEChallengeData2016/images/validation"),
            },
            *("prepare_ade20k_150.py", _ade20k_150_names),
        ),
        (
            *("ade20k_847", "ade20k_full"),
            {
                "train": ("ade20k_full_train", "ade20k_full/images/training"),
                "train_tags": ("ade20k_full_train_tags", "ade20k_full/images/training"),
                "val": ("ade20k_full_val", "ade20k_full/images/validation"),
            },
            *("prepare_ade20k_full.py", _ade20k_847_names),
        ),
    )
    for part, (json_file, images) in parts.items()
}


def register_coco(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    strict: bool = True,
    class_names: Sequence[str] | None = None,
) -> None:
    """Register a COCO-format data set whose annotations may lack masks.

    Detectron2's own reader drops a box whose polygons are all bad; this one does not. Categories
    are read at once, annotations when the data set is used.

    With ``class_names`` the data set lives in a larger class list, so that it can train together
    with others of that list. If its file annotates only some of the classes, its boxes are
    incomplete: an object of any other class may be anywhere without a box. Its records then have
    ``boxes_complete`` False, and :class:`MaskXDatasetMapper` marks their instances with
    ``gt_boxes_complete``, all False. Such an image trains the mask branch only: for the detector
    every object of the other classes would be background.

    Args:
        name: name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``. Registering it again with the same
            arguments does nothing.
        json_file: annotation file.
        image_root: folder of the images.
        strict: whether a bad annotation is an error; see :func:`maskx.data.coco.load_coco`.
        class_names: class list, by class index, to which the categories of the file belong by
            name; None for the categories of the file, in the order of their ids.

    Raises:
        FileNotFoundError: there is no such annotation file.
        ValueError: the name stands for another data set, the file cannot be used, or it has a
            category that is not in ``class_names``.
    """
    _register(
        name,
        json_file,
        image_root,
        strict=strict,
        class_names=class_names,
        categories=lambda: _read_categories(json_file),
    )


def register_tag_list(
    name: str, file: str | os.PathLike, image_root: str | os.PathLike, *, remedy: str = ""
) -> None:
    """Register images with tags alone, see :func:`maskx.data.tag_lists.read_tag_list`.

    ConceptMask reads it in its own vocabulary. For others the class list is that of the file, by
    the alphabet.

    Args:
        name: name for ``DATASETS.TRAIN``. Registering it again with the same files does nothing.
        file: JSON lines with ``file_name`` and ``tags``; it is read when the data set is used.
        image_root: folder of the images.
        remedy: what the message says if there is no such file.

    Raises:
        ValueError: the name stands for another data set.
    """

    def load() -> list[dict[str, Any]]:
        check_file(file, remedy)
        tags = read_tag_list(file, strict=False)
        MetadataCatalog.get(name).set(thing_classes=list(tags.names))
        return [
            {
                "file_name": os.path.join(image_root, str(image_id)),
                "image_id": image_id,
                "image_labels": tags.tags_of(index).tolist(),
                "supervision": Supervision.IMAGE.value,
            }
            for index, image_id in enumerate(tags.image_ids)
        ]

    source = {"tag_list": os.fspath(file), "image_root": os.fspath(image_root)}
    _register_lazily(name, load, source)
    MetadataCatalog.get(name).remedy = remedy


def register_all(root: str | os.PathLike | None = None) -> None:
    """Register the data sets that maskx knows. Calling it again adds only what is new.

    - ``maskx_coco_2017_train`` and ``_val``: COCO in ``root/coco``, laid out as for Detectron2;
    - ``maskx_scenes_train`` and ``_val``: 1000 and 200 generated scenes of 128 pixels with 40
      categories, written to ``root/maskx_scenes`` when first used (6 s on 1 core);
    - ``maskx_scenes_sparse_train`` and ``_val``: 1500 and 200 scenes of one or two objects with 12
      categories, in ``root/maskx_scenes_sparse``, from whose image labels much can be learned;
    - ``maskx_scenes_sparse_stuff_train`` and ``_val``: 750 more and the same 200, in which the 5
      kinds of ground are classes too, after the 12, so that every pixel has a class;
    - ``maskx_scenes_sparse_stuff_tags``: the 1500 scenes of ``maskx_scenes_sparse_train``, with
      image labels alone, of the ground too.

    - ``maskx_scenes_concepts_train`` and ``_val``: 1500 and 200 scenes with 71 concepts, see
      :mod:`maskx.systems.concept_mask.scenes`, in ``root/maskx_scenes_concepts``.

    Whose files are looked for when they are used, and whose class lists are read with them:

    - ``maskx_open_images_train_tags``, ``_train_boxes``, ``_val_tags`` and ``_val_boxes``, by
      ``datasets/prepare_open_images.py``;
    - ``maskx_visual_genome_train_tags``, ``_train_boxes``, ``_val_tags`` and ``_val_boxes``, by
      ``datasets/prepare_visual_genome_concepts.py``.

    Without a background, with class lists that are known even where the data are not there:

    - ``maskx_coco_stuff_train``, ``_train_tags`` and ``_val``: COCO-Stuff in 160 classes;
    - ``maskx_ade20k_150_train``, ``_train_tags`` and ``_val``: ADE20K in 150 classes;
    - ``maskx_ade20k_847_train``, ``_train_tags`` and ``_val``: ADE20K in 847 classes.

    ``datasets/prepare_coco_stuff.py``, ``prepare_ade20k_150.py`` and ``prepare_ade20k_full.py``
    write their files; ``_tags`` are the images of train with image labels only.

    Where ``datasets/prepare_imagenet21k.py`` has written ``root/imagenet21k_labels``:

    - ``maskx_imagenet_ade150``, ``_ade847`` and ``_all``: ImageNet-21K, one image label each, in
      the classes that are also ADE20K's, or in all.

    Where ``datasets/prepare_voc.py`` has written ``root/voc2012``, with the images in
    ``root/VOCdevkit/VOC2012/JPEGImages``:

    - ``maskx_voc_2012_trainaug`` and ``_val``: image labels and label maps;
    - ``maskx_voc_2012_trainaug_tags``: the images of trainaug, image labels only.

    Where ``datasets/prepare_coco60.py`` has written
    ``root/coco/annotations/instances_coco60_train2014.json``:

    - ``maskx_coco60_train2014``: the images of COCO without any class of VOC, with the 60 other
      classes; their images in ``root/coco/train2014``.

    Where ``datasets/prepare_visual_genome.py`` has written ``root/visual_genome/annotations``:

    - ``maskx_vg3k_train``, ``_val`` and ``_test``: Visual Genome, boxes only;
    - ``maskx_coco_2017_vg3k_train`` and ``_val``: COCO in the class list of Visual Genome, whose
      first 80 classes it annotates; see ``class_names`` of :func:`register_coco`.

    Args:
        root: folder of the data sets; None for the environment variable ``DETECTRON2_DATASETS``
            or, where that is not set, ``datasets``; after a first call None keeps its folder.
    """
    root = _known_root() if root is None else Path(root).expanduser()
    for part in ("train", "val"):
        _register_coco_2017(f"maskx_coco_2017_{part}", root, part)
    for name, (place, parameters) in _SCENES.items():
        folder = root / place
        _register(
            name,
            folder / "annotations.json",
            folder,
            strict=True,
            categories=functools.partial(_scene_categories, parameters),
            prepare=functools.partial(_write_scenes, folder, parameters),
        )
    for name, (place, parameters) in _SCENES_WITH_STUFF.items():
        folder = root / place
        _register(
            name,
            folder / "annotations.json",
            folder,
            strict=True,
            categories=functools.partial(_scene_categories, parameters),
            stuff=[category.name for category in STUFF_CATEGORIES],
            labels_only=name.endswith("_tags"),
            prepare=functools.partial(_write_scenes, folder, parameters),
        )
    for name, (place, parameters) in _SCENES_WITH_CONCEPTS.items():
        folder = root / place
        _register(
            name,
            folder / "concepts.json",
            folder,
            strict=True,
            categories=lambda: dict(enumerate(scene_concept_kinds(), start=1)),
            prepare=functools.partial(
                _write_scenes, folder, parameters, generate=generate_concept_scenes
            ),
        )
    for name, (file, images, script) in _CONCEPT_FILES.items():
        _register_concept_file(name, root / file, root / images, script)
    for name, prepared in _LABEL_MAP_SETS.items():
        _register_prepared(name, root, prepared)
    for name, classes in _IMAGENET.items():
        if _imagenet_categories_file(root, classes).is_file():
            _register_imagenet(name, root, classes)
    for name in _VOC:
        if _voc_file(root, name).is_file():
            _register_voc(name, root)
    if _coco60_file(root).is_file():
        _register_coco60(root)
    if _vg_categories_file(root).is_file():
        _register_visual_genome(root)


def register_from_config(cfg: CfgNode) -> None:
    """Register the data sets of ``DATASETS.MASKX.REGISTER``. Calling it again does nothing.

    A file that ends with ``.jsonl`` is a tag list.

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
        if entry[1].endswith(".jsonl"):
            register_tag_list(*entry)
        else:
            register_coco(*entry, strict=cfg.DATASETS.MASKX.STRICT)


def class_names_of(dataset_name: str) -> list[str]:
    """Return the class list of a registered data set.

    Raises:
        FileNotFoundError: it is one of VOC, COCO-60, ImageNet or Visual Genome, which was not
            prepared.
        ValueError: there is no such data set, or it has no class list.
    """
    prepared = (*_VOC, _COCO60, *_IMAGENET, *_VISUAL_GENOME)
    if dataset_name in prepared and dataset_name not in DatasetCatalog:
        root = _known_root()
        if dataset_name in _VOC:
            file, script = _voc_file(root, dataset_name), "prepare_voc.py"
        elif dataset_name in _IMAGENET:
            classes = _IMAGENET[dataset_name]
            file = _imagenet_categories_file(root, classes)
            script = f"prepare_imagenet21k.py --classes {classes}"
        elif dataset_name == _COCO60:
            file, script = _coco60_file(root), "prepare_coco60.py"
        else:
            file, script = _vg_categories_file(root), "prepare_visual_genome.py"
        raise FileNotFoundError(
            f"Data set '{dataset_name}' needs {file}, which was "
            "not there when the data sets were registered. Write it with `python "
            f"datasets/{script} --root <folder of the data sets>` (see "
            "datasets/README.md), then call maskx.detectron2.register_all() or start again."
        )
    check_registered(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(dataset_name)  # Detectron2's COCO reader knows them only then
    if not metadata.get("thing_classes"):
        raise ValueError(
            f"Data set '{dataset_name}' has no class list. Set "
            f"MetadataCatalog.get('{dataset_name}').thing_classes to the names by class index."
        )
    return metadata.thing_classes


def check_registered(dataset_name: str) -> None:
    """Refuse the name of a data set that is not registered.

    Raises:
        ValueError: there is no such data set; the message names close ones.
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


def records_of(dataset_name: str) -> list[dict[str, Any]]:
    """Read a registered data set, whoever registered it, in the form of ``load_coco``.

    Raises:
        ValueError: there is no such data set.
    """
    check_registered(dataset_name)
    return [record_from_detectron2(record) for record in DatasetCatalog.get(dataset_name)]


def record_from_detectron2(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record in the form of :func:`maskx.data.coco.load_coco`; one of ours as it is.

    A record of another reader that says nothing of what its image shows, neither by annotations
    nor by image labels, gets none of the keys that would say that it shows nothing.

    Args:
        record: of a data set that anybody registered with Detectron2.
    """
    annotations = record.get("annotations", ())
    is_ours = all("class_index" in annotation for annotation in annotations)
    if is_ours and "supervision" in record:
        return record
    if not {"annotations", "image_labels", "label_map_file_name"} & record.keys():
        return record
    annotations = [_annotation_from_detectron2(annotation) for annotation in annotations]
    labels = {annotation["class_index"] for annotation in annotations}
    read = {
        **record,
        "annotations": annotations,
        "image_labels": sorted(labels.union(record.get("image_labels", ()))),
    }
    read.setdefault("supervision", supervision_of(read, tags_given="image_labels" in record))
    return read


def _annotation_from_detectron2(annotation: Mapping[str, Any]) -> dict[str, Any]:
    if "class_index" in annotation:
        return annotation
    return {
        **annotation,
        "class_index": annotation["category_id"],  # Detectron2 calls it so
        "bbox": BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS),
        "bbox_mode": BoxMode.XYXY_ABS,
        "iscrowd": annotation.get("iscrowd", 0),
    }


def add_detectron2_keys(records: Sequence[dict[str, Any]]) -> None:
    """Give records of ``load_coco`` the keys that Detectron2's own code looks for.

    Its mapper, filters, samplers and Visualizer read ``category_id``, which is the class index
    there, and ``bbox_mode`` of each annotation. The records of our registered data sets have both.
    """
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] = annotation["class_index"]
            annotation["bbox_mode"] = BoxMode.XYXY_ABS


def _register(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    strict: bool,
    categories: Callable[[], dict[int, str]],
    class_names: Sequence[str] | None = None,
    stuff: Sequence[str] = (),
    labels_only: bool = False,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Register a data set unless it is.

    Args:
        name: name of the data set.
        json_file: annotation file.
        image_root: folder of the images.
        strict: whether a bad annotation is an error.
        categories: returns names by category id, in the order of the ids.
        class_names: the class list they belong to by name; None if they are the class list.
        stuff: without ``class_names``, the stuff of the file, classes after its categories; see
            :func:`maskx.systems.larvseg.joint_sets.things_and_stuff`.
        labels_only: keep no more than image labels.
        prepare: called before the annotation file is read.
    """
    source = {
        "json_file": os.fspath(json_file),
        "image_root": os.fspath(image_root),
        "strict": strict,
        # Not "class_names": Detectron2 refuses it as an old name of thing_classes.
        "class_list": None if class_names is None else list(class_names),
        "stuff_list": list(stuff),
    }
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        found = {key: metadata.get(key) for key in source}
        differing = [key for key in source if found[key] != source[key]]
        if differing:
            ways = (", ".join(f"{k} {way[k]!r:.200}" for k in differing) for way in (found, source))
            raise ValueError(
                f"Data set '{name}' is already registered with {next(ways)}; now {next(ways)} is "
                "asked for. Choose another name, or register it once (register_all: pass the root "
                "in its first call)."
            )
        return

    names = categories()
    class_list = [*names.values(), *stuff] if class_names is None else list(class_names)
    class_index = _match_categories(names, class_list, json_file)
    class_index |= {max(names) + i: len(names) - 1 + i for i in range(1, len(stuff) + 1)}

    def load() -> list[dict[str, Any]]:
        if prepare is not None:
            prepare()
        records = _load_records(json_file, image_root, strict, names, class_list, stuff)
        return [_with_labels_only(record) for record in records] if labels_only else records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=class_list,
        thing_dataset_id_to_contiguous_id=class_index,
        evaluator_type="maskx_coco",
        **source,
    )


def _match_categories(
    names: Mapping[int, str], class_list: Sequence[str], json_file: str | os.PathLike
) -> dict[int, int]:
    """Return class indices by category id."""
    index_of = {name: index for index, name in enumerate(class_list)}
    if len(index_of) < len(class_list):
        raise ValueError(f"class_names for {os.fspath(json_file)} repeats a name. Remove it.")
    for name in names.values():
        if name not in index_of:
            close = difflib.get_close_matches(name, class_list, n=3, cutoff=0.4)
            hint = f" Closest: {', '.join(map(repr, close))}." if close else ""
            raise ValueError(
                f"{os.fspath(json_file)} has the category '{name}', which is not among the "
                f"{len(class_list)} of class_names.{hint} Rename it in the file, or add it to "
                "class_names."
            )
    return {id_: index_of[name] for id_, name in names.items()}


def _load_records(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    strict: bool,
    names: Mapping[int, str],
    class_list: Sequence[str],
    stuff: Sequence[str],
) -> list[dict[str, Any]]:
    """Read records in the class list of a data set.

    Args:
        json_file: annotation file.
        image_root: folder of the images.
        strict: whether a bad annotation is an error.
        names: category names by id that the data set was registered with.
        class_list: the class list, which has all of them.
        stuff: the stuff that is in it after them.
    """
    data = load_coco(json_file, image_root, strict=strict)
    found = dict(zip(data.category_ids, data.class_names, strict=True))
    if found != names:
        differing = sorted({name for _, name in found.items() ^ names.items()})
        raise ValueError(
            f"{os.fspath(json_file)} has {len(found)} categories, which are not the {len(names)} "
            f"that the data set was registered with; they differ in {', '.join(differing[:5])}"
            f"{' and more' if len(differing) > 5 else ''}. If it is the right file, register it "
            "with register_coco under a name of its own."
        )
    labelled = next((r for r in data.records if "label_map_file_name" in r), None)
    if labelled is not None and list(data.class_names) != list(class_list):
        raise ValueError(
            f"{os.fspath(json_file)}: image {labelled['image_id']!r} has a label map, whose labels "
            f"count the {len(data.class_names)} categories of the file, but the data set is "
            f"registered with a list of {len(class_list)} classes. Register it without class_names."
        )
    records, known_names = data.records, list(data.class_names)
    if stuff:
        records, known_names = things_and_stuff(data)
        if list(known_names) != list(class_list):
            raise ValueError(
                f"{os.fspath(json_file)} has the stuff {', '.join(known_names[len(names) :])}, but "
                f"the data set was registered with {', '.join(stuff)}. Generate it anew."
            )
    position = {name: index for index, name in enumerate(class_list)}
    # load_coco counts the categories of the file from 0.
    class_index = [position[name] for name in known_names]
    for record in records:
        record["image_labels"] = sorted(class_index[label] for label in record["image_labels"])
        if len(known_names) < len(class_list):
            record["boxes_complete"] = False
        for annotation in record["annotations"]:
            annotation["class_index"] = class_index[annotation["class_index"]]
    add_detectron2_keys(records)
    return records


def _with_labels_only(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("file_name", "height", "width", "image_id", "image_labels")
    return {key: record[key] for key in kept} | {
        "annotations": [],
        "supervision": Supervision.IMAGE.value,
    }


def _register_coco_2017(
    name: str, root: Path, part: str, class_names: Sequence[str] | None = None
) -> None:
    _register(
        name,
        root / "coco" / "annotations" / f"instances_{part}2017.json",
        root / "coco" / f"{part}2017",
        strict=False,  # a few boxes of the official files have no width or no height
        class_names=class_names,
        categories=_coco_categories,
    )


def _register_visual_genome(root: Path) -> None:
    class_names = read_class_names(_vg_categories_file(root))
    for part in SPLITS:
        _register(
            f"maskx_vg3k_{part}",
            root / "visual_genome" / "annotations" / f"instances_vg3k_{part}.json",
            root / "visual_genome",
            strict=True,  # prepare_visual_genome writes no box that the reader refuses
            categories=lambda: dict(enumerate(class_names, start=1)),
        )
    for name, part in zip(_COCO_IN_VG, ("train", "val"), strict=True):
        _register_coco_2017(name, root, part, class_names)


def _register_voc(name: str, root: Path) -> None:
    _register(
        name,
        _voc_file(root, name),
        root / "VOCdevkit" / "VOC2012" / "JPEGImages",
        strict=True,
        categories=lambda: dict(enumerate(VOC_CLASSES, start=1)),
    )


def _register_coco60(root: Path) -> None:
    categories = {i: n for i, n in _coco_categories().items() if n not in VOC_CLASSES_IN_COCO}
    _register(
        _COCO60,
        _coco60_file(root),
        root / "coco" / "train2014",
        strict=False,  # as COCO itself
        categories=lambda: categories,
    )


def _register_prepared(name: str, root: Path, prepared: _Prepared) -> None:
    json_file = root / prepared.json_file
    _register(
        name,
        json_file,
        root / prepared.image_root,
        strict=True,
        categories=lambda: dict(enumerate(prepared.class_names(), start=1)),
        prepare=functools.partial(_check_prepared, json_file, prepared.script),
    )


def _register_imagenet(name: str, root: Path, classes: str) -> None:
    path = _imagenet_categories_file(root, classes)
    _register(
        name,
        path.with_name(f"imagenet_{classes}_tags.json"),
        root / "imagenet21k",
        strict=True,
        categories=lambda: {c["id"]: c["name"] for c in json.loads(path.read_bytes())},
    )


def _register_concept_file(name: str, file: Path, image_root: Path, script: str) -> None:
    remedy = (
        f"Write it with `python datasets/{script} --root <folder of the data sets>` (see "
        "datasets/README.md)."
    )
    if file.suffix == ".jsonl":
        register_tag_list(name, file, image_root, remedy=remedy)
        return

    def load() -> list[dict[str, Any]]:
        check_file(file, remedy)
        names = _read_categories(file)
        MetadataCatalog.get(name).set(thing_classes=list(names.values()))
        return _load_records(file, image_root, False, names, list(names.values()), ())

    _register_lazily(name, load, {"json_file": str(file), "image_root": str(image_root)})


def _register_lazily(
    name: str, load: Callable[[], list[dict[str, Any]]], source: Mapping[str, str]
) -> None:
    """Register a data set, unless it is, whose class list is known once it is read."""
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**source)
        return
    metadata = MetadataCatalog.get(name)
    found = {key: metadata.get(key) for key in source}
    if found != source:
        raise ValueError(
            f"Data set '{name}' is already registered with {found}; now {dict(source)} is asked "
            "for. Choose another name, or register it once (register_all: pass the root in its "
            "first call)."
        )


def check_file(file: str | os.PathLike, remedy: str) -> None:
    """Refuse a file that is not there, with what to do."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(file)}. {remedy or 'Correct it.'}")


def _check_prepared(json_file: Path, script: str) -> None:
    if not json_file.is_file():
        raise FileNotFoundError(
            f"There is no file {json_file}. Write it with `python datasets/{script} --root <folder "
            "of the data sets>` (see datasets/README.md)."
        )


def _imagenet_categories_file(root: Path, classes: str) -> Path:
    return root / "imagenet21k_labels" / f"imagenet_{classes}_categories.json"


def _coco60_file(root: Path) -> Path:
    return root / "coco" / "annotations" / "instances_coco60_train2014.json"


def _voc_file(root: Path, name: str) -> Path:
    return root / "voc2012" / f"voc2012_{_VOC[name]}.json"


def _vg_categories_file(root: Path) -> Path:
    return root / "visual_genome" / "annotations" / CATEGORIES_FILE


def _known_root() -> Path:
    """Folder of the first call of register_all or, before it, the default."""
    if "maskx_coco_2017_train" in DatasetCatalog:
        return Path(MetadataCatalog.get("maskx_coco_2017_train").image_root).parents[1]
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def _read_categories(json_file: str | os.PathLike) -> dict[int, str]:
    categories = read_coco_json(json_file)["categories"]
    return {c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}


def _coco_categories() -> dict[int, str]:
    ids = [i for i in range(1, 91) if i not in _UNUSED_COCO_IDS]
    return dict(zip(ids, COCO_THING_CLASSES, strict=True))


def _scene_categories(parameters: Mapping[str, Any]) -> dict[int, str]:
    categories = scene_categories(parameters["num_categories"], parameters["style"])
    return {index: category.name for index, category in enumerate(categories, start=1)}


def _write_scenes(
    folder: Path,
    parameters: Mapping[str, Any],
    generate: Callable[..., Path] = generate_scenes,
) -> None:
    """Generate scenes unless they are there; several processes may do so at the same time."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "scenes"
            generate(made, **parameters)
            with contextlib.suppress(OSError):  # another process was first, with the same scenes
                made.rename(folder)
    generate(folder, **parameters)  # writes nothing, but checks what is there
