r"""Measure in one pass over boxes how much concepts lie within each other (ConceptMask, Eq. 3).

The spatial discrimination loss of stage 2 learns from it which concepts exclude each other.

Examples:
    python tools/concept_overlap.py --split concepts.json --output overlap.npz \
        --json annotations/instances_train2017.json visual_genome_boxes.json
"""

import argparse
import logging
from pathlib import Path

from maskx.core.command_line import ended_in_one_line

_NUM_EXAMPLES = 5


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, nargs="+", required=True, help="COCO files with boxes")
    add("--split", type=Path, required=True, help="concept split: vocabulary, boxed, masked")
    add("--word-table", type=Path, help="word table, if the split lists no vocabulary")
    add("--output", type=Path, required=True, help=".npz file to write")
    add("--skip-bad", action="store_true", help="leave annotations with bad boxes out, counted")
    arguments = parser.parse_args()
    if arguments.output.is_dir():
        parser.error("--output is a folder; give a file")
    return arguments


def main() -> None:
    """Write the file; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ended_in_one_line():
        import numpy as np

        from maskx.core.word_table import load_word_table
        from maskx.data.coco import load_coco
        from maskx.systems.concept_mask.concept_sets import concept_sets, read_concept_split
        from maskx.systems.concept_mask.overlap import (
            concept_overlap,
            negative_weights,
            save_overlap,
        )

        names = (
            None if arguments.word_table is None else load_word_table(arguments.word_table).names
        )
        split = read_concept_split(arguments.split, names)
        records = (
            record
            for json_file in arguments.json
            for record in concept_sets(
                split,
                boxes=load_coco(json_file, "", strict=not arguments.skip_bad, check_images=False),
            ).boxed
        )
        overlap = concept_overlap(records, len(split.vocabulary), progress=True)
        save_overlap(arguments.output, overlap, split.vocabulary)
    ratios = overlap.ratios()
    print(
        f"Wrote {arguments.output}: {len(ratios)} ordered pairs of concepts in one image, "
        f"{len(negative_weights(overlap)[1])} of them negatives"
    )
    for pair in np.argsort(-ratios, kind="stable")[:_NUM_EXAMPLES]:
        inner, outer = (split.vocabulary[i[pair]] for i in (overlap.rows, overlap.columns))
        print(f"{ratios[pair]:.2f} of '{inner}' lies within '{outer}'")


if __name__ == "__main__":
    main()
