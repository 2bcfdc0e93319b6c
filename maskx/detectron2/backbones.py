"""The backbones of maskx in Detectron2's registry."""

import math
from typing import Any

import detectron2.modeling
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from maskx.core.backbones import VGG16, Backbone, SmallResNet
from maskx.core.timm_backbones import TimmBackbone, expected_pixels

# The networks of timm and torchvision expect it.
_FORMAT = "RGB"


class _MaskXBackbone(Backbone, detectron2.modeling.Backbone):
    """What Detectron2 asks of a backbone. Images of any size are taken: nothing is padded."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride by name of the feature map."""
        return {
            name: ShapeSpec(channels=shape.channels, stride=shape.stride)
            for name, shape in self.feature_shapes.items()
        }


@BACKBONE_REGISTRY.register()
class MaskXSmallResNet(SmallResNet, _MaskXBackbone):
    """A network to train from scratch on a CPU: :class:`maskx.core.backbones.SmallResNet`."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        for key in ("PRETRAINED", "WEIGHTS"):
            _check_without(cfg, cls, key, "there are no weights for it")
        _check_without(cfg, cls, "FROZEN_NORM", "it is trained from scratch")
        keys = cfg.MODEL.MASKX.BACKBONE
        options = {"frozen_stages": keys.FROZEN_STAGES}
        return options | ({"output_stride": keys.OUTPUT_STRIDE} if keys.OUTPUT_STRIDE else {})


@BACKBONE_REGISTRY.register()
class MaskXVGG16(VGG16, _MaskXBackbone):
    """VGG-16, convolutions only, with pool switches: :class:`maskx.core.backbones.VGG16`."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        _check_without(cfg, cls, "FROZEN_NORM", "it has no batch norm")
        return _options(cfg, "vgg16")


@BACKBONE_REGISTRY.register()
class MaskXTimm(TimmBackbone, _MaskXBackbone):
    """Any model of timm with feature maps: :class:`maskx.core.timm_backbones.TimmBackbone`.

    ``MODEL.MASKX.BACKBONE.NAME`` is its name. ``MODEL.RESNETS`` and ``MODEL.BACKBONE.FREEZE_AT``
    are not read.
    """

    @configurable
    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        keys = cfg.MODEL.MASKX.BACKBONE
        return _options(cfg, keys.NAME) | {
            "name": keys.NAME,
            "frozen_norm": keys.FROZEN_NORM,
            "drop_path": keys.DROP_PATH,
        }


@BACKBONE_REGISTRY.register()
class MaskXTimmFPN(FPN):
    """Detectron2's feature pyramid, ``p2`` to ``p6``, on :class:`MaskXTimm`.

    Args:
        in_features: its maps that the pyramid is built of, e.g. ``layer1`` to ``layer4``.
    """

    @configurable
    def __init__(
        self,
        *,
        bottom_up: MaskXTimm,
        in_features: list[str],
        out_channels: int = 256,
        norm: str = "",
        fuse_type: str = "sum",
    ) -> None:
        top = LastLevelMaxPool()
        # Detectron2 takes it for granted that the last level has stride 32.
        top.in_feature = f"p{round(math.log2(bottom_up.feature_shapes[in_features[-1]].stride))}"
        super().__init__(bottom_up, in_features, out_channels, norm, top, fuse_type=fuse_type)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        network, keys = MaskXTimm(cfg, input_shape), cfg.MODEL.FPN
        unknown = [name for name in keys.IN_FEATURES if name not in network.feature_shapes]
        if unknown or not keys.IN_FEATURES:
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES is {list(keys.IN_FEATURES)}, but {network} has "
                f"{', '.join(network.feature_shapes)}. Name some of these."
            )
        network.drop_layers_after(keys.IN_FEATURES[-1])
        return {
            "bottom_up": network,
            "in_features": keys.IN_FEATURES,
            "out_channels": keys.OUT_CHANNELS,
            "norm": keys.NORM,
            "fuse_type": keys.FUSE_TYPE,
        }


def check_images(cfg: CfgNode, name: str, key: str) -> None:
    """Refuse images that are not those that the weights of a backbone expect.

    Args:
        key: what asks for the weights.
    """
    mean, std = map(list, expected_pixels(name))
    found = (cfg.INPUT.FORMAT, list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD))
    if found != (_FORMAT, mean, std):
        raise ValueError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, MODEL.PIXEL_MEAN {cfg.MODEL.PIXEL_MEAN} and "
            f"MODEL.PIXEL_STD {cfg.MODEL.PIXEL_STD}, but {key} loads weights of {name!r}, which "
            f"expect {_FORMAT}, {mean} and {std}. Set all three so, or {key.rpartition('.')[2]} "
            "off."
        )


def _options(cfg: CfgNode, name: str) -> dict[str, Any]:
    """Arguments that VGG-16 and the models of timm share."""
    keys = cfg.MODEL.MASKX.BACKBONE
    # MODEL.WEIGHTS replaces them anyway.
    starts = not cfg.MODEL.WEIGHTS
    for key in ("PRETRAINED", "WEIGHTS"):
        if keys[key] and starts:
            check_images(cfg, name, f"MODEL.MASKX.BACKBONE.{key}")
    return {
        "output_stride": keys.OUTPUT_STRIDE or None,
        "frozen_stages": keys.FROZEN_STAGES,
        "pretrained": starts and (keys.WEIGHTS or keys.PRETRAINED),
    }


def _check_without(cfg: CfgNode, cls: type, key: str, reason: str) -> None:
    value = cfg.MODEL.MASKX.BACKBONE[key]
    if value:
        raise ValueError(
            f"MODEL.MASKX.BACKBONE.{key} is {value}, but MODEL.BACKBONE.NAME is {cls.__name__}: "
            f"{reason}. Set {key} {type(value)()!r}, or NAME MaskXTimm."
        )
