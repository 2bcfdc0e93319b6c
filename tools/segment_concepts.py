r"""Find concepts in images by name, with a trained ConceptMask.

Writes a picture of all concepts and the mask of each, in a folder per image.

Examples:
    python tools/segment_concepts.py photo.jpg --run output/quickstart-concept_mask \
        --concepts "green plus" lamp grass
    python tools/segment_concepts.py photos/*.jpg --run output/quickstart-concept_mask
    python tools/segment_concepts.py photo.jpg --unseen-words new_words.safetensors \
        --config-file output/concept_mask/stage3/config.yaml --concepts dog unicorn
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskx.core.command_line import ended_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--run", help="folder of a finished run of tools/quickstart.py")
    group.add_argument("--config-file", help="of a run of Detectron2")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="pairs over --config-file")
    add("--concepts", nargs="+", metavar="NAME", help="default: all that seem to exist")
    add("--unseen-words", help="table of tools/learn_word_vectors.py --fold-in, or .npy")
    add("--blend-unseen", action="store_true", help="blend their maps with the nearest boxed one")
    add("--output", type=Path, default=Path("output/concepts"), help="default: output/concepts")
    add("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


def make_predictor(arguments: argparse.Namespace) -> Callable[..., dict[str, Any]]:
    """Open the model of either host, to be called with an RGB image and names."""
    from maskx.engine.training import select_device
    from maskx.systems.concept_mask.query import read_unseen_words
    from maskx.systems.concept_mask.system import open_predictor

    device = select_device(arguments.device)
    words = arguments.unseen_words
    if arguments.run is not None:
        opened = open_predictor(arguments.run, device=device)
        if words is not None:
            opened.model.unseen = read_unseen_words(words, opened.model.table)
        opened.blend_unseen = arguments.blend_unseen
        return opened
    from maskx.detectron2 import ConceptPredictor  # before its parts: it registers them all
    from maskx.systems.concept_mask.detectron2.model import trained_config

    opts = [*arguments.opts, *([] if words is None else ["TEST.MASKX.UNSEEN_WORDS", words])]
    cfg = trained_config(arguments.config_file, opts, device=device)
    cfg.TEST.MASKX.BLEND_UNSEEN = cfg.TEST.MASKX.BLEND_UNSEEN or arguments.blend_unseen
    predict = ConceptPredictor(cfg)
    return lambda image, concepts: predict(image[:, :, ::-1], concepts)


def main() -> None:
    """Find concepts and list them; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line():
        from maskx.systems.concept_mask.predictor import said_of_map, segment_files

        predictor = make_predictor(arguments)
        results = segment_files(predictor, arguments.images, arguments.output, arguments.concepts)
    print("| image | concept | existence | exists | share of the image | borrowed |")
    print("|---|---|---|---|---|---|")
    for image, found in results.items():
        for name, each in found.items():
            cells = f"{each.existence:.3f} | {'yes' if each.exists else 'no'}"
            rest = said_of_map(each.borrowed, each.own_share) or "-"
            print(f"| {image} | {name} | {cells} | {each.mask.mean():.3f} | {rest} |")
    empty = [image for image, found in results.items() if not found]
    if empty:
        print(f"No concept seems to be in {', '.join(empty)}.")
    print(f"Wrote pictures and masks to {arguments.output}")


if __name__ == "__main__":
    main()
