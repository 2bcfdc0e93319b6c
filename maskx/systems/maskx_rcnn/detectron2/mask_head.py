"""The mask head of maskx behind Detectron2's registry."""

import inspect
from functools import partial
from typing import Any, Protocol

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY, build_box_head
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from maskx.core.word_vectors import load_class_vectors
from maskx.systems.maskx_rcnn.detectron2.box_predictor import (
    class_names_from_config,
    text_vectors_from_config,
)
from maskx.systems.maskx_rcnn.mask_head import MaskXHead, mask_loss
from maskx.systems.maskx_rcnn.weight_transfer import DETECTOR_INPUTS, DetectorWeights

__all__ = ["MaskHeadProtocol", "MaskXMaskHead"]


class MaskHeadProtocol(Protocol):
    """What :class:`MaskXROIHeadsMixin` expects of a mask head, which must be an ``nn.Module``.

    To train another head on partial supervision, subclass it; without a use for ``detector``::

        class MyPartialMaskHead(MyMaskHead):
            def forward(self, features, instances, detector):
                return super().forward(features, instances)

    A batch without any mask is passed on as well, so a head must survive zero boxes.
    """

    def forward(
        self,
        features: Tensor | dict[str, Tensor],
        instances: list[Instances],
        detector: DetectorWeights,
    ) -> dict[str, Tensor] | list[Instances]:
        """Compute the mask losses in training, predict masks at inference.

        Args:
            features: (R, C, P, P) pooled features of the boxes of all images. Of RoI heads without
                a mask pooler: feature maps by name.
            instances: one per image, R boxes in all. In training: RoIs that have a mask, with
                ``proposal_boxes``, ``gt_classes`` and ``gt_masks`` (the latter may be absent
                where there is no RoI). At inference: with ``pred_boxes`` and ``pred_classes``.
            detector: live weights of the box predictor; None where it has no such rows.

        Returns:
            In training, losses by name (``loss_...``); also for R = 0, where they are zero with a
            graph through every parameter of the head. At inference, ``instances``, to which
            ``pred_masks`` were added: (N, 1, M, M) probabilities of the predicted class.
        """


def takes_detector_weights(mask_head: nn.Module) -> bool:
    """Whether a mask head follows :class:`MaskHeadProtocol`."""
    return "detector" in inspect.signature(mask_head.forward).parameters


@ROI_MASK_HEAD_REGISTRY.register()
class MaskXMaskHead(MaskXHead):
    """Mask head for partial supervision; to be driven by ``MaskXROIHeads``.

    Parameters carry the names of Detectron2's ``MaskRCNNConvUpsampleHead``, so checkpoints of the
    model zoo load: whole into the predictor ``class_specific``, the trunk into the others.

    Args:
        input_shape: shape of the pooled RoI features.
        loss_weight: multiplier of the mask loss.
        **kwargs: arguments of :class:`maskx.systems.maskx_rcnn.mask_head.MaskXHead`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, loss_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(in_channels=input_shape.channels, pool_size=input_shape.height, **kwargs)
        self.loss_weight = loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Raises:
            ValueError: two keys do not go together; the message names them and the remedy.
        """
        head, maskx = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.MASKX
        _check_config(cfg)
        transfer = transfer_arguments(cfg, input_shape.channels)
        return {
            "input_shape": input_shape,
            "loss_weight": maskx.LOSS_WEIGHT,
            "num_classes": num_classes_from_config(cfg),
            "channels": head.CONV_DIM,
            "trunk": maskx.TRUNK,
            "num_convs": head.NUM_CONV,
            "norm": partial(get_norm, head.NORM) if head.NORM else None,
            "predictor": maskx.PREDICTOR,
            "mlp": maskx.MLP,
            "transfer_inputs": transfer["inputs"],
            "transfer_layers": transfer["num_layers"],
            "transfer_activation": transfer["activation"],
            "stop_gradient": transfer["stop_gradient"],
            "detector_channels": transfer["detector_channels"],
            "class_vectors": transfer["class_vectors"],
        }

    def forward(
        self,
        features: Tensor,
        instances: list[Instances],
        detector: DetectorWeights | None = None,
    ) -> dict[str, Tensor] | list[Instances]:
        """Compute the mask loss, or predict masks; see :class:`MaskHeadProtocol`."""
        if detector is None:
            raise ValueError(
                "MaskXMaskHead got no weights of the box predictor: another RoI head than "
                "MaskXROIHeads drives it, which would train on masks that do not exist. Set "
                "MODEL.ROI_HEADS.NAME MaskXROIHeads."
            )
        if not self.training:
            class_indices = torch.cat([x.pred_classes for x in instances])
            mask_prob = super().forward(features, class_indices, detector).sigmoid()
            split = mask_prob[:, None].split([len(x) for x in instances])
            for instances_per_image, masks in zip(instances, split, strict=True):
                instances_per_image.pred_masks = masks
            return instances

        get_event_storage().put_scalar("maskx/num_mask_rois", len(features))
        class_indices = torch.cat([x.gt_classes for x in instances])
        mask_logits = super().forward(features, class_indices, detector)
        loss = mask_loss(mask_logits, crop_gt_masks(instances, self.mask_size, mask_logits.device))
        return {"loss_mask": loss * self.loss_weight}


