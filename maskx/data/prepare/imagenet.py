"""ImageNet-21K (Deng et al., CVPR 2009) as COCO-format files with one image label each.

Images lie in folders that are named by their WordNet synset, such as n01440764. Which synset a
class of ADE20K is, nobody has published with it; `match_synsets` finds it by names:

- A synset is a candidate for a class if the first of the class's names in ADE20K, or its name here,
  is among the names of the synset.
- Of the candidates it is the one that shares most names: common names by all names of both. ADE20K
  took its names from WordNet, so these often agree as a whole.
- If that leaves several, as WordNet has more than one "wall", it is the one with most images, then
  the one with the lowest id.
- A synset is of one class, the one it shares most names with; the others go without.
- Synsets that have the name by accident, such as the flounder "windowpane", are no candidates.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from maskx.core.files import write_json
from maskx.core.processes import run_jobs
from maskx.data.json_files import read_json
from maskx.data.large_vocabularies import (
    AdeClass,
    ade20k_150_classes,
    ade20k_847_classes,
    imagenet_synsets,
    vocabulary_rows,
)
from maskx.data.prepare.label_map_sets import (
    check_folder,
    image_size,
    left_out_line,
    list_problems,
    refuse_problems,
    some_of,
)

__all__ = [
    "HOMONYMS",
    "IMAGENET_CLASS_LISTS",
    "PAPER_COUNTS",
    "ImageNetSummary",
    "choose_synsets",
    "match_synsets",
    "prepare_imagenet21k",
    "synset_names",
]

# Synsets that share a name with a class of ADE20K or COCO-Stuff, but show another thing. Found by
# reading the definitions of most matches; there may be finer ones left.
HOMONYMS = dict(vocabulary_rows("imagenet_homonyms.tsv"))

IMAGENET_CLASS_LISTS = ("all", "ade150", "ade847")
"""Named lists of synsets: those that have a folder, or those of ADE20K's classes."""

PAPER_COUNTS = {"all": (21841, 14_197_122), "ade150": (124, 174_000), "ade847": (585, 739_000)}
"""Classes and images: ImageNet-21K of fall 2011; I124 and I585 of the LarvSeg paper, rounded."""

_SYNSET = re.compile(r"n\d{8}")
_SUFFIXES = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True)
class ImageNetSummary:
    """What `prepare_imagenet21k` wrote.

    Attributes:
        classes: Which classes: a name of `IMAGENET_CLASS_LISTS`, or a file.
        missing: Synsets of the list that have no folder, or no image, by class name.
        without_synset: Classes of ADE20K for which no synset has been found.
        num_reused: Folders whose sizes an earlier run had read.
        left_out: What is wrong with the file of each image that was left out, by its path.
    """

    classes: str
    num_images: Mapping[str, int]
    missing: Mapping[str, str]
    without_synset: tuple[str, ...]
    num_reused: int
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        num_classes = sum(number > 0 for number in self.num_images.values())
        total = sum(self.num_images.values())
        known = ""
        if self.classes in PAPER_COUNTS:
            known_classes, known_images = PAPER_COUNTS[self.classes]
            known = f" (published: {known_classes} classes, {known_images} images)"
        lines = [f"{num_classes} classes with {total} images{known}."]
        for what, names in (
            ("Classes of ADE20K without a synset", self.without_synset),
            ("Synsets without images", tuple(self.missing.values())),
        ):
            lines.append(f"{what}: {some_of(names)}.")
        lines.append(f"Folders read by an earlier run: {self.num_reused}.")
        return "\n".join([*lines, left_out_line(self.left_out)])


class _Job(NamedTuple):
    folder: Path
    names: tuple[str, ...]
    sizes: Path


class _Done(NamedTuple):
    synset: str
    sizes: dict[str, list[int]]
    problems: dict[str, str]
    was_reused: bool


