#!/usr/bin/env python
r"""Train ConceptMask in its stages: tags, boxes, masks.

They go to OUTPUT/stage1, OUTPUT/stage2 and OUTPUT/stage3. A stage that is finished is not run
again, and stages of another run may be given instead. Where a config names no WORD_TABLE, one is
learned from the tags of stage 1 (OUTPUT/words.safetensors); where that of stage 2 names no OVERLAP,
it is computed (OUTPUT/overlap.npz). KEY VALUE pairs of the configuration at the end go to all
stages.

Examples:
    python tools/train_concept_mask.py --num-gpus 8 --output output/concept_mask \
        --stage1 configs/ConceptMask/stage1_embedding_R_50.yaml \
        --stage2 configs/ConceptMask/stage2_refinement_R_50.yaml \
        --stage3 configs/ConceptMask/stage3_segmentation_R_50.yaml
    python tools/train_concept_mask.py --num-gpus 8 --output output/concept_mask_no_negatives \
        --stage1-weights output/concept_mask/stage1/model_final.pth \
        --stage2 configs/ConceptMask/stage2_refinement_no_negatives_R_50.yaml \
        --stage3 configs/ConceptMask/stage3_segmentation_R_50.yaml
    python tools/train_concept_mask.py --output output/concept_mask_scenes \
        --stage1 configs/ConceptMask/quick_schedules/stage1_embedding_scenes_cpu.yaml \
        --stage2 configs/ConceptMask/quick_schedules/stage2_refinement_scenes_cpu.yaml \
        --stage3 configs/ConceptMask/quick_schedules/stage3_segmentation_scenes_cpu.yaml
"""

import argparse
from pathlib import Path

from maskx.core.command_line import add_chain_arguments, ended_in_one_line

_STAGES = ("stage1", "stage2", "stage3")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for stage, what in (("stage1", "embedding"), ("stage2", "refinement")):
        group = parser.add_mutually_exclusive_group()
        group.add_argument(f"--{stage}", type=Path, metavar="CONFIG", help=f"config of the {what}")
        group.add_argument(
            f"--{stage}-weights", type=Path, metavar="FILE", help=f"trained {what}, instead"
        )
    add("--stage3", type=Path, metavar="CONFIG", required=True, help="config of the segmentation")
    add_chain_arguments(parser, _STAGES, output="output/concept_mask")
    arguments = parser.parse_args()
    if not arguments.stage2 and not arguments.stage2_weights:
        parser.error("give --stage2 or --stage2-weights")
    if arguments.stage2 and not arguments.stage1 and not arguments.stage1_weights:
        parser.error("stage 2 starts from stage 1: give --stage1 or --stage1-weights")
    if arguments.stage2_weights and (arguments.stage1 or arguments.stage1_weights):
        parser.error("--stage2-weights holds what stage 1 learned; leave stage 1 out")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then run what is not finished."""
    from maskx.detectron2 import check_num_gpus  # says what is missing
    from maskx.detectron2.stagewise import run_stages
    from maskx.systems.concept_mask.detectron2.model import check_concept_stages, concept_stages

    check_num_gpus(arguments.num_gpus)
    stages = concept_stages(
        arguments.stage1 or arguments.stage1_weights,
        arguments.stage2 or arguments.stage2_weights,
        arguments.stage3,
        output=arguments.output,
        opts=tuple(arguments.opts),
        own_opts={stage: getattr(arguments, f"{stage}_opts") for stage in _STAGES},
    )
    finished = check_concept_stages(stages)
    run_stages(stages, finished, num_gpus=arguments.num_gpus, resume=arguments.resume)


def main() -> None:
    """Run the stages; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line("the same command with --resume goes on from the last checkpoint"):
        run(arguments)


if __name__ == "__main__":
    main()
