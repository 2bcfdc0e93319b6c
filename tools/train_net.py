#!/usr/bin/env python
"""Train and evaluate with Detectron2.

Examples:
    python tools/train_net.py --config-file configs/MaskX/quick_schedules/maskx_scenes_cpu.yaml
    python tools/train_net.py --num-gpus 8 --config-file <config> OUTPUT_DIR <folder>
    python tools/train_net.py --eval-only --config-file <config> MODEL.WEIGHTS <checkpoint>

The flags are Detectron2's, with KEY VALUE pairs of the configuration at the end.
"""

import argparse
from typing import Any

from maskx.core.command_line import ended_in_one_line
from maskx.detectron2 import Trainer, check_num_gpus, evaluate, setup  # says what is missing

# isort: split
from detectron2.engine import default_argument_parser, launch


def main(args: argparse.Namespace) -> Any:
    """Run in each process."""
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__).parse_args()
    with ended_in_one_line("the same command with --resume goes on from the last checkpoint"):
        check_num_gpus(args.num_gpus)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
