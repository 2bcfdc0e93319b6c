#!/usr/bin/env python
r"""Train TransferNet in its stages: classifier of image labels, attention, attention and decoder.

They go to OUTPUT/stage0, OUTPUT/stage1 and OUTPUT/stage2. A stage that is finished is not run
again, and stages of another run may be given instead. KEY VALUE pairs of the configuration at the
end go to all stages, those of --stage2-opts and so on to one.

Examples:
    python tools/train_transfernet.py --num-gpus 8 --output output/transfernet \
        --stage0 configs/TransferNet/stage0_classifier_VGG_16.yaml \
        --stage1 configs/TransferNet/stage1_attention_VGG_16.yaml \
        --stage2 configs/TransferNet/stage2_joint_VGG_16.yaml
    python tools/train_transfernet.py --num-gpus 8 --output output/transfernet_baseline \
        --stage0-weights output/transfernet/stage0/model_final.pth \
        --stage1 configs/TransferNet/stage1_baseline_VGG_16.yaml \
        --stage2 configs/TransferNet/stage2_baseline_VGG_16.yaml
    python tools/train_transfernet.py --output output/transfernet_scenes \
        --stage0 configs/TransferNet/quick_schedules/stage0_classifier_scenes_cpu.yaml \
        --stage1 configs/TransferNet/quick_schedules/stage1_attention_scenes_cpu.yaml \
        --stage2 configs/TransferNet/quick_schedules/stage2_joint_scenes_cpu.yaml
"""

import argparse
from pathlib import Path

from maskx.core.command_line import add_chain_arguments, ended_in_one_line

_STAGES = ("stage0", "stage1", "stage2")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    first = parser.add_mutually_exclusive_group(required=True)
    first.add_argument("--stage0", type=Path, metavar="CONFIG", help="config of the classifier")
    first.add_argument(
        "--stage0-weights", type=Path, metavar="FILE", help="trained classifier, instead"
    )
    second = parser.add_mutually_exclusive_group(required=True)
    second.add_argument("--stage1", type=Path, metavar="CONFIG", help="config of the attention")
    second.add_argument(
        "--stage1-weights", type=Path, metavar="FILE", help="trained attention, instead"
    )
    add("--stage2", type=Path, metavar="CONFIG", required=True, help="config of the masks")
    add_chain_arguments(parser, _STAGES, output="output/transfernet")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then run what is not finished."""
    from maskx.detectron2 import check_num_gpus  # says what is missing
    from maskx.detectron2.stagewise import run_stages
    from maskx.systems.transfernet.detectron2.stages import check_transfer_stages, transfer_stages

    check_num_gpus(arguments.num_gpus)
    stages = transfer_stages(
        arguments.stage0 or arguments.stage0_weights,
        arguments.stage1 or arguments.stage1_weights,
        arguments.stage2,
        output=arguments.output,
        opts=arguments.opts,
        own_opts={stage: getattr(arguments, f"{stage}_opts") for stage in _STAGES},
    )
    finished = check_transfer_stages(stages)
    run_stages(stages, finished, num_gpus=arguments.num_gpus, resume=arguments.resume)


def main() -> None:
    """Run the stages; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line("the same command with --resume goes on from the last checkpoint"):
        run(arguments)


if __name__ == "__main__":
    main()
