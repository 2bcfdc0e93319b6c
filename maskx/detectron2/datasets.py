"""Data sets of Detectron2 and their class lists. Importing this module registers none.

The data sets that maskx knows by name are in :mod:`maskx.detectron2.known_datasets`.
"""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from maskx.data.coco import (
    CocoData,
    check_same_categories,
    load_coco,
    read_coco_json,
    supervision_of,
    with_labels_only,
)
from maskx.data.label_maps import ignore_label, voc_palette
from maskx.data.splits import resolve_split
from maskx.data.tag_lists import read_tag_list
from maskx.data.things_and_stuff import things_and_stuff
from maskx.detectron2.complete_files import complete_when_asked
from maskx.evaluation.figures import COLOR_WITH_MASKS, COLOR_WITHOUT_MASKS
from maskx.supervision import CategorySplit, Supervision

# Detectron2's own tool has no evaluator that is right for such a data set. Its error shows this.
_OWN_EVALUATORS = (
    "maskx (let build_evaluator return maskx.detectron2.MaskXCOCOEvaluator(dataset_name, "
    "output_dir=output_folder), for tags MaskXImageLabelEvaluator, or use maskx's own "
    "tools/train_net.py)"
)


@dataclass(frozen=True)
class CocoSource:
    """Where the records and classes of a data set come from.

    Attributes:
        categories: gives names by category id, in the order of the ids; None for those of the file.
        class_names: gives the class list they belong to by name; None if they are the class list.
        stuff: without ``class_names``, the stuff of the file, classes after its categories; see
            :func:`maskx.data.things_and_stuff.things_and_stuff`.
    """

    json_file: str | os.PathLike
    image_root: str | os.PathLike
    strict: bool = True
    categories: Callable[[], Mapping[int, str]] | None = None
    class_names: Callable[[], Sequence[str]] | None = None
    stuff: Sequence[str] = ()
    labels_only: bool = False
    prepare: Callable[[], None] | None = None

    def describe(self) -> dict[str, Any]:
        """Return what two registrations under one name must agree in."""
        return {
            "json_file": os.fspath(self.json_file),
            "image_root": os.fspath(self.image_root),
            "strict": self.strict,
            "stuff_list": list(self.stuff),
        }

    def classes(self, names: Mapping[int, str]) -> tuple[list[str], dict[int, int]]:
        """Return the class list, and class indices by category id."""
        if self.class_names is not None:
            class_list = list(self.class_names())
        else:
            class_list = [*names.values(), *self.stuff]
        class_index = _match_categories(names, class_list, self.json_file)
        stuff = range(len(self.stuff))
        return class_list, class_index | {max(names) + 1 + i: len(names) + i for i in stuff}


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
    incomplete: its records have ``boxes_complete`` False, and :class:`MaskXDatasetMapper` marks
    their instances with ``gt_boxes_complete``, all False. Such an image trains the mask branch
    only: for the detector every object of the other classes would be background.

    Registering it again with the same arguments does nothing.

    Args:
        strict: whether a bad annotation is an error; see :func:`maskx.data.coco.load_coco`.
        class_names: by class index; None for the categories of the file, in the order of their ids.

    Raises:
        ValueError: the name stands for another data set, or a category is not in ``class_names``.
    """
    categories = _read_categories(json_file, strict)
    source = CocoSource(
        json_file,
        image_root,
        strict=strict,
        categories=lambda: categories,
        class_names=None if class_names is None else lambda: class_names,
    )
    register_source(name, source)


def register_tag_list(
    name: str, file: str | os.PathLike, image_root: str | os.PathLike, *, remedy: str = ""
) -> None:
    """Register images with tags alone, see :func:`maskx.data.tag_lists.read_tag_list`.

    ConceptMask reads it in its own vocabulary. For others the class list is that of the file, by
    the alphabet.

    Args:
        file: JSON lines with ``file_name`` and ``tags``; it is read when the data set is used.
        remedy: what the message says if there is no such file.
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
    _register(name, load, source)
    MetadataCatalog.get(name).set(remedy=remedy, evaluator_type=_OWN_EVALUATORS)


def register_source(name: str, source: CocoSource, *, read_classes: bool = True) -> None:
    """Register a data set unless it is.

    Args:
        read_classes: whether the class list can be known now; otherwise it is known once the data
            set was read, or registered again when it can.
    """

    def load() -> list[dict[str, Any]]:
        if source.prepare is not None:
            source.prepare()
        data = load_coco(source.json_file, source.image_root, strict=source.strict)
        found = dict(zip(data.category_ids, data.class_names, strict=True))
        names = found if source.categories is None else source.categories()
        _check_categories(found, names, source.json_file)
        class_list, class_index = source.classes(names)
        _set_classes(name, class_list, class_index)
        records = _records_in(class_list, data, source)
        if source.labels_only:
            records = [with_labels_only(record) for record in records]
        _offer_to_other_evaluators(name, data, records)
        return records

    # Before anything is registered, as the classes may be refused.
    classes = source.classes(source.categories()) if read_classes else None
    _register(name, load, source.describe(), class_list=None if classes is None else classes[0])
    if classes is not None:
        _set_classes(name, *classes)
    # Detectron2's own tool asks when the data set is read, which says which it can be.
    vars(MetadataCatalog.get(name)).setdefault("evaluator_type", "coco")


