r"""Train one of the five systems, evaluate it and draw what it predicts.

Without data of your own it trains on generated scenes. The output folder is a run folder: `maskx
predict` and `maskx complete` open it, and so does `maskx.open_run`.

Examples:
    maskx train
    maskx train --system larvseg --output output/larvseg
    maskx train --photos train.json train --val val.json val
    maskx train --masks-for with_masks.txt --output output/animals \
        --coco-train train.json train --coco-val val.json val
    maskx train --start output/animals --output output/corrected \
        --coco-train corrected.json train --coco-val val.json val
    maskx train --settings animals.yaml --iterations 400

A settings file holds options by their long names, such as `coco-train: [train.json, train]`; its
relative paths count from its folder, and options of the command line count before it. Every run
folder has one, settings.yaml.
"""

import argparse
from pathlib import Path
from typing import Any

import maskx.systems  # noqa: F401 - registers them
from maskx.core.command_line import ended_in_one_line
from maskx.core.text import listed
from maskx.engine.options import QuickstartOptions
from maskx.engine.system import find_system, system_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, whose defaults are those of QuickstartOptions."""
    add, default = parser.add_argument, QuickstartOptions
    add("--settings", type=Path, metavar="FILE", help="YAML file of these options")
    add("--system", choices=system_names(), default="maskx", help="default: maskx")
    add("--output", type=Path, help="folder for results (default: output/quickstart-SYSTEM)")
    add("--seed", type=int, default=default.seed, help="of scenes, initial weights, data order")
    add("--iterations", type=int, help="training steps per model (default: see its page)")
    add("--batch-size", type=int, help="images per step (default: see its page)")
    add(
        "--compare",
        action="store_true",
        help="maskx: class-agnostic masks and GrabCut as well; transfernet: DecoupledNet",
    )
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--overwrite", action="store_true", help="replace the run that the output folder holds")
    add("--device", default=default.device, help="auto, cpu or cuda")
    pair = {"nargs": 2, "metavar": ("DATA", "IMAGES")}
    add(
        "--coco-train",
        **pair,
        help="train on a COCO file, or annotations that `maskx check` reads, instead of scenes",
    )
    add("--coco-val", **pair, help="evaluate on such annotations")
    add(
        "--photos",
        **pair,
        help="train on such annotations of photographs, with settings for these and weights of the "
        "extra photos; each option that is given counts before those",
    )
    add(
        "--val",
        nargs="+",
        metavar=("DATA", "IMAGES"),
        help="--photos: evaluate on this (default: on a part of the photographs)",
    )
    add(
        "--target-train",
        **pair,
        help="transfernet: file of the target, with tags; --coco-train is then the source",
    )
    add(
        "--masks-for",
        metavar="SPLIT",
        help="categories with masks: a named split, a file, or drawn, for those that have some "
        "(default: scenes_half; for COCO maskx all, concept_mask coco_voc; for photographs drawn); "
        "not for class_patterns, nor for scenes of concept_mask",
    )
    add(
        "--concept-split",
        metavar="JSON",
        help="concept_mask, for COCO: which concepts have boxes and which masks; all others, of "
        "--tags too, have tags only",
    )
    add(
        "--tags",
        nargs=2,
        metavar=("LIST", "IMAGES"),
        help="concept_mask: tag list for --concept-split (default: the labels of --coco-train)",
    )
    add("--skip-bad", action="store_true", help="leave bad annotations out, counted")
    add(
        "--backbone",
        help="small (default), vgg16, or a model of timm: resnet50, efficientnet_lite0",
    )
    add(
        "--pretrained",
        action="store_true",
        default=None,
        help="start from ImageNet weights, of an installed package or by download; not for small",
    )
    add(
        "--weights",
        dest="pretrained",
        metavar="FILE",
        help="start from this file, safetensors or a state dict with timm's names",
    )
    add(
        "--start",
        metavar="RUN",
        help="maskx: start from a trained run, of the same backbone and options; its categories "
        "are known by name",
    )
    add(
        "--frozen",
        action="store_true",
        default=None,
        help="keep the backbone as it is, and compute its features of an image once",
    )
    add(
        "--feature-cache",
        type=float,
        metavar="GB",
        help=f"most of these features that are kept (default: {default.feature_cache:g}), 0: none",
    )
    add(
        "--image-size",
        type=int,
        help="in pixels (default: 128, or 256 for COCO); maskx: of the shorter side, others: of "
        "squares that images are warped to",
    )
    add("--workers", type=int, default=default.workers, help="processes that read images")
    add("--threshold", help="class_patterns: of proxy masks, zero (the paper) or otsu (default)")
    add(
        "--resolve",
        help="class_patterns: pixels of several classes, ignore (the paper) or standardised "
        "(default)",
    )
    add(
        "--annotated-boxes",
        action="store_true",
        default=None,
        help="maskx: train masks in annotated boxes alone, for `maskx complete`: several times as "
        "fast, but detections get worse masks",
    )
    add(
        "--box-loss",
        type=float,
        metavar="WEIGHT",
        help="maskx: learn masks also from the boxes of objects without a mask (default: 0, off)",
    )
    add(
        "--ema-teacher",
        type=float,
        metavar="WEIGHT",
        help="maskx: learn masks of these objects also from a moving average of the model "
        "(default: 0, off)",
    )
    add(
        "--light",
        action="store_true",
        default=None,
        help="maskx: few channels and samples in the detector, for a CPU",
    )
    add(
        "--tag-loss",
        type=float,
        metavar="WEIGHT",
        help="maskx: learn classes also from images with image labels alone (default: 0, off; "
        "0.1 in Detic)",
    )
    add(
        "--pseudo-weight",
        help="maskx: of masks that `maskx complete` made: quality (default), or one, as drawn ones",
    )
    add(
        "--crf",
        action="store_true",
        help="class_patterns, transfernet: dense CRF, needs the extra crf",
    )
    add("--multi-scale", action="store_true", help="class_patterns: test at three sizes")
    add("--layer", help="class_patterns: whose masks are trained on (default: C41 of a ResNet)")
    add("--max-images", type=int, help="class_patterns: images of a class for its pattern")


def run(args: argparse.Namespace) -> None:
    """Run the quick start of the chosen system."""
    from maskx.cli.settings_file import write_settings
    from maskx.engine.photos import photo_options, plan_of_photos
    from maskx.engine.runs import RUN_NAME
    from maskx.engine.training_report import METRICS_NAME, REPORT_NAME

    options = dict(vars(args))
    del options["settings"]
    system = options.pop("system")
    options["output"] = options["output"] or Path("output") / f"quickstart-{system}"
    overwrite = options.pop("overwrite")
    with ended_in_one_line("the same command with --resume goes on from the last checkpoint"):
        names = (RUN_NAME, METRICS_NAME, REPORT_NAME, "predictions.png")
        found = [name for name in names if (options["output"] / name).exists()]
        if found and not (overwrite or options["resume"]):
            what = "a run" if RUN_NAME in found else listed(found)
            raise FileExistsError(
                f"{options['output']} holds {what} already. Name another --output, add --resume to "
                "go on with it, or --overwrite to replace it."
            )
        if args.settings is not None:
            print(f"Options of the command line, then of {args.settings}, then the defaults.")
        photos = _take_photos(options)
        for key in ("coco_train", "coco_val", "target_train"):
            if options[key]:
                options[key] = _as_coco(key, options)
        given = {name: value for name, value in options.items() if value is not None}
        if photos:
            quickstart = photo_options(system, given)
            for line in plan_of_photos(system, quickstart):
                print(line)
        else:
            quickstart = QuickstartOptions(**given)
        # One that goes on may be refused: then the file still says what the run was made with.
        if not quickstart.resume:
            write_settings(quickstart.output, vars(args))
        find_system(system).pipeline(quickstart, print)
        if quickstart.resume:
            write_settings(quickstart.output, vars(args))


def _take_photos(options: dict[str, Any]) -> bool:
    """Turn the options of photographs into those of annotations, and say if there are any."""
    photos, val = options.pop("photos"), options.pop("val")
    if photos is None:
        if val is not None:
            raise ValueError("--val is of --photos. Give --coco-val with --coco-train.")
        return False
    if options["coco_train"] or options["coco_val"]:
        raise ValueError(
            "--photos has the place of --coco-train, and --val that of --coco-val. Give either."
        )
    if val is not None and len(val) > 2:
        raise ValueError(f"--val takes DATA, or DATA and IMAGES, got {len(val)} words.")
    options["coco_train"] = photos
    # Without a folder of its own, in that of the others.
    options["coco_val"] = val and (val if len(val) == 2 else [val[0], photos[1]])
    return True


def _as_coco(key: str, options: dict[str, Any]) -> tuple[str, str]:
    """Return a COCO file, which is made in the output folder of annotations of another format."""
    from maskx.data.formats.table import as_coco

    made = options["output"] / "coco" / f"{key}.json"
    pair = as_coco(*options[key], made, strict=not options["skip_bad"])
    return str(pair[0]), str(pair[1])
