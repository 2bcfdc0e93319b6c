"""Box predictor that classifies by fixed vectors of the class names, as open-vocabulary detectors.

Shape legend:
    R: number of RoIs; K: number of foreground classes; D: channels of the RoI features; E: length
    of the vector of a class.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import Tensor, nn

from maskx.core.word_vectors import load_class_vectors
from maskx.detectron2.datasets import register_from_config, training_class_names
from maskx.detectron2.known_datasets import register_all
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights

__all__ = ["MaskXTextOutputLayers", "TextClassifier", "class_names_from_config"]


class TextClassifier(nn.Module):
    """Cosine classifier over fixed class vectors, with a learned projection of the features.

    The logit of class k is ``temperature * cos(projection(x), vector_k)``. Background has the zero
    vector, so its logit is always 0 (Detic, Zhou et al., ECCV 2022).

    Args:
        in_channels: D.
        class_vectors: (K, E), not all zero in a row; kept normalised to length 1. They are no part
            of a checkpoint, so that one with other classes loads.
        temperature: multiplier of the cosine, above 0; 50 in Detic.

    Raises:
        ValueError: the temperature is out of range.
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
        input_shape: shape of the features that enter the box predictor.
        class_vectors: (K, E), by class index, as a tensor or as the array of
            :func:`maskx.core.word_vectors.load_class_vectors`.
        temperature: see :class:`TextClassifier`.
        **kwargs: arguments of ``FastRCNNOutputLayers``.

    Raises:
        ValueError: there is not one usable vector per class, or box regression is to be
            class-specific.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        class_vectors: Tensor | np.ndarray,
        temperature: float = 50.0,
        cls_agnostic_bbox_reg: bool = True,
        **kwargs: Any,
    ) -> None:
        class_vectors = torch.as_tensor(class_vectors)
        _check_vectors(class_vectors, num_classes)
        if not cls_agnostic_bbox_reg:
            raise ValueError(
                "A text classifier needs class-agnostic box regression: there are no learned "
                "weights per class. Set MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True "
                "(cls_agnostic_bbox_reg=True without a configuration)."
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
    """Read the (K, E) class vectors of ``MODEL.MASKX.TEXT_CLASSIFIER``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be used, or lacks a class.
    """
    path = cfg.MODEL.MASKX.TEXT_CLASSIFIER.VECTORS
    return torch.from_numpy(load_class_vectors(path, class_names_from_config(cfg)))


def class_names_from_config(cfg: CfgNode) -> list[str]:
    """Return the class list of the model: that of the text classifier, or of the training data.

    Raises:
        ValueError: there is none, or it has another length than ``MODEL.ROI_HEADS.NUM_CLASSES``.
    """
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
            f"The vectors of class indices {zero} are all zero, which is the vector of the "
            "background. Give every class a vector of its own."
        )