def prepare_imagenet21k(
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    classes: str | os.PathLike[str] = "ade847",
    max_images_per_class: int | None = None,
    allow_other_counts: bool = False,
    strict: bool = True,
    workers: int = 1,
) -> ImageNetSummary:
    """Write `imagenet_NAME_tags.json`: image labels, as ImageNet has no masks.

    Its categories, which say what the classes are, are in `imagenet_NAME_categories.json` too, as
    the file itself may be large.

    Sizes are read from the headers of the images, folder by folder, and kept in `output/sizes`, so
    that an interrupted run goes on; a folder in which names have changed is read anew. Categories
    have the key `synset`; those of ADE20K's classes have the names of `ade20k.py`, others the first
    name of the synset, with the synset behind it where several have that name. Images are named
    from `images`, ids count them from 1.

    Args:
        images: Folder with a folder of images for each synset; any of them may be missing.
        output: Folder to write to; it is created, files of an earlier run are replaced.
        classes: A name of `IMAGENET_CLASS_LISTS`, or a JSON file {synset: class name}, such as the
            list of a published model. NAME is then its stem.
        max_images_per_class: Take the first so many images of each folder, by name.
        allow_other_counts: Whether synsets of the list may have no images.
        strict: Whether an image that cannot be read is an error. If False it is left out, counted.

    Raises:
        FileNotFoundError: There is no folder of images, or no file `classes`.
        ValueError: The list or the folders are not what they should be, or an image.
    """
    if max_images_per_class is not None and max_images_per_class < 1:
        raise ValueError(f"max_images_per_class must be at least 1, got {max_images_per_class}.")
    images, output = Path(images), Path(output)
    files = _list_images(images)
    counts = {synset: len(names) for synset, names in files.items()}
    name, class_of, without_synset = choose_synsets(classes, counts)
    missing = {class_name: synset for synset, class_name in class_of.items() if not files[synset]}
    if missing and not allow_other_counts:
        class_name, synset = next(iter(missing.items()))
        raise ValueError(
            f"{images}: {len(missing)} of {len(class_of)} synsets have no images, such as {synset} "
            f"({class_name!r}). Unpack their folders, or say that it is a part of ImageNet "
            "(allow_other_counts=True, --allow-other-counts)."
        )
    sizes_folder = output / "sizes"
    sizes_folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(
            images / synset,
            tuple(files[synset][:max_images_per_class]),
            sizes_folder / f"{synset}.json",
        )
        for synset in sorted(class_of)
        if files[synset]
    ]
    sizes, problems, num_reused = {}, {}, 0
    finished = run_jobs(_read_sizes, jobs, workers)
    for done in tqdm(finished, total=len(jobs), unit="folder", disable=None):
        sizes[done.synset] = done.sizes
        problems |= done.problems
        num_reused += done.was_reused
    problems = dict(sorted(problems.items()))
    if strict:
        refuse_problems(problems, sum(len(job.names) for job in jobs))
    content = _coco(sizes, class_of)
    if not content["images"]:
        raise ValueError(
            f"{images}: no image is left of {len(class_of)} synsets.{list_problems(problems)}"
        )
    write_json(output / f"imagenet_{name}_tags.json", content, compact=True)
    write_json(output / f"imagenet_{name}_categories.json", content["categories"])
    return ImageNetSummary(
        classes=name,
        num_images={
            class_name: len(sizes.get(synset, ())) for synset, class_name in class_of.items()
        },
        missing=missing,
        without_synset=without_synset,
        num_reused=num_reused,
        left_out=problems,
    )


