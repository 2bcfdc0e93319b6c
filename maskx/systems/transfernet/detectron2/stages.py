"""The stages of TransferNet as runs of :mod:`maskx.detectron2.stagewise`, checked together.

Stage 0 trains the classifier of image labels, whose backbone is the encoder; stage 1 the attention
(Eq. 6); stage 2 attention and decoder (Eq. 9). Stages 1 and 2 of a baseline are its own two.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from maskx.detectron2.hooks import architecture_of
from maskx.detectron2.known_datasets import register_all
from maskx.detectron2.stagewise import Stage, build_on_cpu, check_chain
from maskx.detectron2.trainer import check_config
from maskx.systems.transfernet.detectron2 import MaskXTransferClassifier, MaskXTransferNet

_CLASSIFIER_KEY = "MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS"

# What every stage must have alike, to compute the same features and mean the same classes.
_SHARED_KEYS = (
    "MODEL.BACKBONE.NAME",
    "MODEL.RESNETS",
    "MODEL.MASKX.BACKBONE.OUTPUT_STRIDE",
    "MODEL.MASKX.BACKBONE.NAME",
    "MODEL.MASKX.BACKBONE.FROZEN_NORM",
    "MODEL.MASKX.NUM_CLASSES",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "INPUT.FORMAT",
    "DATASETS.TRAIN",
    "DATASETS.MASKX.SPLIT",
)
# What the attention of stage 1 must have like that of stage 2.
_ATTENTION_KEYS = (
    *(f"MODEL.MASKX.TRANSFERNET.{key}" for key in ("METHOD", "ATTENTION", "NUM_FACTORS")),
    *(f"MODEL.MASKX.TRANSFERNET.{key}" for key in ("HIDDEN_CHANNELS", "FEATURE_SCALE")),
    "MODEL.MASKX.IN_FEATURE",
    "MODEL.MASKX.TRANSFERNET.CLASSIFIER_FEATURE",
)


def transfer_stages(
    stage0: Path,
    stage1: Path,
    stage2: Path,
    *,
    output: Path,
    opts: Sequence[Any] = (),
    own_opts: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> list[Stage]:
    """Make the runs of a chain; weights of a stage go into the next.

    Args:
        stage0: YAML file of the classifier, or its weights (any other file).
        stage1: YAML file of the attention, or of a baseline on the source, or its weights.
        stage2: YAML file of the masks.
        output: folder; the runs are in ``stage0``, ``stage1`` and ``stage2`` of it.
        opts: KEY VALUE pairs for all of them.
        own_opts: pairs for ``stage0``, ``stage1`` or ``stage2`` alone.
    """
    for key in ("MODEL.WEIGHTS", _CLASSIFIER_KEY):
        if any(key in pairs[::2] for pairs in (opts, *own_opts.values())):
            raise ValueError(
                f"{key} is given as an option, but each stage starts from the one before. Remove "
                "it; --stage0-weights and --stage1-weights take trained stages."
            )
    stages: list[Stage] = []

    def weights_of(config: Path, name: str, *inputs: Any, weights: Path | None = None) -> Path:
        if config.suffix != ".yaml":
            if not config.is_file():
                raise FileNotFoundError(f"--{name}-weights '{config}': there is no such file.")
            return config
        pairs = (*opts, *own_opts.get(name, ()), *inputs)
        stages.append(Stage(config, output / name, pairs, weights))
        return stages[-1].final_weights

    classifier = (_CLASSIFIER_KEY, str(weights_of(stage0, "stage0").resolve()))
    first = weights_of(stage1, "stage1", *classifier)
    weights_of(stage2, "stage2", *classifier, weights=first)
    return stages


def check_transfer_stages(stages: Sequence[Stage]) -> list[bool]:
    """Check that the stages fit together, before hours are spent on the first.

    Returns:
        Whether each was trained and evaluated before.
    """
    register_all()
    for stage in stages:
        _check_stage(stage)
    return check_chain(stages, _shared_with_next)


def _shared_with_next(stage: Stage) -> tuple[str, ...]:
    keys = _SHARED_KEYS
    if stage.output.name == "stage1":
        keys += _ATTENTION_KEYS
        if stage.cfg.MODEL.MASKX.TRANSFERNET.ATTENTION == "fc":
            keys += ("INPUT.MASKX.SIZE",)  # its weights are for one size
    return keys


def _check_stage(stage: Stage) -> None:
    name = stage.output.name
    wanted, train_stages = {
        "stage0": (MaskXTransferClassifier, ()),
        "stage1": (MaskXTransferNet, ("attention", "source")),
        "stage2": (MaskXTransferNet, ("joint", "target")),
    }[name]
    cfg = stage.cfg.clone()
    cfg.defrost()
    if not issubclass(architecture_of(cfg), wanted):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE} in {stage.config_file}, "
            f"the config of {name}. It must be {wanted.__name__}: are two configs exchanged?"
        )
    keys = cfg.MODEL.MASKX.TRANSFERNET
    if train_stages and keys.STAGE not in train_stages:
        raise ValueError(
            f"MODEL.MASKX.TRANSFERNET.STAGE is '{keys.STAGE}' in {stage.config_file}, the config "
            f"of {name}. It must be '{train_stages[0]}', or of a baseline '{train_stages[1]}': are "
            "two configs exchanged?"
        )
    # An earlier stage may have to make these yet.
    cfg.MODEL.WEIGHTS, keys.CLASSIFIER_WEIGHTS = "", ""
    cfg.MODEL.MASKX.BACKBONE.PRETRAINED = False
    check_config(cfg)
    build_on_cpu(cfg)
