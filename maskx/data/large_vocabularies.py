"""Class lists that are too long for code: COCO-Stuff, ADE20K and the synsets of ImageNet.

They lie in `maskx/data/vocabulary_files`, whose README.md says where each comes from. Here are also
the base/novel splits of LarvSeg (Yu et al., PRCV 2024) over ADE20K: base are the classes that
COCO-Stuff has masks of. The paper uses two rules, which give different numbers:

- raw: COCO-Stuff's own names, cut at the first hyphen ("window-other" is "window"). 58 base and 92
  novel classes of ADE20K's 150, 92 and 755 of its 847.
- renamed: COCO-Stuff's names as the paper's code matches them with ADE20K's ("tv" is "television
  receiver"). 63 and 87 of 150, 94 and 753 of 847.

For 847 classes both compare names as that code spells them, with hyphens for spaces, so that a
name of several words is never base. COCO-Stuff has "traffic light" and "parking meter", which are
novel by both rules, and, renamed, "television receiver" and "dirt track".
"""

import functools
import gzip
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "LARVSEG_SPLITS",
    "AdeClass",
    "CocoStuffClass",
    "ade20k_150_classes",
    "ade20k_847_classes",
    "base_and_novel",
    "coco_stuff_classes",
    "imagenet_synsets",
    "vocabulary_rows",
]

LARVSEG_SPLITS = ("ade150_raw", "ade150_renamed", "ade847_raw", "ade847_renamed")
"""Names that `base_and_novel` knows: the data set and the rule."""

_FOLDER = Path(__file__).with_name("vocabulary_files")


@dataclass(frozen=True)
class CocoStuffClass:
    """A class of COCO-Stuff.

    Attributes:
        category_id: 1 to 182; 171 of them exist.
        name: As published.
        renamed: As matched with ADE20K's names; 160 different ones.
    """

    category_id: int
    name: str
    renamed: str


@dataclass(frozen=True)
class AdeClass:
    """A class of ADE20K.

    Attributes:
        value: Of its pixels: 1 to 150 in the masks of the 150 classes, an index of object names in
            those of the full data set.
        name: One name, unique in the list.
        synonyms: All names that ADE20K gives it.
    """

    value: int
    name: str
    synonyms: tuple[str, ...]


@functools.cache
def coco_stuff_classes() -> tuple[CocoStuffClass, ...]:
    """Return the 171 classes of COCO-Stuff, ordered by id."""
    return tuple(
        CocoStuffClass(int(category_id), name, renamed)
        for category_id, name, renamed in vocabulary_rows("coco_stuff_171.tsv")
    )


@functools.cache
def ade20k_150_classes() -> tuple[AdeClass, ...]:
    """Return the 150 classes of the scene parsing challenge, ordered by their value."""
    return _ade_classes("ade20k_150.tsv")


@functools.cache
def ade20k_847_classes() -> tuple[AdeClass, ...]:
    """Return the 847 classes that are in use for the full ADE20K, in their usual order."""
    return _ade_classes("ade20k_847.tsv")


@functools.cache
def imagenet_synsets() -> dict[str, tuple[str, ...]]:
    """Return the names of ImageNet's synsets, by their id such as "n01440764"."""
    text = gzip.decompress((_FOLDER / "imagenet_synsets.tsv.gz").read_bytes()).decode("utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return {synset: tuple(names.split(", ")) for synset, names in rows}


@functools.cache
def base_and_novel(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the base and the novel classes of a split of `LARVSEG_SPLITS`, by name.

    Raises:
        ValueError: There is no such split.
    """
    if split not in LARVSEG_SPLITS:
        raise ValueError(
            f"There is no base/novel split {split!r}. Allowed: {', '.join(LARVSEG_SPLITS)}."
        )
    data_set, rule = split.split("_")
    if rule == "raw":
        with_masks = {entry.name.partition("-")[0] for entry in coco_stuff_classes()}
    else:
        with_masks = {entry.renamed for entry in coco_stuff_classes()}
    if data_set == "ade150":
        is_base = {entry.name: entry.name in with_masks for entry in ade20k_150_classes()}
    else:
        is_base = {
            entry.name: entry.name.replace(" ", "-") in with_masks for entry in ade20k_847_classes()
        }
    base = tuple(name for name, found in is_base.items() if found)
    return base, tuple(name for name, found in is_base.items() if not found)


def _ade_classes(file_name: str) -> tuple[AdeClass, ...]:
    return tuple(
        AdeClass(int(value), name, tuple(names.split(", ")))
        for value, name, names in vocabulary_rows(file_name)
    )


def vocabulary_rows(file_name: str) -> list[list[str]]:
    """Read a table of `maskx/data/vocabulary_files`, without the names of its columns."""
    lines = (_FOLDER / file_name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines[1:]]
