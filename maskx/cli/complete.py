r"""Give every object that has a box and no mask a mask.

A trained run segments each object in the box it has; --teacher grabcut needs no training. Masks
that people drew stay as they are, and so does everything else in a COCO file; of another format,
such as a YOLO folder, the result is a COCO file too, and `maskx export` brings it back. Each new
mask says what made it (segmentation_source) and how good it probably is (segmentation_quality, the
IoU to be expected, from 0 to 1). Beside the output lies a report that lists the worst first.

A run of a system that makes label maps writes them for the images that have tags alone, with
label_map_source and label_map_quality, the mean IoU to be expected. Images that cannot be read are
named, the rest goes on, and the status is 1; --skip-bad goes on without those that are missing or
broken, too.

The quality is calibrated on masks and label maps that the run was not trained on: those of the
file, or of another one that --calibrate names. The same command goes on after an interruption.

Examples:
    maskx complete output/animals train.json train --output completed.json
    maskx complete output/animals train.json train --output completed.json \
        --calibrate val.json val --min-quality 0.5
    maskx complete output/animals train.json train --teacher grabcut --agree 0.7 \
        --output completed.json
    maskx complete train.json train --teacher grabcut --workers 4 --output completed.json
"""

import argparse
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.usage = "maskx complete [RUN] DATA [IMAGES] --output FILE [options]"
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="[RUN] DATA [IMAGES]",
        help="run folder (none with --teacher alone); annotations that `maskx check` reads; folder "
        "of the images (default: where the annotations say, or their own)",
    )
    add("--output", type=Path, required=True, metavar="FILE", help="COCO file to write")
    add(
        "--teacher",
        metavar="NAME",
        help="grabcut, u2netp (an extra), or module:callable, called with an image (H, W, 3) RGB, "
        "boxes (R, 4) XYXY and names, that returns R masks of the image's size",
    )
    add("--agree", type=float, metavar="IOU", help="keep what run and teacher agree on this much")
    add("--min-quality", type=float, default=0.0, metavar="Q", help="leave worse ones out")
    add(
        "--calibrate",
        nargs=2,
        metavar=("DATA", "IMAGES"),
        help="annotations with masks, or label maps, that the run was not trained on",
    )
    add(
        "--withhold",
        metavar="SPLIT",
        help="replace the masks of the categories that this split has no masks of, and measure "
        "the new ones with them",
    )
    add("--again", action="store_true", help="replace masks of an earlier completion too")
    add("--skip-bad", action="store_true", help="leave bad annotations as they are, counted")
    add("--workers", type=int, default=1, help="processes of the teacher")
    add("--device", default="auto", help="of the run: auto, cpu or cuda")
    add("--report", type=Path, metavar="HTML", help="default: the output with the ending .html")
    add("--overwrite", action="store_true", help="replace an output that exists")


def run(args: argparse.Namespace) -> int:
    """Complete a file; the status is 1 where an image failed."""
    from maskx.data.formats.table import as_coco
    from maskx.engine.completion import CompletionOptions, complete
    from maskx.engine.completion_report import summary, write_report

    run_folder, data, images = _inputs(args.inputs)
    page = args.report or args.output.with_suffix(".html")
    if page.exists() and not args.overwrite:
        raise FileExistsError(
            f"{page} exists already. Add --overwrite to replace it, or name another --report."
        )
    with tempfile.TemporaryDirectory() as scratch:
        made, strict = Path(scratch), not args.skip_bad
        calibrate = args.calibrate
        if calibrate is not None:
            calibrate = as_coco(*calibrate, made / "calibrate.json", strict=strict)
        options = CompletionOptions(
            data=as_coco(data, images, made / "data.json", strict=strict),
            calibrate=calibrate,
            run=run_folder,
            **{
                name: getattr(args, name)
                for name in (
                    "output",
                    "teacher",
                    "agree",
                    "min_quality",
                    "withhold",
                    "again",
                    "skip_bad",
                    "workers",
                    "device",
                    "overwrite",
                )
            },
        )
        completion = complete(options)
    write_report(page, completion, f"Completed: {Path(data).name}")
    print(summary(completion))
    print(f"\nWrote {args.output} and {page}")
    return 1 if completion.failures else 0


def _inputs(words: list[str]) -> tuple[Path | None, str, str | None]:
    """Tell run folder, annotations and image folder apart."""
    from maskx.engine.runs import RUN_NAME

    is_run = (Path(words[0]) / RUN_NAME).is_file()
    if len(words) == 2 and not is_run:
        is_run = not Path(words[1]).is_dir()
    run_folder, *rest = words if is_run or len(words) > 2 else (None, *words)
    if not 1 <= len(rest) <= 2:
        raise ValueError(
            f"Got {' '.join(words)}. Allowed: a run folder (or none with --teacher), annotations, "
            "and perhaps the folder of their images."
        )
    return None if run_folder is None else Path(run_folder), rest[0], (*rest, None)[1]
