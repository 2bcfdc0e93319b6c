#!/usr/bin/env python
"""Make label maps and tags of COCO-Stuff 164k, in 160 classes or in its 171.

Reads ROOT/coco/{train2017,val2017} and ROOT/coco/stuffthingmaps; writes ROOT/coco_stuff.
An interrupted run goes on with the same command.

Examples:
    python datasets/prepare_coco_stuff.py
    python datasets/prepare_coco_stuff.py --root /data --names raw
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.data.prepare.coco_stuff import COCO_STUFF_NAMINGS, prepare_coco_stuff
from maskx.data.prepare.label_map_sets import format_label_map_summary


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
    add("--masks", type=Path, help="default: ROOT/coco/stuffthingmaps")
    add(
        "--names",
        choices=COCO_STUFF_NAMINGS,
        default=COCO_STUFF_NAMINGS[0],
        help="renamed: as LarvSeg matches them with ADE20K's, 160 classes; raw: the 171 published "
        "ones (default: %(default)s)",
    )
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    add(
        "--allow-other-counts",
        action="store_true",
        help="take other numbers of images than those of the whole data set",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out images whose files are missing or bad, and count them",
    )
    return parser.parse_args()


def main() -> None:
    """Write the files and say what is in them."""
    arguments = parse_arguments()
    root = arguments.root.expanduser()
    try:
        summary = prepare_coco_stuff(
            root / "coco",
            arguments.masks or root / "coco" / "stuffthingmaps",
            root / "coco_stuff",
            naming=arguments.names,
            allow_other_counts=arguments.allow_other_counts,
            strict=not arguments.skip_bad,
            workers=arguments.workers,
            progress=True,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with what is left")
    print(format_label_map_summary(summary))
    print(f"Written to {root / 'coco_stuff'}.")


if __name__ == "__main__":
    main()
