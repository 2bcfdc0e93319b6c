"""The plain backbones of maskx in Detectron2's registry, with the same names of parameters."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from maskx.core.backbones import VGG16, DilatedResNet, SmallResNet
from maskx.core.vit import ViTBackbone, timm_vit

__all__ = ["MaskXResNet", "MaskXSmallResNet", "MaskXVGG16", "MaskXViT", "check_imagenet_images"]

# What torchvision's ImageNet weights expect, for pixels in [0, 255].
_FORMAT = "RGB"
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class _MaskXBackbone(Backbone):
    """What Detectron2 asks of a backbone. Images of any size are taken: nothing is padded."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride by name of the feature map."""
        return {
            name: ShapeSpec(channels=shape.channels, stride=shape.stride)
            for name, shape in self.feature_shapes.items()
        }

    def drop_layers_after(self, feature: str) -> None:
        """Take away what comes after a feature map, so that nothing is left without a gradient."""
        names = list(self.feature_shapes)
        for name in names[names.index(feature) + 1 :]:
            del self.feature_shapes[name]
            self._drop_stage(name)
        modules = dict(self.named_modules())
        self.layer_aliases = {a: m for a, m in self.layer_aliases.items() if m in modules}

    def _drop_stage(self, name: str) -> None:
        delattr(self, name)


@BACKBONE_REGISTRY.register()
class MaskXSmallResNet(SmallResNet, _MaskXBackbone):
    """A network to train from scratch on a CPU: :class:`maskx.core.backbones.SmallResNet`.

    Args:
        **kwargs: arguments of ``SmallResNet``.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Raises:
            ValueError: ``MODEL.MASKX.BACKBONE`` asks for what this network does not have.
        """
        _check_without(cfg, cls, "PRETRAINED", "there are no weights for it")
        _check_without(cfg, cls, "FROZEN_NORM", "it is trained from scratch")
        return {"output_stride": cfg.MODEL.MASKX.BACKBONE.OUTPUT_STRIDE}


@BACKBONE_REGISTRY.register()
class MaskXResNet(DilatedResNet, _MaskXBackbone):
    """torchvision's ResNet: :class:`maskx.core.backbones.DilatedResNet`.

    ``MODEL.RESNETS.DEPTH`` is its depth. No other key of ``MODEL.RESNETS`` is read, and neither is
    ``MODEL.BACKBONE.FREEZE_AT``.

    Args:
        **kwargs: arguments of ``DilatedResNet``.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Raises:
            ValueError: the images would not be those that the ImageNet weights expect.
        """
        keys = cfg.MODEL.MASKX.BACKBONE
        return {
            "depth": cfg.MODEL.RESNETS.DEPTH,
            "output_stride": keys.OUTPUT_STRIDE,
            "frozen_norm": keys.FROZEN_NORM,
            "weights": _imagenet_weights(cfg),
        }


@BACKBONE_REGISTRY.register()
class MaskXVGG16(VGG16, _MaskXBackbone):
    """torchvision's VGG-16, convolutions only: :class:`maskx.core.backbones.VGG16`.

    Args:
        **kwargs: arguments of ``VGG16``.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Raises:
            ValueError: the images would not be those that the ImageNet weights expect, or
                ``MODEL.MASKX.BACKBONE`` asks for what this network does not have.
        """
        _check_without(cfg, cls, "FROZEN_NORM", "it has no batch norm")
        return {
            "output_stride": cfg.MODEL.MASKX.BACKBONE.OUTPUT_STRIDE,
            "weights": _imagenet_weights(cfg),
        }

    def _drop_stage(self, name: str) -> None:
        last_kept = next(reversed(self.feature_shapes))
        del self.features[int(self.layer_aliases[last_kept].rpartition(".")[2]) + 1 :]


