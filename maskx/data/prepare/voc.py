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
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from maskx.core.files import write_json
from maskx.data.label_maps import read_label_map, write_label_map
from maskx.data.vocabularies import VOC_CLASSES

__all__ = [
    "SBD_IMAGES",
    "VOC_COUNTS",
    "ClassCounts",
    "VocSummary",
    "choose_trainaug",
    "format_voc_summary",
    "prepare_voc",
    "read_sbd_mask",
]

VOC_COUNTS = {"train": 1464, "val": 1449, "trainaug": 10582}
"""Number of images in VOC's lists and in the one made with SBD."""

SBD_IMAGES = 11355
"""Number of images of SBD, train and val together."""

_LISTS = ("train", "val")  # VOC and SBD have lists of these names, with other images
_NAME = re.compile(r"\d{4}_\d{6}")  # of an image: 2007_000032
_NUM_EXAMPLES = 5  # bad images quoted
_README = "datasets/README.md says where files lie."


@dataclass(frozen=True)
class ClassCounts:
    """Images of a file.

    Attributes:
        num_images: All.
        num_unlabeled: Those without any class in their mask; they have no image labels.
        by_class: Those with a class, in VOC's order.
    """

    num_images: int
    num_unlabeled: int
    by_class: Mapping[str, int]


@dataclass(frozen=True)
class VocSummary:
    """What `prepare_voc` wrote.

    Attributes:
        listed: Number of images by list: those of `VOC_COUNTS` and "sbd".
        images_of: For "trainaug" and "val" the number of images, and by class.
        num_sbd_masks: How many images of trainaug have the mask of SBD.
        left_out: What is wrong with the files of each image that was left out, by its name.
    """

    listed: Mapping[str, int]
    images_of: Mapping[str, ClassCounts]
    num_sbd_masks: int
    left_out: Mapping[str, str]


def prepare_voc(
    voc: str | os.PathLike[str],
    sbd: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    allow_other_counts: bool = False,
    strict: bool = True,
    progress: bool = False,
) -> VocSummary:
    """Write `voc2012_trainaug.json`, `voc2012_trainaug_tags.json` and `voc2012_val.json`.

    Images have `image_labels`, the category ids in their mask, and `label_map_file_name`, the mask:
    a label map (`maskx.data.label_maps`) named relative to the folder of the JSON file. PNG files
    stay where they are; `.mat` files of SBD are converted to `output/label_maps`. File names of
    images are relative to `voc/JPEGImages`, ids are the digits of the name. There are no
    annotations.

    `voc2012_trainaug_tags.json` has no `label_map_file_name`: what learns from it sees no mask.

    An interrupted run leaves these three files as they were, and no other file half-written.

    Args:
        voc: `VOCdevkit/VOC2012`.
        sbd: `benchmark_RELEASE/dataset` of SBD (`cls/*.mat`, `train.txt`, `val.txt`; needs scipy),
            or a folder of its masks as PNG, known as `SegmentationClassAug`. Every file in it
            counts as of SBD; that it often has those of VOC's lists as well changes nothing.
        output: Folder to write to; it is created, files of an earlier run are replaced.
        allow_other_counts: Whether the lists may have other lengths than `VOC_COUNTS`.
        strict: Whether an image without usable files is an error. If False it is left out, counted.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: A folder or a list is missing.
        ImportError: `sbd` has `.mat` files and scipy is not installed.
        ValueError: The lists are not what they should be, or, with `strict`, files of an image.
    """
    voc, sbd, output = Path(voc), Path(sbd), Path(output)
    _check_folders(voc)
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
    masks = {
        name: voc / "SegmentationClass" / f"{name}.png" if name in own else sbd_masks[name]
        for part in names.values()
        for name in part
    }
    entries, left_out = _read_images(masks, voc, output, progress)
    if left_out and strict:
        raise ValueError(
            f"{voc}: {len(left_out)} of {len(masks)} images cannot be used. Restore their files, "
            "or leave these images out, counted (strict=False, --skip-bad):"
            f"{_examples(left_out)}"
        )
    images = {part: [entries[n] for n in ns if n in entries] for part, ns in names.items()}
    empty = [part for part, found in images.items() if not found]
    if empty:
        raise ValueError(
            f"{voc}: no image is left for {empty[0]}, of {listed[empty[0]]} listed. Restore their "
            f"files.{_examples(left_out)}"
        )
    _write_files(images, output)
    return VocSummary(
        listed=listed,
        images_of={part: _count_classes(found) for part, found in images.items()},
        num_sbd_masks=len(entries.keys() - own),
        left_out=left_out,
    )


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

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file.
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


