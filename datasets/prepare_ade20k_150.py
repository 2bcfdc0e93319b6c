#!/usr/bin/env python
"""Make label maps and tags of ADE20K in the 150 classes of its scene parsing challenge.

Reads ROOT/ADEChallengeData2016; writes ROOT/ade20k_150.
An interrupted run goes on with the same command.

Examples:
    python datasets/prepare_ade20k_150.py
    python datasets/prepare_ade20k_150.py --root /data --workers 8
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.data.prepare.ade20k import prepare_ade20k_150
from maskx.data.prepare.label_map_sets import format_label_map_summary


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
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
        summary = prepare_ade20k_150(
            root / "ADEChallengeData2016",
            root / "ade20k_150",
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
    print(f"Written to {root / 'ade20k_150'}.")


if __name__ == "__main__":
    main()
