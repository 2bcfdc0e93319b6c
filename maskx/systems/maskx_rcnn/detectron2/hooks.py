"""How Mask^X R-CNN, and every other detector, is trained and evaluated by Detectron2's engine."""

import functools
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
from torch import nn

from maskx.core.text import listed
from maskx.detectron2.adapters import AspectGroupedBatches, SeededMapper, seeded_train_loader
from maskx.detectron2.evaluation import MaskXCOCOEvaluator
from maskx.detectron2.hooks import Detectron2Hooks, check_num_classes, set_default_hooks
from maskx.systems.maskx_rcnn.detectron2.dataset_mapper import MaskXDatasetMapper
from maskx.systems.maskx_rcnn.detectron2.grabcut import predicts_masks
from maskx.systems.maskx_rcnn.detectron2.proposal_generator import MaskXRPN
from maskx.systems.maskx_rcnn.detectron2.rcnn import check_can_freeze
from maskx.systems.maskx_rcnn.detectron2.roi_heads import MaskXROIHeadsMixin

__all__ = ["HOOKS"]


def _train_loader(cfg: CfgNode) -> Any:
    mapper = MaskXDatasetMapper(cfg, is_train=True)
    keys = cfg.DATALOADER
    if keys.SAMPLER_TRAIN != "TrainingSampler":  # its own order, which does not go on on resume
        return build_detection_train_loader(cfg, mapper=mapper)
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=keys.FILTER_EMPTY_ANNOTATIONS,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    batches = None
    if keys.ASPECT_RATIO_GROUPING:
        is_wide = [record["width"] > record["height"] for record in records]
        batches = functools.partial(AspectGroupedBatches, is_wide)
    return seeded_train_loader(cfg, records, SeededMapper(mapper), batches)


def _test_loader(cfg: CfgNode, dataset_name: str) -> Any:
    mapper = MaskXDatasetMapper(cfg, is_train=False)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)


def _evaluator(cfg: CfgNode, dataset_name: str) -> MaskXCOCOEvaluator:
    return MaskXCOCOEvaluator(
        dataset_name,
        split=cfg.DATASETS.MASKX.SPLIT,
        iou_types=("bbox", "segm") if predicts_masks(cfg) else ("bbox",),
        output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name),
    )


def _check(cfg: CfgNode) -> None:
    check_can_freeze(cfg)
    _check_text_classifier(cfg)
    check_num_classes(cfg, "MODEL.ROI_HEADS.NUM_CLASSES")
    if not cfg.MODEL.MASKX.FREEZE_DETECTOR:
        _check_incomplete_boxes(cfg)


def _check_text_classifier(cfg: CfgNode) -> None:
    """Refuse RoI heads that would classify by learned weights all the same."""
    vectors, name = cfg.MODEL.MASKX.TEXT_CLASSIFIER.VECTORS, cfg.MODEL.ROI_HEADS.NAME
    if vectors and not issubclass(ROI_HEADS_REGISTRY.get(name), MaskXROIHeadsMixin):
        raise ValueError(
            f"MODEL.MASKX.TEXT_CLASSIFIER.VECTORS is '{vectors}', but MODEL.ROI_HEADS.NAME {name} "
            "do not read it. Set NAME MaskXROIHeads or MaskXCascadeROIHeads, or VECTORS ''."
        )


def _check_incomplete_boxes(cfg: CfgNode) -> None:
    """Refuse modules that would take objects of classes without annotations for background."""
    for dataset in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(dataset)
        num_annotated = len(metadata.thing_dataset_id_to_contiguous_id)
        if num_annotated == len(metadata.thing_classes):
            continue
        for key, registry, needed in (
            ("PROPOSAL_GENERATOR", PROPOSAL_GENERATOR_REGISTRY, MaskXRPN),
            ("ROI_HEADS", ROI_HEADS_REGISTRY, MaskXROIHeadsMixin),
        ):
            name = cfg.MODEL[key].NAME
            if name != "PrecomputedProposals" and not issubclass(registry.get(name), needed):
                remedy = needed.__name__.removesuffix("Mixin")
                raise ValueError(
                    f"Data set '{dataset}' annotates {num_annotated} of "
                    f"{len(metadata.thing_classes)} classes, so its boxes are incomplete, but "
                    f"MODEL.{key}.NAME {name} would take every other object for background. Set "
                    f"it to {remedy}."
                )


def _started(cfg: CfgNode, model: nn.Module, missing: Sequence[str]) -> None:
    """Check that a detector that is to stay frozen was loaded."""
    if not cfg.MODEL.MASKX.FREEZE_DETECTOR:
        return
    weights = cfg.MODEL.WEIGHTS
    missing = [name for name in missing if not name.startswith("roi_heads.mask_head.")]
    if weights and not missing:
        return
    lacks = f"lacks {len(missing)} of its weights: {listed(missing, 5)}" if weights else "is empty"
    raise ValueError(
        f"MODEL.MASKX.FREEZE_DETECTOR keeps the detector as it was trained in stage 1, but "
        f"MODEL.WEIGHTS '{weights}' {lacks}. Train a detector with the same backbone and classes "
        "first, for example configs/MaskX/stage1/faster_rcnn_R_50_FPN_1x.yaml, and set "
        "MODEL.WEIGHTS to its model_final.pth."
    )


HOOKS = Detectron2Hooks(
    system="maskx",
    train_loader=_train_loader,
    test_loader=_test_loader,
    evaluator=_evaluator,
    check=_check,
    started=_started,
)
set_default_hooks(HOOKS)
