"""Which categories have masks and which have only boxes or tags: levels and category splits.

A :class:`CategorySplit` divides the class list of a data set into A, the categories whose masks
are used in training (base, seen, source), and B, those whose masks are withheld or do not exist
(novel, target). Splits are defined by category *name* and resolved through the class list of a
data set to class indices, so they never depend on the ids of a file.
"""

import difflib
import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from maskx.core.text import listed


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
                f"Category split '{self.name}': {listed(overlap)} stand on both sides, with and "
                "without masks. Every category belongs to one side; remove it from the other."
            )
        check_category_names(self.name, (*self.with_masks, *self.without_masks), self.class_names)
        uncovered = set(self.class_names) - set(self.with_masks) - set(self.without_masks)
        if uncovered:
            raise ValueError(
                f"Category split '{self.name}' says nothing of {listed(uncovered)}. The two "
                "sides must cover the class list; add them to one side, or name only the "
                "categories with masks."
            )
        if not self.with_masks:
            raise ValueError(
                f"Category split '{self.name}' leaves no category with masks, so no mask could "
                f"be learned. Name at least one of: {listed(self.class_names)}."
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


def split_one_side(
    name: str,
    class_names: tuple[str, ...],
    *,
    with_masks: tuple[str, ...] | None = None,
    without_masks: tuple[str, ...] | None = None,
) -> CategorySplit:
    """Make a split of one named side; the rest of the class list is the other side.

    Args:
        name: of the split.
        class_names: class list of the data set, by class index.
        with_masks: names of A; or
        without_masks: names of B.

    Raises:
        ValueError: a name is not in the class list, or A is empty.
    """
    given = without_masks if with_masks is None else with_masks
    check_category_names(name, given, class_names)
    chosen = tuple(c for c in class_names if c in given)
    rest = tuple(c for c in class_names if c not in given)
    sides = (rest, chosen) if with_masks is None else (chosen, rest)
    return CategorySplit(name, class_names, *sides)


def check_category_names(split_name: str, names: Sequence[str], class_names: Sequence[str]) -> None:
    """Refuse names that are not in a class list, with the closest ones that are."""
    known = frozenset(class_names)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, class_names, n=3, cutoff=0.4)
            hint = f" Closest: {listed(close)}." if close else ""
            raise ValueError(
                f"Category split '{split_name}' names '{name}', which is not among the "
                f"{len(class_names)} categories of the data set.{hint}"
            )
