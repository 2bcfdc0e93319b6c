"""The data sets that maskx knows by name. Importing this module registers none."""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from maskx.data.large_vocabularies import ade20k_150_classes, ade20k_847_classes
from maskx.data.prepare.coco_stuff import coco_stuff_names
from maskx.data.prepare.imagenet import IMAGENET_CLASS_LISTS
from maskx.data.prepare.table import prepare_command
from maskx.data.prepare.visual_genome import CATEGORIES_FILE, SPLITS, read_class_names
from maskx.data.scenes.concepts import generate_concept_scenes, scene_concept_kinds
from maskx.data.scenes.generator import STUFF_CATEGORIES, generate_scenes, scene_categories
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES, VOC_CLASSES_IN_COCO
from maskx.detectron2.datasets import (
    CocoSource,
    check_file,
    register_source,
    register_tag_list,
)

# The other ids from 1 to 90 are those of the official files, in the order of the class list.
_UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


@dataclass(frozen=True)
class Scenes:
    """Scenes that are generated when a data set is first used.

    Attributes:
        generate: the generator; it writes nothing where it finds its scenes.
    """

    parameters: Mapping[str, Any]
    generate: Callable[..., Path] = generate_scenes

    def write(self, folder: Path) -> None:
        """Generate them unless they are there; several processes may do so at the same time."""
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = Path(scratch) / "scenes"
                self.generate(made, **self.parameters)
                with contextlib.suppress(OSError):  # another process was first, with the same
                    made.rename(folder)
        self.generate(folder, **self.parameters)  # writes nothing, but checks what is there


@dataclass(frozen=True)
class KnownDataset:
    """A data set by where it lies below the folder of the data sets.

    Attributes:
        json_file: annotations, or a tag list (``.jsonl``).
        categories: names by category id, given the folder of the data sets; None for those of the
            file, which are known when it is read.
        made_by: name and options of ``datasets/prepare.py``, which makes it; empty if it is
            published so, or generated.
        class_file: file that the classes are read from, if they are not known without.
    """

    json_file: str
    image_root: str
    categories: Callable[[Path], Mapping[int, str]] | None = None
    strict: bool = True
    made_by: tuple[str, ...] = ()
    class_file: str = ""
    class_names: Callable[[Path], Sequence[str]] | None = None
    stuff: Sequence[str] = ()
    labels_only: bool = False
    scenes: Scenes | None = None


def register_all(root: str | os.PathLike | None = None) -> None:
    """Register the data sets of ``KNOWN_DATASETS``, which ``datasets/README.md`` describes.

    Nothing is read but the class lists that are in files. Calling it again adds only what is new,
    such as class lists of what was prepared in the meantime.

    Args:
        root: folder of the data sets; None for the environment variable ``DETECTRON2_DATASETS``
            or, where that is not set, ``datasets``; after a first call None keeps its folder.
    """
    root = _known_root() if root is None else Path(root).expanduser()
    for name, known in KNOWN_DATASETS.items():
        _register(name, known, root)


def _register(name: str, known: KnownDataset, root: Path) -> None:
    json_file, image_root = root / known.json_file, root / known.image_root
    remedy = f"Write it with {prepare_command(*known.made_by)}." if known.made_by else ""
    if json_file.suffix == ".jsonl":
        register_tag_list(name, json_file, image_root, remedy=remedy)
        return

    def prepare() -> None:
        if known.scenes is not None:
            known.scenes.write(image_root)
        for file in (root / known.class_file, json_file) if known.class_file else (json_file,):
            if known.made_by:
                check_file(file, remedy)

    def given_root(function: Callable[[Path], Any] | None) -> Callable[[], Any] | None:
        return None if function is None else functools.partial(function, root)

    source = CocoSource(
        json_file,
        image_root,
        strict=known.strict,
        categories=given_root(known.categories),
        class_names=given_root(known.class_names),
        stuff=known.stuff,
        labels_only=known.labels_only,
        prepare=prepare,
    )
    has_classes = not known.class_file or (root / known.class_file).is_file()
    register_source(name, source, read_classes=has_classes and known.categories is not None)


