"""The mask head of maskx behind Detectron2's registry."""

from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY, build_box_head
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from maskx.data.word_vectors import load_class_vectors
from maskx.detectron2.data import register_all, register_from_config, training_class_names
from maskx.modeling.mask_head import MaskXHead, mask_loss
from maskx.modeling.weight_transfer import DETECTOR_INPUTS, DetectorWeights

__all__ = ["MaskXMaskHead"]


@ROI_MASK_HEAD_REGISTRY.register()
class MaskXMaskHead(MaskXHead):
    """Mask head for partial supervision; to be driven by ``MaskXROIHeads``.

    Parameters carry the names of Detectron2's ``MaskRCNNConvUpsampleHead``, so checkpoints of the
    model zoo load: whole into the predictor ``class_specific``, the trunk into the others.

    Args:
        input_shape: shape of the pooled RoI features.
        loss_weight: multiplier of the mask loss.
        **kwargs: arguments of :class:`maskx.modeling.mask_head.MaskXHead`.
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
        transfers = maskx.PREDICTOR == "transfer"
        inputs = maskx.TRANSFER.INPUTS
        return {
            "input_shape": input_shape,
            "loss_weight": maskx.LOSS_WEIGHT,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "channels": head.CONV_DIM,
            "num_convs": head.NUM_CONV,
            "norm": partial(get_norm, head.NORM) if head.NORM else None,
            "predictor": maskx.PREDICTOR,
            "mlp": maskx.MLP,
            "transfer_inputs": inputs,
            "transfer_layers": maskx.TRANSFER.LAYERS,
            "transfer_activation": maskx.TRANSFER.ACTIVATION,
            "stop_gradient": maskx.TRANSFER.STOP_GRADIENT,
            "detector_channels": (
                _box_predictor_channels(cfg, input_shape.channels)
                if transfers and inputs in DETECTOR_INPUTS
                else None
            ),
            "class_vectors": _class_vectors(cfg) if transfers and inputs == "vectors" else None,
        }

    def forward(
        self,
        features: Tensor,
        instances: list[Instances],
        detector: DetectorWeights | None = None,
    ) -> dict[str, Tensor] | list[Instances]:
        """Compute the mask loss, or predict masks.

        Args:
            features: (R, C, P, P) pooled features of the boxes of all images.
            instances: one per image, R boxes in all. In training: RoIs that have a mask, with
                ``proposal_boxes``, ``gt_classes`` and ``gt_masks`` (the latter may be absent
                where there is no RoI). At inference: with ``pred_classes``.
            detector: live weights of the box predictor.

        Returns:
            In training, the losses. At inference, ``instances``, to which ``pred_masks`` were
            added: (N, 1, M, M) probabilities of the predicted class.
        """
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
        mask_targets = [
            x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, self.mask_size)
            for x in instances
            if len(x) > 0
        ]
        # Without RoIs the loss does not look at its targets.
        loss = mask_loss(mask_logits, torch.cat(mask_targets) if mask_targets else mask_logits)
        return {"loss_mask": loss * self.loss_weight}


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


def _box_predictor_channels(cfg: CfgNode, in_channels: int) -> int:
    """Channels that enter the box predictor, whichever box head is configured."""
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
    # A predictor is built from the configuration alone, before anybody registered its data sets.
    register_all()
    register_from_config(cfg)
    return torch.from_numpy(load_class_vectors(path, training_class_names(cfg)))
