r"""Fit theta and the existence thresholds of a trained ConceptMask on validation images.

Theta is the share that the own map of a concept without boxes has in its blend with the map of the
nearest concept with boxes. The values are written into the checkpoint of the run. Of Detectron2
that is model_final.pth in the OUTPUT_DIR of the config, or the MODEL.WEIGHTS of --opts.

The masks of these images are read, of concepts without masks too: results are to be reported on
other images than those given here.

Examples:
    python tools/fit_concepts.py output/quickstart-concept_mask \
        annotations/held_out.json held_out
    python tools/fit_concepts.py --config-file output/concept_mask/stage3/config.yaml \
        annotations/held_out.json held_out
"""

import argparse
from typing import Any

from maskx.core.command_line import ended_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", nargs="?", help="folder of a finished run of tools/quickstart.py")
    add("json", help="COCO-format file with tags and masks of concepts")
    add("images", help="folder of its images")
    add("--skip-bad", action="store_true", help="leave bad annotations out, counted")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--config-file", help="of a run of Detectron2, instead of a folder")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="pairs over --config-file")
    arguments = parser.parse_args()
    if (arguments.run is None) == (arguments.config_file is None):
        parser.error("give the folder of a run, or --config-file")
    return arguments


def fit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit the model of either host."""
    from maskx.engine.training import select_device
    from maskx.systems.concept_mask.pipeline import fit_run

    data, strict = (arguments.json, arguments.images), not arguments.skip_bad
    device = select_device(arguments.device)
    if arguments.run is not None:
        return fit_run(arguments.run, *data, strict=strict, device=device)
    import maskx.detectron2  # noqa: F401 - before its parts: it registers them all
    from maskx.systems.concept_mask.detectron2.model import fit_checkpoint, trained_config

    cfg = trained_config(arguments.config_file, arguments.opts, device=device)
    return fit_checkpoint(cfg, *data, strict=strict)


def main() -> None:
    """Fit and say what was found; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line():
        fitted = fit(arguments)
    for name, value in fitted.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' ')}: {'not fitted' if value is None else shown}")


if __name__ == "__main__":
    main()
