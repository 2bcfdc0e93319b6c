"""TransferNet and its classifier of image labels as meta-architectures of Detectron2."""

import pickle
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.utils.events import get_event_storage
from torch import Tensor

from maskx.core.image_classifier import ImageClassifier
from maskx.detectron2.hooks import architecture_of
from maskx.detectron2.image_classifier import MaskXImageClassifier
from maskx.detectron2.image_model import choose_feature, pixel_arguments
from maskx.systems.transfernet.detectron2.data import transfer_split
from maskx.systems.transfernet.model import TransferNetModel, build_network
from maskx.systems.transfernet.network import PairNetwork

__all__ = ["MaskXTransferClassifier", "MaskXTransferNet", "check_loaded", "check_transfernet"]

_KEYS = "MODEL.MASKX.TRANSFERNET"
_ENTROPY_PERIOD = 20  # iterations; Detectron2 writes as often, and reading it waits for the GPU


@META_ARCH_REGISTRY.register()
class MaskXTransferClassifier(MaskXImageClassifier):
    """:class:`MaskXImageClassifier` for the tags of source and target images.

    What source categories a target image shows is not known, and taken as absent: without, source
    categories are predicted on target images, see the page of TransferNet.
    """


@META_ARCH_REGISTRY.register()
class MaskXTransferNet(TransferNetModel):
    """:class:`maskx.systems.transfernet.model.TransferNetModel` in Detectron2.

    Args:
        classifier_weights: checkpoint of a :class:`MaskXTransferClassifier` to start from, see
            :meth:`start_from`; "" leaves classifier and encoder as they are.
        **arguments: of ``TransferNetModel``.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it cannot be read, or does not fit.
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
            self.start_from(_read(classifier_weights), f"{_KEYS}.CLASSIFIER_WEIGHTS")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Raises:
            ValueError: keys do not fit together.
        """
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
        encoder = build_backbone(without_imagenet if weights else cfg)
        in_feature, in_channels = choose_feature(encoder, cfg.MODEL.MASKX.IN_FEATURE)
        names = ("METHOD", "STAGE", "ATTENTION", "NUM_FACTORS", "HIDDEN_CHANNELS", "DECODER")
        names += ("DECODER_INPUT", "FEATURE_SCALE", "FREEZE_ENCODER", "FREEZE_ATTENTION")
        network = build_network(
            encoder,
            in_feature=in_feature,
            in_channels=in_channels,
            stride=encoder.output_shape()[in_feature].stride,
            size=cfg.INPUT.MASKX.SIZE,
            num_classes=cfg.MODEL.MASKX.NUM_CLASSES,
            **{name.lower(): keys[name] for name in (*names, "MASK_WEIGHT")},
        )
        is_known = cfg.DATASETS.TRAIN and all(n in DatasetCatalog for n in cfg.DATASETS.TRAIN)
        return {
            "network": network,
            "classifier": classifier,
            "classifier_weights": weights,
            "size": cfg.INPUT.MASKX.SIZE,
            # Without the data sets, of a predictor, they are those of the checkpoint.
            "class_names": transfer_split(cfg).class_names if is_known else (),
            "gt_labels": cfg.TEST.MASKX.GT_LABELS,
            "crf": cfg.TEST.MASKX.CRF,
            **pixel_arguments(cfg),
        }

    def log(self, name: str, value: float | Tensor) -> None:
        """Write a number into the storage of the training."""
        storage = get_event_storage()
        if not isinstance(value, Tensor) or storage.iter % _ENTROPY_PERIOD == 0:
            storage.put_scalar(f"maskx/{name}", value)


def _read(path: str) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["model"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, KeyError) as error:
        raise ValueError(
            f"{_KEYS}.CLASSIFIER_WEIGHTS '{path}' cannot be read ({type(error).__name__}). Give "
            "the model_final.pth of a training of MaskXTransferClassifier."
        ) from error


def check_transfernet(cfg: CfgNode) -> None:
    """Refuse configurations of :class:`MaskXTransferNet` that would fail or mislead later.

    Raises:
        FileNotFoundError: there is no such checkpoint of a classifier.
        ValueError: the stage cannot be evaluated, or a key has no effect.
    """
    if not issubclass(architecture_of(cfg), MaskXTransferNet):
        return
    if cfg.MODEL.MASKX.TRANSFERNET.STAGE == "attention" and cfg.DATASETS.TEST:
        raise ValueError(
            f"{_KEYS}.STAGE is 'attention', which makes no masks that could be evaluated on "
            f"{', '.join(cfg.DATASETS.TEST)}. Set DATASETS.TEST ()."
        )
    if cfg.SOLVER.MASKX.BACKBONE_LR_FACTOR != 1:
        raise ValueError(
            f"SOLVER.MASKX.BACKBONE_LR_FACTOR is {cfg.SOLVER.MASKX.BACKBONE_LR_FACTOR}, but the "
            f"backbone of MaskXTransferNet is frozen, or trains as everything else with "
            f"{_KEYS}.FREEZE_ENCODER False. Set it to 1."
        )


def check_loaded(cfg: CfgNode, model: MaskXTransferNet, missing: Sequence[str]) -> None:
    """Check, before a training starts, that what stays as it was loaded was loaded.

    Args:
        cfg: the configuration.
        model: with its weights.
        missing: names of the weights that ``MODEL.WEIGHTS`` does not have.

    Raises:
        ValueError: a frozen part, or the classifier that an evaluation needs, is random.
    """
    keys, weights = cfg.MODEL.MASKX.TRANSFERNET, cfg.MODEL.WEIGHTS
    from_elsewhere = keys.CLASSIFIER_WEIGHTS or cfg.MODEL.MASKX.BACKBONE.PRETRAINED
    for key, prefix, is_loaded in (
        ("FREEZE_ENCODER", "network.encoder.", bool(weights or from_elsewhere)),
        ("FREEZE_ATTENTION", "network.attention.", bool(weights)),
    ):
        lacking = [name for name in missing if name.startswith(prefix)]
        if keys[key] and (lacking or not is_loaded):
            lacks = f"lacks {', '.join(lacking[:3])}" if lacking else "is empty"
            raise ValueError(
                f"{_KEYS}.{key} is True, but what is to stay as it was loaded is random: "
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
