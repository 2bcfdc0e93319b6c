"""What the configurations of image classifiers and semantic segmentation share."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone

__all__ = ["choose_feature", "pixel_arguments"]


def pixel_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of :class:`maskx.core.sample_models.SampleModel` but the size of images."""
    return {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}


def choose_feature(backbone: Backbone, name: str) -> tuple[str, int]:
    """Return the name and the channels of a feature map of a backbone.

    What the feature map does not depend on is taken away (backbones of maskx) or frozen (others):
    training by several processes stops where a parameter gets no gradient.

    Args:
        backbone: any of Detectron2.
        name: of the feature map; "" for the last.

    Raises:
        ValueError: the backbone has no such feature map.
    """
    shapes = backbone.output_shape()
    if name and name not in shapes:
        raise ValueError(
            f"MODEL.MASKX.IN_FEATURE (in_feature) is '{name}', which {type(backbone).__name__} "
            f"does not return. Allowed: {', '.join(shapes)}; '' for the last of them."
        )
    name = name or list(shapes)[-1]
    if hasattr(backbone, "drop_layers_after"):
        backbone.drop_layers_after(name)
    elif len(shapes) > 1:
        _freeze_unused(backbone, name)
    return name, shapes[name].channels


def _freeze_unused(backbone: Backbone, name: str) -> None:
    """Freeze the parameters that have no part in a feature map, found by a small image."""
    stride = max(shape.stride for shape in backbone.output_shape().values())
    side = 2 * max(stride, backbone.size_divisibility)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    if not trained:
        return
    is_training = backbone.training
    backbone.eval()  # keeps the statistics of batch norm
    image = trained[0].new_zeros(1, 3, side, side)
    with torch.enable_grad():
        found = torch.autograd.grad(backbone(image)[name].sum(), trained, allow_unused=True)
    backbone.train(is_training)
    for parameter, gradient in zip(trained, found, strict=True):
        parameter.requires_grad_(gradient is not None)