def _known_root() -> Path:
    """Folder of the first call of register_all or, before it, the default."""
    if "maskx_coco_2017_train" in DatasetCatalog:
        return Path(MetadataCatalog.get("maskx_coco_2017_train").image_root).parents[1]
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def _coco_categories(root: Path) -> dict[int, str]:
    ids = [i for i in range(1, 91) if i not in _UNUSED_COCO_IDS]
    return dict(zip(ids, COCO_THING_CLASSES, strict=True))


def _coco60_categories(root: Path) -> dict[int, str]:
    return {i: n for i, n in _coco_categories(root).items() if n not in VOC_CLASSES_IN_COCO}


def _vg_names(root: Path) -> Sequence[str]:
    return read_class_names(root / _VG_CLASSES)


def _numbered(names: Callable[[], Iterable[Any]]) -> Callable[[Path], dict[int, str]]:
    """Number classes from 1; they are names, or have one."""
    return lambda root: {i: getattr(c, "name", c) for i, c in enumerate(names(), start=1)}


def _listed_categories(path: str) -> Callable[[Path], dict[int, str]]:
    return lambda root: {c["id"]: c["name"] for c in json.loads((root / path).read_bytes())}


def scene_dataset(
    folder: str, *, with_ground: bool = False, labels_only: bool = False, **parameters: Any
) -> KnownDataset:
    """Describe generated scenes.

    Args:
        with_ground: whether the kinds of ground are classes too, so that every pixel has one.
    """

    def categories(root: Path) -> dict[int, str]:
        kinds = scene_categories(parameters["num_categories"], parameters["style"])
        return {index: category.name for index, category in enumerate(kinds, start=1)}

    return KnownDataset(
        f"{folder}/annotations.json",
        folder,
        categories,
        stuff=tuple(category.name for category in STUFF_CATEGORIES) if with_ground else (),
        labels_only=labels_only,
        scenes=Scenes(parameters),
    )


def concept_scene_dataset(folder: str, **parameters: Any) -> KnownDataset:
    """Describe generated scenes with concepts of every kind, as :func:`scene_dataset`."""
    return KnownDataset(
        f"{folder}/concepts.json",
        folder,
        _numbered(scene_concept_kinds),
        scenes=Scenes(parameters, generate_concept_scenes),
    )


_VG_CLASSES = f"visual_genome/annotations/{CATEGORIES_FILE}"
_VG = {"made_by": ("visual_genome",), "class_file": _VG_CLASSES}
_CROWDED = {"size": 128, "num_categories": 40, "style": "crowded"}
_SPARSE = {"size": 128, "num_categories": 12, "style": "sparse"}

