#!/usr/bin/env python
"""Make COCO-format files of Clothing Co-Parsing (CCP): photos with masks, photos with tags only.

Reads ROOT/ccp: photos/NNNN.jpg, masks/NNNN.png (8 bits, value = number of the class),
classes.json, image_level_tags.json, pixel_train.txt, pixel_val.txt and image_level.txt; writes
ROOT/ccp/annotations/ccp_{train,val,tags,mixed}.json.

Examples:
    python datasets/prepare_ccp.py
    python datasets/prepare_ccp.py --ccp /downloads/ccp --output annotations
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.data.prepare.ccp import format_ccp_summary, prepare_ccp


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
    add("--ccp", type=Path, help="folder of the data set (default: ROOT/ccp)")
    add("--output", type=Path, help="folder to write to (default: annotations in that of CCP)")
    return parser.parse_args()


def main() -> None:
    """Write the files and say what is in them."""
    arguments = parse_arguments()
    ccp = arguments.ccp or arguments.root.expanduser() / "ccp"
    output = arguments.output or ccp / "annotations"
    try:
        summary = prepare_ccp(ccp, output, progress=True)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(format_ccp_summary(summary))
    print(f"Written to {output}.")


if __name__ == "__main__":
    main()
