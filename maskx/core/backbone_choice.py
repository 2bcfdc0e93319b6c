"""Backbones of whole-image models on the embedded host, by name."""

from collections.abc import Sequence

from torch import nn

from maskx.core.backbones import RESNET_DEPTHS, VGG16, DilatedResNet, FeatureShape, SmallResNet
from maskx.core.checks import check_choice

__all__ = ["BACKBONES", "RESNETS", "build_backbone", "choose_feature"]

_DEPTHS = {f"resnet{depth}": depth for depth in RESNET_DEPTHS}
RESNETS = ("small", *_DEPTHS)
"""Names of the backbones with the stages of a ResNet."""
BACKBONES = ("small", "vgg16", *_DEPTHS)
"""Names of all backbones."""


def build_backbone(
    name: str, *, frozen_norm: bool, pretrained: bool, allowed: Sequence[str] = BACKBONES
) -> SmallResNet | DilatedResNet | VGG16:
    """Make a backbone.

    Args:
        name: ``small``, with stride 8; ``vgg16``, with stride 16; or a torchvision ResNet, with
            stride 8.
        frozen_norm: fix the norms of a ResNet; the others have no use for it.
        pretrained: load ImageNet weights, which torchvision downloads.
        allowed: names that the caller has a use for.

    Raises:
        ValueError: the name is not allowed, or there are no such weights.
    """
    if name not in allowed:
        raise ValueError(f"backbone must be one of {', '.join(allowed)}; got {name!r}.")
    weights = "DEFAULT" if pretrained else None
    if name == "vgg16":
        return VGG16(weights=weights)
    if name in _DEPTHS:
        return DilatedResNet(depth=_DEPTHS[name], frozen_norm=frozen_norm, weights=weights)
    if pretrained:
        raise ValueError(
            "There are no pretrained weights of the backbone 'small'. Name one of torchvision, "
            "such as resnet50, or train from random weights."
        )
    return SmallResNet(output_stride=8)


def choose_feature(backbone: nn.Module, name: str | None = None) -> tuple[str, FeatureShape]:
    """Return the name and shape of a feature map, the last if none is named.

    Raises:
        ValueError: the backbone has no feature map of that name.
    """
    name = name or list(backbone.feature_shapes)[-1]
    check_choice(f"in_feature of {type(backbone).__name__}", name, tuple(backbone.feature_shapes))
    return name, backbone.feature_shapes[name]
