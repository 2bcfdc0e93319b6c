r"""Measure how well the features of a trained LarvSeg model group the pixels of a class.

One random true pixel of each class in an image is given; every pixel takes the class of the most
similar of them (Eq. 2 of the paper). No class is learned for it, so base and novel classes are
measured alike.

Examples:
    python tools/pixel_grouping.py --model output/quickstart-larvseg/larvseg \
        --masks-for scenes_half --coco output/quickstart-larvseg/scenes/val/annotations.json \
        output/quickstart-larvseg/scenes/val
    python tools/pixel_grouping.py --model output/LarvSeg/larvseg_ViT_B_16_C171_WA150 \
        --masks-for ade150_raw \
        --coco datasets/ade20k_150/ade20k_150_val.json datasets/ADEChallengeData2016/images
"""

import argparse
from pathlib import Path

from maskx.core.command_line import ended_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="FOLDER", required=True, help="run folder of LarvSeg, of either host")
    pair = {"nargs": 2, "metavar": ("JSON", "IMAGES")}
    add("--coco", **pair, required=True, help="images with true masks")
    add("--masks-for", metavar="SPLIT", help="measure its base and novel classes apart")
    add("--features", default="tokens", help="tokens (default), or backbone: before the classifier")
    add("--seed", type=int, default=0, help="of the random pixels")
    add("--output", type=Path, help="JSON file for the results")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--skip-bad", action="store_true", help="leave bad annotations out, counted")
    return parser.parse_args()


def main() -> None:
    """Print the measures; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line():
        import maskx
        from maskx.core.files import write_json
        from maskx.data.coco import load_coco
        from maskx.data.images import read_rgb
        from maskx.data.splits import resolve_split
        from maskx.engine.quickstart import nan_to_null
        from maskx.evaluation.mean_iou import format_table
        from maskx.systems.larvseg.evaluation import evaluate_grouping
        from maskx.systems.larvseg.samples import labelled_images

        predictor = maskx.open_run(arguments.model, device=arguments.device)
        if predictor.system.name != "larvseg":
            raise ValueError(
                f"'{arguments.model}' is a run of {predictor.system.title}. Give one of LarvSeg."
            )
        data = load_coco(*arguments.coco, strict=not arguments.skip_bad)
        images, novel = labelled_images(data), None
        if arguments.masks_for:
            novel = resolve_split(arguments.masks_for, data.class_names).without_masks
        found = evaluate_grouping(
            predictor.model,
            images,
            novel,
            seed=arguments.seed,
            features=arguments.features,
            read=lambda record: predictor.prepare(read_rgb(record["file_name"])),
        )
        if arguments.output:
            per_class = dict(zip(images.class_names, found["per_class"], strict=True))
            write_json(arguments.output, nan_to_null(found | {"per_class": per_class}))
    print(format_table(found))


if __name__ == "__main__":
    main()
