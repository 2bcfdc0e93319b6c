#!/usr/bin/env python
r"""Compare weight transfer with the class-agnostic baseline on random category splits.

Every run is a second stage on one trained detector (--stage1-weights, or --stage1 to train it).
Runs that have a result in OUTPUT are not run again, an interrupted one goes on; at the end there
are a table, random_splits.json and random_splits.png, which needs matplotlib (pip install -e
'.[plots]'). Checkpoints of all runs stay in OUTPUT: SOLVER.CHECKPOINT_PERIOD says how many.

Examples:
    python tools/random_splits.py --num-gpus 8 --output output/random_splits \
        --stage1-weights output/MaskX/stage1/faster_rcnn_R_50_FPN_1x/model_final.pth \
        SOLVER.CHECKPOINT_PERIOD 30000
    python tools/random_splits.py --output output/random_splits --plot-only
    python tools/random_splits.py \
        --stage1 configs/MaskX/quick_schedules/stage1_faster_rcnn_scenes_cpu.yaml \
        --baseline-config configs/MaskX/quick_schedules/stage2_baseline_scenes_cpu.yaml \
        --transfer-config configs/MaskX/quick_schedules/stage2_clsbox_2_layer_scenes_cpu.yaml \
        --splits configs/MaskX/quick_schedules/scenes_splits/*.txt \
        --output output/random_splits_scenes --stage1-opts SOLVER.MAX_ITER 300 SOLVER.MAX_ITER 150
"""

import argparse
from pathlib import Path

from maskx.core.command_line import ended_in_one_line

CONFIGS = Path(__file__).parents[1] / "configs" / "MaskX" / "random_splits"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    first = parser.add_mutually_exclusive_group(required=True)
    file = {"type": Path, "metavar": "FILE"}
    first.add_argument("--stage1-weights", **file, help="trained detector")
    first.add_argument("--stage1", **file, help="config of a detector, trained in OUTPUT/stage1")
    first.add_argument(
        "--plot-only", action="store_true", help="only the table and the figure of OUTPUT"
    )
    for method, name in (("baseline", "baseline"), ("transfer", "clsbox_2_layer")):
        default = CONFIGS / f"{name}_R_50_FPN_1x.yaml"
        add(f"--{method}-config", **file, default=default, help=f"stage 2 of the {method}")
    add("--output", type=Path, default=Path("output/random_splits"), help="folder of all runs")
    add(
        "--splits",
        nargs="+",
        metavar="SPLIT",
        help="names or files (default: coco_random_{20,30,40,50,60}_{1..5})",
    )
    add("--num-gpus", type=int, default=1, help="processes, one per GPU; 1 on a CPU")
    add(
        "--stage1-opts",
        nargs=2,
        action="extend",
        default=[],
        metavar=("KEY", "VALUE"),
        help="a pair for stage 1 alone; may be repeated",
    )
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="pairs for all runs")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Make all runs and the summary."""
    from maskx.detectron2 import check_num_gpus  # says what is missing

    # isort: split
    from studies.random_splits import (
        BASELINE,
        PAPER_SPLITS,
        TRANSFER,
        RandomSplits,
        write_summary,
    )

    from maskx.detectron2.stagewise import Stage

    if not arguments.plot_only:
        check_num_gpus(arguments.num_gpus)
        detector = arguments.stage1_weights
        if detector is None:
            stage1_opts = (*arguments.opts, *arguments.stage1_opts)
            detector = Stage(arguments.stage1, arguments.output / "stage1", stage1_opts)
        RandomSplits(
            arguments.splits or PAPER_SPLITS,
            configs={BASELINE: arguments.baseline_config, TRANSFER: arguments.transfer_config},
            detector=detector,
            output=arguments.output,
            opts=arguments.opts,
        ).run(num_gpus=arguments.num_gpus)
    print(write_summary(arguments.output))


def main() -> None:
    """Run the protocol; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line("the same command goes on"):
        run(arguments)


if __name__ == "__main__":
    main()
