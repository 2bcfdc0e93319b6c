#!/usr/bin/env python
"""Make the image labels of ImageNet-21K, or of the synsets that are classes of ADE20K.

Reads ROOT/imagenet21k/n*/*.JPEG, any part of it; writes ROOT/imagenet21k_labels.
An interrupted run goes on with the same command.

Examples:
    python datasets/prepare_imagenet21k.py --classes ade150
    python datasets/prepare_imagenet21k.py --classes all --max-images-per-class 100 --skip-bad
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.data.prepare.imagenet import (
    IMAGENET_CLASS_LISTS,
    format_imagenet_summary,
    prepare_imagenet21k,
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
    add("--images", type=Path, help="folder of the synsets' folders (default: ROOT/imagenet21k)")
    add(
        "--classes",
        default="ade847",
        help=f"{', '.join(IMAGENET_CLASS_LISTS)}, or a JSON file {{synset: class name}} (default: "
        "%(default)s)",
    )
    add("--max-images-per-class", type=int, help="take the first so many of each class, by name")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    add(
        "--allow-other-counts",
        action="store_true",
        help="take lists with synsets of which there are no images",
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
        summary = prepare_imagenet21k(
            arguments.images or root / "imagenet21k",
            root / "imagenet21k_labels",
            classes=arguments.classes,
            max_images_per_class=arguments.max_images_per_class,
            allow_other_counts=arguments.allow_other_counts,
            strict=not arguments.skip_bad,
            workers=arguments.workers,
            progress=True,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with what is left")
    print(format_imagenet_summary(summary))
    print(f"Written to {root / 'imagenet21k_labels'}.")


if __name__ == "__main__":
    main()