@BACKBONE_REGISTRY.register()
class MaskXViT(ViTBackbone, _MaskXBackbone):
    """A vision transformer of timm: :class:`maskx.core.vit.ViTBackbone`.

    ``MODEL.MASKX.BACKBONE.OUTPUT_STRIDE`` is not read: the stride is the size of a patch.

    Args:
        name: of the model.
        pretrained: download its weights.
        drop_path: probability with which a layer is skipped in training.

    Raises:
        ImportError: timm is not installed.
    """

    @configurable
    def __init__(self, *, name: str, pretrained: bool = False, drop_path: float = 0.1) -> None:
        plain = timm_vit(name, pretrained=pretrained, drop_path=drop_path)
        super().__init__(plain.transformer)
        self.layer_aliases: dict[str, str] = {}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Raises:
            ValueError: timm has no such model, the images would not be those that its weights
                expect, or ``MODEL.MASKX.BACKBONE`` asks for what this network does not have.
        """
        _check_without(cfg, cls, "FROZEN_NORM", "it has no batch norm")
        keys = cfg.MODEL.MASKX.BACKBONE
        return {
            "name": keys.VIT,
            "pretrained": _timm_weights(cfg),
            "drop_path": keys.DROP_PATH,
        }


def _timm_weights(cfg: CfgNode) -> bool:
    """Whether to load the weights of timm, after a check that there are any for these images."""
    try:
        import timm
    except ImportError:
        return False  # timm_vit says what to install
    name = cfg.MODEL.MASKX.BACKBONE.VIT
    if not timm.is_model(name):
        raise ValueError(
            f"MODEL.MASKX.BACKBONE.VIT is '{name}', which timm {timm.__version__} does not have. "
            "Give one of timm.list_models('vit*')."
        )
    if not cfg.MODEL.MASKX.BACKBONE.PRETRAINED or cfg.MODEL.WEIGHTS:
        return False
    weights = timm.get_pretrained_cfg(name)
    expected = [
        [round(255 * value, 3) for value in values] for values in (weights.mean, weights.std)
    ]
    _check_images(cfg, "timm", *expected)
    return True


def _check_without(cfg: CfgNode, cls: type, key: str, reason: str) -> None:
    if cfg.MODEL.MASKX.BACKBONE[key]:
        raise ValueError(
            f"MODEL.MASKX.BACKBONE.{key} is True, but MODEL.BACKBONE.NAME is {cls.__name__}: "
            f"{reason}. Set {key} False, or NAME MaskXResNet."
        )


def _imagenet_weights(cfg: CfgNode) -> str | None:
    """Name of torchvision's weights; None where ``MODEL.WEIGHTS`` replaces them anyway."""
    if not cfg.MODEL.MASKX.BACKBONE.PRETRAINED or cfg.MODEL.WEIGHTS:
        return None
    _check_images(cfg, "torchvision", _MEAN, _STD)
    return "DEFAULT"


def check_imagenet_images(cfg: CfgNode, key: str) -> None:
    """Refuse images that are not those that torchvision's ImageNet weights expect.

    Args:
        cfg: the configuration.
        key: what asks for the weights.

    Raises:
        ValueError: format, mean or deviation are others.
    """
    _check_images(cfg, "torchvision", _MEAN, _STD, key)


def _check_images(
    cfg: CfgNode,
    library: str,
    mean: Sequence[float],
    std: Sequence[float],
    key: str = "MODEL.MASKX.BACKBONE.PRETRAINED",
) -> None:
    """Refuse images that are not those that downloaded weights expect."""
    found = (cfg.INPUT.FORMAT, *cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD)
    if found != (_FORMAT, *mean, *std):
        raise ValueError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, MODEL.PIXEL_MEAN {cfg.MODEL.PIXEL_MEAN} and "
            f"MODEL.PIXEL_STD {cfg.MODEL.PIXEL_STD}, but {key} loads weights of {library}, which "
            f"expect {_FORMAT}, {list(mean)} and {list(std)}. Set all three so, or "
            f"{key.rpartition('.')[2]} False."
        )
