"""What image classifiers and semantic segmentation share: a feature map, and normalised images."""

from collections.abc import Sequence
from typing import Any

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
    return name, shapes[name].channels


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
