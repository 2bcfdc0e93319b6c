"""Stage-wise training (section 2.2): runs that go on where they stopped and never run twice.

Stage 1 trains a detector on the boxes of all categories, stage 2 only the mask branch on it. One
detector serves many second stages, which is why the paper's ablations work stage-wise.
"""

import argparse
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.engine import launch
from torch import nn

from maskx.detectron2.checkpointer import FINAL_NAME
from maskx.detectron2.config import read_config, read_plain
from maskx.detectron2.datasets import register_from_config, training_class_names
from maskx.detectron2.known_datasets import register_all
from maskx.detectron2.runs import as_dict, free_keys, run_of
from maskx.detectron2.trainer import Trainer, check_config, setup
from maskx.engine.runs import Run, flat_settings, is_below, read_run
from maskx.engine.stages import StageState, begin_stage, stage_state

# What makes a detector compute what it was trained to compute; a key stands for those below it.
_DETECTOR_KEYS = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.BACKBONE.NAME",
    "MODEL.RESNETS",
    "MODEL.FPN",
    "MODEL.ANCHOR_GENERATOR",
    "MODEL.MASKX.BACKBONE.NAME",
    "MODEL.RPN.IN_FEATURES",
    "MODEL.RPN.HEAD_NAME",
    "MODEL.RPN.CONV_DIMS",
    "MODEL.RPN.BBOX_REG_WEIGHTS",
    "MODEL.ROI_HEADS.IN_FEATURES",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "MODEL.ROI_BOX_HEAD",
)


class MadeData(NamedTuple):
    """A data set that an earlier run makes: its registered name, annotations and images."""

    name: str
    json_file: Path
    image_root: Path


@dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
        output: folder of the run; takes the place of ``OUTPUT_DIR``.
        weights: initial weights, in place of ``MODEL.WEIGHTS``; None for those of the file.
        data: takes the place of ``DATASETS.TRAIN``; None for that of the file. It need not exist
            before the run.
    """

    config_file: Path
    output: Path
    opts: tuple[Any, ...] = ()
    weights: Path | None = None
    data: MadeData | None = None

    @property
    def all_opts(self) -> list[Any]:
        """KEY VALUE pairs with those of ``output``, ``weights`` and ``data``."""
        weights = () if self.weights is None else ("MODEL.WEIGHTS", str(self.weights.resolve()))
        data: tuple[Any, ...] = ()
        if self.data is not None:
            register = read_config(self.config_file, self.opts).DATASETS.MASKX.REGISTER
            paths = (str(path.resolve()) for path in (self.data.json_file, self.data.image_root))
            kept = [e for e in register if not e or e[0] != self.data.name]
            register = [*kept, [self.data.name, *paths]]
            data = ("DATASETS.TRAIN", (self.data.name,), "DATASETS.MASKX.REGISTER", register)
        return [*self.opts, *weights, *data, "OUTPUT_DIR", str(self.output.resolve())]

    @property
    def final_weights(self) -> Path:
        """The weights when the training has ended."""
        return self.output / FINAL_NAME

    def describe(self) -> Run:
        """Describe the run, by what the files it starts from hold now."""
        register_all()
        register_from_config(self.cfg)
        return run_of(self.cfg)

    @functools.cached_property
    def cfg(self) -> CfgNode:
        """The configuration, frozen."""
        if "OUTPUT_DIR" in self.opts[::2]:
            raise ValueError("OUTPUT_DIR is made of --output for each run. Use --output instead.")
        read_config(self.config_file, self.opts)  # so that errors name the user's pairs alone
        cfg = read_config(self.config_file, self.all_opts)
        cfg.freeze()
        return cfg


def check_stages(first: Stage | Path, second: Stage) -> None:
    """Check that a second stage can follow a first, or its weights, before hours are spent."""
    register_all()
    if "MODEL.WEIGHTS" in second.opts[::2] and not (
        isinstance(first, Stage) and "MODEL.WEIGHTS" in first.opts[::2]  # a pair for both
    ):
        raise ValueError(
            "MODEL.WEIGHTS is given for stage 2, which starts from the detector of stage 1. "
            "Remove it."
        )
    if isinstance(first, Stage):
        _check_first(first)
        known, source = as_dict(first.cfg), first.config_file
    else:
        if not first.is_file():
            raise FileNotFoundError(f"--stage1-weights '{first}': there is no such file.")
        source = first.with_name("config.yaml")  # that Detectron2 writes beside the weights
        known = read_plain(str(source)) if source.is_file() else {}
    _check_second(second)
    found = flat_settings(as_dict(second.cfg))
    for key, value in flat_settings(known).items():
        if is_below(key, _DETECTOR_KEYS) and found.get(key, value) != value:
            raise ValueError(
                f"{key} is {found[key]!r} in {second.config_file}, but {value!r} in {source}: "
                "stage 2 would run another detector than stage 1 trained. Set it alike in both."
            )
    if isinstance(first, Stage):
        _check_same_classes(first, second)
    build_on_cpu(second.cfg)


def check_chain(
    stages: Sequence[Stage], shared_keys: Callable[[Stage], tuple[str, ...]]
) -> list[bool]:
    """Check that stages fit together of which each starts from the weights of the one before.

    Args:
        shared_keys: that a stage and the next must have alike; a key stands for those below it.

    Returns:
        Whether each was trained and evaluated before.
    """
    finished = [stage_is_finished(stage) for stage in stages]
    for first, second in itertools.pairwise(stages):
        keys = shared_keys(first)
        before, after = (config_values(stage.cfg, keys) for stage in (first, second))
        for key, value in before.items():
            if after[key] != value:
                raise ValueError(
                    f"{key} is {after[key]!r} in {second.config_file}, but {value!r} in "
                    f"{first.config_file}, the stage before it, whose weights it starts from. Set "
                    "it alike in both."
                )
    for index, stage in enumerate(stages):
        if finished[index] and not all(finished[:index]):
            raise ValueError(
                f"'{stage.output}' is finished, but the stage before it is not, whose weights it "
                "started from. Remove that folder, or choose another --output."
            )
    return finished


def stage_is_finished(stage: Stage) -> bool:
    """Whether a stage was trained and evaluated, and its weights are whole."""
    if stage.data is not None and not stage.data.json_file.is_file():
        if not stage.final_weights.is_file():
            return False  # an earlier stage has to make them yet
        raise FileNotFoundError(
            f"The run in '{stage.output}' trained on '{stage.data.json_file}', which is gone. "
            "Restore it, or remove that folder to train on data that are made again."
        )
    state = stage_state(stage.output, stage.describe(), free=free_keys(stage.cfg))
    return state is StageState.FINISHED


def run_stage(stage: Stage, *, num_gpus: int = 1, resume: bool = True) -> Run:
    """Train and evaluate a stage, unless that is done; an interrupted one goes on.

    Args:
        resume: whether an interrupted run may go on; otherwise it is an error.
    """
    free = free_keys(stage.cfg)
    if begin_stage(stage.output, stage.describe(), resume=resume, free=free) is not None:
        with _own_log_handlers():
            launch(_train, num_gpus, dist_url="auto", args=(stage,))
    return read_run(stage.output)


def run_stages(
    stages: Sequence[Stage],
    finished: Sequence[bool],
    *,
    num_gpus: int = 1,
    resume: bool = True,
    report: Callable[[str], None] = print,
) -> None:
    """Run the stages that are not finished, in order.

    Args:
        finished: of each, see :func:`stage_is_finished`; known of all before hours go into one.
    """
    for stage, done in zip(stages, finished, strict=True):
        if done:
            report(f"{stage.output}: finished before, not run again")
        else:
            run_stage(stage, num_gpus=num_gpus, resume=resume)


def _train(stage: Stage) -> None:
    """Train and evaluate, in each process."""
    arguments = argparse.Namespace(config_file=str(stage.config_file), opts=stage.all_opts)
    trainer = Trainer(setup(arguments))
    trainer.resume_or_load(resume=True)
    trainer.train()


def _check_first(stage: Stage) -> None:
    maskx = stage.cfg.MODEL.MASKX
    if maskx.FREEZE_DETECTOR:
        raise ValueError(
            f"MODEL.MASKX.FREEZE_DETECTOR is True in {stage.config_file}, the config of stage 1, "
            "which trains the detector. Set it False, or exchange --stage1 and --stage2."
        )
    if stage.cfg.MODEL.MASK_ON:
        raise ValueError(
            f"MODEL.MASK_ON is True in {stage.config_file}, the config of stage 1: masks would be "
            "learned before stage 2, by another split perhaps. Set it False."
        )
    check_config(stage.cfg)


def _check_second(stage: Stage) -> None:
    if not stage.cfg.MODEL.MASK_ON:
        raise ValueError(
            f"MODEL.MASK_ON is False in {stage.config_file}, the config of stage 2, which is to "
            "train the mask branch. Set it True."
        )
    if not stage.cfg.MODEL.MASKX.FREEZE_DETECTOR:
        raise ValueError(
            f"MODEL.MASKX.FREEZE_DETECTOR is False in {stage.config_file}, the config of stage 2. "
            "Set it True (with MODEL.META_ARCHITECTURE MaskXRCNN), or train end to end with "
            "tools/train_net.py."
        )
    cfg = stage.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""  # stage 1 may have to make them yet
    check_config(cfg)


def _check_same_classes(first: Stage, second: Stage) -> None:
    pairs = zip(training_class_names(first.cfg), training_class_names(second.cfg), strict=True)
    for index, (in_first, in_second) in enumerate(pairs):
        if in_first != in_second:
            raise ValueError(
                f"Class {index} is '{in_first}' in {first.cfg.DATASETS.TRAIN[0]}, the training "
                f"data of stage 1, but '{in_second}' in {second.cfg.DATASETS.TRAIN[0]}, that of "
                "stage 2 (DATASETS.TRAIN). Train both stages on the same classes in one order."
            )


def build_on_cpu(cfg: CfgNode) -> nn.Module:
    """Build a model without its weights, since its modules check the keys that they read."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return Trainer.build_model(cfg)


def config_values(cfg: CfgNode, keys: tuple[str, ...]) -> dict[str, Any]:
    """Values by dotted key of some keys and of all those below them."""
    values = flat_settings(as_dict(cfg))
    return {key: value for key, value in values.items() if is_below(key, keys)}


@contextmanager
def _own_log_handlers() -> Iterator[None]:
    """Remove the log handlers that a run adds, so that the next does not log into its files."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "maskx")]
    before = [list(logger.handlers) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers = handlers
