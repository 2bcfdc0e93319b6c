"""The stages of ConceptMask as runs of :mod:`maskx.detectron2.stagewise`, checked together.

Stage 1 learns from tags, stage 2 from boxes, stage 3 from masks; each starts from the one before.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskx.core.word_table import load_word_table
from maskx.detectron2.datasets import register_from_config
from maskx.detectron2.hooks import architecture_of
from maskx.detectron2.known_datasets import register_all
from maskx.detectron2.stagewise import Stage, build_on_cpu, check_chain
from maskx.detectron2.trainer import check_config
from maskx.systems.concept_mask.detectron2.data import make_overlap, make_word_table
from maskx.systems.concept_mask.detectron2.model import MaskXConceptMask

__all__ = ["check_concept_stages", "concept_stages"]

_KEYS = "MODEL.MASKX.CONCEPT_MASK"
_TABLE, _OVERLAP = f"{_KEYS}.WORD_TABLE", f"{_KEYS}.OVERLAP"
WORDS_NAME, OVERLAP_NAME = "words.safetensors", "overlap.npz"
"""Files in the output folder that are made where a configuration names none."""

# What every stage must have alike, to compute the same features of the same concepts.
_SHARED_KEYS = (
    *("MODEL.BACKBONE.NAME", "MODEL.RESNETS", "MODEL.FPN", "MODEL.MASKX.IN_FEATURE"),
    *("MODEL.MASKX.BACKBONE.OUTPUT_STRIDE", "MODEL.MASKX.BACKBONE.FROZEN_NORM"),
    *("MODEL.MASKX.BACKBONE.NAME", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT", _TABLE),
    *(f"{_KEYS}.{key}" for key in ("SPLIT", "EMBEDDING_CHANNELS", "FINAL_RELU")),
)
# What stage 3 must have like stage 2, whose maps it segments.
_REFINEMENT_KEYS = (f"{_KEYS}.HIDDEN_CHANNELS",)


def concept_stages(
    stage1: Path | None,
    stage2: Path,
    stage3: Path,
    *,
    output: Path,
    opts: tuple[Any, ...] = (),
) -> list[Stage]:
    """Make the runs of a chain; weights of a stage go into the next.

    Where a configuration names no word table, that of the tags of stage 1 is made, and likewise
    the overlaps of the boxes of stage 2.

    Args:
        stage1: YAML file of the embedding, or its weights (any other file); None where stage 2 is
            weights.
        stage2: YAML file of the refinement, or its weights.
        stage3: YAML file of the segmentation.
        output: folder; the runs are in ``stage1``, ``stage2`` and ``stage3`` of it.
        opts: KEY VALUE pairs for all of them.

    Raises:
        FileNotFoundError: there is no such file of weights.
        ValueError: the pairs name weights, which the chain sets itself; a file is the config of
            another stage; or the word table of given weights is not known.
    """
    if "MODEL.WEIGHTS" in opts[::2]:
        raise ValueError(
            "MODEL.WEIGHTS is given for all stages, but each starts from the one before. Remove "
            "it; --stage1-weights and --stage2-weights take trained stages."
        )
    stages: list[Stage] = []
    weights = None
    for name, config in (("stage1", stage1), ("stage2", stage2), ("stage3", stage3)):
        if config is None:
            continue
        if config.suffix == ".yaml":
            stages.append(Stage(config, output / name, opts, weights))
            weights = stages[-1].final_weights
        elif not config.is_file():
            raise FileNotFoundError(f"--{name}-weights '{config}': there is no such file.")
        else:
            weights = config
    for stage in stages:
        _check_kind(stage)
    register_all()
    for stage in stages:
        register_from_config(stage.cfg)
    stages = _with_table(stages, output)
    return [_with_overlap(stage, output) for stage in stages]


def check_concept_stages(stages: Sequence[Stage]) -> list[bool]:
    """Check that the stages fit together, before hours are spent on the first.

    Args:
        stages: of :func:`concept_stages`.

    Returns:
        Whether each was trained and evaluated before.

    Raises:
        FileNotFoundError: a file that a configuration names is missing.
        ValueError: something does not fit; the message names the key and the remedy.
    """
    for stage in stages:
        cfg = stage.cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""  # an earlier stage may have to make them yet
        cfg.MODEL.MASKX.BACKBONE.PRETRAINED = False
        check_config(cfg)
        build_on_cpu(cfg)
    return check_chain(stages, _shared_with_next)


def _shared_with_next(stage: Stage) -> tuple[str, ...]:
    return _SHARED_KEYS + (_REFINEMENT_KEYS if stage.output.name == "stage2" else ())


def _check_kind(stage: Stage) -> None:
    cfg, number = stage.cfg, int(stage.output.name.removeprefix("stage"))
    if not issubclass(architecture_of(cfg), MaskXConceptMask):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE} in {stage.config_file}. It "
            "must be MaskXConceptMask."
        )
    found = cfg.MODEL.MASKX.CONCEPT_MASK.STAGE
    if found != number:
        raise ValueError(
            f"{_KEYS}.STAGE is {found} in {stage.config_file}, the config of stage {number}. It "
            f"must be {number}: are two configs exchanged?"
        )


def _with_table(stages: list[Stage], output: Path) -> list[Stage]:
    """Name a table where a stage names none: that of another stage, or of the output folder.

    The latter is made if need be.
    """
    named = [stage.cfg.MODEL.MASKX.CONCEPT_MASK.WORD_TABLE for stage in stages]
    unnamed = [stage for stage, table in zip(stages, named, strict=True) if not table]
    if not unnamed:
        return stages
    if any(named):
        pair = (_TABLE, next(filter(None, named)))
        return [replace(s, opts=(*s.opts, *pair)) if s in unnamed else s for s in stages]
    path = output / WORDS_NAME
    first = stages[0]
    if first.output.name == "stage1":
        make_word_table(first.cfg, path)
    elif not path.is_file():
        beside = first.weights.resolve().parents[1] / WORDS_NAME
        if not beside.is_file():
            raise ValueError(
                f"{_TABLE} is empty in {unnamed[0].config_file}, and there is no '{beside}': with "
                f"which word table '{first.weights}' was trained is not known. Set {_TABLE}."
            )
        path = beside
    load_word_table(path)  # says what is wrong with it
    pair = (_TABLE, str(path.resolve()))
    return [replace(s, opts=(*s.opts, *pair)) for s in stages]


def _with_overlap(stage: Stage, output: Path) -> Stage:
    keys = stage.cfg.MODEL.MASKX.CONCEPT_MASK
    if keys.STAGE != 2 or not keys.DISCRIMINATION_WEIGHT or keys.OVERLAP:
        return stage
    path = output / OVERLAP_NAME
    make_overlap(stage.cfg, path)
    return replace(stage, opts=(*stage.opts, _OVERLAP, str(path.resolve())))
