r"""Write what a training gave as one page: curves, measures, categories, best and worst images.

`maskx train` writes it for its validation data. This writes it for other data, and for runs of
Detectron2. The page holds all it needs, pictures too.

Examples:
    maskx report output/animals test.json test --output test.html
    maskx report output/detectron2_run val.json val
"""

import argparse
import sys
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN", help="output folder of a training")
    add("data", metavar="DATA", type=Path, help="annotations to compare predictions with")
    add("images", metavar="IMAGES", type=Path, nargs="?", help="folder of their images")
    add("--output", type=Path, metavar="FILE", help="default: report.html in the run folder")
    add("--skip-bad", action="store_true", help="leave bad annotations out, counted")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--overwrite", action="store_true", help="replace the page")


def run(args: argparse.Namespace) -> int:
    """Write the page; the status is 1 where an image could not be read."""
    import maskx
    from maskx.data.coco import load_coco
    from maskx.data.formats.table import as_coco
    from maskx.engine.training_report import REPORT_NAME, write_training_report

    output = args.output or args.run_folder / REPORT_NAME
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists. Name another --output, or add --overwrite.")
    predictor = maskx.open_run(args.run_folder, device=args.device)
    strict = not args.skip_bad
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "annotations.json"
        data = load_coco(*as_coco(args.data, args.images, made, strict=strict), strict=strict)
        found = write_training_report(output, args.run_folder, predictor, data)
    print(f"Wrote {output}: {len(found.images)} images compared.")
    for name, reason in found.failures.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return 1 if found.failures else 0
