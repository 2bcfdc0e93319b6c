"""One list of classes for data sets whose class lists overlap, by name."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maskx.data.label_maps import aligned_labels

__all__ = ["ClassTable", "RowMatch", "class_table", "match_rows"]


@dataclass(frozen=True)
class ClassTable:
    """The union of class lists; made by `class_table`.

    Attributes:
        names: Names of the union by class index: those of the first data set in its order, then
            what the next one adds, and so on.
        class_lists: By data set its class list, as given.
        indices: By data set the index in the union of each of its class indices.
        tied: By data set the names that several of its class indices have, with these indices.
        shared_synsets: Synsets that the union has under several names, with the names. These
            classes are kept apart.
    """

    names: tuple[str, ...]
    class_lists: Mapping[str, tuple[str, ...]]
    indices: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, Mapping[str, tuple[int, ...]]]
    shared_synsets: Mapping[str, tuple[str, ...]]

    def classes_of(self, data_set: str) -> tuple[int, ...]:
        """Return the classes of a data set: indices in the union, each once, ascending."""
        return tuple(sorted(set(self._of(self.indices, data_set))))

    def aligned_labels(self, data_set: str) -> np.ndarray:
        """Return the labels in the union by the labels of a data set.

        `table.aligned_labels(name)[label_map]` is the label map in the union, in which labels of
        tied classes are one; see `maskx.data.label_maps.aligned_labels`.
        """
        return aligned_labels(self._of(self.class_lists, data_set), self.names)

    def describe(self) -> str:
        """Say for people what was united and what was merged."""
        lines = [f"{len(self.names)} classes by name, of {len(self.class_lists)} class lists."]
        for data_set, names in self.class_lists.items():
            tied = ", ".join(f"{name} x{len(them)}" for name, them in self.tied[data_set].items())
            lines.append(
                f"{data_set}: {len(names)} classes, {len(self.classes_of(data_set))} names; "
                f"merged: {tied or 'none'}."
            )
        for synset, names in self.shared_synsets.items():
            lines.append(f"{synset} is kept as {len(names)} classes: {', '.join(names)}.")
        return "\n".join(lines)

    def _of(self, values: Mapping[str, tuple], data_set: str) -> tuple:
        if data_set not in values:
            raise ValueError(
                f"The class table has no data set {data_set!r}. Allowed: {', '.join(values)}."
            )
        return values[data_set]


class RowMatch(NamedTuple):
    """Rows of one class list that another has under the same name.

    Attributes:
        new_rows: Rows to fill, ascending.
        old_rows: For each of them the row to take: `new[new_rows] = old[old_rows]`.
        only_new: Names without an old row, in their order.
        only_old: Names whose row nothing takes, in their order.
    """

    new_rows: tuple[int, ...]
    old_rows: tuple[int, ...]
    only_new: tuple[str, ...]
    only_old: tuple[str, ...]


def class_table(
    class_lists: Mapping[str, Sequence[str]],
    *,
    synsets: Mapping[str, Mapping[str, str]] | None = None,
) -> ClassTable:
    """Unite class lists by name.

    A name that a list has several times, as COCO-Stuff's renamed list has "wall", is one class.

    Args:
        class_lists: By data set its names by class index.
        synsets: Where known, by data set the WordNet synset of a name. A name has one synset in
            all data sets. A synset with several names stays several classes, which are reported.

    Raises:
        ValueError: There is no list, a list is empty, a name is not usable, or data sets mean
            different synsets by one name.
    """
    if not class_lists:
        raise ValueError("A class table needs at least one class list, got none.")
    for data_set, names in class_lists.items():
        _check_names(names, f"class list {data_set!r}")
    union = tuple(dict.fromkeys(name for names in class_lists.values() for name in names))
    index_of = {name: index for index, name in enumerate(union)}
    return ClassTable(
        names=union,
        class_lists={data_set: tuple(names) for data_set, names in class_lists.items()},
        indices={
            data_set: tuple(index_of[name] for name in names)
            for data_set, names in class_lists.items()
        },
        tied={data_set: _tied(names) for data_set, names in class_lists.items()},
        shared_synsets=_shared_synsets(class_lists, synsets or {}),
    )


def match_rows(old_names: Sequence[str], new_names: Sequence[str]) -> RowMatch:
    """Match the rows of two class lists by name, such as those of a checkpoint and of a model.

    Args:
        old_names: Names by row of what there is.
        new_names: Names by row of what is wanted.

    Raises:
        ValueError: A list is empty, a name is not usable, or is in a list twice.
    """
    for names, what in ((old_names, "old"), (new_names, "new")):
        _check_names(names, f"{what} class list")
        tied = _tied(names)
        if tied:
            name, rows = next(iter(tied.items()))
            raise ValueError(
                f"The {what} class list has {len(tied)} names several times, such as {name!r} in "
                f"the rows {', '.join(map(str, rows))}. Give a list of unique names, such as "
                "ClassTable.names."
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


def _check_names(names: Sequence[str], where: str) -> None:
    if not names:
        raise ValueError(f"The {where} is empty. Give at least one name.")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name or name != name.strip():
            raise ValueError(
                f"The {where} has the name {name!r} at index {index}. Allowed: text without "
                "white space around it."
            )


def _tied(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the names that stand in a list several times, and where."""
    found = defaultdict(list)
    for index, name in enumerate(names):
        found[name].append(index)
    return {name: tuple(places) for name, places in found.items() if len(places) > 1}


def _shared_synsets(
    class_lists: Mapping[str, Sequence[str]], synsets: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[str, ...]]:
    meaning: dict[str, tuple[str, str]] = {}  # of a name: its synset, and the data set that says so
    for data_set, known in synsets.items():
        unknown = [name for name in known if name not in class_lists.get(data_set, ())]
        if unknown:
            raise ValueError(
                f"Synsets are given for {len(unknown)} names that class list {data_set!r} does "
                f"not have, such as {unknown[0]!r}. Give those of its names."
            )
        for name, synset in known.items():
            other_synset, other = meaning.setdefault(name, (synset, data_set))
            if other_synset != synset:
                raise ValueError(
                    f"{name!r} is {other_synset} in {other!r} but {synset} in {data_set!r}. "
                    "These are different things: rename the class in one of the lists, such as "
                    f"to {f'{name} ({synset})'!r}."
                )
    names_of = defaultdict(list)
    for name, (synset, _) in meaning.items():
        names_of[synset].append(name)
    return {synset: tuple(names) for synset, names in names_of.items() if len(names) > 1}
