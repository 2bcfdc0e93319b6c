#!/usr/bin/env python
"""Make COCO-60, the source set of TransferNet: images of COCO without any class of PASCAL VOC.

Reads ROOT/coco/annotations/instances_train2014.json and writes instances_coco60_train2014.json
beside it.

Examples:
    python datasets/prepare_coco60.py
    python datasets/prepare_coco60.py --json instances_train2017.json --output coco60_2017.json
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.data.prepare.coco_subsets import format_coco60_summary, write_coco60


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
    add("--json", type=Path, help="default: ROOT/coco/annotations/instances_train2014.json")
    add("--output", type=Path, help="default: instances_coco60_train2014.json in the same folder")
    arguments = parser.parse_args()
    if arguments.json and not arguments.output:
        parser.error("--json needs --output, the file to write")
    return arguments


def main() -> None:
    """Write the file and say what is in it."""
    arguments = parse_arguments()
    folder = arguments.root.expanduser() / "coco" / "annotations"
    json_file = arguments.json or folder / "instances_train2014.json"
    output = arguments.output or folder / "instances_coco60_train2014.json"
    try:
        summary = write_coco60(json_file, output)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(format_coco60_summary(summary))
    print(f"Written to {output}.")


if __name__ == "__main__":
    main()
