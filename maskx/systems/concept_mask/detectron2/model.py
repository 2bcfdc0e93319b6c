"""The three networks of ConceptMask in Detectron2, their chain, and finding concepts with them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import Instances
from torch import nn

from maskx.core.archives import read_archive
from maskx.core.word_table import load_word_table
from maskx.data.coco import load_coco
from maskx.detectron2.adapters import in_format
from maskx.detectron2.backbones import check_images
from maskx.detectron2.config import read_config
from maskx.detectron2.datasets import register_from_config
from maskx.detectron2.hooks import Detectron2Hooks, architecture_of
from maskx.detectron2.known_datasets import register_all
from maskx.detectron2.stagewise import Stage, build_on_cpu, check_chain
from maskx.detectron2.trainer import check_config, load_trained
from maskx.detectron2.whole_images import choose_feature, pixel_arguments
from maskx.engine.checkpoints import write_checkpoint
from maskx.systems.concept_mask import predictor
from maskx.systems.concept_mask.detectron2.data import (
    KEYS,
    MaskXConceptEvaluator,
    build_concept_loader,
    build_test_loader,
    check_concept_data,
    concept_split,
    concept_table,
    concept_test_data,
    make_overlap,
    make_word_table,
    unseen_words,
)
from maskx.systems.concept_mask.evaluation import concept_test, fit_concepts
from maskx.systems.concept_mask.model import (
    SYSTEM_NAME,
    EmbeddingModel,
    RefinementModel,
    SegmentationModel,
)
from maskx.systems.concept_mask.network import ConceptEmbedding, ConceptSegmenter, build_encoder
from maskx.systems.concept_mask.overlap import load_overlap, negative_weights
from maskx.systems.concept_mask.query import named_query
from maskx.systems.concept_mask.samples import read_sample
from maskx.systems.concept_mask.system import WORDS_NAME

_TABLE, _OVERLAP = f"{KEYS}.WORD_TABLE", f"{KEYS}.OVERLAP"
# Made in the output folder, as WORDS_NAME is, where a configuration names none.
OVERLAP_NAME = "overlap.npz"

# What every stage must have alike, to compute the same features of the same concepts.
_SHARED_KEYS = (
    "MODEL.BACKBONE.NAME",
    "MODEL.RESNETS",
    "MODEL.FPN",
    "MODEL.MASKX.IN_FEATURE",
    "MODEL.MASKX.BACKBONE.OUTPUT_STRIDE",
    "MODEL.MASKX.BACKBONE.FROZEN_NORM",
    "MODEL.MASKX.BACKBONE.NAME",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "INPUT.FORMAT",
    _TABLE,
    *(f"{KEYS}.{key}" for key in ("SPLIT", "EMBEDDING_CHANNELS", "FINAL_RELU")),
)


def _check(cfg: CfgNode) -> None:
    """Check the keys of ConceptMask that its modules do not check, and the data."""
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    if keys.ENCODER_PRETRAINED and architecture_of(cfg).stage == 3:
        if keys.ENCODER == "small":
            raise ValueError(
                f"{KEYS}.ENCODER_PRETRAINED is True, but ENCODER is small, for which there are no "
                "weights. Set it False, or the name of a ResNet."
            )
        check_images(cfg, keys.ENCODER, f"{KEYS}.ENCODER_PRETRAINED")
    check_concept_data(cfg)


def _evaluator(cfg: CfgNode, dataset_name: str) -> MaskXConceptEvaluator:
    return MaskXConceptEvaluator(dataset_name, test=concept_test_data(cfg, dataset_name))


def _started(cfg: CfgNode, model: nn.Module, missing: Sequence[str]) -> None:
    """Check, before a training starts, that it has what it starts from."""
    keys, weights, stage = cfg.MODEL.MASKX.CONCEPT_MASK, cfg.MODEL.WEIGHTS, model.stage
    if stage > 1:
        lacking = [name for name in missing if name.startswith("embedding.")]
        if lacking or not weights:
            lacks = f"lacks {', '.join(lacking[:3])}" if lacking else "is empty"
            raise ValueError(
                f"{cfg.MODEL.META_ARCHITECTURE} is stage {stage}, which starts from stage "
                f"{stage - 1}, but MODEL.WEIGHTS '{weights}' {lacks}. Set it to the "
                "model_final.pth of that stage, or train all with tools/train_concept_mask.py."
            )
    if stage == 2 and keys.DISCRIMINATION_WEIGHT and not keys.OVERLAP:
        raise ValueError(
            f"{KEYS}.OVERLAP is empty, which the spatial discrimination loss needs. Make the file "
            "with tools/concept_overlap.py, train with tools/train_concept_mask.py, which does, or "
            "set DISCRIMINATION_WEIGHT 0."
        )
    if stage == 3 and keys.ENCODER_PRETRAINED and model.is_new:
        model.segmenter.start_encoder(build_encoder(keys.ENCODER, pretrained=True))


def _for_inference(cfg: CfgNode) -> None:
    cfg.MODEL.MASKX.CONCEPT_MASK.OVERLAP = ""  # read by its training alone


HOOKS = Detectron2Hooks(
    system=SYSTEM_NAME,
    matches_class_names=True,  # its words are compared by a digest of their table
    train_loader=build_concept_loader,
    test_loader=build_test_loader,
    evaluator=_evaluator,
    check=_check,
    class_names=lambda cfg: concept_table(cfg).names,
    split=lambda cfg: None,
    started=_started,
    for_inference=_for_inference,
    files=tuple(f"{KEYS}.{key}" for key in ("WORD_TABLE", "SPLIT", "OVERLAP")),
)


class _FromConfig:
    """Builds a model of any stage from a configuration."""

    maskx_hooks = HOOKS

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Find concepts as on the embedded host, with ``instances`` too.

        These are what Detectron2's Visualizer draws: ``pred_masks``, ``scores`` and
        ``pred_classes``, rows of the word table, of the concepts that are in it.
        """
        result = super().predict(*args, **kwargs)
        known = result["concept_indices"] >= 0
        instances = Instances(tuple(result["masks"].shape[1:]))
        instances.pred_masks = result["masks"][known]
        instances.scores = result["existence"][known].clamp(0, 1)
        instances.pred_classes = result["concept_indices"][known]
        return result | {"instances": instances}

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        keys, test = cfg.MODEL.MASKX.CONCEPT_MASK, cfg.TEST.MASKX
        table, unseen = concept_table(cfg), unseen_words(cfg)
        backbone = build_backbone(cfg)
        in_feature, in_channels = choose_feature(backbone, cfg.MODEL.MASKX.IN_FEATURE)
        _check_sizes(cfg, backbone.size_divisibility or 1)
        embedding = ConceptEmbedding(
            backbone,
            in_feature=in_feature,
            in_channels=in_channels,
            stride=backbone.output_shape()[in_feature].stride,
            dim=table.dim,
            hidden_channels=keys.EMBEDDING_CHANNELS,
            final_relu=keys.FINAL_RELU,
        )
        query, gamma = None, None
        if test.CONCEPTS:
            query = named_query(table, unseen, test.CONCEPTS, blended=test.BLEND_UNSEEN)
        arguments = {
            "embedding": embedding,
            "table": table,
            "split": concept_split(cfg),
            "attention_sizes": keys.ATTENTION_SIZES,
            "scored_sizes": test.SCORED_SIZES,
            "attention_kind": test.ATTENTION_KIND,
            "unseen": unseen,
            "query": query,
            **pixel_arguments(cfg),
        }
        if cls.stage > 1:
            arguments["hidden_channels"] = keys.HIDDEN_CHANNELS
        if cls.stage == 2:
            if keys.DISCRIMINATION_WEIGHT and keys.OVERLAP:
                gamma = negative_weights(load_overlap(keys.OVERLAP, table.names))
            arguments |= {
                "gamma": gamma,
                "num_matched": keys.NUM_MATCHED,
                "matching_weight": keys.MATCHING_WEIGHT,
                "discrimination_weight": keys.DISCRIMINATION_WEIGHT,
            }
        if cls.stage == 3:
            arguments["mask_size"] = cfg.INPUT.MASKX.SIZE
            arguments["segmenter"] = ConceptSegmenter(
                build_encoder(keys.ENCODER, widths=keys.ENCODER_WIDTHS),
                num_maps=len(keys.ATTENTION_SIZES),
                decoder_channels=keys.DECODER_CHANNELS,
            )
        return arguments


