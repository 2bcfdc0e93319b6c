r"""Train, evaluate and look at a system, with nothing but what pip installed.

Examples:
    python tools/quickstart.py
    python tools/quickstart.py --compare
    python tools/quickstart.py --system class_patterns
    python tools/quickstart.py --system transfernet --compare
    python tools/quickstart.py --system larvseg
    python tools/quickstart.py --system concept_mask
    python tools/quickstart.py --photos train.json train --val val.json val
    python tools/quickstart.py --masks-for coco_voc \
        --coco-train annotations/instances_train2017.json train2017 \
        --coco-val annotations/instances_val2017.json val2017
"""

import argparse
import sys

from maskx.cli.settings_file import words_of_settings
from maskx.cli.train import add_arguments, run
from maskx.core.command_line import ended_in_one_line


def main() -> None:
    """Run the chosen system; it is `maskx train` for those who have the checkout alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.set_defaults(overwrite=True)
    with ended_in_one_line():
        args = parser.parse_args()
        if args.settings is not None:
            args = parser.parse_args([*words_of_settings(args.settings), *sys.argv[1:]])
        run(args)


if __name__ == "__main__":
    main()