def format_voc_summary(summary: VocSummary) -> str:
    """Lay out a summary for people."""
    trainaug, val = summary.images_of["trainaug"], summary.images_of["val"]
    num_mask_of_voc = trainaug.num_images - summary.num_sbd_masks
    lines = [
        _compare_counts(summary.listed),
        f"{'class':<14}{'trainaug':>10}{'val':>10}",
        *(
            f"{name:<14}{trainaug.by_class[name]:>10}{val.by_class[name]:>10}"
            for name in VOC_CLASSES
        ),
        f"{'no class':<14}{trainaug.num_unlabeled:>10}{val.num_unlabeled:>10}",
        f"{'all images':<14}{trainaug.num_images:>10}{val.num_images:>10}",
        f"Masks of trainaug: {num_mask_of_voc} of VOC, {summary.num_sbd_masks} of SBD.",
        f"Images left out: {len(summary.left_out) or 'none'}.{_examples(summary.left_out)}",
    ]
    return "\n".join(lines)


def _check_folders(voc: Path) -> None:
    for folder in (voc / "JPEGImages", voc / "SegmentationClass"):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder of VOC 2012. {_README}")


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


def _read_images(
    masks: Mapping[str, Path], voc: Path, output: Path, progress: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the entries of the JSON files, and what is wrong with the other images, by name."""
    entries, problems = {}, {}
    for name, mask in tqdm(masks.items(), "masks", disable=not progress, unit="img"):
        try:
            entries[name] = _read_image(name, mask, voc, output)
        except (FileNotFoundError, ValueError) as error:
            problems[name] = str(error)
    return entries, problems


def _read_image(name: str, mask: Path, voc: Path, output: Path) -> dict[str, Any]:
    height, width = _image_size(voc / "JPEGImages" / f"{name}.jpg")
    if mask.suffix == ".mat":
        mask = _convert_mask(mask, output / "label_maps" / f"{name}.png", height, width)
    num_classes = len(VOC_CLASSES)
    labels = read_label_map(mask, height, width, num_classes=num_classes, image_id=name)
    is_present = np.bincount(labels.ravel(), minlength=num_classes + 1)[: num_classes + 1] > 0
    is_present[0] = False  # background
    # Without symbolic links, through which ".." leads elsewhere.
    folder = os.path.relpath(mask.parent.resolve(), output.resolve())
    return {
        "id": int(name.replace("_", "")),
        "file_name": f"{name}.jpg",
        "height": height,
        "width": width,
        "image_labels": np.flatnonzero(is_present).tolist(),
        "label_map_file_name": (Path(folder) / mask.name).as_posix(),
    }


def _image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, from its header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such image, but it is listed. Unpack VOC 2012 again."
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read as image ({error}). Unpack VOC 2012 again."
        ) from error


def _convert_mask(mat: Path, png: Path, height: int, width: int) -> Path:
    labels = read_sbd_mask(mat)
    if labels.shape != (height, width):
        raise ValueError(
            f"{mat}: the mask is {labels.shape[1]} x {labels.shape[0]} pixels, its image is "
            f"{width} x {height}. Restore both as they were published."
        )
    png.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_label_map(png, labels, num_classes=len(VOC_CLASSES))
    except ValueError as error:
        raise ValueError(f"{mat}: {error}") from None
    return png


def _write_files(images: Mapping[str, Sequence[dict[str, Any]]], output: Path) -> None:
    tags = [{k: v for k, v in i.items() if k != "label_map_file_name"} for i in images["trainaug"]]
    categories = [{"id": number, "name": name} for number, name in enumerate(VOC_CLASSES, start=1)]
    output.mkdir(parents=True, exist_ok=True)
    for part, entries in {**images, "trainaug_tags": tags}.items():
        content = {"images": entries, "annotations": [], "categories": categories}
        write_json(output / f"voc2012_{part}.json", content)


def _count_classes(images: Sequence[Mapping[str, Any]]) -> ClassCounts:
    return ClassCounts(
        num_images=len(images),
        num_unlabeled=sum(not image["image_labels"] for image in images),
        by_class={
            name: sum(number in image["image_labels"] for image in images)
            for number, name in enumerate(VOC_CLASSES, start=1)
        },
    )


def _examples(problems: Mapping[str, str]) -> str:
    """Quote the first problems, one in a line."""
    more = len(problems) - _NUM_EXAMPLES
    lines = [*list(problems.values())[:_NUM_EXAMPLES], *([f"and {more} more"] if more > 0 else [])]
    return "".join(f"\n  {line}" for line in lines)
