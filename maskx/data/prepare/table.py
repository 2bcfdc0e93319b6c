"""The data sets that `datasets/prepare.py` makes: what each reads and writes, and its options.

Nothing is imported before a data set is made, so that the command answers at once.
"""

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


def _path(text: str, **keywords: Any) -> dict[str, Any]:
    return {"type": Path, "help": text, **keywords}


_WORKERS = {
    "--workers": {
        "type": int,
        "default": os.cpu_count(),
        "help": "processes (default: one per core)",
    }
}
_SKIP_BAD = {
    "--skip-bad": {
        "action": "store_true",
        "help": "leave out images whose files are missing or bad, and count them",
    }
}
_OTHER_COUNTS = {
    "--allow-other-counts": {
        "action": "store_true",
        "help": "take other numbers of images than those of the whole data set",
    }
}


def _voc(
    root: Path, *, voc: Path | None, sbd: Path | None, allow_other_counts: bool, skip_bad: bool
) -> Iterator[str]:
    from maskx.data.prepare.voc import format_voc_summary, prepare_voc

    voc = voc or root / "VOCdevkit" / "VOC2012"
    if sbd is None:
        sbd = voc / "SegmentationClassAug"
        if not sbd.is_dir():
            sbd = root / "benchmark_RELEASE" / "dataset"
    output = root / "voc2012"
    summary = prepare_voc(
        voc,
        sbd,
        output,
        allow_other_counts=allow_other_counts,
        strict=not skip_bad,
        progress=True,
    )
    yield format_voc_summary(summary)
    yield f"Written to {output}."


def _coco60(root: Path, *, json: Path | None, output: Path | None) -> Iterator[str]:
    from maskx.data.prepare.coco_subsets import format_coco60_summary, write_coco60

    if json and not output:
        raise ValueError("--json needs --output, the file to write")
    folder = root / "coco" / "annotations"
    output = output or folder / "instances_coco60_train2014.json"
    yield format_coco60_summary(write_coco60(json or folder / "instances_train2014.json", output))
    yield f"Written to {output}."


def _visual_genome(
    root: Path,
    *,
    coco_val_json: Path | None,
    classes: int,
    reference_classes: bool,
    test_images: int,
) -> Iterator[str]:
    from maskx.data.prepare.visual_genome import format_summary, prepare_visual_genome

    folder = root / "visual_genome"
    summary = prepare_visual_genome(
        folder / "objects.json",
        folder / "image_data.json",
        coco_val_json or root / "coco" / "annotations" / "instances_val2017.json",
        folder / "annotations",
        num_classes=classes,
        reference_classes=reference_classes,
        num_test_images=test_images,
        progress=True,
    )
    yield format_summary(summary)
    yield f"Written to {folder / 'annotations'}."


def _visual_genome_concepts(root: Path) -> Iterator[str]:
    from maskx.data.prepare.visual_genome_concepts import (
        format_concept_summary,
        prepare_visual_genome_concepts,
    )

    folder = root / "visual_genome" / "annotations"
    yield format_concept_summary(prepare_visual_genome_concepts(folder))
    yield f"Written to {folder}."


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
        format_open_images_summary,
        prepare_open_images_boxes,
        prepare_open_images_tags,
    )
    from maskx.data.prepare.open_images_names import read_open_images_names

    root = root / "open_images"
    output = root / "annotations"
    published_labels, published_boxes, folder = (root / name for name in _OPEN_IMAGES[split])
    images = images or folder
    names = read_open_images_names(
        descriptions or root / "oidv7-class-descriptions.csv",
        boxable or root / "class-descriptions-boxable.csv",
    )
    if only != "boxes":
        summary = prepare_open_images_tags(
            labels or [published_labels],
            names,
            output / f"{split}_tags.jsonl",
            min_machine_confidence=min_machine_confidence,
            existing_images=images if existing_images else None,
            progress=True,
        )
        yield format_open_images_summary(summary)
    if only != "tags":
        summary = prepare_open_images_boxes(
            boxes or published_boxes,
            names,
            images,
            output / f"{split}_boxes.json",
            sizes=output / f"{split}_sizes.csv",
            existing_only=existing_images,
            workers=workers,
            progress=True,
        )
        yield format_open_images_summary(summary)
    yield f"Written to {output}."


