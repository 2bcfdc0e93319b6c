r"""Predict images and videos with a trained run of any system.

Writes into the output folder pictures (categories that had masks in training in green, the others
in red), videos, label maps, and predictions.json: all that was found, in COCO's format with scores.
Its masks say that the run made them; where they are trained on, they do not count as drawn.
A camera, by its number, is filmed until Ctrl-C.

Examples:
    maskx predict output/animals photo.jpg
    maskx predict output/animals photos/ clip.mp4 --output output/found --threshold 0.7
    maskx predict output/animals aerial.tif --tile 1024
    maskx predict output/animals 0
    maskx predict output/transfernet/stage2 VOC2012/JPEGImages --voc-results --no-pictures
    maskx predict output/quickstart-concept_mask photos/*.jpg --concepts dog "red lamp"
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN", help="run folder of a training")
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, videos, folders of them, patterns, or the number of a camera",
    )
    add("--output", type=Path, default=Path("output/predict"), help="default: output/predict")
    add(
        "--threshold",
        type=float,
        help="least score of an instance (default: 0.5; 0 for concepts that are named)",
    )
    add(
        "--concepts",
        nargs="+",
        metavar="NAME",
        help="ConceptMask: what to look for; predictions.json has those whose mask has a pixel",
    )
    add(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="predict larger images in overlapping squares of this side, for small objects",
    )
    add("--batch-size", type=int, default=1, help="images of one shape at a time (default: 1)")
    add("--no-pictures", action="store_true", help="write results alone")
    add(
        "--voc-results",
        action="store_true",
        help="also write label maps as the test server of PASCAL VOC takes them (comp6)",
    )
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--overwrite", action="store_true", help="write into a folder that holds files already")


def run(args: argparse.Namespace) -> int:
    """Predict the inputs; the status is 1 where one could not be read."""
    import maskx
    from maskx.engine.mask_sources import source_name
    from maskx.engine.predict_files import RESULTS_NAME, find_inputs, predict_files

    inputs = find_inputs(args.inputs)
    predictor = maskx.open_run(args.run_folder, device=args.device)
    if args.concepts and not predictor.system.takes_concepts:
        raise ValueError(
            f"--concepts has no meaning for {predictor.system.title}, only for ConceptMask. Leave "
            "it out."
        )
    threshold = args.threshold
    if threshold is None:
        threshold = 0.0 if args.concepts else 0.5
    done = predict_files(
        predictor,
        inputs,
        args.output,
        source=source_name(args.run_folder),
        threshold=threshold,
        batch_size=args.batch_size,
        tile=args.tile,
        pictures=not args.no_pictures,
        voc_results=args.voc_results,
        asked={"concepts": args.concepts} if args.concepts else {},
        overwrite=args.overwrite,
    )
    maps = sum("label_map_file_name" in image for image in done.images)
    what = f"{maps} label maps" if maps else f"{len(done.annotations)} instances"
    print(
        f"{len(done.images)} images, {what}: "
        f"{args.output / RESULTS_NAME}{f' and {len(done.files)} pictures' if done.files else ''}"
    )
    if done.images and not maps and not done.annotations and threshold > 0:
        print(f"No instance has a score from {threshold:g} on; a lower --threshold shows others.")
    for name, reason in done.failures.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return 1 if done.failures else 0