def choose_synsets(
    classes: str | os.PathLike[str], counts: Mapping[str, int]
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Choose synsets and name them.

    Args:
        counts: Number of images by synset.

    Returns:
        A name for the list, class names by synset, and the classes without a synset.

    Raises:
        FileNotFoundError: `classes` is no known name and no file.
        ValueError: The file is no list of synsets.
    """
    if classes == "all":
        return "all", synset_names(sorted(s for s, number in counts.items() if number)), ()
    if classes in IMAGENET_CLASS_LISTS:
        entries = ade20k_150_classes() if classes == "ade150" else ade20k_847_classes()
        class_of = match_synsets(entries, counts)
        found = set(class_of.values())
        rest = tuple(entry.name for entry in entries if entry.name not in found)
        return str(classes), class_of, rest
    path = Path(classes)
    if not path.is_file():
        raise FileNotFoundError(
            f"'{path}' is neither a named list of synsets nor a file. Allowed: "
            f"{', '.join(IMAGENET_CLASS_LISTS)}, or a JSON file {{synset: class name}}."
        )
    return path.stem, _read_classes(path), ()


def match_synsets(
    classes: Sequence[AdeClass],
    counts: Mapping[str, int] | None = None,
    synsets: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, str]:
    """Match classes of ADE20K with synsets by names; the module says how.

    Args:
        counts: Number of images by synset, for synsets of the same names. Where given, synsets
            without images are not chosen if another fits as well.
        synsets: Names by synset; those of ImageNet by default.

    Returns:
        Class names by synset, in the order of the classes.
    """
    counts = counts or {}
    names_of = {
        synset: frozenset(name.lower() for name in names)
        for synset, names in (imagenet_synsets() if synsets is None else synsets).items()
        if synset not in HOMONYMS
    }
    synsets_with = defaultdict(set)
    for synset, names in names_of.items():
        for name in names:
            synsets_with[name].add(synset)

    offers = []
    for order, entry in enumerate(classes):
        names = {name.lower() for name in (*entry.synonyms, entry.name)}
        heads = {entry.synonyms[0].lower(), entry.name.lower()}
        found = set().union(*(synsets_with.get(head, ()) for head in heads))
        shared = {s: len(names & names_of[s]) / len(names | names_of[s]) for s in found}
        # No class falls back to a worse synset if another class takes its best: that would be
        # another thing.
        best = max(shared.values(), default=0.0)
        offers += [
            (-best, -counts.get(synset, 0), synset, order)
            for synset, share in shared.items()
            if share == best
        ]
    class_of, served = {}, set()
    for _, _, synset, order in sorted(offers):
        if order not in served and synset not in class_of:
            class_of[synset] = order
            served.add(order)
    in_order = sorted(class_of.items(), key=lambda item: item[1])
    return {synset: classes[order].name for synset, order in in_order}


def synset_names(synsets: Sequence[str]) -> dict[str, str]:
    """Return unique class names by synset: its first name, with the synset where it is shared.

    A name is shared if any other synset of ImageNet has it first, whichever are asked for: classes
    have the same names whatever part of ImageNet is at hand.

    Raises:
        ValueError: A synset is not known.
    """
    known = imagenet_synsets()
    unknown = [synset for synset in synsets if synset not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(synsets)} synsets are not known, such as {unknown[0]!r}. Give "
            f"those of ImageNet-21K ({len(known)} are known), or name them in a JSON file {{synset:"
            " class name}."
        )
    uses = Counter(names[0] for synset, names in known.items() if synset not in HOMONYMS)
    return {
        synset: known[synset][0]
        if uses[known[synset][0]] == 1 and synset not in HOMONYMS
        else f"{known[synset][0]} ({synset})"
        for synset in synsets
    }


def _list_images(images: Path) -> dict[str, list[str]]:
    """Return the names of images, sorted, by synset; empty for a synset without a folder."""
    check_folder(images, "images")
    folders = sorted(f for f in images.iterdir() if _SYNSET.fullmatch(f.name) and f.is_dir())
    if not folders:
        raise FileNotFoundError(
            f"{images}: has no folder of a synset, such as n01440764. datasets/README.md says "
            "where files lie."
        )
    files = defaultdict(list)
    for folder in tqdm(folders, desc="list", unit="folder", disable=None):
        with os.scandir(folder) as found:
            names = [entry.name for entry in found]
        files[folder.name] = sorted(name for name in names if name.lower().endswith(_SUFFIXES))
    return files


def _read_classes(path: Path) -> dict[str, str]:
    content = read_json(path, what="list of synsets")
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: must be a JSON object {{synset: class name}} with entries.")
    for synset, name in content.items():
        if not _SYNSET.fullmatch(synset) or not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{path}: has the entry {synset!r}: {name!r}. Allowed: a synset such as n01440764 "
                "and a class name."
            )
    shared = [name for name, uses in Counter(content.values()).items() if uses > 1]
    if shared:
        raise ValueError(
            f"{path}: has {len(shared)} class names of several synsets, such as {shared[0]!r}. "
            "Give each synset a name of its own."
        )
    return content


def _read_sizes(job: _Job) -> _Done:
    synset = job.folder.name
    if job.sizes.is_file():
        kept = _kept_sizes(job.sizes)
        if kept is not None and tuple(kept) == job.names:
            return _Done(synset, kept, {}, True)
    sizes, problems = {}, {}
    for name in job.names:
        try:
            sizes[name] = list(image_size(job.folder / name))
        except (FileNotFoundError, ValueError) as error:
            problems[str(job.folder / name)] = str(error)
    if not problems:
        write_json(job.sizes, sizes, compact=True)
    return _Done(synset, sizes, problems, False)


def _kept_sizes(path: Path) -> dict[str, list[int]] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not of this program: it is written anew
        return None
    return kept if isinstance(kept, dict) else None


def _coco(sizes: Mapping[str, Mapping[str, list[int]]], class_of: Mapping[str, str]) -> dict:
    categories: list[dict[str, Any]] = [
        {"id": number, "name": name, "synset": synset}
        for number, (synset, name) in enumerate(class_of.items(), start=1)
    ]
    entries: list[dict[str, Any]] = []
    for category in categories:
        synset = category["synset"]
        for name, (height, width) in sizes.get(synset, {}).items():
            entry = {"id": len(entries) + 1, "file_name": f"{synset}/{name}"}
            entry |= {"height": height, "width": width, "image_labels": [category["id"]]}
            entries.append(entry)
    return {"images": entries, "annotations": [], "categories": categories}