def _coco_stuff(
    root: Path,
    *,
    masks: Path | None,
    names: str,
    workers: int,
    allow_other_counts: bool,
    skip_bad: bool,
) -> Iterator[str]:
    from maskx.data.prepare.coco_stuff import prepare_coco_stuff
    from maskx.data.prepare.label_map_sets import format_label_map_summary

    output = root / "coco_stuff"
    summary = prepare_coco_stuff(
        root / "coco",
        masks or root / "coco" / "stuffthingmaps",
        output,
        naming=names,
        allow_other_counts=allow_other_counts,
        strict=not skip_bad,
        workers=workers,
        progress=True,
    )
    yield format_label_map_summary(summary)
    yield f"Written to {output}."


def _ade20k_150(
    root: Path, *, workers: int, allow_other_counts: bool, skip_bad: bool
) -> Iterator[str]:
    from maskx.data.prepare.ade20k import prepare_ade20k_150
    from maskx.data.prepare.label_map_sets import format_label_map_summary

    output = root / "ade20k_150"
    summary = prepare_ade20k_150(
        root / "ADEChallengeData2016",
        output,
        allow_other_counts=allow_other_counts,
        strict=not skip_bad,
        workers=workers,
        progress=True,
    )
    yield format_label_map_summary(summary)
    yield f"Written to {output}."


def _ade20k_full(
    root: Path, *, short_side: int, workers: int, allow_other_counts: bool, skip_bad: bool
) -> Iterator[str]:
    from maskx.data.prepare.ade20k import prepare_ade20k_full
    from maskx.data.prepare.label_map_sets import format_label_map_summary

    output = root / "ade20k_full"
    summary = prepare_ade20k_full(
        root / "ADE20K_2021_17_01",
        output,
        short_side=short_side or None,
        allow_other_counts=allow_other_counts,
        strict=not skip_bad,
        workers=workers,
        progress=True,
    )
    yield format_label_map_summary(summary)
    yield f"Written to {output}."


def _imagenet21k(
    root: Path,
    *,
    images: Path | None,
    classes: str,
    max_images_per_class: int | None,
    workers: int,
    allow_other_counts: bool,
    skip_bad: bool,
) -> Iterator[str]:
    from maskx.data.prepare.imagenet import format_imagenet_summary, prepare_imagenet21k

    output = root / "imagenet21k_labels"
    summary = prepare_imagenet21k(
        images or root / "imagenet21k",
        output,
        classes=classes,
        max_images_per_class=max_images_per_class,
        allow_other_counts=allow_other_counts,
        strict=not skip_bad,
        workers=workers,
        progress=True,
    )
    yield format_imagenet_summary(summary)
    yield f"Written to {output}."


def _ccp(root: Path, *, ccp: Path | None, output: Path | None) -> Iterator[str]:
    from maskx.data.prepare.ccp import format_ccp_summary, prepare_ccp

    ccp = ccp or root / "ccp"
    output = output or ccp / "annotations"
    yield format_ccp_summary(prepare_ccp(ccp, output, progress=True))
    yield f"Written to {output}."


