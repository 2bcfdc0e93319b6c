"""Compare settings of Mask^X R-CNN on generated scenes, over several seeds.

A run whose result lies in OUTPUT is not made again, an interrupted one goes on. The table is
printed; numbers of all seeds go to study.json, a picture to study.png (needs matplotlib:
pip install -e '.[plots]').

Examples:
    python tools/study.py
    python tools/study.py --settings sw/baseline sw/clsbox_2_layer --seeds 0 1 --iterations 600
"""

import argparse
import sys
from pathlib import Path

from maskx.torchvision.studies import StudyOptions, run_study


def parse_arguments() -> argparse.Namespace:
    """Read the command line; defaults are those of StudyOptions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, StudyOptions
    add("--output", type=Path, default=Path("output/study"))
    settings_help = "default: the tables 3.1 to 3.4 of the paper, and gains of later papers"
    settings = {"metavar": "TRAINING/METHOD", "help": settings_help}
    add("--settings", nargs="+", default=default.settings, **settings)
    add("--seeds", type=int, nargs="+", default=default.seeds)
    add("--iterations", type=int, default=default.iterations, help="of detectors and end to end")
    add("--stage2-iterations", type=int, default=default.stage2_iterations)
    add("--batch-size", type=int, default=default.batch_size, help="images per step")
    add("--device", default=default.device, help="auto, cpu or cuda")
    return parser.parse_args()


def main() -> None:
    """Run the study; user errors end with their message instead of a traceback."""
    try:
        run_study(StudyOptions(**vars(parse_arguments())), print)
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    main()
