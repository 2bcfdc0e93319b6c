#!/usr/bin/env python
"""Make the tags and boxes of Visual Genome for ConceptMask, named by words.

Reads ROOT/visual_genome/annotations/instances_vg3k_{train,val,test}.json, which
prepare_visual_genome.py writes; writes concepts_{train,val,test}_{tags.jsonl,boxes.json} there.

Examples:
    python datasets/prepare_visual_genome_concepts.py
    python datasets/prepare_visual_genome_concepts.py --root /data
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.data.prepare.visual_genome_concepts import (
    format_concept_summary,
    prepare_visual_genome_concepts,
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    parser.add_argument(
        "--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Write the files and say what is in them."""
    folder = parse_arguments().root.expanduser() / "visual_genome" / "annotations"
    try:
        summary = prepare_visual_genome_concepts(folder)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(format_concept_summary(summary))
    print(f"Written to {folder}.")


if __name__ == "__main__":
    main()
