r"""Train a system on Detectron2 on a few scenes of 64 pixels: all its steps, with evaluation.

For tools that watch a training. What an interrupted run left in the folder goes on.

Example:
    python tools/benchmarks/tiny_detectron2.py larvseg output/tiny --iterations 10
"""

import argparse
import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1]
CONFIGS = TOOLS.parent / "configs"

DETECTOR = (
    "MODEL.BACKBONE.NAME",
    "MaskXTimmFPN",
    "MODEL.MASKX.BACKBONE.NAME",
    "test_resnet",
    "MODEL.MASKX.BACKBONE.PRETRAINED",
    False,
    "MODEL.FPN.IN_FEATURES",
    ["layer1", "layer2", "layer3", "layer4"],
    "MODEL.FPN.OUT_CHANNELS",
    16,
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    24,
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV",
    1,
    "MODEL.ROI_HEADS.NUM_CLASSES",
    4,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    20,
    "MODEL.RPN.POST_NMS_TOPK_TEST",
    20,
    "INPUT.MIN_SIZE_TRAIN",
    (64,),
    "INPUT.MIN_SIZE_TEST",
    64,
)
IMAGES = ("INPUT.MASKX.SIZE", 32)
CLASSES = (*IMAGES, "MODEL.MASKX.NUM_CLASSES", 4)
CONCEPTS = (
    *IMAGES,
    "MODEL.MASKX.CONCEPT_MASK.EMBEDDING_CHANNELS",
    (16, 16),
    "MODEL.MASKX.CONCEPT_MASK.HIDDEN_CHANNELS",
    16,
    "MODEL.MASKX.CONCEPT_MASK.ATTENTION_SIZES",
    (32, 48),
    "MODEL.MASKX.CONCEPT_MASK.DECODER_CHANNELS",
    (8, 8, 8, 8, 8),
)

# Of each system the tool, its configs by option, below configs, and KEY VALUE pairs.
RUNS = {
    "maskx": ("train_net", {"config-file": "MaskX/{}/maskx"}, DETECTOR),
    "maskx_stagewise": (
        "train_stagewise",
        {"stage1": "MaskX/{}/stage1_faster_rcnn", "stage2": "MaskX/{}/stage2_clsbox_2_layer"},
        DETECTOR,
    ),
    "concept_mask": (
        "train_concept_mask",
        {
            "stage1": "ConceptMask/{}/stage1_embedding",
            "stage2": "ConceptMask/{}/stage2_refinement",
            "stage3": "ConceptMask/{}/stage3_segmentation",
        },
        CONCEPTS,
    ),
    "transfernet": (
        "train_transfernet",
        {
            "stage0": "TransferNet/{}/stage0_classifier",
            "stage1": "TransferNet/{}/stage1_attention",
            "stage2": "TransferNet/{}/stage2_joint",
        },
        CLASSES,
    ),
    "larvseg": (
        "train_net",
        {"config-file": "LarvSeg/{}/larvseg"},
        (*IMAGES, "MODEL.WEIGHTS", "", "MODEL.MASKX.LARVSEG.BANK_SIZE", 4),
    ),
    "class_patterns": (
        "train_class_patterns",
        {"classifier": "ClassPatterns/{}/classifier", "segmenter": "ClassPatterns/{}/deeplab"},
        CLASSES,
    ),
}


def command(system: str, folder: Path, iterations: int, period: int) -> list[str]:
    """Write the data and return the command: a file of ``tools`` and its arguments."""
    from maskx.data.scenes.concepts import generate_concept_scenes
    from maskx.data.scenes.generator import generate_scenes

    data, sparse = {"count": 12, "size": 64}, {"num_categories": 4, "style": "sparse"}
    names, test = ["tiny"], "tiny"
    if system == "concept_mask":  # each of 66 concepts is on one of 120 images
        test = "tiny_test"
        sources = [
            generate_concept_scenes(folder / name, count=count, size=64, seed=0)
            for name, count in (("data", 120), ("test", 8))
        ]
    elif system == "larvseg":  # masks of one data set, image labels of the other
        names.append("tiny_tags")
        folders = (folder / "data" / name for name in names)
        sources = [generate_scenes(f, **data, seed=i, **sparse) for i, f in enumerate(folders)]
    else:
        style = {"num_categories": 4} if system.startswith("maskx") else sparse
        sources = [generate_scenes(folder / "data", **data, seed=0, **style)]
    registered = [
        [name, str(source.resolve()), str(source.parent.resolve())]
        for name, source in zip(dict.fromkeys([*names, test]), sources, strict=True)
    ]
    tool, configs, pairs = RUNS[system]
    output, arguments = folder / "output", ["--resume"]
    if tool == "train_net":
        pairs = (*pairs, "OUTPUT_DIR", output)
    else:
        arguments += ["--output", str(output)]
    for option, config in configs.items():
        path = CONFIGS / f"{config.format('quick_schedules')}_scenes_cpu.yaml"
        arguments += [f"--{option}", str(path)]
    if system == "transfernet":  # which makes no masks yet
        arguments += ["--stage1-opts", "DATASETS.TEST", "()"]
    solver = {"MAX_ITER": iterations, "CHECKPOINT_PERIOD": period, "IMS_PER_BATCH": 2}
    solver |= {"BASE_LR": 1e-3, "STEPS": (), "WARMUP_ITERS": 0}
    pairs += tuple(x for key, value in solver.items() for x in (f"SOLVER.{key}", value))
    pairs += ("SEED", 0, "DATASETS.MASKX.REGISTER", registered)
    pairs += ("DATASETS.TRAIN", tuple(names), "DATASETS.TEST", (test,))
    return [str(TOOLS / f"{tool}.py"), *arguments, *map(str, pairs)]


def main() -> None:
    """Run the command in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", choices=RUNS)
    parser.add_argument("folder", type=Path, help="of the data and the output")
    parser.add_argument("--iterations", type=int, default=2000, help="of each training")
    parser.add_argument("--period", type=int, default=500, help="steps between checkpoints")
    sys.argv = command(**vars(parser.parse_args()))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