@META_ARCH_REGISTRY.register()
class MaskXConceptEmbedding(_FromConfig, EmbeddingModel):
    """Stage 1: images among word vectors, from tags; see :class:`EmbeddingModel`."""


@META_ARCH_REGISTRY.register()
class MaskXConceptRefinement(_FromConfig, RefinementModel):
    """Stage 2: attention maps refined by boxes; see :class:`RefinementModel`."""


@META_ARCH_REGISTRY.register()
class MaskXConceptSegmentation(_FromConfig, SegmentationModel):
    """Stage 3: masks of an image and attention maps; see :class:`SegmentationModel`."""


def _check_sizes(cfg: CfgNode, divisor: int) -> None:
    """Refuse sides of images that the backbone does not take."""
    sides = cfg.MODEL.MASKX.CONCEPT_MASK.ATTENTION_SIZES
    sizes = [(f"{KEYS}.ATTENTION_SIZES", side) for side in sides]
    if architecture_of(cfg).stage < 3:
        sizes.append(("INPUT.MASKX.SIZE", cfg.INPUT.MASKX.SIZE))
    for key, side in sizes:
        if side % divisor:
            raise ValueError(
                f"{key} has the side {side}, but {cfg.MODEL.BACKBONE.NAME} takes multiples of "
                f"{divisor}, such as {max(side // divisor, 1) * divisor}."
            )


