"""Category splits by name or from a file."""

import difflib
import functools
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskx.core.files import parse_json
from maskx.core.text import listed
from maskx.data.large_vocabularies import LARVSEG_SPLITS, base_and_novel
from maskx.data.scenes.generator import scene_half_of
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES_IN_COCO
from maskx.supervision import CategorySplit, check_category_names, split_one_side

__all__ = ["DRAWN", "check_masks", "drawn_split", "resolve_split", "split_names"]

DRAWN = "drawn"
"""Name of the split of :func:`drawn_split`."""

logger = logging.getLogger(__name__)


def split_names() -> tuple[str, ...]:
    """Names that :func:`resolve_split` knows without a file."""
    return (
        "all",
        "coco_voc",
        "coco_nonvoc",
        *_coco_random_draws(),
        "vg3k_coco",
        "scenes_half",
        *LARVSEG_SPLITS,
    )


def resolve_split(spec: str | os.PathLike, class_names: Sequence[str]) -> CategorySplit:
    """Resolve a split against the class list of a data set.

    Args:
        spec: a name of :func:`split_names`; ``random_N_T``, for N categories drawn at random in
            trial T, whatever the class list; or the path of a file that lists the categories with
            masks: a text file with one name per line (``#`` starts a comment), a JSON list of
            names, or a JSON object ``{"with_masks": [...], "without_masks": [...]}`` of which
            either list may be left out.

    Returns:
        The split, with disjoint sides that cover the class list and a non-empty A.

    Raises:
        FileNotFoundError: ``spec`` is neither a known name nor a file.
        ValueError: the file or the names in it cannot be used; the message says why.
    """
    class_names = tuple(class_names)
    name = os.fspath(spec)
    if name == "all":
        with_masks = class_names
    elif name == "coco_voc":
        with_masks = VOC_CLASSES_IN_COCO
    elif name == "coco_nonvoc":
        with_masks = tuple(c for c in COCO_THING_CLASSES if c not in VOC_CLASSES_IN_COCO)
    elif name == "vg3k_coco":
        with_masks = COCO_THING_CLASSES
    elif name in LARVSEG_SPLITS:
        with_masks, _ = base_and_novel(name)
    elif name == "scenes_half":
        with_masks = scene_half_of(class_names)
        if with_masks is None:
            raise ValueError(
                "Category split 'scenes_half' is for generated scenes, but the data set has other "
                f"categories: {listed(class_names)}. Name another split (--masks-for, "
                "DATASETS.MASKX.SPLIT)."
            )
    elif name in _coco_random_draws():
        with_masks = tuple(COCO_THING_CLASSES[i] for i in _coco_random_draws()[name])
    elif found := re.fullmatch(r"random_(\d+)_(\d+)", name):
        with_masks = _random_draw(class_names, *map(int, found.groups()))
    else:
        return _read_split(Path(name), class_names)
    return split_one_side(name, class_names, with_masks=with_masks)


def _random_draw(class_names: tuple[str, ...], size: int, trial: int) -> tuple[str, ...]:
    if not 0 < size < len(class_names):
        raise ValueError(
            f"Category split 'random_{size}_{trial}' draws {size} categories with masks, but the "
            f"data set has {len(class_names)}. Allowed: 1 to {len(class_names) - 1}."
        )
    drawn = np.random.RandomState(trial).choice(len(class_names), size, replace=False)
    return tuple(class_names[index] for index in sorted(drawn))


def check_masks(
    records: Iterable[Mapping[str, Any]], split: CategorySplit, *, label_maps: bool = True
) -> None:
    """Compare the categories that a split says to have masks (A) with the masks of training data.

    Those without any are named in a warning.

    Args:
        records: of :func:`maskx.data.coco.load_coco`, to train on.
        split: in their class list.
        label_maps: whether label maps count as masks; they say nothing of single objects.

    Raises:
        ValueError: none of these categories has a mask, so that none could be learned.
    """
    boxes, masks = _count(records, split.class_names, label_maps=label_maps)
    indices = split.indices_with_masks
    without = [index for index in indices if not masks[index]]
    if not without:
        return
    counts = listed([f"{split.class_names[i]} ({boxes[i]} boxes)" for i in without])
    found = f"Category split '{split.name}' says that {len(indices)} categories have masks (A), but"
    if len(without) == len(indices):
        raise ValueError(
            f"{found} no annotation of theirs has one: {counts}. No mask could be learned. Add "
            "polygons or RLE masks to the annotation file, or name categories that have some."
        )
    logger.warning(
        "%s %d of them have none in the training data: %s. No example teaches their masks.",
        found,
        len(without),
        counts,
    )


