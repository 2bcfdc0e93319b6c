"""PASCAL VOC 2012 with the masks of SBD, the set known as `trainaug`, as COCO-format files.

- VOC 2012 has masks for the 1464 images of its `train` and the 1449 of its `val` list.
- SBD (Semantic Boundaries Dataset, Hariharan et al., ICCV 2011) has masks for 11355 images of VOC,
  some of which are in those lists.
- `trainaug` is VOC's train and every image of SBD that is not in VOC's val: 10582 images.
- An image in VOC's train has VOC's mask, any other SBD's.

The image labels are the classes of the mask, not those of VOC's boxes.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from maskx.data.prepare.label_map_sets import (
    LabelMapSetSummary,
    MaskedImage,
    check_folder,
    left_out_line,
    write_label_map_set,
)
from maskx.data.vocabularies import VOC_CLASSES

__all__ = [
    "SBD_IMAGES",
    "VOC_COUNTS",
    "VocSummary",
    "choose_trainaug",
    "prepare_voc",
    "read_sbd_mask",
]

VOC_COUNTS = {"train": 1464, "val": 1449, "trainaug": 10582}
"""Number of images in VOC's lists and in the one made with SBD."""

SBD_IMAGES = 11355
"""Number of images of SBD, train and val together."""

_LISTS = ("train", "val")  # VOC and SBD have lists of these names, with other images
_NAME = re.compile(r"\d{4}_\d{6}")  # of an image: 2007_000032
_README = "datasets/README.md says where files lie."


@dataclass(frozen=True)
class VocSummary:
    """What `prepare_voc` wrote; as text, with the known numbers and a table of the classes.

    Attributes:
        listed: Number of images by list: those of `VOC_COUNTS` and "sbd".
        num_sbd_masks: How many images of trainaug have the mask of SBD.
        written: Images of "trainaug" and "val".
    """

    listed: Mapping[str, int]
    num_sbd_masks: int
    written: LabelMapSetSummary

    def __str__(self) -> str:
        rows = [
            (name, *counts)
            for name, *counts in zip(
                VOC_CLASSES, *self.written.num_images_with.values(), strict=True
            )
        ]
        rows.append(("no class", *self.written.num_unlabeled.values()))
        rows.append(("all images", *self.written.num_images.values()))
        num_of_voc = self.written.num_images["trainaug"] - self.num_sbd_masks
        return "\n".join(
            [
                _compare_counts(self.listed),
                f"{'class':<14}{'trainaug':>10}{'val':>10}",
                *(f"{name:<14}{trainaug:>10}{val:>10}" for name, trainaug, val in rows),
                f"Masks of trainaug: {num_of_voc} of VOC, {self.num_sbd_masks} of SBD.",
                left_out_line(self.written.left_out),
            ]
        )


def prepare_voc(
    voc: str | os.PathLike[str],
    sbd: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    allow_other_counts: bool = False,
    strict: bool = True,
    workers: int = 1,
) -> VocSummary:
    """Write `voc2012_trainaug.json`, `voc2012_trainaug_tags.json` and `voc2012_val.json`.

    `maskx.data.prepare.label_map_sets.write_label_map_set` says what is in the files, and takes
    the other arguments. Masks in PNG files stay where they are, as they are label maps; `.mat`
    files of SBD are converted to `output/label_maps`. File names of images are relative to
    `voc/JPEGImages`, ids are the digits of the name.

    Args:
        sbd: `benchmark_RELEASE/dataset` of SBD (`cls/*.mat`, `train.txt`, `val.txt`), or a folder
            of its masks as PNG, known as `SegmentationClassAug`. Every file in it counts as of
            SBD; that it often has those of VOC's lists as well changes nothing.
        allow_other_counts: Whether the lists may have other lengths than `VOC_COUNTS`.

    Raises:
        ValueError: The lists are not what they should be, or files of an image.
    """
    voc, sbd, output = Path(voc), Path(sbd), Path(output)
    images, own_masks = (
        check_folder(voc / name, "VOC 2012") for name in ("JPEGImages", "SegmentationClass")
    )
    lists = {part: _read_list(voc / "ImageSets/Segmentation" / f"{part}.txt") for part in _LISTS}
    sbd_masks = _find_sbd_masks(sbd)
    both = sorted({*lists["train"]} & {*lists["val"]})
    if both:
        raise ValueError(
            f"{voc}: {len(both)} images are in train.txt and in val.txt, such as {both[0]}. Take "
            "the lists of VOC 2012 as they are."
        )
    names = {
        "trainaug": choose_trainaug(lists["train"], lists["val"], sbd_masks),
        "val": lists["val"],
    }
    listed = {part: len(found) for part, found in {**lists, **names, "sbd": sbd_masks}.items()}
    if not allow_other_counts and listed != listed | VOC_COUNTS:
        raise ValueError(
            f"{voc} with {sbd}: {_compare_counts(listed)} Give both data sets as a whole, or say "
            "that they are a part (allow_other_counts=True, --allow-other-counts)."
        )

    own = {*lists["train"], *lists["val"]}

    def entry(name: str) -> MaskedImage:
        masks = own_masks / f"{name}.png" if name in own else sbd_masks[name]
        is_label_map = masks.suffix == ".png"
        return MaskedImage(
            image_id=int(name.replace("_", "")),
            image=images / f"{name}.jpg",
            masks=masks,
            relabel=None if is_label_map else read_sbd_mask,
            label_map=masks if is_label_map else output / "label_maps" / f"{name}.png",
        )

    parts = {part: [entry(name) for name in found] for part, found in names.items()}
    written = write_label_map_set(
        parts,
        VOC_CLASSES,
        output,
        prefix="voc2012",
        image_roots=dict.fromkeys(parts, images),
        tags_of="trainaug",
        strict=strict,
        workers=workers,
    )
    of_sbd = [e for e in parts["trainaug"] if e.image.stem not in own]
    num_sbd_masks = sum(str(e.image) not in written.left_out for e in of_sbd)
    return VocSummary(listed, num_sbd_masks, written)


