"""Names of the classes of Open Images as concepts, shared with COCO and Visual Genome.

Open Images labels have ids, such as /m/020lf, and names that differ between releases and are not
unique: "Mouse" is the animal and, in the first release, the computer mouse. Classes that COCO has
too are therefore told by their id.
"""

import os
from collections import Counter
from collections.abc import Mapping

from maskx.core.word_table import spelled
from maskx.data.large_vocabularies import vocabulary_rows
from maskx.data.prepare.csv_files import csv_rows

__all__ = ["OPEN_IMAGES_NAMES", "read_open_images_names"]

OPEN_IMAGES_NAMES = dict(vocabulary_rows("open_images_concepts.tsv"))
"""Concept names by id: 79 classes of COCO, and parts of the body that later releases call "Human".

COCO's "cup" has no class of its own: Open Images has boxes of "Coffee cup" and "Mug". A "sports
ball" is a "Ball" here, a "dining table" a "Kitchen & dining room table".
"""

_HEADER = ["LabelName", "DisplayName"]


def read_open_images_names(
    descriptions: str | os.PathLike[str], boxable: str | os.PathLike[str]
) -> dict[str, str]:
    """Read the names of classes: unique, in lower case, with spaces for underscores.

    Those of `OPEN_IMAGES_NAMES` have the name there. Of other classes with one name, the one that
    has boxes takes it; the rest, and all if none has boxes or several have, get their id behind it,
    such as "mouse (/m/04rmv)".

    Args:
        descriptions: `class-descriptions.csv`, `oidv6-class-descriptions.csv` or that of another
            release: ids and names of all classes.
        boxable: `class-descriptions-boxable.csv`, the same for the classes with boxes.

    Returns:
        Names by id.

    Raises:
        ValueError: A file is no list of classes, or gives an id twice.
    """
    with_boxes = _read_descriptions(boxable)
    given = with_boxes | _read_descriptions(descriptions)
    names = {label: name for label, name in OPEN_IMAGES_NAMES.items() if label in given}
    taken = set(OPEN_IMAGES_NAMES.values())
    for labels in (with_boxes, given):
        rest = {label: given[label] for label in labels if label not in names}
        names |= _unique(rest, taken)
        taken.update(rest.values())
    return names


def _unique(names: Mapping[str, str], taken: set[str]) -> dict[str, str]:
    """Put its id behind each name that is taken or shared."""
    uses = Counter(names.values())
    return {
        label: f"{name} ({label})" if name in taken or uses[name] > 1 else name
        for label, name in names.items()
    }


def _read_descriptions(path: str | os.PathLike[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for line, row in csv_rows(path):
        if line == 1 and row[:2] == _HEADER:  # releases up to V4 have none
            continue
        if len(row) < 2 or not row[0].startswith("/") or not spelled(row[1]) or row[0] in names:
            raise ValueError(
                f"{os.fspath(path)}, line {line} is {','.join(row)!r:.80}. Allowed: the id of a "
                "class, which no other line has, and its name, such as '/m/0199g,Bicycle'. Take "
                "the class descriptions of Open Images."
            )
        names[row[0]] = spelled(row[1]).lower()
    if not names:
        raise ValueError(f"{os.fspath(path)} has no class. Download it again.")
    return names
