"""How LarvSeg is trained by Detectron2's engine."""

from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from torch import nn

from maskx.detectron2.hooks import Detectron2Hooks
from maskx.detectron2.sem_seg_evaluation import MaskXLargeVocabularyEvaluator
from maskx.systems.larvseg.detectron2.data import (
    JointLoader,
    MaskXJointMapper,
    build_joint_loader,
    check_joint_data,
    model_class_table,
    split_of_dataset,
    trained_indices,
)
from maskx.systems.larvseg.detectron2.model import MaskXLarvSeg


def _test_loader(cfg: CfgNode, dataset_name: str) -> Any:
    mapper = MaskXJointMapper(cfg, is_train=False, dataset_name=dataset_name)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)


def _evaluator(cfg: CfgNode, dataset_name: str) -> MaskXLargeVocabularyEvaluator:
    return MaskXLargeVocabularyEvaluator(dataset_name, split=split_of_dataset(cfg, dataset_name))


def _built(cfg: CfgNode, model: nn.Module, loader: Iterable) -> None:
    if isinstance(loader, JointLoader):
        model.network.classifier.set_trained(trained_indices(cfg, loader.sets))


HOOKS = Detectron2Hooks(
    system="larvseg",
    train_loader=build_joint_loader,
    test_loader=_test_loader,
    evaluator=_evaluator,
    check=check_joint_data,
    class_names=lambda cfg: model_class_table(cfg).names,
    split=lambda cfg: split_of_dataset(cfg, cfg.DATASETS.TRAIN[0]),
    built=_built,
)
MaskXLarvSeg.maskx_hooks = HOOKS
