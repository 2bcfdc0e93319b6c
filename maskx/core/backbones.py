"""Backbones that map an image batch to a dictionary of feature maps, each a :class:`Backbone`.

Networks of timm are in :mod:`maskx.core.timm_backbones`. Here is what timm does not have:
:class:`SmallResNet` and :class:`SmallFPN`, to train from scratch on a CPU; :class:`VGG16`, which
says where its pools found their maxima; and :class:`PyramidBackbone`, a feature pyramid on any.
"""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from maskx.core.checks import check_choice
from maskx.core.feature_cache import FeatureCache, cached_features
from maskx.core.layers import msra_fill
from maskx.core.pretrained import Pretrained, load_part

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "VGG16",
    "Backbone",
    "FeatureShape",
    "FrozenStages",
    "PyramidBackbone",
    "SmallFPN",
    "SmallResNet",
    "check_feature",
    "listen",
    "named_feature",
]

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet's pixels, RGB from 0 to 255."""

# Channels of the 3x3 convolutions of VGG-16, stage by stage; a pool follows each stage but the
# last, whose pool only feeds the fully connected layers.
_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class FeatureShape(NamedTuple):
    """Channels of a feature map, and its stride in image pixels."""

    channels: int
    stride: int


FrozenStages = int | Literal["all"]
"""How much of a backbone stays as it is: a number of stages, of which the first is what comes
before the first map, or all."""


