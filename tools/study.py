r"""Compare settings of a system on generated scenes or own data, over several seeds.

A run whose result lies in OUTPUT is not made again, an interrupted one goes on. Several such
commands may run on one OUTPUT at a time, with the same or with other settings and seeds; the last
one then prints the table. It is printed with the orderings of the paper and whether they hold;
numbers of all seeds go to study.json, a picture of them to study.png (needs matplotlib:
pip install -e '.[plots]'), and one of what the models of the first seed predict to
contact_sheet.png.

Examples:
    python tools/study.py
    python tools/study.py --settings sw/baseline sw/clsbox_2_layer --seeds 0 1 --iterations 600
    python tools/study.py --system transfernet --settings transfernet baseline
    python tools/study.py --system class_patterns --seeds 0
    python tools/study.py --system concept_mask --settings original refined
    python tools/study.py --coco-train train.json train --coco-val val.json val \
        --masks-for random_5_1 --settings sw/baseline sw/clsbox_2_layer oracle/sw/mask_rcnn
    python tools/study.py --system larvseg --coco-train train.json train --coco-val val.json val \
        --masks-for base.txt --settings baseline larvseg_w1 \
        --backbone efficientnet_lite0 --pretrained --frozen
"""

import argparse
from pathlib import Path

from studies.options import StudyOptions

import maskx.systems  # noqa: F401 - registers them
from maskx.core.command_line import ended_in_one_line
from maskx.engine.system import system_names


def parse_arguments() -> argparse.Namespace:
    """Read the command line; defaults are those of StudyOptions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, StudyOptions
    add("--system", choices=system_names(), default=default.system)
    add("--output", type=Path, help="default: output/study, of other systems output/study_SYSTEM")
    settings_help = "default: those of the paper's tables; an unknown one lists what is allowed"
    add("--settings", nargs="+", metavar="SETTING", help=settings_help)
    add("--seeds", type=int, nargs="+", default=default.seeds)
    add("--iterations", type=int, help="of detectors and end to end, or of the image classifier")
    add("--stage2-iterations", type=int, help="of what is trained on it")
    add("--batch-size", type=int, help="images per step")
    add("--device", default=default.device, help="auto, cpu or cuda")
    own = parser.add_argument_group("own data")
    add = own.add_argument
    files = {"nargs": 2, "metavar": ("JSON", "IMAGES")}
    add("--coco-train", **files, help="COCO file and image folder to train on")
    add("--coco-val", **files, help="COCO file and image folder to evaluate on")
    add("--masks-for", help="not of class_patterns: categories with masks, a named split or a file")
    add("--skip-bad", action="store_true", help="leave bad annotations out, counted")
    add("--image-size", type=int, help="shorter side in pixels")
    add("--backbone", default=default.backbone, help="small, or a model of timm")
    add("--pretrained", action="store_true", help="start from ImageNet weights")
    add("--frozen", action="store_true", help="keep the backbone as it is")
    add("--light", action="store_true", help="maskx: few channels and samples in the detector")
    add(
        "--vectors",
        type=Path,
        help="file of word vectors, minilm or glove, for settings with 'glove'",
    )
    arguments = parser.parse_args()
    if arguments.output is None:
        suffix = "" if arguments.system == default.system else f"_{arguments.system}"
        arguments.output = Path(f"output/study{suffix}")
    return arguments


def main() -> None:
    """Run the study; user errors end with their message instead of a traceback."""
    with ended_in_one_line("the same command goes on from the last checkpoint"):
        options = StudyOptions(**vars(parse_arguments()))
        from studies.run import run_study

        run_study(options, print)


if __name__ == "__main__":
    main()