KNOWN_DATASETS: dict[str, KnownDataset] = {
    **{
        f"maskx_coco_2017_{part}": KnownDataset(
            f"coco/annotations/instances_{part}2017.json",
            f"coco/{part}2017",
            _coco_categories,
            strict=False,  # a few boxes of the official files have no width or no height
        )
        for part in ("train", "val")
    },
    **{
        f"maskx_{name}": scene_dataset(f"maskx_{folder}", **options, count=count, seed=seed)
        for name, folder, options, count, seed in (
            ("scenes_train", "scenes/train", _CROWDED, 1000, 0),
            ("scenes_val", "scenes/val", _CROWDED, 200, 1),
            ("scenes_sparse_train", "scenes_sparse/train", _SPARSE, 1500, 0),
            ("scenes_sparse_val", "scenes_sparse/val", _SPARSE, 200, 1),
        )
    },
    **{
        f"maskx_scenes_sparse_stuff_{part}": scene_dataset(
            f"maskx_scenes_sparse{folder}",
            with_ground=True,
            labels_only=part == "tags",
            **_SPARSE,
            count=count,
            seed=seed,
        )
        for part, folder, count, seed in (
            ("train", "_stuff/train", 750, 2),
            ("tags", "/train", 1500, 0),  # scenes_sparse_train
            ("val", "/val", 200, 1),  # scenes_sparse_val
        )
    },
    **{
        f"maskx_scenes_concepts_{part}": concept_scene_dataset(
            f"maskx_scenes_concepts/{part}", size=128, count=count, seed=seed
        )
        for part, count, seed in (("train", 1500, 0), ("val", 200, 1))
    },
    **{
        f"maskx_open_images_{part}_{what}": KnownDataset(
            f"open_images/annotations/{part}_{file}",
            f"open_images/{images}",
            strict=False,
            made_by=("open_images", "--split", part),
        )
        for part, images in (("train", "train"), ("val", "validation"))
        for what, file in (("tags", "tags.jsonl"), ("boxes", "boxes.json"))
    },
    **{
        f"maskx_visual_genome_{part}_{what}": KnownDataset(
            f"visual_genome/annotations/concepts_{part}_{file}",
            "visual_genome",
            strict=False,
            made_by=("visual_genome_concepts",),
        )
        for part in ("train", "val")
        for what, file in (("tags", "tags.jsonl"), ("boxes", "boxes.json"))
    },
    "maskx_open_images_val_masks": KnownDataset(
        "open_images/annotations/val_masks.json",
        "open_images/validation",
        strict=False,
        made_by=("open_images_masks",),
    ),
    **{
        f"maskx_lvis_{name}": KnownDataset(
            f"lvis/annotations/{file}.json",
            "coco",
            strict=False,
            made_by=("lvis", "--split", part),
        )
        for name, file, part in (
            ("v1_train", "lvis_v1_train", "train"),
            ("v1_val", "lvis_v1_val", "val"),
            ("concepts_val", "concepts_val", "val"),
        )
    },
    **{
        f"maskx_coco_stuff_{part}": KnownDataset(
            f"coco_stuff/coco_stuff_{file}.json",
            f"coco/{images}",
            _numbered(coco_stuff_names),
            made_by=("coco_stuff",),
        )
        for part, file, images in (
            ("train", "train2017", "train2017"),
            ("train_tags", "train2017_tags", "train2017"),
            ("val", "val2017", "val2017"),
        )
    },
    **{
        f"maskx_ade20k_{num_classes}_{part}": KnownDataset(
            f"{folder}/{folder}_{part}.json",
            f"{images}/{'validation' if part == 'val' else 'training'}",
            _numbered(names),
            made_by=(folder,),
        )
        for num_classes, folder, images, names in (
            (150, "ade20k_150", "ADEChallengeData2016/images", ade20k_150_classes),
            (847, "ade20k_full", "ade20k_full/images", ade20k_847_classes),
        )
        for part in ("train", "train_tags", "val")
    },
    **{
        f"maskx_imagenet_{classes}": KnownDataset(
            f"imagenet21k_labels/imagenet_{classes}_tags.json",
            "imagenet21k",
            _listed_categories(f"imagenet21k_labels/imagenet_{classes}_categories.json"),
            made_by=("imagenet21k", "--classes", classes),
            class_file=f"imagenet21k_labels/imagenet_{classes}_categories.json",
        )
        for classes in IMAGENET_CLASS_LISTS
    },
    **{
        f"maskx_voc_2012_{part}": KnownDataset(
            f"voc2012/voc2012_{part}.json",
            "VOCdevkit/VOC2012/JPEGImages",
            _numbered(lambda: VOC_CLASSES),
            made_by=("voc",),
        )
        for part in ("trainaug", "trainaug_tags", "val")
    },
    "maskx_coco60_train2014": KnownDataset(
        "coco/annotations/instances_coco60_train2014.json",
        "coco/train2014",
        _coco60_categories,
        strict=False,  # as COCO itself
        made_by=("coco60",),
    ),
    **{
        f"maskx_vg3k_{part}": KnownDataset(
            f"visual_genome/annotations/instances_vg3k_{part}.json",
            "visual_genome",
            lambda root: dict(enumerate(_vg_names(root), start=1)),
            **_VG,
        )
        for part in SPLITS
    },
    # COCO in the class list of Visual Genome, whose first 80 classes it annotates.
    **{
        f"maskx_coco_2017_vg3k_{part}": KnownDataset(
            f"coco/annotations/instances_{part}2017.json",
            f"coco/{part}2017",
            _coco_categories,
            strict=False,
            class_names=_vg_names,
            **_VG,
        )
        for part in ("train", "val")
    },
}
