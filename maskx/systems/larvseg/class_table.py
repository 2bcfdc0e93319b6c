"""One list of classes, the class table, for data sets whose class lists overlap, by name."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowMatch", "class_table", "match_rows", "take_rows", "tied_classes"]


class RowMatch(NamedTuple):
    """Rows of one class list that another has under the same name.

    Attributes:
        new_rows: rows to fill, ascending.
        old_rows: for each of them the row to take: ``new[new_rows] = old[old_rows]``.
        only_new: names without an old row, in their order.
        only_old: names whose row nothing takes, in their order.
    """

    new_rows: tuple[int, ...]
    old_rows: tuple[int, ...]
    only_new: tuple[str, ...]
    only_old: tuple[str, ...]


def class_table(class_lists: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Unite class lists by name: those of the first in its order, then what the next adds.

    A name that a list has several times, as COCO-Stuff's renamed list has "wall", is one class.

    Args:
        class_lists: by data set its names by class index.

    Raises:
        ValueError: there is no list, a list is empty, or a name is not usable.
    """
    if not class_lists:
        raise ValueError("A class table needs at least one class list, got none.")
    for data_set, names in class_lists.items():
        _check_names(names, f"class list {data_set!r}")
    return tuple(dict.fromkeys(name for names in class_lists.values() for name in names))


def tied_classes(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the names that stand in a class list several times, and their class indices."""
    found = defaultdict(list)
    for index, name in enumerate(names):
        found[name].append(index)
    return {name: tuple(places) for name, places in found.items() if len(places) > 1}


def match_rows(old_names: Sequence[str], new_names: Sequence[str]) -> RowMatch:
    """Match the rows of two class lists by name, such as those of a checkpoint and of a model.

    Args:
        old_names: names by row of what there is.
        new_names: names by row of what is wanted.

    Raises:
        ValueError: a list is empty, a name is not usable, or is in a list twice.
    """
    for names, what in ((old_names, "old"), (new_names, "new")):
        _check_names(names, f"{what} class list")
        tied = tied_classes(names)
        if tied:
            name, rows = next(iter(tied.items()))
            raise ValueError(
                f"The {what} class list has {len(tied)} names several times, such as {name!r} in "
                f"the rows {', '.join(map(str, rows))}. Give a list of unique names, as "
                "class_table makes it."
            )
    old_row = {name: row for row, name in enumerate(old_names)}
    wanted = set(new_names)
    pairs = [(row, old_row[name]) for row, name in enumerate(new_names) if name in old_row]
    return RowMatch(
        new_rows=tuple(new for new, _ in pairs),
        old_rows=tuple(old for _, old in pairs),
        only_new=tuple(name for name in new_names if name not in old_row),
        only_old=tuple(name for name in old_names if name not in wanted),
    )


def take_rows(own: Tensor, found: Tensor, match: RowMatch, *, what: str) -> Tensor:
    """Return a tensor with the rows replaced that another class list has under the same name.

    Args:
        own: (K, ...), which stays as it is.
        found: (K', ...) of the other class list.
        match: of the two lists.
        what: name of the tensor, for the error.

    Raises:
        ValueError: rows have another shape.
    """
    if found.shape[1:] != own.shape[1:]:
        raise ValueError(
            f"A row of {what} has shape {tuple(found.shape[1:])} in the checkpoint, but "
            f"{tuple(own.shape[1:])} in this model. Give both the same channels and bank size."
        )
    rows = own.detach().clone()
    rows[torch.tensor(match.new_rows)] = found[torch.tensor(match.old_rows)].to(rows)
    return rows


def _check_names(names: Sequence[str], where: str) -> None:
    if not names:
        raise ValueError(f"The {where} is empty. Give at least one name.")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name or name != name.strip():
            raise ValueError(
                f"The {where} has the name {name!r} at index {index}. Allowed: text without "
                "white space around it."
            )
