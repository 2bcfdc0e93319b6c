"""The data sets that `datasets/prepare.py` makes: what each reads and writes, and its options.

Nothing is imported before a data set is made, so that the command answers at once.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PREPARATIONS", "Preparation", "prepare_command"]


@dataclass(frozen=True)
class Preparation:
    """One data set to make.

    Attributes:
        about: What is made, in one line.
        files: What is read and written, below ROOT.
        run: Makes it; takes the root folder and the options, gives what is to be printed.
        options: Keyword arguments of `ArgumentParser.add_argument` by flag.
    """

    about: str
    files: str
    run: Callable[..., Iterator[str]]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def prepare_command(name: str, *options: str) -> str:
    """Return the command that makes a data set, as messages quote it."""
    command = " ".join(["python datasets/prepare.py", name, *options])
    return f"`{command} --root <folder of the data sets>` (see datasets/README.md)"


def _made_by(function: str, **places: str | Callable[[Path, Mapping[str, Path]], Path]) -> Any:
    """Return the `run` that calls a function of this folder with paths and options by name."""
    # Of each path is given where it is below ROOT, or how it is found by ROOT and the paths before;
    # an option of its name goes first. The last of them is written.

    def run(root: Path, **options: Any) -> Iterator[str]:
        paths: dict[str, Path] = {}
        for name, place in places.items():
            given = options.pop(name, None)
            paths[name] = given or (place(root, paths) if callable(place) else root / place)
        module, name = function.split(".")
        made = getattr(importlib.import_module(f"maskx.data.prepare.{module}"), name)
        yield str(made(**paths, **options))
        yield f"Written to {[*paths.values()][-1]}."

    return run


def _masks_of_sbd(root: Path, paths: Mapping[str, Path]) -> Path:
    as_png = paths["voc"] / "SegmentationClassAug"
    return as_png if as_png.is_dir() else root / "benchmark_RELEASE" / "dataset"


# Of each split the published names of its labels, its boxes and its folder of images.
_OPEN_IMAGES = {
    "train": (
        "oidv7-train-annotations-human-imagelabels.csv",
        "oidv6-train-annotations-bbox.csv",
        "train",
    ),
    "val": (
        "oidv7-val-annotations-human-imagelabels.csv",
        "validation-annotations-bbox.csv",
        "validation",
    ),
}


def _open_images(
    root: Path,
    *,
    split: str,
    only: str | None,
    labels: list[Path] | None,
    boxes: Path | None,
    descriptions: Path | None,
    boxable: Path | None,
    images: Path | None,
    min_machine_confidence: float | None,
    existing_images: bool,
    workers: int,
) -> Iterator[str]:
    from maskx.data.prepare.open_images import (
        prepare_open_images_boxes,
        prepare_open_images_tags,
        read_open_images_names,
    )

    root = root / "open_images"
    output = root / "annotations"
    published_labels, published_boxes, folder = (root / name for name in _OPEN_IMAGES[split])
    images = images or folder
    names = read_open_images_names(
        descriptions or root / "oidv7-class-descriptions.csv",
        boxable or root / "class-descriptions-boxable.csv",
    )
    if only != "boxes":
        made = prepare_open_images_tags(
            labels or [published_labels],
            names,
            output / f"{split}_tags.jsonl",
            min_machine_confidence=min_machine_confidence,
            existing_images=images if existing_images else None,
        )
        yield str(made)
    if only != "tags":
        made = prepare_open_images_boxes(
            boxes or published_boxes,
            names,
            images,
            output / f"{split}_boxes.json",
            sizes=output / f"{split}_sizes.csv",
            existing_only=existing_images,
            workers=workers,
        )
        yield str(made)
    yield f"Written to {output}."


def _lvis(root: Path, *, split: str, json_file: Path | None) -> Iterator[str]:
    from maskx.data.prepare.lvis import prepare_lvis

    output = root / "lvis" / "annotations"
    made = prepare_lvis(
        json_file or root / "lvis" / f"lvis_v1_{split}.json",
        output / f"lvis_v1_{split}.json",
        # The images of its train are all of COCO's train2017.
        concepts=output / "concepts_val.json" if split == "val" else None,
    )
    yield str(made)
    yield f"Written to {output}."


def _path(text: str, **keywords: Any) -> dict[str, Any]:
    return {"type": Path, "help": text, **keywords}


def _number(text: str, default: int, **keywords: Any) -> dict[str, Any]:
    return {"type": int, "default": default, "help": f"{text} (default: %(default)s)", **keywords}


def _flag(text: str, **keywords: Any) -> dict[str, Any]:
    return {"action": "store_true", "help": text, **keywords}


_SKIP_BAD = _flag(
    "leave out images whose files are missing or bad, and count them",
    action="store_false",
    dest="strict",
)
_PARTS = {
    "--allow-other-counts": _flag("take other numbers of images than those of the whole data set"),
    "--skip-bad": _SKIP_BAD,
}
_WORKERS = {
    "--workers": _number("processes", os.cpu_count(), help="processes (default: one per core)")
}

PREPARATIONS: dict[str, Preparation] = {
    "voc": Preparation(
        "PASCAL VOC 2012 with the masks of SBD (trainaug, 10582 images), and VOC's val",
        "Reads ROOT/VOCdevkit/VOC2012 and, whichever is there, its folder SegmentationClassAug "
        "(PNG) or ROOT/benchmark_RELEASE/dataset (SBD as published); writes ROOT/voc2012.",
        _made_by("voc.prepare_voc", voc="VOCdevkit/VOC2012", sbd=_masks_of_sbd, output="voc2012"),
        {
            "--voc": _path("default: ROOT/VOCdevkit/VOC2012"),
            "--sbd": _path("folder of SBD's masks, PNG or as published (default: see above)"),
            **_WORKERS,
            **_PARTS,
        },
    ),
    "coco60": Preparation(
        "COCO-60, the source set of TransferNet: images of COCO without any class of PASCAL VOC",
        "Reads ROOT/coco/annotations/instances_train2014.json; writes "
        "instances_coco60_train2014.json beside it.",
        _made_by(
            "coco_subsets.write_coco60",
            json_file="coco/annotations/instances_train2014.json",
            output=lambda _, paths: paths["json_file"].with_name("instances_coco60_train2014.json"),
        ),
        {
            "--json": _path(
                "default: ROOT/coco/annotations/instances_train2014.json", dest="json_file"
            ),
            "--output": _path("default: instances_coco60_train2014.json in the same folder"),
        },
    ),
    "visual_genome": Preparation(
        "the 3000-class data set of the Mask^X R-CNN paper, from Visual Genome 1.4",
        "Reads objects.json and image_data.json in ROOT/visual_genome and COCO's "
        "instances_val2017.json; writes ROOT/visual_genome/annotations.",
        _made_by(
            "visual_genome.prepare_visual_genome",
            objects_json="visual_genome/objects.json",
            image_data_json="visual_genome/image_data.json",
            coco_val_json="coco/annotations/instances_val2017.json",
            output="visual_genome/annotations",
        ),
        {
            "--coco-val-json": _path("default: ROOT/coco/annotations/instances_val2017.json"),
            "--classes": _number("number of classes", 3000, dest="num_classes"),
            "--reference-classes": _flag(
                "the class list of the published code: the CLASSES most frequent synsets and the "
                "COCO classes that are not among them"
            ),
            "--test-images": _number(
                "images held out for a test set; 0: none, as in the paper",
                5000,
                dest="num_test_images",
            ),
        },
    ),
    "visual_genome_concepts": Preparation(
        "tags and boxes of Visual Genome for ConceptMask, named by words",
        "Reads ROOT/visual_genome/annotations/instances_vg3k_{train,val,test}.json, which "
        "`prepare.py visual_genome` writes; writes "
        "concepts_{train,val,test}_{tags.jsonl,boxes.json} there.",
        _made_by(
            "visual_genome.prepare_visual_genome_concepts",
            folder="visual_genome/annotations",
        ),
    ),
    "open_images": Preparation(
        "tags and boxes of Open Images (V4 to V7) for ConceptMask",
        "Reads CSV files and images in ROOT/open_images, by their published names; writes "
        "ROOT/open_images/annotations/{train,val}_{tags.jsonl,boxes.json}. Sizes of images are "
        "kept in SPLIT_sizes.csv there, for the next run.",
        _open_images,
        {
            "--split": {
                "choices": tuple(_OPEN_IMAGES),
                "default": "train",
                "help": "default: %(default)s",
            },
            "--only": {"choices": ("tags", "boxes"), "help": "make one of the two files"},
            "--labels": _path("CSV files of image labels, verified and machine", nargs="+"),
            "--boxes": _path("CSV file of boxes"),
            "--descriptions": _path("default: oidv7-class-descriptions.csv"),
            "--boxable": _path("default: class-descriptions-boxable.csv"),
            "--images": _path("folder of images (default: train or validation)"),
            "--min-machine-confidence": {
                "type": float,
                "help": "take machine labels of this confidence or more too (default: verified "
                "ones only)",
            },
            "--existing-images": _flag(
                "leave out images that are not in the folder, and count them"
            ),
            **_WORKERS,
        },
    ),
    "open_images_masks": Preparation(
        "masks of the validation images of Open Images, for testing ConceptMask",
        "Reads validation-annotations-object-segmentation.csv and the folder masks/validation in "
        "ROOT/open_images, and val_{boxes.json,sizes.csv} that `prepare.py open_images --split "
        "val` writes; writes ROOT/open_images/annotations/val_masks.json.",
        _made_by(
            "open_images_masks.prepare_open_images_masks",
            mask_file="open_images/validation-annotations-object-segmentation.csv",
            masks="open_images/masks/validation",
            boxes="open_images/annotations/val_boxes.json",
            sizes="open_images/annotations/val_sizes.csv",
            output="open_images/annotations/val_masks.json",
        ),
    ),
    "lvis": Preparation(
        "LVIS v1: mask AP by its own rule, and masks of concepts that COCO does not have",
        "Reads ROOT/lvis/lvis_v1_SPLIT.json; writes ROOT/lvis/annotations/lvis_v1_SPLIT.json and, "
        "of val, concepts_val.json. Images are those of ROOT/coco.",
        _lvis,
        {
            "--split": {
                "choices": ("train", "val"),
                "default": "val",
                "help": "default: %(default)s",
            },
            "--json": _path("default: ROOT/lvis/lvis_v1_SPLIT.json", dest="json_file"),
        },
    ),
    "coco_stuff": Preparation(
        "label maps and tags of COCO-Stuff 164k, in 160 classes or in its 171",
        "Reads ROOT/coco/{train2017,val2017} and ROOT/coco/stuffthingmaps; writes ROOT/coco_stuff.",
        _made_by(
            "coco_stuff.prepare_coco_stuff",
            images="coco",
            masks="coco/stuffthingmaps",
            output="coco_stuff",
        ),
        {
            "--masks": _path("default: ROOT/coco/stuffthingmaps"),
            "--names": {
                "dest": "naming",
                "choices": ("renamed", "raw"),
                "default": "renamed",
                "help": "renamed: as LarvSeg matches them with ADE20K's, 160 classes; raw: the "
                "171 published ones (default: %(default)s)",
            },
            **_WORKERS,
            **_PARTS,
        },
    ),
    "ade20k_150": Preparation(
        "label maps and tags of ADE20K in the 150 classes of its scene parsing challenge",
        "Reads ROOT/ADEChallengeData2016; writes ROOT/ade20k_150.",
        _made_by(
            "ade20k.prepare_ade20k_150", challenge="ADEChallengeData2016", output="ade20k_150"
        ),
        {**_WORKERS, **_PARTS},
    ),
    "ade20k_full": Preparation(
        "label maps and tags of the full ADE20K, in 847 classes",
        "Reads ROOT/ADE20K_2021_17_01/images/ADE; writes ROOT/ade20k_full.",
        _made_by("ade20k.prepare_ade20k_full", full="ADE20K_2021_17_01", output="ade20k_full"),
        {
            "--short-side": _number(
                "write images whose shorter side is longer so small, in pixels; 0: leave all as "
                "and where they are",
                512,
            ),
            **_WORKERS,
            **_PARTS,
        },
    ),
    "imagenet21k": Preparation(
        "image labels of ImageNet-21K, or of the synsets that are classes of ADE20K",
        "Reads ROOT/imagenet21k/n*/*.JPEG, any part of it; writes ROOT/imagenet21k_labels.",
        _made_by("imagenet.prepare_imagenet21k", images="imagenet21k", output="imagenet21k_labels"),
        {
            "--images": _path("folder of the synsets' folders (default: ROOT/imagenet21k)"),
            "--classes": {
                "default": "ade847",
                "help": "ade150, ade847, all, or a JSON file {synset: class name} (default: "
                "%(default)s)",
            },
            "--max-images-per-class": {
                "type": int,
                "help": "take the first so many of each class, by name",
            },
            **_WORKERS,
            "--allow-other-counts": _flag("take lists with synsets of which there are no images"),
            "--skip-bad": _SKIP_BAD,
        },
    ),
    "ccp": Preparation(
        "Clothing Co-Parsing (CCP): photos with masks, photos with tags only",
        "Reads ROOT/ccp: photos/NNNN.jpg, masks/NNNN.png (8 bits, value = number of the class), "
        "classes.json, image_level_tags.json, pixel_train.txt, pixel_val.txt and "
        "image_level.txt; writes ROOT/ccp/annotations/ccp_{train,val,tags,mixed}.json.",
        _made_by(
            "ccp.prepare_ccp", ccp="ccp", output=lambda _, paths: paths["ccp"] / "annotations"
        ),
        {
            "--ccp": _path("folder of the data set (default: ROOT/ccp)"),
            "--output": _path("folder to write to (default: annotations in that of CCP)"),
        },
    ),
}
