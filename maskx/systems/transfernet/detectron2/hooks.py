"""How TransferNet, its baselines and its classifier are trained by Detectron2's engine."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.file_io import PathManager

from maskx.detectron2.hooks import Detectron2Hooks
from maskx.detectron2.image_label_evaluation import check_all_classes_known
from maskx.systems.transfernet.detectron2.data import (
    check_transfer_data,
    test_loader,
    train_loader,
    transfer_split,
)
from maskx.systems.transfernet.detectron2.evaluation import (
    MaskXTransferLabelEvaluator,
    MaskXTransferSemSegEvaluator,
)
from maskx.systems.transfernet.detectron2.model import (
    MaskXTransferClassifier,
    MaskXTransferNet,
    check_loaded,
    check_transfernet,
)


def _evaluator(kind: Callable[..., DatasetEvaluator]) -> Callable[..., DatasetEvaluator]:
    return lambda cfg, dataset_name: kind(dataset_name, split=transfer_split(cfg))


def _check_network(cfg: CfgNode) -> None:
    classifier = cfg.MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS
    if classifier and not cfg.MODEL.WEIGHTS and not PathManager.isfile(classifier):
        raise FileNotFoundError(
            f"MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS '{classifier}': there is no such file. "
            "Train the classifier of stage 0 first, or all stages with tools/train_transfernet.py."
        )
    check_transfernet(cfg)
    check_transfer_data(cfg)


def _check_classifier(cfg: CfgNode) -> None:
    check_transfer_data(cfg)
    for name in cfg.DATASETS.TRAIN:
        check_all_classes_known(name)


def _for_inference(cfg: CfgNode) -> None:
    cfg.MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS = ""


_SHARED = {
    "system": "transfernet",
    "train_loader": train_loader,
    "test_loader": test_loader,
    "class_names": lambda cfg: transfer_split(cfg).class_names,
    "split": transfer_split,
}
MaskXTransferNet.maskx_hooks = Detectron2Hooks(
    evaluator=_evaluator(MaskXTransferSemSegEvaluator),
    check=_check_network,
    started=check_loaded,
    for_inference=_for_inference,
    learns_label_maps=True,
    files=("MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS",),
    **_SHARED,
)
MaskXTransferClassifier.maskx_hooks = Detectron2Hooks(
    evaluator=_evaluator(MaskXTransferLabelEvaluator), check=_check_classifier, **_SHARED
)
