#!/usr/bin/env python
r"""Learn to segment from image labels alone, by class patterns.

Trains an image classifier, makes proxy masks of its training images by class patterns, trains a
segmentation network on them, predicts the training images by it, restricted to their labels, and
trains the network once more on these predictions. Each step has its folder in OUTPUT; a step that
is finished is not run again. Trainings use all GPUs, the steps between them one process. To try
other masks on the same classifier, copy OUTPUT/classifier into another folder. A segmentation
network whose config names no weights starts from the backbone of the classifier, both times.
KEY VALUE pairs of the configuration at the end go to both networks.

Examples:
    python tools/train_class_patterns.py --num-gpus 8 --output output/tags_voc --crf \
        --classifier configs/ClassPatterns/classifier_R_101_voc.yaml \
        --segmenter configs/ClassPatterns/deeplab_R_101_voc.yaml
    python tools/train_class_patterns.py --output output/tags_scenes \
        --classifier configs/ClassPatterns/quick_schedules/classifier_scenes_cpu.yaml \
        --segmenter configs/ClassPatterns/quick_schedules/deeplab_scenes_cpu.yaml \
        --threshold otsu --resolve standardised
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
    for name in ("classifier", "segmenter"):
        add(f"--{name}", type=Path, metavar="CONFIG", required=True, help=f"config of the {name}")
    add("--layer", default="C41", help="whose patterns are used (default: %(default)s)")
    add("--threshold", default="zero", help="of proxy masks: zero (default) or otsu")
    add("--resolve", default="ignore", help="pixels of several classes: ignore or standardised")
    add("--crf", action="store_true", help="refine proxy masks of images with one label")
    add("--max-images-per-class", type=int, default=800, help="for patterns; 2000 on COCO")
    add_chain_arguments(parser, ("classifier", "segmenter"), output="output/class_patterns")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then run what is not finished."""
    from maskx.detectron2 import check_num_gpus  # says what is missing
    from maskx.systems.class_patterns.detectron2.chain import TagChain, format_results
    from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings

    check_num_gpus(arguments.num_gpus)
    masks = ProxyMaskSettings(
        threshold=arguments.threshold, resolve=arguments.resolve, crf=arguments.crf
    )
    chain = TagChain(
        arguments.classifier,
        arguments.segmenter,
        arguments.output,
        layer=arguments.layer,
        masks=masks,
        max_images_per_class=arguments.max_images_per_class,
        classifier_opts=(*arguments.opts, *arguments.classifier_opts),
        segmenter_opts=(*arguments.opts, *arguments.segmenter_opts),
    )
    results = chain.run(num_gpus=arguments.num_gpus, resume=arguments.resume)
    print(f"\n{format_results(results)}")


def main() -> None:
    """Run all steps; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line("the same command with --resume goes on where it stopped"):
        run(arguments)


if __name__ == "__main__":
    main()
