r"""Convert weights of the reference implementation of Mask^X R-CNN (Caffe2) for Detectron2.

Takes a .pkl file of the authors' "seg_every_thing", or of Detectron's Faster and Mask R-CNN with a
ResNet and FPN, and writes a checkpoint for MODEL.WEIGHTS. Nothing in the file is executed.

Examples:
    python tools/convert_seg_every_thing.py model_final.pkl maskx_vg3k.pth
    python tools/train_net.py --eval-only --config-file configs/MaskX/Base-MaskX-RCNN-FPN.yaml \
        MODEL.WEIGHTS maskx_vg3k.pth <the options that the conversion prints>

Classes: the file has weights, no names. The order of the rows is kept, only the background moves.
A model of COCO has K = 80 in the order of the category ids, which is Detectron2's. The Visual
Genome models have K = 3001 in the authors' own order: the 80 synsets aligned with COCO first, in
COCO's order, then all others by name. It is the order of the categories in their
instances_vg3k_cocoaligned_*.json; datasets/prepare.py visual_genome --reference-classes makes a
list by the same rule. A file whose box predictor was cut down to COCO gets all its classes back.

Images: BGR, minus the mean that is printed, not divided, as in Detectron; stride in the 1x1
convolutions of the ResNet. The last two are Detectron2's defaults.
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from maskx.core.command_line import ended_in_one_line

if TYPE_CHECKING:  # a help text waits for none of these
    from converters.caffe2_weights import Caffe2Architecture, ConvertedWeights


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the authors' .pkl file")
    parser.add_argument("target", type=Path, help="the .pth file to write")
    parser.add_argument(
        "--allow-unknown", action="store_true", help="leave out blobs that are not known"
    )
    return parser.parse_args()


def config_options(found: "Caffe2Architecture") -> list[str]:
    """Options that make configs/MaskX/Base-MaskX-RCNN-FPN.yaml the model of the weights."""
    options = {
        "MODEL.PIXEL_MEAN": "[102.9801,115.9465,122.7717]",  # Detectron's; Detectron2's differs
        "MODEL.RESNETS.DEPTH": found.depth,
        "MODEL.ROI_HEADS.NUM_CLASSES": found.num_classes,
    }
    if not found.has_rpn:
        options["MODEL.PROPOSAL_GENERATOR.NAME"] = "PrecomputedProposals"
    if found.predictor is None:
        options |= {"MODEL.MASK_ON": False, "MODEL.ROI_HEADS.NAME": "StandardROIHeads"}
    else:
        options |= {
            "MODEL.ROI_MASK_HEAD.NUM_CONV": found.num_convs,
            "MODEL.MASKX.PREDICTOR": found.predictor,
            "MODEL.MASKX.MLP": found.mlp,
        }
    if found.predictor == "transfer":
        options |= {
            "MODEL.MASKX.TRANSFER.INPUTS": found.transfer_inputs,
            "MODEL.MASKX.TRANSFER.LAYERS": found.transfer_layers,
            "MODEL.MASKX.TRANSFER.ACTIVATION": found.transfer_activation or "leaky_relu",
        }
    return [str(part) for option in options.items() for part in option]


def report(converted: "ConvertedWeights", target: Path) -> str:
    """Say what was found, what became of every blob, and which options belong to it."""
    found = converted.architecture
    lines = [
        f"model: ResNet-{found.depth} FPN, {found.num_classes} classes"
        + ("" if found.has_rpn else ", without RPN: it needs proposals from elsewhere"),
        f"masks: {found.predictor or 'none'}, MLP {found.mlp}",
    ]
    if found.predictor == "transfer":
        activation = found.transfer_activation or "leaky_relu, not recorded but the default"
        between = f", {activation} between them" if found.transfer_layers > 1 else ""
        lines.append(f"T: from {found.transfer_inputs}, {found.transfer_layers} layer(s){between}")
    if found.transfer_inputs == "vectors":
        lines.append(
            "T reads the vectors in the checkpoint; a model is built with those of a file "
            "(MODEL.MASKX.TRANSFER.VECTORS) of the same length, which they replace"
        )
    lines.append(f"converted: {len(converted.converted)} blobs to {len(converted.weights)} weights")
    for reason in sorted(set(converted.left_out.values())):
        names = [name for name, why in converted.left_out.items() if why == reason]
        lines.append(f"left out, {len(names)} x {reason}: {' '.join(names)}")
    lines += [f"left out, NOT KNOWN: {blob} {shape}" for blob, shape in converted.unknown.items()]
    lines += [f"wrote: {target}", f"options: {shlex.join(config_options(found))}"]
    return "\n".join(lines)


def main() -> None:
    """Convert; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line():
        from converters.caffe2_weights import convert_caffe2_file, save_detectron2_checkpoint

        converted = convert_caffe2_file(arguments.source, allow_unknown=arguments.allow_unknown)
        save_detectron2_checkpoint(converted, arguments.target)
    print(report(converted, arguments.target))


if __name__ == "__main__":
    main()
