"""What image classifiers and semantic segmentation share: a feature map, and normalised images."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import Backbone, build_backbone
from torch import Tensor, nn

__all__ = ["ImageModel", "choose_feature"]


class ImageModel(nn.Module):
    """Base of meta-architectures that see whole images.

    Args:
        pixel_mean: by channel, in the order of the images.
        pixel_std: by channel.
    """

    def __init__(self, *, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration; Detectron2 makes the model of them."""
        return {
            "backbone": build_backbone(cfg),
            "in_feature": cfg.MODEL.MASKX.IN_FEATURE,
            "num_classes": cfg.MODEL.MASKX.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is; inputs are moved there."""
        return self.pixel_mean.device

    def normalised(self, image: Tensor) -> Tensor:
        """Normalise an image (3, H, W) in [0, 255] of the format of the model."""
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std

    def normalised_square(self, image: Tensor, size: int) -> Tensor:
        """Normalise an image (3, H, W) and warp it to (3, size, size)."""
        image = self.normalised(image)
        if image.shape[-2:] == (size, size):
            return image
        # Antialiased, as the images of the training are.
        return F.interpolate(
            image[None], (size, size), mode="bilinear", align_corners=False, antialias=True
        )[0]


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


def lacking_weights(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Names of the weights of a module that a checkpoint lacks or holds in another shape.

    Args:
        module: part of a model.
        state: of a checkpoint.
        prefix: of the names there.
    """
    lacking = []
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):  # frozen batch norm has none
            continue
        found = state.get(prefix + name)
        if found is None or found.shape != value.shape:
            lacking.append(prefix + name)
    return lacking


def required(sample: dict[str, Any], key: str, mapper: str) -> Any:
    """Return what a training sample must have.

    Raises:
        ValueError: it does not have it.
    """
    if key not in sample:
        raise ValueError(
            f"The training sample of image {sample.get('image_id', 'without id')!r} has no '{key}'."
            f" {mapper}"
        )
    return sample[key]


def resized_image(image: Tensor, height: int, width: int) -> np.ndarray:
    """Make an image (height, width, 3) uint8 of a sample's (3, H, W) in [0, 255]."""
    pixels = image.cpu().clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = height < pixels.shape[0]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=interpolation)


def check_same_backbone(
    model: ImageModel, classifier: Mapping[str, Tensor], prefix: str = ""
) -> None:
    """Check that the backbone of an image classifier is one to start from.

    Args:
        model: the segmentation network.
        classifier: weights of :class:`maskx.detectron2.MaskXImageClassifier`.
        prefix: of their names.

    Raises:
        ValueError: it is another backbone.
    """
    backbone = model.network.backbone
    lacking = lacking_weights(backbone, classifier, f"{prefix}classifier.backbone.")
    if lacking:
        raise ValueError(
            f"The image classifier that the segmentation network is to start from lacks "
            f"{len(lacking)} of the weights of its backbone {type(backbone).__name__}, or holds "
            f"them in another shape, such as {lacking[0]}. Choose the same MODEL.BACKBONE.NAME "
            "and MODEL.RESNETS for both, or start the segmentation network from other weights: "
            "MODEL.WEIGHTS, or MODEL.MASKX.BACKBONE.PRETRAINED True."
        )