def choose_trainaug(
    train: Sequence[str], val: Sequence[str], sbd: Mapping[str, Any] | Sequence[str]
) -> list[str]:
    """Return VOC's train and the images of SBD that are not in VOC's val, sorted by name.

    Args:
        train: Names in VOC's train list.
        val: Names in VOC's val list.
        sbd: Names of all images of SBD, its train and val list together.
    """
    return sorted({*train, *sbd} - {*val})


def read_sbd_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a mask of SBD.

    Args:
        path: `.mat` file with the struct `GTcls`, of the folder `cls`.

    Returns:
        (H, W) integers: 0 for background, 1 to 20 for the classes of VOC.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: there is no such mask, but its image is listed. Unpack SBD again."
        )
    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False)
        mask = np.asarray(content["GTcls"].Segmentation)
    except Exception as error:  # loadmat has no class of errors of its own
        raise ValueError(
            f"{path}: cannot be read as mask of SBD ({type(error).__name__}: {error}). Give the "
            "files of its folder cls, complete."
        ) from error
    if mask.ndim != 2 or mask.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: GTcls.Segmentation has shape {mask.shape} and dtype {mask.dtype}. Allowed: "
            "(H, W) integers. Give the files of SBD's folder cls."
        )
    return mask


def _read_list(path: Path) -> list[str]:
    """Read the names of a list of images."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such list of images. {_README}")
    names = path.read_text(encoding="utf-8", errors="replace").split("\n")
    names = [name for name in map(str.strip, names) if name]
    for name in names:
        _check_name(name, path)
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: repeats {repeated}. Take the list as it was published.")
    return sorted(names)


def _check_name(name: str, source: Path) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{source}: {name!r:.80} is no name of an image of VOC 2012. Allowed: a year and a "
            "number, such as 2007_000032."
        )


def _find_sbd_masks(sbd: Path) -> dict[str, Path]:
    """Return the files of all masks of SBD by the names of their images."""
    if (sbd / "cls").is_dir():
        names = [name for part in _LISTS for name in _read_list(sbd / f"{part}.txt")]
        return {name: sbd / "cls" / f"{name}.mat" for name in names}
    files = sorted(sbd.glob("*.png"))
    if not files:
        raise FileNotFoundError(
            f"{sbd}: there are no masks of SBD, neither a folder cls (SBD's folder dataset) nor "
            f"PNG files (SegmentationClassAug). {_README}"
        )
    for file in files:
        _check_name(file.stem, sbd)
    return {file.stem: file for file in files}


def _compare_counts(listed: Mapping[str, int]) -> str:
    """Say how long the lists are, and how long they should be."""
    train, val, trainaug = (f"{listed[part]} (known: {n})" for part, n in VOC_COUNTS.items())
    added = listed["trainaug"] - listed["train"]
    known = VOC_COUNTS["trainaug"] - VOC_COUNTS["train"]
    return (
        f"Images listed: train {train}, val {val}, trainaug {trainaug}: train and the {added} "
        f"(known: {known}) of {listed['sbd']} masks given as SBD's ({SBD_IMAGES} as published) "
        "that are neither in train nor in val."
    )
