"""Backbones by name: those of maskx, and every model of timm that returns feature maps."""

from torch import nn

from maskx.core.backbones import (
    VGG16,
    Backbone,
    FeatureShape,
    FrozenStages,
    PyramidBackbone,
    SmallFPN,
    SmallResNet,
)
from maskx.core.checks import check_choice
from maskx.core.pretrained import Pretrained
from maskx.core.timm_backbones import TimmBackbone, can_dilate

__all__ = ["build_backbone", "build_pyramid", "choose_feature"]


def build_backbone(
    name: str,
    *,
    output_stride: int | None = None,
    frozen_norm: bool = False,
    frozen_stages: FrozenStages = 0,
    pretrained: Pretrained = False,
) -> Backbone:
    """Make a backbone whose last feature map is fine enough to segment with.

    Args:
        name: ``small``; ``vgg16``, with pool switches; or a model of timm, e.g. ``resnet50``,
            ``efficientnet_lite0``, ``convnext_tiny``, ``vit_base_patch16_224``.
        output_stride: of the last feature map. None: 8, for ``vgg16`` 16, and for a network that
            has no dilation its own.
        frozen_norm: fix the batch norms of a network of timm; the others have no use for it.
        frozen_stages: how many stages stay as they are; see :class:`TimmBackbone`.
        pretrained: True: start from ImageNet weights, of an installed package or by download. Or a
            file to start from.

    Raises:
        ValueError: there is no such backbone, or it does not have what is asked for.
    """
    if name == "small":
        _check_without_weights(pretrained)
        return SmallResNet(output_stride=output_stride or 8, frozen_stages=frozen_stages)
    shared = {"frozen_stages": frozen_stages, "pretrained": pretrained}
    if name == "vgg16":
        return VGG16(output_stride=output_stride or 16, **shared)
    if output_stride is None and can_dilate(name, 8):
        output_stride = 8
    return TimmBackbone(name, output_stride=output_stride, frozen_norm=frozen_norm, **shared)


def build_pyramid(
    name: str,
    *,
    out_channels: int | None = None,
    frozen_norm: bool = False,
    frozen_stages: FrozenStages = 0,
    pretrained: Pretrained = False,
) -> SmallFPN | PyramidBackbone:
    """Make a backbone with a feature pyramid, for detectors.

    Args:
        out_channels: of every level; None for 64 (``small``) or 256.

    Raises:
        ValueError: there is no such backbone, or it does not have what is asked for.
    """
    if name == "small":
        _check_without_weights(pretrained)
        return SmallFPN(out_channels=out_channels or 64)
    shared = {"frozen_stages": frozen_stages, "pretrained": pretrained}
    if name == "vgg16":
        backbone = VGG16(**shared)
    else:
        backbone = TimmBackbone(name, frozen_norm=frozen_norm, **shared)
    return PyramidBackbone(backbone, out_channels=out_channels or 256, extra_level=True)


def choose_feature(backbone: nn.Module, name: str | None = None) -> tuple[str, FeatureShape]:
    """Return the name and shape of a feature map, the last if none is named.

    Raises:
        ValueError: the backbone has no feature map of that name.
    """
    name = name or list(backbone.feature_shapes)[-1]
    check_choice(f"in_feature of {backbone}", name, tuple(backbone.feature_shapes))
    return name, backbone.feature_shapes[name]


def _check_without_weights(pretrained: Pretrained) -> None:
    if pretrained is not False:
        raise ValueError(
            "There are no pretrained weights of the backbone 'small'. Name one of timm, such as "
            "resnet50 or efficientnet_lite0, or train from random weights."
        )