def crop_gt_masks(rois: list[Instances], size: int, device: torch.device) -> Tensor:
    """Cut the training targets of RoIs with masks out of their images.

    Args:
        rois: one per image, with ``proposal_boxes`` and, where there are any, ``gt_masks``.
        size: M.
        device: device of the targets.

    Returns:
        (R, M, M) bool.
    """
    targets = [
        x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, size) for x in rois if len(x) > 0
    ]
    none = torch.empty(0, size, size, dtype=torch.bool, device=device)
    return torch.cat(targets) if targets else none


def num_classes_from_config(cfg: CfgNode) -> int | None:
    """Return K, or None where neither the text classifier nor the mask head depends on it."""
    maskx = cfg.MODEL.MASKX
    stored = maskx.PREDICTOR == "class_specific" or (
        maskx.PREDICTOR == "transfer" and maskx.TRANSFER.INPUTS in ("vectors", "randn")
    )
    if maskx.TEXT_CLASSIFIER.VECTORS and not stored:
        return None
    return cfg.MODEL.ROI_HEADS.NUM_CLASSES


def transfer_arguments(cfg: CfgNode, in_channels: int) -> dict[str, Any]:
    """Read the arguments of :class:`maskx.systems.maskx_rcnn.weight_transfer.WeightTransfer`.

    Args:
        cfg: configuration.
        in_channels: channels of the feature maps.
    """
    maskx = cfg.MODEL.MASKX
    inputs, transfers = maskx.TRANSFER.INPUTS, maskx.PREDICTOR == "transfer"
    from_detector = transfers and inputs in DETECTOR_INPUTS
    return {
        "inputs": inputs,
        "num_layers": maskx.TRANSFER.LAYERS,
        "activation": maskx.TRANSFER.ACTIVATION,
        "stop_gradient": maskx.TRANSFER.STOP_GRADIENT,
        "detector_channels": _detector_channels(cfg, in_channels) if from_detector else None,
        "class_vectors": _class_vectors(cfg) if transfers and inputs == "vectors" else None,
    }


def _check_config(cfg: CfgNode) -> None:
    """Refuse keys of Detectron2's own mask head that have another meaning here."""
    head = cfg.MODEL.ROI_MASK_HEAD
    if head.CLS_AGNOSTIC_MASK:
        raise ValueError(
            "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK is True, which MaskXMaskHead does not read. "
            "Set it to False, and MODEL.MASKX.PREDICTOR class_agnostic for class-agnostic masks."
        )
    if not head.POOLER_TYPE:
        raise ValueError(
            "MODEL.ROI_MASK_HEAD.POOLER_TYPE is empty, but MaskXMaskHead needs pooled features. "
            "Allowed: ROIAlign, ROIAlignV2 or ROIPool."
        )


def _detector_channels(cfg: CfgNode, in_channels: int) -> int:
    """Length of a classifier row: as given, of the text vectors, or of the output of a box head."""
    if cfg.MODEL.MASKX.TRANSFER.DETECTOR_CHANNELS:
        return cfg.MODEL.MASKX.TRANSFER.DETECTOR_CHANNELS
    if cfg.MODEL.MASKX.TEXT_CLASSIFIER.VECTORS:
        return text_vectors_from_config(cfg).shape[1]
    size = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    with torch.device("meta"):  # only its output shape is wanted
        head = build_box_head(cfg, ShapeSpec(channels=in_channels, height=size, width=size))
    shape = head.output_shape
    return shape.channels * (shape.height or 1) * (shape.width or 1)


def _class_vectors(cfg: CfgNode) -> Tensor:
    """Look up the vector of each class by its name in the training data."""
    path = cfg.MODEL.MASKX.TRANSFER.VECTORS
    if not path:
        raise ValueError(
            "MODEL.MASKX.TRANSFER.INPUTS is 'vectors', but MODEL.MASKX.TRANSFER.VECTORS is empty. "
            "Give the path of a file with one vector per class name, or transfer from 'cls+box'."
        )
    return torch.from_numpy(load_class_vectors(path, class_names_from_config(cfg)))
