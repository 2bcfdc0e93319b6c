r"""Draw how alike every position of an image is to some of its pixels, for a trained run.

Of TransferNet these are rows of the Gram matrix (its figure 6), of LarvSeg response maps (its
figure 2). The run may be of either host.

Examples:
    python tools/draw_similarity.py output/quickstart-larvseg photo.jpg --at 120 80 --at 30 40
    python tools/draw_similarity.py output/transfernet/stage2 photo.jpg --at 120 80
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
    add("run", metavar="RUN", help="run folder of a training")
    add("image", metavar="IMAGE")
    point = {"nargs": 2, "type": int, "metavar": ("X", "Y")}
    add("--at", **point, action="append", required=True, help="a pixel; may be repeated")
    add("--output", type=Path, default=Path("output/similarity.png"), help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


def main() -> None:
    """Draw; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line():
        import maskx
        from maskx.data.images import read_rgb
        from maskx.evaluation.figures import draw_similarities, save_png

        predictor = maskx.open_run(arguments.run, device=arguments.device)
        image, points = read_rgb(arguments.image), [tuple(point) for point in arguments.at]
        maps = predictor.similarities(image, points)
        save_png(arguments.output, draw_similarities(image, points, maps, symmetric=maps.min() < 0))
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
