#!/usr/bin/env python
"""Make the lists of concepts with boxes and masks that ConceptMask trains with.

Reads a word table and files of boxes and masks; writes ROOT/concepts/split.json, whose vocabulary
is that of the word table.

Examples:
    python datasets/prepare_concept_split.py --words datasets/concepts/words.safetensors
    python datasets/prepare_concept_split.py --words words.safetensors --min-images 100 \
        --boxes datasets/open_images/annotations/train_boxes.json --output split.json
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.core.word_table import load_word_table
from maskx.systems.concept_mask.concept_lists import choose_concepts, format_concept_lists
from maskx.systems.concept_mask.concept_sets import write_concept_split


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
    add("--words", type=Path, required=True, help="word table, from tools/learn_word_vectors.py")
    add(
        "--boxes",
        type=Path,
        nargs="+",
        help="COCO files (default: the training boxes of Open Images and Visual Genome in ROOT)",
    )
    add("--masks", type=Path, help="default: ROOT/coco/annotations/instances_train2017.json")
    add(
        "--min-images",
        type=int,
        default=8,
        help="images with boxes that a concept needs (default: %(default)s)",
    )
    add("--output", type=Path, help="default: ROOT/concepts/split.json")
    return parser.parse_args()


def main() -> None:
    """Write the file and say what is in it."""
    arguments = parse_arguments()
    root = arguments.root.expanduser()
    output = arguments.output or root / "concepts" / "split.json"
    boxes = arguments.boxes or [
        root / "open_images" / "annotations" / "train_boxes.json",
        root / "visual_genome" / "annotations" / "concepts_train_boxes.json",
    ]
    try:
        split, summary = choose_concepts(
            load_word_table(arguments.words).names,
            boxes=boxes,
            masks=arguments.masks or root / "coco" / "annotations" / "instances_train2017.json",
            min_images=arguments.min_images,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        write_concept_split(output, split)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(format_concept_lists(split, summary))
    print(f"Written to {output}.")


if __name__ == "__main__":
    main()
