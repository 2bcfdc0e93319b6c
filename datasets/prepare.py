#!/usr/bin/env python
"""Make the files of a public data set in the form that maskx reads; see datasets/README.md.

An interrupted run goes on with the same command.

Examples:
    python datasets/prepare.py voc
    python datasets/prepare.py coco_stuff --root /data --workers 8
    python datasets/prepare.py open_images --help
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from maskx.core.command_line import ended_in_one_line
from maskx.data.prepare.table import PREPARATIONS, Preparation


def _concept_split(
    root: Path,
    *,
    words: Path,
    boxes: list[Path] | None,
    masks: Path | None,
    min_images: int,
    output: Path | None,
) -> Iterator[str]:
    from maskx.core.word_table import load_word_table
    from maskx.systems.concept_mask.concept_sets import (
        choose_concepts,
        format_concept_lists,
        write_concept_split,
    )

    output = output or root / "concepts" / "split.json"
    split, summary = choose_concepts(
        load_word_table(words).names,
        boxes=boxes
        or [
            root / "open_images" / "annotations" / "train_boxes.json",
            root / "visual_genome" / "annotations" / "concepts_train_boxes.json",
        ],
        masks=masks or root / "coco" / "annotations" / "instances_train2017.json",
        min_images=min_images,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_concept_split(output, split)
    yield format_concept_lists(split, summary)
    yield f"Written to {output}."


def _concept_tests(
    root: Path, *, split: Path | None, masks: list[Path] | None, min_images: int
) -> Iterator[str]:
    from maskx.core.files import write_json
    from maskx.core.text import listed
    from maskx.systems.concept_mask.concept_sets import read_concept_split, weak_lists

    lists = weak_lists(
        read_concept_split(split or root / "concepts" / "split.json"),
        masks
        or [
            root / "lvis" / "annotations" / "concepts_val.json",
            root / "open_images" / "annotations" / "val_masks.json",
        ],
        min_images=min_images,
    )
    output = root / "concepts" / "test_lists.json"
    write_json(output, lists)
    for name, names in lists.items():
        yield f"{name}: {len(names)} concepts: {listed(names) or 'none'}."
    yield f"Written to {output}."


# The lists of a system are made of data sets, but data know no system.
_CONCEPT_SPLIT = Preparation(
    "the lists of concepts with boxes and masks that ConceptMask trains with",
    "Reads a word table and files of boxes and masks; writes ROOT/concepts/split.json, whose "
    "vocabulary is that of the word table.",
    _concept_split,
    {
        "--words": {
            "type": Path,
            "required": True,
            "help": "word table, from tools/learn_word_vectors.py",
        },
        "--boxes": {
            "type": Path,
            "nargs": "+",
            "help": "COCO files (default: the training boxes of Open Images and Visual Genome in "
            "ROOT)",
        },
        "--masks": {
            "type": Path,
            "help": "default: ROOT/coco/annotations/instances_train2017.json",
        },
        "--min-images": {
            "type": int,
            "default": 8,
            "help": "images with boxes that a concept needs (default: %(default)s)",
        },
        "--output": {"type": Path, "help": "default: ROOT/concepts/split.json"},
    },
)

_CONCEPT_TESTS = Preparation(
    "which concepts of the test masks are Weak-Box, Weak-Image and zero-shot, as in ConceptMask",
    "Reads ROOT/concepts/split.json and the files of masks; writes ROOT/concepts/test_lists.json.",
    _concept_tests,
    {
        "--split": {"type": Path, "help": "default: ROOT/concepts/split.json"},
        "--masks": {
            "type": Path,
            "nargs": "+",
            "help": "COCO files of images that are not trained on (default: those of LVIS and Open "
            "Images in ROOT)",
        },
        "--min-images": {
            "type": int,
            "default": 5,
            "help": "images with masks that a concept needs (default: %(default)s)",
        },
    },
)

_TABLE = {**PREPARATIONS, "concept_split": _CONCEPT_SPLIT, "concept_tests": _CONCEPT_TESTS}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    for name, entry in _TABLE.items():
        about = f"{entry.about[0].upper()}{entry.about[1:]}. {entry.files}"
        of_name = names.add_parser(name, help=entry.about, description=about)
        of_name.add_argument(
            "--root",
            type=Path,
            default=root,
            help="folder of the data sets (default: %(default)s)",
        )
        for flag, keywords in entry.options.items():
            of_name.add_argument(flag, **keywords)
    return parser.parse_args(arguments)


def main() -> None:
    """Make the files and say what is in them."""
    options = vars(parse_arguments())
    name, root = options.pop("name"), options.pop("root").expanduser()
    with ended_in_one_line("the same command goes on with what is left"):
        for text in _TABLE[name].run(root, **options):
            print(text)


if __name__ == "__main__":
    main()
