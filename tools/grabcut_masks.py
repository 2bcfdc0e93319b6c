r"""Give the boxes of a COCO file masks made by GrabCut, to train on as if they were true ones.

The masks of categories with masks in the split stay; without --split all categories get
GrabCut's. An interrupted run goes on with the same command.

Examples:
    python tools/grabcut_masks.py --split coco_voc --workers 8 --skip-bad \
        --json annotations/instances_train2017.json --images train2017 \
        --output annotations/instances_train2017_grabcut_nonvoc.json
"""

import argparse
import os
from pathlib import Path

from maskx.core.command_line import ended_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, required=True, help="COCO annotation file")
    add("--images", type=Path, required=True, help="folder of its images")
    add("--output", type=Path, required=True, help="file to write")
    add("--split", help="categories whose masks stay: a named split or a file")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    add("--skip-bad", action="store_true", help="leave annotations with bad boxes out, counted")
    return parser.parse_args()


def main() -> None:
    """Write the file; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line("the same command goes on with the images that are left"):
        from maskx.data.grabcut_coco import write_grabcut_json

        summary = write_grabcut_json(
            arguments.json,
            arguments.images,
            arguments.output,
            split=arguments.split,
            strict=not arguments.skip_bad,
            workers=arguments.workers,
            progress=True,
        )
    print(
        f"Wrote {arguments.output}: {summary.num_masks} masks by GrabCut, of which "
        f"{summary.num_whole_boxes} are the whole box; {summary.num_left_out} annotations left "
        "out for a bad box"
    )


if __name__ == "__main__":
    main()
