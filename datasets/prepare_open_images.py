#!/usr/bin/env python
"""Make the tags and boxes of Open Images (V4 to V7) for ConceptMask.

Reads CSV files and images in ROOT/open_images, by their published names; writes
ROOT/open_images/annotations/{train,val}_{tags.jsonl,boxes.json}. Sizes of images are kept in
SPLIT_sizes.csv there, so that an interrupted run goes on with the same command.

Examples:
    python datasets/prepare_open_images.py --split train --existing-images
    python datasets/prepare_open_images.py --split val --only boxes
    python datasets/prepare_open_images.py --split train --only tags --min-machine-confidence 0.9 \
        --labels train-annotations-human-imagelabels.csv train-annotations-machine-imagelabels.csv
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.data.prepare.open_images import (
    format_open_images_summary,
    prepare_open_images_boxes,
    prepare_open_images_tags,
)
from maskx.data.prepare.open_images_names import read_open_images_names

# Of each split the published names of its labels, its boxes and its folder of images.
_FILES = {
    "train": (
        "oidv7-train-annotations-human-imagelabels.csv",
        "oidv6-train-annotations-bbox.csv",
        "train",
    ),
    "val": (
        "oidv7-val-annotations-human-imagelabels.csv",
        "validation-annotations-bbox.csv",
        "validation",
    ),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
    add("--split", choices=tuple(_FILES), default="train", help="default: %(default)s")
    add("--only", choices=("tags", "boxes"), help="make one of the two files")
    add("--labels", type=Path, nargs="+", help="CSV files of image labels, verified and machine")
    add("--boxes", type=Path, help="CSV file of boxes")
    add("--descriptions", type=Path, help="default: oidv7-class-descriptions.csv")
    add("--boxable", type=Path, help="default: class-descriptions-boxable.csv")
    add("--images", type=Path, help="folder of images (default: train or validation)")
    add(
        "--min-machine-confidence",
        type=float,
        help="take machine labels of this confidence or more too (default: verified ones only)",
    )
    add(
        "--existing-images",
        action="store_true",
        help="leave out images that are not in the folder, and count them",
    )
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    return parser.parse_args()


def main() -> None:
    """Write the files and say what is in them."""
    arguments = parse_arguments()
    root = arguments.root.expanduser() / "open_images"
    output, split = root / "annotations", arguments.split
    labels, boxes, images = (root / name for name in _FILES[split])
    images = arguments.images or images
    try:
        names = read_open_images_names(
            arguments.descriptions or root / "oidv7-class-descriptions.csv",
            arguments.boxable or root / "class-descriptions-boxable.csv",
        )
        if arguments.only != "boxes":
            summary = prepare_open_images_tags(
                arguments.labels or [labels],
                names,
                output / f"{split}_tags.jsonl",
                min_machine_confidence=arguments.min_machine_confidence,
                existing_images=images if arguments.existing_images else None,
                progress=True,
            )
            print(format_open_images_summary(summary))
        if arguments.only != "tags":
            summary = prepare_open_images_boxes(
                arguments.boxes or boxes,
                names,
                images,
                output / f"{split}_boxes.json",
                sizes=output / f"{split}_sizes.csv",
                existing_only=arguments.existing_images,
                workers=arguments.workers,
                progress=True,
            )
            print(format_open_images_summary(summary))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with what is left")
    print(f"Written to {output}.")


if __name__ == "__main__":
    main()
