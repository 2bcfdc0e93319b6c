"""Which categories have masks and which have only boxes or tags: levels and category splits.

A :class:`CategorySplit` divides the class list of a data set into A, the categories whose masks
are used in training (base, seen, source), and B, those whose masks are withheld or do not exist
(novel, target). Splits are defined by category *name* and resolved through the class list of a
data set to class indices, so they never depend on the ids of a file.
"""

import difflib
import enum
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskx.data.large_vocabularies import LARVSEG_SPLITS, base_and_novel
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES_IN_COCO


class Supervision(str, enum.Enum):
    """What is known of an image or an annotation, from least to most."""

    IMAGE = "image"
    BOX = "box"
    MASK = "mask"


@dataclass(frozen=True)
class CategorySplit:
    """A division of a class list into A (with masks) and B (without).

    Attributes:
        name: name of the split, or the path of the file it was read from.
        class_names: class list of the data set, by class index.
        with_masks: A, in the order of the class list.
        without_masks: B, in the order of the class list.
    """

    name: str
    class_names: tuple[str, ...]
    with_masks: tuple[str, ...]
    without_masks: tuple[str, ...]

    def __post_init__(self) -> None:
        overlap = set(self.with_masks) & set(self.without_masks)
        if overlap:
            raise ValueError(
                f"Category split '{self.name}': {_listed(overlap)} stand on both sides, with and "
                "without masks. Every category belongs to one side; remove it from the other."
            )
        _check_known(self.name, (*self.with_masks, *self.without_masks), self.class_names)
        uncovered = set(self.class_names) - set(self.with_masks) - set(self.without_masks)
        if uncovered:
            raise ValueError(
                f"Category split '{self.name}' says nothing of {_listed(uncovered)}. The two "
                "sides must cover the class list; add them to one side, or name only the "
                "categories with masks."
            )
        if not self.with_masks:
            raise ValueError(
                f"Category split '{self.name}' leaves no category with masks, so no mask could "
                f"be learned. Name at least one of: {_listed(self.class_names)}."
            )

    @functools.cached_property
    def indices_with_masks(self) -> tuple[int, ...]:
        """Class indices of A, ascending."""
        return self._indices(self.with_masks)

    @functools.cached_property
    def indices_without_masks(self) -> tuple[int, ...]:
        """Class indices of B, ascending."""
        return self._indices(self.without_masks)

    def groups(self) -> dict[str, tuple[int, ...]]:
        """Class indices by the group names that every evaluation reports."""
        return {
            "all": tuple(range(len(self.class_names))),
            "A": self.indices_with_masks,
            "B": self.indices_without_masks,
        }

    def _indices(self, names: Sequence[str]) -> tuple[int, ...]:
        position = {name: index for index, name in enumerate(self.class_names)}
        return tuple(sorted(position[name] for name in names))


def split_names() -> tuple[str, ...]:
    """Names that :func:`resolve_split` knows without a file."""
    return (
        *("all", "coco_voc", "coco_nonvoc", *_coco_random_draws(), "vg3k_coco", "scenes_half"),
        *LARVSEG_SPLITS,
    )


def resolve_split(spec: str | os.PathLike, class_names: Sequence[str]) -> CategorySplit:
    """Resolve a split against the class list of a data set.

    Args:
        spec: a name of :func:`split_names`, or the path of a file that lists the categories with
            masks: a text file with one name per line (``#`` starts a comment), a JSON list of
            names, or a JSON object ``{"with_masks": [...], "without_masks": [...]}`` of which
            either list may be left out.
        class_names: class list of the data set, by class index.

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
        from maskx.data.scenes import scene_half_of  # loads OpenCV

        with_masks = scene_half_of(class_names)
        if with_masks is None:
            raise ValueError(
                "Category split 'scenes_half' is for generated scenes, but the data set has other "
                f"categories: {_listed(class_names)}. Name another split."
            )
    elif name in _coco_random_draws():
        with_masks = tuple(COCO_THING_CLASSES[i] for i in _coco_random_draws()[name])
    else:
        return _read_split(Path(name), class_names)
    return _from_one_side(name, class_names, with_masks=with_masks)


@functools.cache
def _coco_random_draws() -> dict[str, tuple[int, ...]]:
    """Category positions of A in the 25 random COCO splits of the Mask^X R-CNN paper.

    One legacy NumPy stream with seed 3 serves all draws, so their order matters: trial 1..5
    outside, 20..60 categories inside. RandomState's stream is frozen by NumPy's own promise.
    """
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
        hint = f" Did you mean {_listed(close)}?" if close else ""
        raise FileNotFoundError(
            f"'{path}' is neither a named category split nor a file.{hint} Named splits: all, "
            "coco_voc, coco_nonvoc, coco_random_{20,30,40,50,60}_{1..5}, vg3k_coco, scenes_half, "
            f"{', '.join(LARVSEG_SPLITS)}; or give a text file with one category name per line, or "
            "a JSON list of names."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Category split '{path}' is not text in UTF-8: {error}.") from error
    if path.suffix.lower() != ".json":
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return _from_one_side(str(path), class_names, with_masks=tuple(filter(None, lines)))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
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
            _check_known(str(path), names, class_names)
        ordered = (tuple(c for c in class_names if c in content[side]) for side in sides)
        return CategorySplit(str(path), class_names, *ordered)
    ((side, names),) = content.items()
    return _from_one_side(str(path), class_names, **{side: tuple(names)})


def _from_one_side(
    name: str,
    class_names: tuple[str, ...],
    *,
    with_masks: tuple[str, ...] | None = None,
    without_masks: tuple[str, ...] | None = None,
) -> CategorySplit:
    """Make a split of one named side; the rest of the class list is the other side."""
    given = without_masks if with_masks is None else with_masks
    _check_known(name, given, class_names)
    chosen = tuple(c for c in class_names if c in given)
    rest = tuple(c for c in class_names if c not in given)
    sides = (rest, chosen) if with_masks is None else (chosen, rest)
    return CategorySplit(name, class_names, *sides)


def _check_known(split_name: str, names: Sequence[str], class_names: Sequence[str]) -> None:
    known = frozenset(class_names)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, class_names, n=3, cutoff=0.4)
            hint = f" Closest: {_listed(close)}." if close else ""
            raise ValueError(
                f"Category split '{split_name}' names '{name}', which is not among the "
                f"{len(class_names)} categories of the data set.{hint}"
            )


def _listed(names: Sequence[str] | set[str], limit: int = 8) -> str:
    ordered = sorted(names) if isinstance(names, set) else list(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(f"'{name}'" for name in ordered[:limit]) + more
