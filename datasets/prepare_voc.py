#!/usr/bin/env python
"""Make PASCAL VOC 2012 with the masks of SBD (trainaug, 10582 images) and VOC's val.

Reads ROOT/VOCdevkit/VOC2012 and, whichever is there, its folder SegmentationClassAug (PNG) or
ROOT/benchmark_RELEASE/dataset (SBD as published); writes ROOT/voc2012.

Examples:
    python datasets/prepare_voc.py
    python datasets/prepare_voc.py --root /data --sbd /downloads/benchmark_RELEASE/dataset
"""

import argparse
import os
import sys
from pathlib import Path

from maskx.data.prepare.voc import format_voc_summary, prepare_voc


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
    add("--voc", type=Path, help="default: ROOT/VOCdevkit/VOC2012")
    add("--sbd", type=Path, help="folder of SBD's masks, PNG or as published (default: see above)")
    add(
        "--allow-other-counts",
        action="store_true",
        help="take lists of other lengths than those of the whole data sets",
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
    voc = arguments.voc or root / "VOCdevkit" / "VOC2012"
    sbd = voc / "SegmentationClassAug"
    if not sbd.is_dir():
        sbd = root / "benchmark_RELEASE" / "dataset"
    try:
        summary = prepare_voc(
            voc,
            arguments.sbd or sbd,
            root / "voc2012",
            allow_other_counts=arguments.allow_other_counts,
            strict=not arguments.skip_bad,
            progress=True,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(format_voc_summary(summary))
    print(f"Written to {root / 'voc2012'}.")


if __name__ == "__main__":
    main()
