r"""Make proxy masks of tagged images by class patterns, and a file to train on.

By default as the paper does it, but without its dense CRF. Where the images have true masks, those
are compared to the proxy masks, and used for nothing else. An interrupted run goes on with the same
command; other settings (--threshold, --resolve, --crf) use the same projections.

Examples:
    python tools/make_proxy_masks.py --patterns patterns/patterns.safetensors --output proxy \
        --model output/quickstart-class_patterns/classifier \
        --coco annotations/instances_train2017.json train2017
    python tools/make_proxy_masks.py ... --layers C41 --threshold otsu --resolve standardised
    python tools/make_proxy_masks.py ... --crf --workers 8
"""

import argparse
import os
from pathlib import Path

from maskx.core.command_line import ended_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="FOLDER", help="classifier of the quick start")
    model.add_argument("--config-file", metavar="CFG", help="Detectron2 config of a classifier")
    add("--coco", nargs=2, metavar=("JSON", "IMAGES"), help="images for --model")
    add("--weights", help="for --config-file")
    add("--opts", nargs="*", default=[], help="for --config-file: KEY VALUE ... of the config")
    add("--patterns", type=Path, required=True, help="file of discover_class_patterns.py")
    add("--output", type=Path, required=True, help="folder for projections, masks and JSON files")
    add("--layers", nargs="+", help="default: all of the patterns")
    add("--threshold", default="zero", help="zero (default) or otsu")
    add("--resolve", default="ignore", help="pixels of several classes: ignore or standardised")
    add("--crf", action="store_true", help="refine masks of images with one label (extra crf)")
    add("--batch-size", type=int, default=16, help="images at a time (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes that make masks (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda, for --model")
    add("--skip-bad", action="store_true", help="leave bad annotations out, counted")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.coco is None):
        parser.error("--model and --coco belong together")
    if (arguments.config_file is None) != (arguments.weights is None):
        parser.error("--config-file and --weights belong together")
    return arguments


def main() -> None:
    """Write the masks; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line("the same command goes on with the images that are left"):
        from maskx.core.digests import network_hash
        from maskx.data.dense_crf import check_crf
        from maskx.engine.training import select_device
        from maskx.systems.class_patterns.patterns import load_patterns
        from maskx.systems.class_patterns.pipeline import open_tagged_images
        from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings
        from maskx.systems.class_patterns.steps import make_masks, project

        settings = ProxyMaskSettings(
            threshold=arguments.threshold, resolve=arguments.resolve, crf=arguments.crf
        )
        if settings.crf:
            check_crf()  # before the network
        if arguments.model:
            device = select_device(arguments.device)
            source, records, class_names = open_tagged_images(
                arguments.model, *arguments.coco, device=device, strict=not arguments.skip_bad
            )
            root = arguments.coco[1]
        else:
            from maskx.systems.class_patterns.detectron2.chain import open_classifier

            source, records, class_names = open_classifier(
                arguments.config_file, arguments.weights, arguments.opts
            )
            root = os.path.commonpath([os.path.dirname(r["file_name"]) for r in records])
        patterns = load_patterns(
            arguments.patterns,
            network=network_hash(source.classifier),
            class_names=class_names,
            layers=arguments.layers,
        )
        layers = list(patterns.layers)
        project(
            source, records, patterns, layers, arguments.output, batch_size=arguments.batch_size
        )
        made = make_masks(
            records,
            patterns,
            layers,
            arguments.output,
            image_root=root,
            settings=settings,
            workers=arguments.workers,
        )
        print(f"Wrote {', '.join(str(of_layer.json_file) for of_layer in made.values())}")


if __name__ == "__main__":
    main()
