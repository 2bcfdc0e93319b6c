"""How the stages of ConceptMask are trained by Detectron2's engine."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from torch import nn

from maskx.detectron2.hooks import Detectron2Hooks
from maskx.systems.concept_mask.detectron2.data import (
    MaskXConceptMapper,
    build_concept_loader,
    check_concept_data,
    concept_table,
    concept_test_data,
)
from maskx.systems.concept_mask.detectron2.evaluation import MaskXConceptEvaluator
from maskx.systems.concept_mask.detectron2.model import (
    MaskXConceptMask,
    check_concept_mask,
    check_started,
)


def _test_loader(cfg: CfgNode, dataset_name: str) -> Any:
    mapper = MaskXConceptMapper(cfg, is_train=False, dataset_name=dataset_name)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)


def _evaluator(cfg: CfgNode, dataset_name: str) -> MaskXConceptEvaluator:
    return MaskXConceptEvaluator(dataset_name, test=concept_test_data(cfg, dataset_name))


def _check(cfg: CfgNode) -> None:
    check_concept_mask(cfg)
    check_concept_data(cfg)


def _started(cfg: CfgNode, model: nn.Module, missing: Sequence[str]) -> None:
    check_started(cfg, missing)
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    if keys.STAGE == 3 and keys.ENCODER_PRETRAINED and model.is_new:
        model.start_encoder(keys.ENCODER_DEPTH)


def _for_inference(cfg: CfgNode) -> None:
    cfg.MODEL.MASKX.CONCEPT_MASK.OVERLAP = ""  # read by its training alone


HOOKS = Detectron2Hooks(
    system="concept_mask",
    train_loader=build_concept_loader,
    test_loader=_test_loader,
    evaluator=_evaluator,
    check=_check,
    class_names=lambda cfg: concept_table(cfg).names,
    split=lambda cfg: None,
    started=_started,
    for_inference=_for_inference,
    files=tuple(f"MODEL.MASKX.CONCEPT_MASK.{key}" for key in ("WORD_TABLE", "SPLIT", "OVERLAP")),
)
MaskXConceptMask.maskx_hooks = HOOKS