class Backbone(nn.Module):
    """What the backbones of maskx have in common.

    Attributes:
        cache: where the maps of a frozen backbone are kept; None: they are not.
        feature_shapes: channels and stride of each feature map, by name, from the finest on.
        layer_aliases: modules that are known by a name of the papers (``C41``: first block of the
            last stage; ``conv5_3``), for :class:`maskx.core.image_classifier.LayerTaps`.
        pixel_mean: of the images that the network expects, RGB from 0 to 255.
    """

    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD

    def __init__(self) -> None:
        super().__init__()
        self.feature_shapes: dict[str, FeatureShape] = {}
        self.layer_aliases: dict[str, str] = {}
        self.cache: FeatureCache | None = None
        self._frozen: list[str] = []
        self._listeners: dict[str, Callable[[Tensor], None]] = {}

    def __str__(self) -> str:
        return type(self).__name__

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to feature maps, (N, C, H / stride, W / stride).

        With a :attr:`cache` each image is computed once, by itself, and what was kept of it counts;
        see :func:`maskx.core.feature_cache.cached_features`.
        """
        if self.cache is None:
            return self.maps(images)
        paths = list(self._listeners)
        names = [*self.feature_shapes, *(path for path in paths if path not in self.feature_shapes)]
        stride = max(shape.stride for shape in self.feature_shapes.values())
        found = cached_features(self.cache, images, names, stride, self._maps_and_layers)
        for path in paths:
            self._listeners[path](found[path])
        return {name: found[name] for name in self.feature_shapes}

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps of :meth:`forward`."""
        raise NotImplementedError

    def keep_features(self, **cache: Any) -> None:
        """Compute the feature maps of an image once, from now on, and keep them.

        Args:
            **cache: arguments of :class:`maskx.core.feature_cache.FeatureCache`.

        Raises:
            ValueError: not all of the backbone is frozen.
        """
        if "" not in self._frozen:
            raise ValueError(
                f"Features of {self} cannot be kept, as its weights change in training. Freeze all "
                "of it (--frozen, frozen_stages 'all'), or keep no features."
            )
        self.cache = FeatureCache(self, **cache)

    def _maps_and_layers(self, images: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        ends = [
            _hook(self, path, functools.partial(outputs.__setitem__, path))
            for path in self._listeners
        ]
        try:
            return outputs | self.maps(images)
        finally:
            for end in ends:
                end()

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; what is frozen stays as in evaluation: its norms, its dropout."""
        super().train(mode)
        for path in self._frozen:
            self.get_submodule(path).training = False
        return self

    def take_input_convolution(self) -> nn.Conv2d:
        """Take the first convolution out: from now on its output is the input of the backbone.

        Raises:
            ValueError: the network does not start with one convolution.
        """
        path = self._input_layer()
        layer = None if path is None else self.get_submodule(path)
        if not isinstance(layer, nn.Conv2d):
            raise ValueError(
                f"The backbone {self} does not start with one convolution that could take more "
                "than the image. Name another, such as a ResNet or EfficientNet."
            )
        parent, _, child = path.rpartition(".")
        setattr(self.get_submodule(parent), child, nn.Identity())
        return layer

    def drop_layers_after(self, feature: str) -> None:
        """Take away what comes after a feature map, so that nothing is left without a gradient."""
        names = list(self.feature_shapes)
        dropped = names[names.index(feature) + 1 :]
        for name in dropped:
            del self.feature_shapes[name]
        if dropped:
            self._drop(dropped)
            modules = dict(self.named_modules())
            self.layer_aliases = {a: m for a, m in self.layer_aliases.items() if m in modules}
            self._frozen = [path for path in self._frozen if path in modules]
            self.train(self.training)

    def _input_layer(self) -> str | None:
        """Path of the first convolution."""
        raise NotImplementedError

    def _drop(self, names: list[str]) -> None:
        """Take away the layers of the last feature maps."""
        raise NotImplementedError

    def _freeze(self, stages: FrozenStages, paths: Sequence[str]) -> None:
        """Freeze the first stages."""
        num_maps = len(self.feature_shapes)
        if stages == "all":
            stages = num_maps + 1
        allowed = tuple(range(num_maps + 2)) if all(paths) else (0, num_maps + 1)
        check_choice(f"frozen_stages of {self}", stages, allowed)
        if stages == 0:
            return
        order = [path for path, _ in self.named_modules()]
        if stages > num_maps:
            end = len(order)
        elif stages == 1:
            end = order.index(paths[0])
        else:
            end = _end_of(order, paths[stages - 2])
        for path, module in self.named_modules():
            if _end_of(order, path) <= end:
                self._frozen.append(path)
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
        self.train(self.training)


def listen(
    backbone: nn.Module, path: str, listener: Callable[[Tensor], None]
) -> Callable[[], object]:
    """Call a function with what an inner layer puts out, in each forward pass.

    With a :attr:`Backbone.cache` the layer does not run for images that were seen before; what it
    put out is kept beside the maps then.

    Args:
        path: of the layer in the backbone.

    Returns:
        What ends it.
    """
    if getattr(backbone, "cache", None) is None:
        return _hook(backbone, path, listener)
    backbone._listeners[path] = listener
    return functools.partial(backbone._listeners.pop, path)


def _hook(
    network: nn.Module, path: str, listener: Callable[[Tensor], None]
) -> Callable[[], object]:
    layer = network.get_submodule(path)
    return layer.register_forward_hook(lambda layer, inputs, output: listener(output)).remove


class SmallFPN(nn.Module):
    """Residual network of three stages with a feature pyramid, for training from scratch on a CPU.

    About 1.0 M parameters and 0.2 GMAC for a 128 x 128 image.

    Attributes:
        strides: stride in image pixels by name of the feature map.
    """

    strides = {"0": 4, "1": 8, "2": 16}  # noqa: RUF012

    def __init__(
        self, *, widths: tuple[int, int, int, int] = (32, 64, 128, 192), out_channels: int = 64
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.stages = nn.ModuleList(
            _block(before, after, stride=2) for before, after in itertools.pairwise(widths)
        )
        self.fpn = FeaturePyramidNetwork(list(widths[1:]), out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to ``{"0": (N, C, H / 4, W / 4), ...}``."""
        x = self.stem(images)
        features = OrderedDict()
        for name, stage in zip(self.strides, self.stages, strict=True):
            features[name] = x = stage(x)
        return self.fpn(features)


class SmallResNet(Backbone):
    """Residual network of four stages of basic blocks, for training from scratch on a CPU.

    About 1.3 M parameters and 0.36 GMAC for a 128 x 128 image at output stride 8 (1.36 at 4, 0.13
    at 16). The last stage keeps its resolution and has dilation 2 instead.

    Args:
        widths: channels of ``layer1`` to ``layer4``.
        output_stride: stride of ``layer4`` in image pixels: 4, 8 or 16.
        frozen_stages: 0: none; 1: what comes before ``layer1``; 2: ``layer1``, too; 5, or ``all``:
            all.
    """

    def __init__(
        self,
        *,
        widths: tuple[int, int, int, int] = (32, 64, 96, 128),
        output_stride: int = 8,
        frozen_stages: FrozenStages = 0,
    ) -> None:
        super().__init__()
        check_choice("output_stride of SmallResNet", output_stride, (4, 8, 16))
        self.conv1 = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[0], num_blocks=1, stride=2)
        self.layer2 = _stage(widths[0], widths[1], num_blocks=2, stride=min(output_stride // 4, 2))
        self.layer3 = _stage(widths[1], widths[2], num_blocks=2, stride=max(output_stride // 8, 1))
        self.layer4 = _stage(widths[2], widths[3], num_blocks=3, stride=2)
        _trade_stride_for_dilation(self.layer4, dilation=1)
        strides = (4, min(output_stride, 8), output_stride, output_stride)
        for i, shape in enumerate(zip(widths, strides, strict=True), start=1):
            self.feature_shapes[f"layer{i}"] = FeatureShape(*shape)
        self.layer_aliases = {f"C4{i + 1}": f"layer4.{i}" for i in range(len(self.layer4))}
        self._freeze(frozen_stages, tuple(self.feature_shapes))

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to ``{"layer1": (N, C, H / 4, W / 4), ...}``."""
        x = self.relu(self.bn1(self.conv1(images)))
        features = {}
        for name in self.feature_shapes:
            features[name] = x = getattr(self, name)(x)
        return features

    def _input_layer(self) -> str:
        return "conv1"

    def _drop(self, names: list[str]) -> None:
        for name in names:
            delattr(self, name)


class VGG16(Backbone):
    """Convolutions of VGG-16, up to conv5_3; parameters have the names of torchvision's network.

    "Very Deep Convolutional Networks for Large-Scale Image Recognition" (Simonyan & Zisserman,
    ICLR 2015), configuration D.

    Args:
        output_stride: stride of ``conv5_3`` in image pixels. 16: four 2x2 pools. 8: the form of
            DeepLab-LargeFOV, the fourth pool is 3x3 with stride 1 and conv5 has dilation 2.
        frozen_stages: 0: none; 1: what comes before ``conv1_2``; 2: that, too; 6, or ``all``: all.
        pretrained: True: start from ImageNet weights of timm's hub, those of torchvision. Or a
            file to start from, safetensors or a state dict.
    """

    def __init__(
        self,
        *,
        output_stride: int = 16,
        frozen_stages: FrozenStages = 0,
        pretrained: Pretrained = False,
    ) -> None:
        super().__init__()
        check_choice("output_stride of VGG16", output_stride, (8, 16))
        self.output_stride = output_stride
        self.features = nn.Sequential()
        in_channels, stride = 3, 1
        for stage, widths in enumerate(_VGG16_STAGES, start=1):
            if stage > 1:
                keeps_size = stage == 5 and output_stride == 8
                self.features.append(
                    nn.MaxPool2d(3, stride=1, padding=1) if keeps_size else nn.MaxPool2d(2)
                )
                stride *= 1 if keeps_size else 2
            dilation = 2 if stage == 5 and output_stride == 8 else 1
            for number, channels in enumerate(widths, start=1):
                conv = nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation)
                msra_fill(conv)
                # Not in place: a tap on a convolution must see its output before the ReLU.
                self.features.extend([conv, nn.ReLU()])
                self.layer_aliases[f"conv{stage}_{number}"] = f"features.{len(self.features) - 1}"
                in_channels = channels
            self.feature_shapes[f"conv{stage}_{len(widths)}"] = FeatureShape(in_channels, stride)
        state = load_part("vgg16", "features.", pretrained)
        if state is not None:
            self.load_state_dict(state)
        self._freeze(frozen_stages, [self.layer_aliases[name] for name in self.feature_shapes])

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to ``{"conv1_2": (N, 64, H, W), ...}``.

        Features are those after the ReLU: the one before each pool, and ``conv5_3``. A size that
        a pool cannot halve loses its last row or column there.
        """
        names = iter(self.feature_shapes)
        features = {}
        x = images
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                features[next(names)] = x
            x = layer(x)
        features[next(names)] = x
        return features

    def _input_layer(self) -> str:
        return "features.0"

    def _drop(self, names: list[str]) -> None:
        last_kept = next(reversed(self.feature_shapes))
        del self.features[int(self.layer_aliases[last_kept].rpartition(".")[2]) + 1 :]

    def forward_with_switches(self, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Also return where each pool found its maxima.

        Returns:
            The features of :meth:`forward`, and for pool1 to pool4 the (N, C, h, w) int64 indices
            into the height x width of the pool's input. ``max_pool2d`` gives them and
            ``max_unpool2d`` takes them, with the input's size as ``output_size``.
        """
        if self.output_stride != 16:
            raise ValueError(
                f"pool switches need VGG16(output_stride=16), got output_stride="
                f"{self.output_stride}: the windows of its fourth pool overlap, so that several "
                "outputs may come from one place."
            )
        names = iter(self.feature_shapes)
        features, switches = {}, []
        x = images
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                features[next(names)] = x
                x, indices = F.max_pool2d(x, layer.kernel_size, return_indices=True)
                switches.append(indices)
            else:
                x = layer(x)
        features[next(names)] = x
        return features, switches


class PyramidBackbone(nn.Module):
    """Feature pyramid on a backbone; its levels have the names of the maps they are made of.

    "Feature Pyramid Networks for Object Detection" (Lin et al., CVPR 2017).

    Args:
        backbone: best without dilation, each map half the size of the one before.
        in_features: names of the maps that the pyramid is built of; None for all.
        extra_level: add ``pool``, every second position of the last level, as detectors have it.

    Attributes:
        feature_shapes: channels and stride by name.

    Raises:
        ValueError: the backbone has no such feature map.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        in_features: Sequence[str] | None = None,
        out_channels: int = 256,
        extra_level: bool = False,
    ) -> None:
        super().__init__()
        shapes = backbone.feature_shapes
        names = list(shapes if in_features is None else in_features)
        unknown = [name for name in names if name not in shapes]
        if unknown:
            raise ValueError(
                f"in_features of the pyramid has {', '.join(map(repr, unknown))}; {backbone} has "
                f"{', '.join(shapes)}."
            )
        self.backbone = backbone
        self.out_channels = out_channels
        self.pixel_mean, self.pixel_std = backbone.pixel_mean, backbone.pixel_std
        self._in_features = names
        pool = LastLevelMaxPool() if extra_level else None
        channels = [shapes[name].channels for name in names]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, pool)
        self.feature_shapes = {n: FeatureShape(out_channels, shapes[n].stride) for n in names}
        if extra_level:
            stride = 2 * shapes[names[-1]].stride
            self.feature_shapes["pool"] = FeatureShape(out_channels, stride)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to the levels of the pyramid."""
        features = self.backbone(images)
        return self.fpn(OrderedDict((name, features[name]) for name in self._in_features))


def _stage(in_channels: int, out_channels: int, *, num_blocks: int, stride: int) -> nn.Sequential:
    first = _block(in_channels, out_channels, stride=stride)
    return nn.Sequential(
        first, *(BasicBlock(out_channels, out_channels) for _ in range(num_blocks - 1))
    )


def _block(in_channels: int, out_channels: int, *, stride: int) -> BasicBlock:
    shortcut = nn.Sequential(
        conv1x1(in_channels, out_channels, stride=stride), nn.BatchNorm2d(out_channels)
    )
    return BasicBlock(in_channels, out_channels, stride=stride, downsample=shortcut)


def _trade_stride_for_dilation(stage: nn.Module, *, dilation: int) -> None:
    """Give a stage of stride 2 stride 1, and what follows its strided convolution more dilation."""
    for layer in stage.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if layer.kernel_size == (3, 3):
            layer.dilation = layer.padding = (dilation, dilation)
            # The 1x1 shortcut has the same stride, but lies beside the main path.
            dilation *= layer.stride[0]
        layer.stride = (1, 1)


def _end_of(order: list[str], path: str) -> int:
    """Position after the last module inside that of this path."""
    inside = [i for i, each in enumerate(order) if not path or f"{each}.".startswith(f"{path}.")]
    return inside[-1] + 1


def named_feature(features: Mapping[str, Tensor], name: str, backbone: nn.Module) -> Tensor:
    """Return the feature map of that name.

    Raises:
        ValueError: the backbone returned no such feature map.
    """
    if name not in features:
        raise ValueError(
            f"{type(backbone).__name__} has no feature {name!r}. Allowed: {', '.join(features)}."
        )
    return features[name]


def check_feature(backbone: nn.Module, name: str, channels: int) -> None:
    """Check that a backbone has a feature map of so many channels, as far as it says.

    Args:
        backbone: with ``feature_shapes``, as those of maskx have; any other is not checked.

    Raises:
        ValueError: it has no such feature map, or one of other channels.
    """
    shapes = getattr(backbone, "feature_shapes", None)
    if shapes is None:
        return
    if name not in shapes:
        raise ValueError(
            f"in_feature must be a feature of {type(backbone).__name__}, one of "
            f"{', '.join(shapes)}; got {name!r}."
        )
    if shapes[name].channels != channels:
        raise ValueError(
            f"in_channels must be the channels of {name!r}, {shapes[name].channels}; got "
            f"{channels}."
        )