class ConceptPredictor(predictor.ConceptPredictor):
    """Finds any concepts in BGR images; ``DefaultPredictor`` finds those of the configuration."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(
            _load(cfg),
            blend_unseen=cfg.TEST.MASKX.BLEND_UNSEEN,
            model_format=cfg.INPUT.FORMAT,
            order="BGR",
        )


def trained_config(
    config_file: str | Path, opts: Sequence[Any] = (), *, device: torch.device | str = "cpu"
) -> CfgNode:
    """Read the configuration of a trained model, such as the ``config.yaml`` of a run.

    Without ``MODEL.WEIGHTS`` among the KEY VALUE pairs `opts`, the weights are ``model_final.pth``
    of ``OUTPUT_DIR``.
    """
    cfg = read_config(config_file, opts)
    if "MODEL.WEIGHTS" not in opts[::2]:
        cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if not Path(cfg.MODEL.WEIGHTS).is_file():
        raise FileNotFoundError(
            f"There is no file '{cfg.MODEL.WEIGHTS}'. Train the model to its end, or add "
            "MODEL.WEIGHTS FILE."
        )
    cfg.MODEL.DEVICE = str(device)
    return cfg


def fit_checkpoint(
    cfg: CfgNode, json_file: str | Path, image_root: str | Path, *, strict: bool = True
) -> dict[str, Any]:
    """Fit theta and the existence thresholds, and write them to the file ``MODEL.WEIGHTS``.

    See :func:`maskx.systems.concept_mask.pipeline.fit_run`.
    """
    model = _load(cfg)
    data = load_coco(json_file, image_root, strict=strict)
    names, source = data.class_names, str(json_file)
    test = concept_test(data.records, names, model.split, model.table, model.unseen, source=source)
    fitted = fit_concepts(model, test, in_format(read_sample, cfg.INPUT.FORMAT))
    content = read_archive(cfg.MODEL.WEIGHTS)
    content["model"] |= {name: value.cpu() for name, value in model.state_dict().items()}
    write_checkpoint(cfg.MODEL.WEIGHTS, content)
    return fitted


def _load(cfg: CfgNode) -> EmbeddingModel:
    if not issubclass(architecture_of(cfg), EmbeddingModel):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which finds no concepts. "
            "Give the configuration of a MaskXConceptSegmentation."
        )
    return load_trained(cfg)


def concept_stages(
    stage1: Path | None,
    stage2: Path,
    stage3: Path,
    *,
    output: Path,
    opts: tuple[Any, ...] = (),
    own_opts: Mapping[str, Sequence[Any]] | None = None,
) -> list[Stage]:
    """Make the runs of a chain, in folders of `output`; weights of a stage go into the next.

    Where a configuration names no word table, that of the tags of stage 1 is made, and likewise
    the overlaps of the boxes of stage 2.

    Args:
        stage1: YAML file of the embedding, or its weights (any other file); None where stage 2 is
            weights.
        output: folder of the runs ``stage1``, ``stage2`` and ``stage3``.
        own_opts: pairs for one of them alone, by its name.
    """
    own_opts = own_opts or {}
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
            own = (*opts, *own_opts.get(name, ()))
            stages.append(Stage(config, output / name, own, weights))
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
    """Check that stages fit together, and return whether each was trained and evaluated before."""
    for stage in stages:
        cfg = stage.cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""  # an earlier stage may have to make them yet
        cfg.MODEL.MASKX.BACKBONE.PRETRAINED = False
        check_config(cfg)
        build_on_cpu(cfg)
    # Stage 3 must have the refinement of stage 2 too, whose maps it segments.
    refined = (*_SHARED_KEYS, f"{KEYS}.HIDDEN_CHANNELS")
    return check_chain(stages, lambda s: refined if s.output.name == "stage2" else _SHARED_KEYS)


def _check_kind(stage: Stage) -> None:
    number, architecture = int(stage.output.name.removeprefix("stage")), architecture_of(stage.cfg)
    if not issubclass(architecture, EmbeddingModel) or architecture.stage != number:
        wanted = (MaskXConceptEmbedding, MaskXConceptRefinement, MaskXConceptSegmentation)
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {architecture.__name__} in {stage.config_file}, the "
            f"config of stage {number}. It must be {wanted[number - 1].__name__}: are two configs "
            "exchanged?"
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
    if stage.output.name != "stage2" or not keys.DISCRIMINATION_WEIGHT or keys.OVERLAP:
        return stage
    path = output / OVERLAP_NAME
    make_overlap(stage.cfg, path)
    return replace(stage, opts=(*stage.opts, _OVERLAP, str(path.resolve())))
