r"""Write a trained run as one file: a program that needs no maskx, or what maskx opens elsewhere.

A program is one of torch.export (.pt2) or ONNX (.onnx). Images may have any size; they are RGB from
0 to 255, (1, 3, height, width) float. The class names, and what the program takes and gives, are in
the metadata of the file. ONNX needs pip install 'maskx-detectron2[export]'.

A .safetensors file holds the weights and what the run is: maskx predict, complete and serve take it
in place of a run folder. A model card, FILE.md, is written beside it.

Examples:
    maskx export-model output/animals --output animals.onnx
    maskx export-model output/animals --output animals.safetensors --licence "CC BY 4.0"
    maskx export-model output/quickstart-transfernet --output transfernet.pt2
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN", help="run folder of a training")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        required=True,
        help="ends with .pt2, .onnx or .safetensors",
    )
    add("--licence", metavar="TEXT", help="of the data, for the card of a .safetensors file")
    add("--overwrite", action="store_true", help="replace the file")


def run(args: argparse.Namespace) -> None:
    """Export, and say what the program takes and gives."""
    import maskx
    from maskx.engine.model_export import check_export, check_exportable, export_model
    from maskx.engine.model_files import write_model_file
    from maskx.engine.runs import MODEL_FILE_SUFFIX, read_run

    check_export(args.output, overwrite=args.overwrite)
    if args.output.suffix == MODEL_FILE_SUFFIX:
        options = {"licence": args.licence, "overwrite": args.overwrite}
        card = write_model_file(args.run_folder, args.output, **options)
        print(f"Wrote {args.output} and its model card {card}. Complete the card by hand.")
        return
    check_exportable(read_run(args.run_folder))
    predictor = maskx.open_run(args.run_folder, device="cpu")
    found = export_model(predictor, args.output, overwrite=args.overwrite)
    print(
        f"Wrote {args.output}: {', '.join(found.inputs)} to {', '.join(found.outputs)}, "
        f"{len(found.class_names)} classes."
    )