def _set_classes(name: str, class_list: list[str], class_index: dict[int, int]) -> None:
    MetadataCatalog.get(name).set(
        thing_classes=class_list,
        thing_dataset_id_to_contiguous_id=class_index,
        # By label of a label map, for Detectron2's Visualizer.
        stuff_classes=["background", *class_list],
        stuff_colors=voc_palette(len(class_list) + 1).tolist(),
    )


def _offer_to_other_evaluators(
    name: str, data: CocoData, records: Sequence[dict[str, Any]]
) -> None:
    """Say which evaluator of Detectron2's own tool is right, and give it what it needs."""
    metadata = MetadataCatalog.get(name)
    if data.lacking & {"iscrowd", "area"}:
        complete_when_asked(metadata.json_file)
    class_indices = sorted(metadata.thing_dataset_id_to_contiguous_id.values())
    is_whole = class_indices == list(range(len(metadata.thing_classes)))
    has_objects = any(record["annotations"] for record in records)
    evaluator = _OWN_EVALUATORS
    if has_objects and is_whole and "segmentation" not in data.lacking:
        evaluator = "coco"
    elif records and all("label_map_file_name" in record for record in records):
        evaluator = "sem_seg"
        metadata.ignore_label = ignore_label(len(metadata.thing_classes))
        for record in records:
            record["sem_seg_file_name"] = record["label_map_file_name"]
    vars(metadata)["evaluator_type"] = evaluator  # metadata takes a value once


def _register(
    name: str,
    load: Callable[[], list[dict[str, Any]]],
    source: Mapping[str, Any],
    *,
    class_list: list[str] | None = None,
) -> None:
    """Register a data set unless it is; refuse another source or class list under its name."""
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**source)
        return
    metadata = MetadataCatalog.get(name)
    asked, found = dict(source), {key: metadata.get(key) for key in source}
    if class_list is not None and metadata.get("thing_classes") is not None:
        asked["class names"], found["class names"] = class_list, metadata.thing_classes
    differing = [key for key in asked if found[key] != asked[key]]
    if differing:
        ways = (", ".join(f"{k} {way[k]!r:.200}" for k in differing) for way in (found, asked))
        raise ValueError(
            f"Data set '{name}' is already registered with {next(ways)}; now {next(ways)} is "
            "asked for. Choose another name, or register it once (register_all: pass the root "
            "in its first call)."
        )


def register_from_config(cfg: CfgNode) -> None:
    """Register the data sets of ``DATASETS.MASKX.REGISTER``. Calling it again does nothing.

    A file that ends with ``.jsonl`` is a tag list. A test set with the categories of the training
    data in another order is registered in their order. All data sets of the configuration get the
    colours of its split for Detectron2's Visualizer: categories with masks (A) green, others red.
    """
    train, test = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    for entry in cfg.DATASETS.MASKX.REGISTER:
        is_triple = isinstance(entry, list | tuple) and len(entry) == 3
        if not is_triple or not all(isinstance(part, str) for part in entry):
            raise ValueError(
                f"DATASETS.MASKX.REGISTER holds {entry!r}. Allowed: entries "
                "[name, json_file, image_root], all three strings."
            )
    is_test = {e[0]: e[0] in test and e[0] not in train for e in cfg.DATASETS.MASKX.REGISTER}
    for entry in sorted(cfg.DATASETS.MASKX.REGISTER, key=lambda e: is_test[e[0]]):
        if entry[1].endswith(".jsonl"):
            register_tag_list(*entry)
            continue
        class_names = None
        if is_test[entry[0]] and train and train[0] in DatasetCatalog:
            found = _read_categories(entry[1], cfg.DATASETS.MASKX.STRICT)
            names = MetadataCatalog.get(train[0]).get("thing_classes") or ()
            if list(found.values()) != list(names) and set(found.values()) == set(names):
                files = (f"data set '{entry[0]}'", f"'{train[0]}'")
                check_same_categories(found, _names_by_id(train[0], names), files=files)
                class_names = names
        register_coco(*entry, strict=cfg.DATASETS.MASKX.STRICT, class_names=class_names)
    _set_colors(cfg)


