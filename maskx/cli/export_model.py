r"""Write a trained run as a program that needs no maskx: of torch.export (.pt2), or ONNX (.onnx).

Images may have any size; they are RGB from 0 to 255, (1, 3, height, width) float. The class names,
and what the program takes and gives, are in the metadata of the file. ONNX needs
pip install 'maskx-detectron2[export]'.

Examples:
    maskx export-model output/animals --output animals.onnx
    maskx export-model output/quickstart-transfernet --output transfernet.pt2
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN", help="run folder of a training")
    add("--output", type=Path, metavar="FILE", required=True, help="a .pt2 or .onnx file")
    add("--overwrite", action="store_true", help="replace the file")


def run(args: argparse.Namespace) -> None:
    """Export, and say what the program takes and gives."""
    import maskx
    from maskx.engine.model_export import check_export, check_exportable, export_model
    from maskx.engine.runs import read_run

    check_export(args.output, overwrite=args.overwrite)
    check_exportable(read_run(args.run_folder))
    predictor = maskx.open_run(args.run_folder, device="cpu")
    found = export_model(predictor, args.output, overwrite=args.overwrite)
    print(
        f"Wrote {args.output}: {', '.join(found.inputs)} to {', '.join(found.outputs)}, "
        f"{len(found.class_names)} classes."
    )
