"""ADE20K (Zhou et al., CVPR 2017) as COCO-format files with label maps: 150 or 847 classes.

- The 150 classes are those of the scene parsing challenge ("ADEChallengeData2016"): grey PNG files
  with 1 to 150, and 0 for anything else.
- The 847 classes are those in common use for the full data set ("ADE20K_2021_17_01"). Its masks
  `*_seg.png` have the index of an object name in two channels: red / 10 * 256 + green. The file
  index_ade20k.pkl is not needed, nor read.
"""

import functools
import itertools
import os
import re
from pathlib import Path

import numpy as np

from maskx.data.large_vocabularies import ade20k_150_classes, ade20k_847_classes
from maskx.data.prepare.label_map_sets import (
    LabelMapSetSummary,
    MaskedImage,
    check_counts,
    check_folder,
    label_table,
    read_values,
    relabel_by_value,
    write_label_map_set,
)

__all__ = [
    "ADE20K_150_COUNTS",
    "ADE20K_FULL_COUNTS",
    "prepare_ade20k_150",
    "prepare_ade20k_full",
    "read_object_indices",
]

ADE20K_150_COUNTS = {"train": 20210, "val": 2000}
"""Number of images of the scene parsing challenge."""

ADE20K_FULL_COUNTS = {"train": 25574, "val": 2000}
"""Number of images of the full data set."""

_FOLDERS = {"train": "training", "val": "validation"}
_MAX_INDEX = 25 * 256 + 255  # what two channels can hold


def prepare_ade20k_150(
    challenge: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    allow_other_counts: bool = False,
    strict: bool = True,
    workers: int = 1,
) -> LabelMapSetSummary:
    """Write `ade20k_150_{train,train_tags,val}.json` and the label maps they name.

    `maskx.data.prepare.label_map_sets.write_label_map_set` says what is in the files, and takes
    the other arguments. Label 0 is not used: pixels that are none of the 150 classes are 255.
    Images are named from `challenge/images/{training,validation}`.

    Args:
        challenge: `ADEChallengeData2016`, with the folders `images` and `annotations`.
        allow_other_counts: Whether the numbers of images may be others than `ADE20K_150_COUNTS`.

    Raises:
        ValueError: The numbers of images are not what they should be, or files of an image.
    """
    challenge, output = Path(challenge), Path(output)
    parts = {}
    for part, folder in _FOLDERS.items():
        masks = check_folder(challenge / "annotations" / folder, "ADE20K")
        parts[part] = [
            MaskedImage(
                image_id=_image_id(path),
                image=challenge / "images" / folder / f"{path.stem}.jpg",
                masks=path,
                relabel=_read_150,
                label_map=output / "label_maps" / folder / path.name,
            )
            for path in sorted(masks.glob("*.png"))
        ]
    counts = {part: len(entries) for part, entries in parts.items()}
    check_counts(counts, ADE20K_150_COUNTS, challenge, allow_other=allow_other_counts)
    return write_label_map_set(
        parts,
        [entry.name for entry in ade20k_150_classes()],
        output,
        prefix="ade20k_150",
        image_roots={part: challenge / "images" / folder for part, folder in _FOLDERS.items()},
        tags_of="train",
        strict=strict,
        workers=workers,
    )


def prepare_ade20k_full(
    full: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    short_side: int = 512,
    allow_other_counts: bool = False,
    strict: bool = True,
    workers: int = 1,
) -> LabelMapSetSummary:
    """Write `ade20k_full_{train,train_tags,val}.json`, and the images and label maps they name.

    `maskx.data.prepare.label_map_sets.write_label_map_set` says what is in the files, and takes
    the other arguments. Label 0 is not used: pixels that are none of the 847 classes are 65535. An
    image whose name starts with `ADE_val` is in val, any other in train. Ids count the names in
    alphabetical order, from 1.

    Args:
        full: `ADE20K_2021_17_01`, with `images/ADE/{training,validation}/*/*/ADE_*.jpg` and
            `*_seg.png` beside them.
        short_side: Images whose shorter side is longer are made so small, bilinearly, and all are
            in `output/images`. 512 is the size at which the 847 classes are commonly evaluated.
            With 0 images stay as and where they are, and are named from `full/images/ADE`.
        allow_other_counts: Whether the numbers of images may be others than `ADE20K_FULL_COUNTS`.

    Raises:
        ValueError: The numbers of images are not what they should be, or files of an image.
    """
    if short_side < 0:
        raise ValueError(f"short_side must be at least 1 pixel, or 0 for none, got {short_side}.")
    full, output = Path(full), Path(output)
    source = check_folder(full / "images" / "ADE", "ADE20K")
    parts = {part: [] for part in _FOLDERS}
    for path in sorted(source.glob("*/**/ADE_*.jpg"), key=lambda path: path.name):
        part = "val" if path.name.startswith("ADE_val") else "train"
        parts[part].append(
            MaskedImage(
                image_id=len(parts[part]) + 1,
                image=path,
                masks=path.with_name(f"{path.stem}_seg.png"),
                relabel=_read_847,
                label_map=output / "label_maps" / _FOLDERS[part] / f"{path.stem}.png",
                small_image=output / "images" / _FOLDERS[part] / path.name if short_side else None,
            )
        )
    counts = {part: len(entries) for part, entries in parts.items()}
    check_counts(counts, ADE20K_FULL_COUNTS, full, allow_other=allow_other_counts)
    for entries in parts.values():
        names = [entry.image.name for entry in entries]
        repeated = [one for one, other in itertools.pairwise(names) if one == other]
        if repeated:
            raise ValueError(
                f"{source}: has {len(repeated)} images of a name that another has, such as "
                f"{repeated[0]}. Unpack the data set into an empty folder."
            )
    small = {part: output / "images" / folder for part, folder in _FOLDERS.items()}
    return write_label_map_set(
        parts,
        [entry.name for entry in ade20k_847_classes()],
        output,
        prefix="ade20k_full",
        image_roots=small if short_side else dict.fromkeys(_FOLDERS, source),
        tags_of="train",
        short_side=short_side or None,
        strict=strict,
        workers=workers,
    )


def read_object_indices(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the objects of a mask of the full ADE20K, `*_seg.png`.

    Returns:
        (H, W) int32: 0 for no object, else the index of its name in ADE20K's list, from 1.
    """
    colours = read_values(Path(path), kind="colour").astype(np.int32)
    return colours[..., 0] // 10 * 256 + colours[..., 1]


def _image_id(path: Path) -> int:
    match = re.fullmatch(r"ADE_(?:train|val)_(\d{8})", path.stem)
    if match is None:
        raise ValueError(
            f"{path}: is no name of an image of ADE20K. Allowed: such as ADE_train_00000001.png. "
            "Move other files elsewhere."
        )
    return int(match[1])


def _read_150(path: Path) -> np.ndarray:
    labels = label_table({value: value for value in range(1, 151)}, 151, 150, unlabeled=[0])
    return relabel_by_value(path, labels, "0 (no class), 1 to 150 (class index + 1)")


def _read_847(path: Path) -> np.ndarray:
    return _labels_of_847()[read_object_indices(path)]


@functools.cache
def _labels_of_847() -> np.ndarray:
    labels = {entry.value: label for label, entry in enumerate(ade20k_847_classes(), start=1)}
    values = range(_MAX_INDEX + 1)
    return label_table(labels, len(values), len(labels), unlabeled=values)