def _set_colors(cfg: CfgNode) -> None:
    for name in {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} & DatasetCatalog.keys():
        metadata = MetadataCatalog.get(name)
        class_names = metadata.get("thing_classes") or ()
        try:
            with_masks = set(resolve_split(cfg.DATASETS.MASKX.SPLIT, class_names).with_masks)
        except (ValueError, FileNotFoundError):  # the classes are not known yet, or are others
            continue
        colors = [COLOR_WITH_MASKS if n in with_masks else COLOR_WITHOUT_MASKS for n in class_names]
        # Metadata takes a value once, but the next configuration may have another split.
        vars(metadata)["thing_colors"] = colors


def check_class_list(name: str, class_names: Sequence[str], source: str) -> None:
    """Refuse a data set whose class list is not that of the model.

    Args:
        name: of the data set.
        class_names: of the model, by class index.
        source: the data set that they are of; "" where they are of none.
    """
    own = class_names_of(name)
    if list(own) == list(class_names):
        return
    other = f"'{source}'" if source else "the class list of the model"
    check_same_categories(
        _names_by_id(name, own),
        _names_by_id(source, class_names),
        files=(f"data set '{name}'", other),
    )
    index = next(i for i, each in enumerate(own) if each != class_names[i])
    raise ValueError(
        f"Data set '{name}' has the classes of {other} in another order: class {index} is "
        f"{own[index]!r}, not {class_names[index]!r}. Register it with register_coco(..., "
        "class_names=) in that order, or in DATASETS.MASKX.REGISTER."
    )


def _names_by_id(dataset_name: str, class_names: Sequence[str]) -> dict[Any, str]:
    """Class names by category id, by themselves where the ids are not known."""
    metadata = MetadataCatalog.get(dataset_name) if dataset_name else {}
    class_index = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    if len(class_index) != len(class_names):
        return dict(zip(class_names, class_names, strict=True))
    return {id_: class_names[index] for id_, index in class_index.items()}


def class_names_of(dataset_name: str) -> list[str]:
    """Return the class list of a registered data set."""
    check_registered(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(dataset_name)  # some readers know them only then
    if not metadata.get("thing_classes"):
        raise ValueError(
            f"Data set '{dataset_name}' has no class list. Set "
            f"MetadataCatalog.get('{dataset_name}').thing_classes to the names by class index."
        )
    return metadata.thing_classes


def check_registered(dataset_name: str) -> None:
    """Refuse the name of a data set that is not registered."""
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
    """Return the class list of the (first) data set of ``DATASETS.TRAIN``."""
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty. Name at least one registered data set.")
    return class_names_of(cfg.DATASETS.TRAIN[0])


def split_from_config(cfg: CfgNode) -> CategorySplit:
    """Resolve ``DATASETS.MASKX.SPLIT`` by the class list of the training data."""
    return resolve_split(cfg.DATASETS.MASKX.SPLIT, training_class_names(cfg))


def records_of(dataset_name: str) -> list[dict[str, Any]]:
    """Read a registered data set, whoever registered it, in the form of ``load_coco``."""
    check_registered(dataset_name)
    return [record_from_detectron2(record) for record in DatasetCatalog.get(dataset_name)]


def record_from_detectron2(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record in the form of :func:`maskx.data.coco.load_coco`; one of ours as it is.

    A record of another reader that says nothing of what its image shows, neither by annotations
    nor by image labels, gets none of the keys that would say that it shows nothing.
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


def _check_categories(
    found: Mapping[int, str], names: Mapping[int, str], json_file: str | os.PathLike
) -> None:
    """Refuse a file whose categories are not those that its data set was registered with."""
    if found != names:
        differing = sorted({name for _, name in found.items() ^ names.items()})
        raise ValueError(
            f"{os.fspath(json_file)} has {len(found)} categories, which are not the {len(names)} "
            f"that the data set was registered with; they differ in {', '.join(differing[:5])}"
            f"{' and more' if len(differing) > 5 else ''}. If it is the right file, register it "
            "with register_coco under a name of its own."
        )


def _records_in(
    class_list: Sequence[str], data: CocoData, source: CocoSource
) -> list[dict[str, Any]]:
    """Return records in a class list, with the keys that Detectron2's own code looks for."""
    json_file, stuff = source.json_file, source.stuff
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
                f"{os.fspath(json_file)} has stuff other than {', '.join(stuff)}, which "
                "the data set was registered with. Generate it anew."
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


def check_file(file: str | os.PathLike, remedy: str) -> None:
    """Refuse a file that is not there, with what to do."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(file)}. {remedy or 'Correct it.'}")


def _read_categories(json_file: str | os.PathLike, strict: bool) -> dict[int, str]:
    categories = read_coco_json(json_file, strict=strict)["categories"]
    return {c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}