PREPARATIONS: dict[str, Preparation] = {
    "voc": Preparation(
        "PASCAL VOC 2012 with the masks of SBD (trainaug, 10582 images), and VOC's val",
        "Reads ROOT/VOCdevkit/VOC2012 and, whichever is there, its folder SegmentationClassAug "
        "(PNG) or ROOT/benchmark_RELEASE/dataset (SBD as published); writes ROOT/voc2012.",
        _voc,
        {
            "--voc": _path("default: ROOT/VOCdevkit/VOC2012"),
            "--sbd": _path("folder of SBD's masks, PNG or as published (default: see above)"),
            **_OTHER_COUNTS,
            **_SKIP_BAD,
        },
    ),
    "coco60": Preparation(
        "COCO-60, the source set of TransferNet: images of COCO without any class of PASCAL VOC",
        "Reads ROOT/coco/annotations/instances_train2014.json; writes "
        "instances_coco60_train2014.json beside it.",
        _coco60,
        {
            "--json": _path("default: ROOT/coco/annotations/instances_train2014.json"),
            "--output": _path("default: instances_coco60_train2014.json in the same folder"),
        },
    ),
    "visual_genome": Preparation(
        "the 3000-class data set of the Mask^X R-CNN paper, from Visual Genome 1.4",
        "Reads objects.json and image_data.json in ROOT/visual_genome and COCO's "
        "instances_val2017.json; writes ROOT/visual_genome/annotations.",
        _visual_genome,
        {
            "--coco-val-json": _path("default: ROOT/coco/annotations/instances_val2017.json"),
            "--classes": {
                "type": int,
                "default": 3000,
                "help": "number of classes (default: %(default)s)",
            },
            "--reference-classes": {
                "action": "store_true",
                "help": "the class list of the published code: the CLASSES most frequent synsets "
                "and the COCO classes that are not among them",
            },
            "--test-images": {
                "type": int,
                "default": 5000,
                "help": "images held out for a test set (default: %(default)s; 0: none, as in "
                "the paper)",
            },
        },
    ),
    "visual_genome_concepts": Preparation(
        "tags and boxes of Visual Genome for ConceptMask, named by words",
        "Reads ROOT/visual_genome/annotations/instances_vg3k_{train,val,test}.json, which "
        "`prepare.py visual_genome` writes; writes "
        "concepts_{train,val,test}_{tags.jsonl,boxes.json} there.",
        _visual_genome_concepts,
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
            "--existing-images": {
                "action": "store_true",
                "help": "leave out images that are not in the folder, and count them",
            },
            **_WORKERS,
        },
    ),
    "coco_stuff": Preparation(
        "label maps and tags of COCO-Stuff 164k, in 160 classes or in its 171",
        "Reads ROOT/coco/{train2017,val2017} and ROOT/coco/stuffthingmaps; writes ROOT/coco_stuff.",
        _coco_stuff,
        {
            "--masks": _path("default: ROOT/coco/stuffthingmaps"),
            "--names": {
                "choices": ("renamed", "raw"),
                "default": "renamed",
                "help": "renamed: as LarvSeg matches them with ADE20K's, 160 classes; raw: the "
                "171 published ones (default: %(default)s)",
            },
            **_WORKERS,
            **_OTHER_COUNTS,
            **_SKIP_BAD,
        },
    ),
    "ade20k_150": Preparation(
        "label maps and tags of ADE20K in the 150 classes of its scene parsing challenge",
        "Reads ROOT/ADEChallengeData2016; writes ROOT/ade20k_150.",
        _ade20k_150,
        {**_WORKERS, **_OTHER_COUNTS, **_SKIP_BAD},
    ),
    "ade20k_full": Preparation(
        "label maps and tags of the full ADE20K, in 847 classes",
        "Reads ROOT/ADE20K_2021_17_01/images/ADE; writes ROOT/ade20k_full.",
        _ade20k_full,
        {
            "--short-side": {
                "type": int,
                "default": 512,
                "help": "write images whose shorter side is longer so small (default: "
                "%(default)s pixels; 0: leave all as and where they are)",
            },
            **_WORKERS,
            **_OTHER_COUNTS,
            **_SKIP_BAD,
        },
    ),
    "imagenet21k": Preparation(
        "image labels of ImageNet-21K, or of the synsets that are classes of ADE20K",
        "Reads ROOT/imagenet21k/n*/*.JPEG, any part of it; writes ROOT/imagenet21k_labels.",
        _imagenet21k,
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
            "--allow-other-counts": {
                "action": "store_true",
                "help": "take lists with synsets of which there are no images",
            },
            **_SKIP_BAD,
        },
    ),
    "ccp": Preparation(
        "Clothing Co-Parsing (CCP): photos with masks, photos with tags only",
        "Reads ROOT/ccp: photos/NNNN.jpg, masks/NNNN.png (8 bits, value = number of the class), "
        "classes.json, image_level_tags.json, pixel_train.txt, pixel_val.txt and "
        "image_level.txt; writes ROOT/ccp/annotations/ccp_{train,val,tags,mixed}.json.",
        _ccp,
        {
            "--ccp": _path("folder of the data set (default: ROOT/ccp)"),
            "--output": _path("folder to write to (default: annotations in that of CCP)"),
        },
    ),
}
