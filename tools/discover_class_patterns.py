r"""Find the class patterns of a trained image classifier, from tagged images.

An interrupted run goes on with the same command. Several machines share the images out with
--shard; the same command with --merge instead then makes one file of their results. --draw shows
images on the first principal components of a class, whose shares the paper's figure 3 has.

Examples:
    python tools/discover_class_patterns.py --output patterns \
        --model output/quickstart-class_patterns/classifier \
        --coco annotations/instances_train2017.json train2017
    python tools/discover_class_patterns.py --output patterns --max-images-per-class 2000 \
        --config-file configs/ClassPatterns/classifier_R_101_coco.yaml --weights model_final.pth
    python tools/discover_class_patterns.py --output patterns --draw dog cat --layers C41 \
        --model output/tags/classifier --coco annotations.json images
    python tools/discover_class_patterns.py ... --shard 0/4
    python tools/discover_class_patterns.py ... --merge
"""

import argparse
import itertools
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
    add("--output", type=Path, required=True, help="folder for the file of patterns")
    add("--layers", nargs="+", default=["C41", "C42", "C43"], help="default: %(default)s")
    add("--max-images-per-class", type=int, default=800, help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the choice of images")
    add("--batch-size", type=int, default=16, help="images at a time (default: %(default)s)")
    add("--save-every", type=int, default=500, help="images between checkpoints")
    add("--workers", type=int, default=1, help="processes, on a CPU (default: %(default)s)")
    add(
        "--draw",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="draw images of these classes on their principal components, a picture per layer",
    )
    add("--shard", type=_read_shard, metavar="I/N", help="do share I, from 0, of N only")
    add("--merge", action="store_true", help="merge finished shards")
    add("--device", default="auto", help="auto, cpu or cuda, for --model")
    add("--skip-bad", action="store_true", help="leave bad annotations out, counted")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.coco is None):
        parser.error("--model and --coco belong together")
    if (arguments.config_file is None) != (arguments.weights is None):
        parser.error("--config-file and --weights belong together")
    if arguments.merge and (arguments.shard or arguments.workers != 1):
        parser.error("--merge makes no pass: leave --shard and --workers out")
    if arguments.shard and arguments.draw:
        parser.error("a shard has not seen all images: give --draw with --merge")
    if arguments.shard and arguments.workers != 1:
        parser.error("a shard is done by one process: leave --workers out")
    return arguments


def _read_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 0/4")
    return int(index), int(count)


def main() -> None:
    """Write the patterns; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line("the same command goes on from the last checkpoint"):
        from maskx.core.text import file_name_of, listed
        from maskx.engine.training import select_device
        from maskx.systems.class_patterns.components import draw_components
        from maskx.systems.class_patterns.pipeline import open_tagged_images
        from maskx.systems.class_patterns.steps import discover

        if arguments.model:
            device = select_device(arguments.device)
            source, records, class_names = open_tagged_images(
                arguments.model, *arguments.coco, device=device, strict=not arguments.skip_bad
            )
        else:
            from maskx.systems.class_patterns.detectron2.chain import open_classifier

            source, records, class_names = open_classifier(
                arguments.config_file, arguments.weights, arguments.opts
            )
        names = ("output", "max_images_per_class", "seed", "batch_size", "save_every")
        names += ("workers", "shard", "merge")
        chosen = {name: getattr(arguments, name) for name in names}
        unknown = sorted(set(arguments.draw) - set(class_names))
        if unknown:
            raise ValueError(
                f"--draw names {listed(unknown)}. The classifier knows {listed(class_names)}."
            )
        discover(source, records, class_names, arguments.layers, **chosen)
        for name, layer in itertools.product(arguments.draw, arguments.layers):
            path = arguments.output / f"components_{file_name_of(name)}_{file_name_of(layer)}.png"
            shares = draw_components(
                path,
                source,
                records,
                class_names.index(name),
                layer,
                max_images=arguments.max_images_per_class,
                batch_size=arguments.batch_size,
            )
            shown = ", ".join(f"{share:.1%}" for share in shares[:5])
            print(f"Wrote {path}. Components explain {shown} of the variance.")


if __name__ == "__main__":
    main()
