"""TransferNet and its classifier of image labels as meta-architectures of Detectron2."""

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.utils.events import get_event_storage
from detectron2.utils.file_io import PathManager
from torch import Tensor

from maskx.core.image_classifier import ImageClassifier
from maskx.detectron2.checkpointer import read_weights
from maskx.detectron2.evaluation import check_all_classes_known
from maskx.detectron2.hooks import Detectron2Hooks
from maskx.detectron2.whole_images import MaskXImageClassifier, choose_feature, pixel_arguments
from maskx.supervision import CategorySplit
from maskx.systems.transfernet.detectron2.data import (
    MaskXTransferLabelEvaluator,
    MaskXTransferSemSegEvaluator,
    check_transfer_data,
    test_loader,
    train_loader,
    transfer_split,
)
from maskx.systems.transfernet.model import TransferNetModel, build_network
from maskx.systems.transfernet.network import PairNetwork
from maskx.systems.transfernet.samples import classes_of_stage

_KEYS = "MODEL.MASKX.TRANSFERNET"
_ENTROPY_PERIOD = 20  # iterations; Detectron2 writes as often, and reading it waits for the GPU


@META_ARCH_REGISTRY.register()
class MaskXTransferClassifier(MaskXImageClassifier):
    """:class:`MaskXImageClassifier` for the tags of source and target images.

    What source categories a target image shows is not known, and taken as absent: without, source
    categories are predicted on target images, see the page of TransferNet.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        split = _known_split(cfg)
        names = () if split is None else split.class_names
        return super().from_config(cfg) | {"class_names": names}


@META_ARCH_REGISTRY.register()
class MaskXTransferNet(TransferNetModel):
    """:class:`maskx.systems.transfernet.model.TransferNetModel` in Detectron2.

    Args:
        classifier_weights: checkpoint of a :class:`MaskXTransferClassifier` to start from, see
            :meth:`start_from`; "" leaves classifier and encoder as they are.
        **arguments: of ``TransferNetModel``.
    """

    @configurable
    def __init__(
        self,
        *,
        network: PairNetwork,
        classifier: ImageClassifier,
        classifier_weights: str = "",
        **arguments: Any,
    ) -> None:
        super().__init__(network, classifier, **arguments)
        if classifier_weights:
            self.start_from(read_weights(classifier_weights), f"{_KEYS}.CLASSIFIER_WEIGHTS")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        keys = cfg.MODEL.MASKX.TRANSFERNET
        weights = "" if cfg.MODEL.WEIGHTS else keys.CLASSIFIER_WEIGHTS
        without_imagenet = cfg.clone()
        without_imagenet.defrost()
        without_imagenet.MODEL.MASKX.BACKBONE.PRETRAINED = False
        backbone = build_backbone(without_imagenet)
        in_feature, in_channels = choose_feature(backbone, keys.CLASSIFIER_FEATURE)
        classifier = ImageClassifier(
            backbone,
            in_feature=in_feature,
            in_channels=in_channels,
            num_classes=cfg.MODEL.MASKX.NUM_CLASSES,
        )
        shares_encoder = keys.METHOD == "transfernet" or keys.FREEZE_ENCODER
        encoder = build_backbone(without_imagenet if weights and shares_encoder else cfg)
        in_feature, in_channels = choose_feature(encoder, cfg.MODEL.MASKX.IN_FEATURE)
        split = _known_split(cfg)
        options = {key.lower(): value for key, value in keys.items() if "CLASSIFIER" not in key}
        network = build_network(
            encoder,
            in_feature=in_feature,
            in_channels=in_channels,
            stride=encoder.output_shape()[in_feature].stride,
            size=cfg.INPUT.MASKX.SIZE,
            num_classes=cfg.MODEL.MASKX.NUM_CLASSES,
            stage_classes=None if split is None else classes_of_stage(split, keys.STAGE),
            **options,
        )
        return {
            "network": network,
            "classifier": classifier,
            "classifier_weights": weights,
            "size": cfg.INPUT.MASKX.SIZE,
            "class_names": () if split is None else split.class_names,
            "gt_labels": cfg.TEST.MASKX.GT_LABELS,
            "crf": cfg.TEST.MASKX.CRF,
            **pixel_arguments(cfg),
        }

    def log(self, name: str, value: float | Tensor) -> None:
        """Write a number into the storage of the training."""
        storage = get_event_storage()
        if not isinstance(value, Tensor) or storage.iter % _ENTROPY_PERIOD == 0:
            storage.put_scalar(f"maskx/{name}", value)


def _known_split(cfg: CfgNode) -> CategorySplit | None:
    """None without the data sets, of a predictor; the class names are those of the checkpoint."""
    is_known = cfg.DATASETS.TRAIN and all(n in DatasetCatalog for n in cfg.DATASETS.TRAIN)
    return transfer_split(cfg) if is_known else None


def _check_loaded(cfg: CfgNode, model: MaskXTransferNet, missing: Sequence[str]) -> None:
    """Check, before a training starts, that what stays as it was loaded was loaded."""
    keys, weights = cfg.MODEL.MASKX.TRANSFERNET, cfg.MODEL.WEIGHTS
    from_elsewhere = keys.CLASSIFIER_WEIGHTS or cfg.MODEL.MASKX.BACKBONE.PRETRAINED
    for key, value, prefix, is_loaded in (
        ("FREEZE_ENCODER", True, "network.encoder.", bool(weights or from_elsewhere)),
        ("FREEZE_ATTENTION", True, "network.attention.", bool(weights)),
        ("STAGE", "target", "network.decoder.", bool(weights)),
    ):
        lacking = [name for name in missing if name.startswith(prefix)]
        if keys[key] == value and (lacking or not is_loaded):
            lacks = f"lacks {', '.join(lacking[:3])}" if lacking else "is empty"
            raise ValueError(
                f"{_KEYS}.{key} is {value}, but what is to stay as it was loaded is random: "
                f"MODEL.WEIGHTS '{weights}' {lacks}. Train the stages in their order, with "
                f"tools/train_transfernet.py, or set {_KEYS}.CLASSIFIER_WEIGHTS for stage 1 and "
                "MODEL.WEIGHTS for stage 2."
            )
    if cfg.DATASETS.TEST and not cfg.TEST.MASKX.GT_LABELS and not model.has_classifier:
        raise ValueError(
            f"{_KEYS}.CLASSIFIER_WEIGHTS is '{keys.CLASSIFIER_WEIGHTS}' and MODEL.WEIGHTS "
            f"'{weights}': neither gives a trained classifier, which chooses the labels of the "
            f"images of {', '.join(cfg.DATASETS.TEST)} after the training. Train one with "
            "META_ARCHITECTURE MaskXTransferClassifier, or set TEST.MASKX.GT_LABELS True."
        )


def _evaluator(kind: Callable[..., DatasetEvaluator]) -> Callable[..., DatasetEvaluator]:
    return lambda cfg, dataset_name: kind(dataset_name, split=transfer_split(cfg))


def _check_network(cfg: CfgNode) -> None:
    keys = cfg.MODEL.MASKX.TRANSFERNET
    weights = keys.CLASSIFIER_WEIGHTS
    if weights and not cfg.MODEL.WEIGHTS and not PathManager.isfile(weights):
        raise FileNotFoundError(
            f"{_KEYS}.CLASSIFIER_WEIGHTS '{weights}': there is no such file. Train the classifier "
            "of stage 0 first, or all stages with tools/train_transfernet.py."
        )
    if keys.STAGE == "attention" and cfg.DATASETS.TEST:
        raise ValueError(
            f"{_KEYS}.STAGE is 'attention', which makes no masks that could be evaluated on "
            f"{', '.join(cfg.DATASETS.TEST)}. Set DATASETS.TEST ()."
        )
    if cfg.SOLVER.MASKX.BACKBONE_LR_FACTOR != 1 and keys.FREEZE_ENCODER:
        raise ValueError(
            f"SOLVER.MASKX.BACKBONE_LR_FACTOR is {cfg.SOLVER.MASKX.BACKBONE_LR_FACTOR}, but the "
            f"backbone of MaskXTransferNet is frozen by {_KEYS}.FREEZE_ENCODER True. Set it to 1."
        )
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
    started=_check_loaded,
    for_inference=_for_inference,
    learns_label_maps=True,
    files=("MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS",),
    **_SHARED,
)
MaskXTransferClassifier.maskx_hooks = Detectron2Hooks(
    evaluator=_evaluator(MaskXTransferLabelEvaluator), check=_check_classifier, **_SHARED
)
