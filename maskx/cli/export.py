r"""Bring annotations into the format of another tool.

DATA may be of any of the formats too: a COCO file, a YOLO folder, a folder of labelme files or of
PASCAL VOC, an XML file of CVAT, a JSON export of Label Studio. What a format cannot hold is said,
with its number. Label maps are held by COCO, which copies them with the images, or else names them
where they are, and by VOC, as its SegmentationClass.

Examples:
    maskx export completed.json --format yolo --output yolo
    maskx export completed.json images --copy-images --format labelme --output labelme
    maskx export labelme --format coco --output coco
"""

import argparse
import sys
from pathlib import Path

_FORMATS = ("coco", "cvat", "label-studio", "labelme", "voc", "yolo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="annotation file or folder")
    add("images", metavar="IMAGES", type=Path, nargs="?", help="folder of the images")
    add("--format", choices=_FORMATS, required=True, help="to write")
    add("--output", metavar="FOLDER", type=Path, required=True, help="to write into")
    add("--copy-images", action="store_true", help="copy the images to where the format has them")
    add("--skip-bad", action="store_true", help="leave what is bad out, counted")
    add("--overwrite", action="store_true", help="replace an export that the folder holds")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was lost; the status is 1 where that is an image or a label map."""
    from maskx.data.formats.dataset import LABEL_MAP
    from maskx.data.formats.table import label_maps_read, read_dataset, write_dataset

    dataset = read_dataset(
        args.data,
        args.images,
        strict=not args.skip_bad,
        check_images=args.copy_images,
        check_label_maps=label_maps_read(args.format, copy_images=args.copy_images),
    )
    lost = write_dataset(
        dataset,
        args.output,
        args.format,
        copy_images=args.copy_images,
        overwrite=args.overwrite,
    )
    content = dataset.content
    images, objects = len(content["images"]), len(content["annotations"])
    maps = sum(isinstance(image.get(LABEL_MAP), str) for image in content["images"])
    maps = f", {maps} label maps" if maps and args.format in ("coco", "voc") else ""
    print(f"Wrote {args.output}: {images} images, {objects} objects{maps}, as {args.format}.")
    place = {"yolo": "images/train", "voc": "JPEGImages"}.get(args.format)
    if place and not args.copy_images:
        print(f"The images belong into {args.output / place}; --copy-images copies them there.")
    for what, number in sorted(lost.items()):
        print(f"Not held by {args.format}: {number} {what}.")
    for name, reason in dataset.lost_files.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return 1 if dataset.lost_files else 0
