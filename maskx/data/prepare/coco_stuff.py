"""COCO-Stuff 164k (Caesar et al., CVPR 2018) as COCO-format files with label maps.

Its masks ("stuffthingmaps") are PNG files of 8 bits with the category id - 1; ids go from 1 to 182
and 11 of them do not exist. 255 is unlabelled.
"""

import functools
import os
from pathlib import Path

from maskx.data.large_vocabularies import coco_stuff_classes
from maskx.data.prepare.label_map_sets import (
    LabelMapSetSummary,
    MaskedImage,
    check_counts,
    check_folder,
    label_table,
    relabel_by_value,
    write_label_map_set,
)

__all__ = [
    "COCO_STUFF_COUNTS",
    "COCO_STUFF_NAMINGS",
    "coco_stuff_class_of_id",
    "coco_stuff_names",
    "prepare_coco_stuff",
]

COCO_STUFF_COUNTS = {"train2017": 118287, "val2017": 5000}
"""Number of images."""

COCO_STUFF_NAMINGS = ("renamed", "raw")
"""How classes are named: to match ADE20K (160 classes) or as published (171)."""

_UNLABELED = 255


def coco_stuff_names(naming: str = "renamed") -> tuple[str, ...]:
    """Return the class list: unique names, in the order of the first id of each.

    Args:
        naming: "renamed" for the names that LarvSeg matches with ADE20K's, of which 7 ids are
            "wall", 5 "floor" and 2 "ceiling": 160 classes; "raw" for the 171 published names.
    """
    return tuple(dict.fromkeys(_name_of_id(naming).values()))


def coco_stuff_class_of_id(naming: str = "renamed") -> dict[int, int]:
    """Return the class index of each of the 171 category ids; ids of one name have one index."""
    index_of = {name: index for index, name in enumerate(coco_stuff_names(naming))}
    return {category_id: index_of[name] for category_id, name in _name_of_id(naming).items()}


def prepare_coco_stuff(
    images: str | os.PathLike[str],
    masks: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    naming: str = "renamed",
    allow_other_counts: bool = False,
    strict: bool = True,
    workers: int = 1,
) -> LabelMapSetSummary:
    """Write `coco_stuff_{train2017,train2017_tags,val2017}.json` and the label maps they name.

    `maskx.data.prepare.label_map_sets.write_label_map_set` says what is in the files, and takes
    the other arguments. Label maps are in `output/label_maps_NAMING`; label 0 is not used,
    unlabelled pixels are 255. With `naming` "raw" the names of the JSON files start with
    `coco_stuff_raw`.

    Args:
        images: Folder of COCO's images, with the folders `train2017` and `val2017`.
        allow_other_counts: Whether the numbers of images may be others than `COCO_STUFF_COUNTS`.

    Raises:
        ValueError: The numbers of images are not what they should be, or files of an image.
    """
    images, masks, output = Path(images), Path(masks), Path(output)
    names = coco_stuff_names(naming)
    relabel = functools.partial(_read_labels, naming=naming)
    parts = {
        part: [
            MaskedImage(
                image_id=_image_id(path),
                image=images / part / f"{path.stem}.jpg",
                masks=path,
                relabel=relabel,
                label_map=output / f"label_maps_{naming}" / part / path.name,
            )
            for path in sorted(check_folder(masks / part, "masks").glob("*.png"))
        ]
        for part in COCO_STUFF_COUNTS
    }
    counts = {part: len(entries) for part, entries in parts.items()}
    check_counts(counts, COCO_STUFF_COUNTS, masks, allow_other=allow_other_counts)
    return write_label_map_set(
        parts,
        names,
        output,
        prefix="coco_stuff" if naming == "renamed" else "coco_stuff_raw",
        image_roots={part: images / part for part in parts},
        tags_of="train2017",
        strict=strict,
        workers=workers,
    )


def _name_of_id(naming: str) -> dict[int, str]:
    if naming not in COCO_STUFF_NAMINGS:
        raise ValueError(
            f"COCO-Stuff has no names {naming!r}. Allowed: {', '.join(COCO_STUFF_NAMINGS)}."
        )
    return {
        entry.category_id: entry.renamed if naming == "renamed" else entry.name
        for entry in coco_stuff_classes()
    }


def _image_id(path: Path) -> int:
    if not path.stem.isdecimal():
        raise ValueError(
            f"{path}: is no name of an image of COCO. Allowed: digits, such as 000000000139.png. "
            "Move other files elsewhere."
        )
    return int(path.stem)


@functools.cache
def _labels_by_value(naming: str):
    labels = {
        category_id - 1: index + 1 for category_id, index in coco_stuff_class_of_id(naming).items()
    }
    num_classes = len(coco_stuff_names(naming))
    return label_table(labels, _UNLABELED + 1, num_classes, unlabeled=[_UNLABELED])


def _read_labels(path: Path, naming: str):
    allowed = "category ids of COCO-Stuff less 1 (0 to 181, of which 171 exist), 255 (unlabelled)"
    return relabel_by_value(path, _labels_by_value(naming), allowed)