def drawn_split(
    records: Iterable[Mapping[str, Any]], class_names: Sequence[str], *, label_maps: bool = True
) -> CategorySplit:
    """Make the split whose A are the categories that training data has a mask of.

    Args:
        records: as of :func:`check_masks`, like ``label_maps``.

    Raises:
        ValueError: there is no mask.
    """
    names = tuple(class_names)
    boxes, masks = _count(records, names, label_maps=label_maps)
    if not any(masks.values()):
        raise ValueError(
            f"None of the {boxes.total()} annotations of the training data has a mask, so none "
            "could be learned. Draw masks of some categories, or let a teacher draw them: "
            "maskx complete DATA IMAGES --teacher grabcut --output completed.json."
        )
    drawn = tuple(name for index, name in enumerate(names) if masks[index])
    return split_one_side(DRAWN, names, with_masks=drawn)


def _count(
    records: Iterable[Mapping[str, Any]], class_names: Sequence[str], *, label_maps: bool
) -> tuple[Counter[int], Counter[int]]:
    """Count boxes and masks by class index."""
    boxes, masks = Counter(), Counter()
    for record in records:
        for annotation in record.get("annotations", ()):
            if not annotation["iscrowd"]:
                boxes[annotation["class_index"]] += 1
                masks[annotation["class_index"]] += bool(annotation.get("segmentation"))
        if label_maps and "label_map_file_name" in record:
            labels = record.get("image_labels", ())
            masks.update(labels or range(len(class_names)))
    return boxes, masks


@functools.cache
def _coco_random_draws() -> dict[str, tuple[int, ...]]:
    """Category positions of A in the 25 random COCO splits of the Mask^X R-CNN paper."""
    random_state = np.random.RandomState(3)
    return {
        f"coco_random_{size}_{trial}": tuple(
            random_state.choice(len(COCO_THING_CLASSES), size, replace=False).tolist()
        )
        for trial in range(1, 6)
        for size in (20, 30, 40, 50, 60)
    }


def _read_split(path: Path, class_names: tuple[str, ...]) -> CategorySplit:
    if not path.is_file():
        close = difflib.get_close_matches(str(path), split_names(), n=3, cutoff=0.5)
        hint = f" Did you mean {listed(close)}?" if close else ""
        raise FileNotFoundError(
            f"'{path}' is neither a named category split nor a file.{hint} Named splits: all, "
            "coco_voc, coco_nonvoc, coco_random_{20,30,40,50,60}_{1..5}, vg3k_coco, scenes_half, "
            "random_N_T, "
            f"{', '.join(LARVSEG_SPLITS)}; or give a text file with one category name per line, or "
            "a JSON list of names."
        )
    try:
        # As maskx.data.coco reads names: macOS writes letters and their accents apart.
        text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"Category split '{path}' is not text in UTF-8: {error}.") from error
    if path.suffix.lower() != ".json":
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return split_one_side(str(path), class_names, with_masks=tuple(filter(None, lines)))
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Category split '{path}' is not valid JSON: {error}.") from error
    if isinstance(content, list):
        content = {"with_masks": content}
    sides = ("with_masks", "without_masks")
    if not isinstance(content, dict) or not content or set(content) - set(sides):
        raise ValueError(
            f"Category split '{path}' must be a JSON list of category names or an object with the "
            f"keys with_masks and/or without_masks, got {text[:80]!r}."
        )
    for side, names in content.items():
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(
                f"Category split '{path}': {side} must be a list of names, got {names!r:.80}."
            )
    if len(content) == 2:
        for names in content.values():
            check_category_names(str(path), names, class_names)
        ordered = (tuple(c for c in class_names if c in content[side]) for side in sides)
        return CategorySplit(str(path), class_names, *ordered)
    ((side, names),) = content.items()
    return split_one_side(str(path), class_names, **{side: tuple(names)})
