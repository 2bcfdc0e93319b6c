#!/usr/bin/env python
"""Train and evaluate with Detectron2.

Examples:
    python tools/train_net.py --config-file configs/MaskX/quick_schedules/maskx_scenes_cpu.yaml
    python tools/train_net.py --num-gpus 8 --config-file <config> OUTPUT_DIR <folder>
    python tools/train_net.py --eval-only --config-file <config> MODEL.WEIGHTS <checkpoint>

The flags are Detectron2's, with KEY VALUE pairs of the configuration at the end.
"""

import argparse
import os
import sys
from typing import Any

from maskx.core.command_line import ended_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line: the flags of Detectron2, without loading it for a help text."""
    parser = argparse.ArgumentParser(
        epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="configuration")
    add("--resume", action="store_true", help="go on from the last checkpoint of OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate, without training")
    add("--num-gpus", type=int, default=1, help="processes of this machine; 1 on a CPU")
    add("--num-machines", type=int, default=1, help="number of machines")
    add("--machine-rank", type=int, default=0, help="of this machine, from 0")
    # Processes of different users must not meet at one port.
    port = 2**15 + 2**14 + hash(os.getuid() if sys.platform != "win32" else 1) % 2**14
    add("--dist-url", default=f"tcp://127.0.0.1:{port}", help="where the machines meet")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="over the configuration")
    return parser.parse_args()


def main(args: argparse.Namespace) -> Any:
    """Run in each process."""
    from maskx.detectron2 import Trainer, evaluate, setup

    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = parse_arguments()
    with ended_in_one_line("the same command with --resume goes on from the last checkpoint"):
        from maskx.detectron2 import check_num_gpus  # says what is missing

        # isort: split
        from detectron2.engine import launch

        check_num_gpus(args.num_gpus)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
