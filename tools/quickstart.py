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

from maskx.cli.train import add_arguments, run


def main() -> None:
    """Run the chosen system; it is `maskx train` for those who have the checkout alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.set_defaults(overwrite=True)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
