#!/usr/bin/env python
"""Make the 3000-class data set of the Mask^X R-CNN paper from Visual Genome 1.4.

Reads objects.json and image_data.json in ROOT/visual_genome and COCO's instances_val2017.json,
writes ROOT/visual_genome/annotations.

Examples:
    python datasets/prepare_visual_genome.py
    python datasets/prepare_visual_genome.py --root /data --coco-val-json instances_val2017.json
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.data.prepare.visual_genome import format_summary, prepare_visual_genome


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
    add(
        "--coco-val-json",
        type=Path,
        help="default: ROOT/coco/annotations/instances_val2017.json",
    )
    add("--classes", type=int, default=3000, help="number of classes (default: %(default)s)")
    add(
        "--reference-classes",
        action="store_true",
        help="the class list of the published code: the CLASSES most frequent synsets and the "
        "COCO classes that are not among them",
    )
    add(
        "--test-images",
        type=int,
        default=5000,
        help="images held out for a test set (default: %(default)s; 0: none, as in the paper)",
    )
    return parser.parse_args()


def main() -> None:
    """Write the files and say what is in them."""
    arguments = parse_arguments()
    folder = arguments.root.expanduser() / "visual_genome"
    coco = arguments.root.expanduser() / "coco" / "annotations" / "instances_val2017.json"
    try:
        summary = prepare_visual_genome(
            folder / "objects.json",
            folder / "image_data.json",
            arguments.coco_val_json or coco,
            folder / "annotations",
            num_classes=arguments.classes,
            reference_classes=arguments.reference_classes,
            num_test_images=arguments.test_images,
            progress=True,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(format_summary(summary))
    print(f"Written to {folder / 'annotations'}.")


if __name__ == "__main__":
    main()
