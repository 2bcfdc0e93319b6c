#!/usr/bin/env python
r"""Train stage-wise: a detector on the boxes of all categories, then the mask branch alone on it.

Stage 1 goes to OUTPUT/stage1, stage 2 to OUTPUT/stage2. A stage that is finished is not run again.
KEY VALUE pairs of the configuration at the end go to both stages.

Examples:
    python tools/train_stagewise.py --num-gpus 8 --output output/sw \
        --stage1 configs/MaskX/stage1/faster_rcnn_R_50_FPN_1x.yaml \
        --stage2 configs/MaskX/voc2nonvoc/sw/clsbox_2_layer_R_50_FPN_1x.yaml
    python tools/train_stagewise.py --num-gpus 8 --output output/sw_glove \
        --stage1-weights output/sw/stage1/model_final.pth \
        --stage2 configs/MaskX/voc2nonvoc/sw/glove_2_layer_R_50_FPN_1x.yaml
    python tools/train_stagewise.py --output output/sw_scenes \
        --stage1 configs/MaskX/quick_schedules/stage1_faster_rcnn_scenes_cpu.yaml \
        --stage2 configs/MaskX/quick_schedules/stage2_clsbox_2_layer_scenes_cpu.yaml \
        --stage1-opts SOLVER.MAX_ITER 300 --stage2-opts SOLVER.MAX_ITER 150
"""

import argparse
from pathlib import Path

from maskx.core.command_line import add_chain_arguments, ended_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    first = parser.add_mutually_exclusive_group(required=True)
    first.add_argument("--stage1", type=Path, metavar="CONFIG", help="config of the detector")
    first.add_argument(
        "--stage1-weights", type=Path, metavar="FILE", help="trained detector, instead of stage 1"
    )
    add("--stage2", type=Path, metavar="CONFIG", required=True, help="config of the mask branch")
    add_chain_arguments(parser, ("stage1", "stage2"), output="output/stagewise")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then run what is not finished."""
    from maskx.detectron2 import check_num_gpus  # says what is missing

    # isort: split
    from maskx.detectron2.stagewise import Stage, check_stages, run_stages, stage_is_finished

    check_num_gpus(arguments.num_gpus)
    output, opts = arguments.output, arguments.opts
    first = arguments.stage1_weights
    weights, stages = first, []
    if first is None:
        first = Stage(arguments.stage1, output / "stage1", (*opts, *arguments.stage1_opts))
        weights, stages = first.final_weights, [first]
    second = Stage(arguments.stage2, output / "stage2", (*opts, *arguments.stage2_opts), weights)
    stages.append(second)
    check_stages(first, second)
    finished = [stage_is_finished(stage) for stage in stages]  # of all, before hours go into one
    run_stages(stages, finished, num_gpus=arguments.num_gpus, resume=arguments.resume)


def main() -> None:
    """Run both stages; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line("the same command with --resume goes on from the last checkpoint"):
        run(arguments)


if __name__ == "__main__":
    main()
