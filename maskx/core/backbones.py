"""Backbones that map an image batch to a dictionary of feature maps.

:class:`SmallResNet`, :class:`DilatedResNet` and :class:`VGG16` say by ``feature_shapes`` which maps
they return, and by ``layer_aliases`` which of their modules are known by a name of the papers
(``C41``: first block of the last stage; ``conv5_3``), for
:class:`maskx.core.image_classifier.LayerTaps`.
"""

import itertools
from collections import OrderedDict
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from maskx.core.checks import check_choice
from maskx.core.layers import msra_fill

RESNET_DEPTHS = (18, 34, 50, 101)

# Channels of the 3x3 convolutions of VGG-16, stage by stage; a pool follows each stage but the
# last, whose pool only feeds the fully connected layers.
_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class FeatureShape(NamedTuple):
    """Channels of a feature map, and its stride in image pixels."""

    channels: int
    stride: int


class SmallFPN(nn.Module):
    """Residual network of three stages with a feature pyramid, for training from scratch on a CPU.

    About 1.0 M parameters and 0.2 GMAC for a 128 x 128 image.

    Attributes:
        out_channels: channels of every feature map.
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


class SmallResNet(nn.Module):
    """Residual network of four stages of basic blocks, for training from scratch on a CPU.

    About 1.3 M parameters and 0.36 GMAC for a 128 x 128 image at output stride 8 (1.36 at 4, 0.13
    at 16). The last stage keeps its resolution and has dilation 2 instead.

    Args:
        widths: channels of ``layer1`` to ``layer4``.
        output_stride: stride of ``layer4`` in image pixels: 4, 8 or 16.
    """

    def __init__(
        self, *, widths: tuple[int, int, int, int] = (32, 64, 96, 128), output_stride: int = 8
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
        self.feature_shapes = _stage_shapes(widths, strides)
        self.layer_aliases = _block_aliases(self.layer4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to ``{"layer1": (N, C, H / 4, W / 4), ...}``."""
        x = self.relu(self.bn1(self.conv1(images)))
        return _run_stages(self, x)


class DilatedResNet(nn.Module):
    """ResNet of torchvision without its classifier, with dilation in place of late strides.

    Parameters have the names and shapes of torchvision's network, and what is computed is what the
    strided network computes, at more positions: taking every second position of a stage whose
    stride was traded gives back the strided stage. Bottleneck networks equal torchvision's
    ``replace_stride_with_dilation``, which refuses basic blocks.

    Args:
        depth: 18, 34, 50 or 101.
        output_stride: stride of ``layer4`` in image pixels: 8, 16 or 32.
        frozen_norm: batch norm as a fixed affine map, for batches too small for statistics.
        weights: name of ImageNet weights of torchvision, e.g. ``DEFAULT`` (a download); None starts
            at random. They expect RGB images in [0, 1], normalised by the ImageNet mean and std.
    """

    def __init__(
        self,
        *,
        depth: int = 101,
        output_stride: int = 8,
        frozen_norm: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("depth of DilatedResNet", depth, RESNET_DEPTHS)
        check_choice("output_stride of DilatedResNet", output_stride, (8, 16, 32))
        name = f"resnet{depth}"
        norm = FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
        for child_name, child in get_model(name, norm_layer=norm).named_children():
            if child_name not in ("avgpool", "fc"):
                self.add_module(child_name, child)
        if weights is not None:
            _load_imagenet_weights(self, name, weights, without="fc.")
        if output_stride == 8:
            _trade_stride_for_dilation(self.layer3, dilation=1)
        if output_stride <= 16:
            _trade_stride_for_dilation(self.layer4, dilation=16 // output_stride)
        channels = (64, 128, 256, 512) if depth < 50 else (256, 512, 1024, 2048)
        strides = (4, 8, min(output_stride, 16), output_stride)
        self.feature_shapes = _stage_shapes(channels, strides)
        self.layer_aliases = _block_aliases(self.layer4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to ``{"layer1": (N, C, H / 4, W / 4), ...}``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return _run_stages(self, x)


class VGG16(nn.Module):
    """Convolutions of VGG-16, up to conv5_3; parameters have the names of torchvision's network.

    "Very Deep Convolutional Networks for Large-Scale Image Recognition" (Simonyan & Zisserman,
    ICLR 2015), configuration D.

    Args:
        output_stride: stride of ``conv5_3`` in image pixels. 16: four 2x2 pools. 8: the form of
            DeepLab-LargeFOV, the fourth pool is 3x3 with stride 1 and conv5 has dilation 2.
        weights: name of ImageNet weights of torchvision, e.g. ``DEFAULT`` (a download); None starts
            at random.
    """

    def __init__(self, *, output_stride: int = 16, weights: str | None = None) -> None:
        super().__init__()
        check_choice("output_stride of VGG16", output_stride, (8, 16))
        self.output_stride = output_stride
        self.features = nn.Sequential()
        self.layer_aliases = {}
        self.feature_shapes = {}
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
        if weights is not None:
            _load_imagenet_weights(self, "vgg16", weights, without="classifier.")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
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
    """Give a stage of stride 2 stride 1, and what follows its strided convolution more dilation.

    Args:
        stage: blocks of torchvision, changed in place.
        dilation: of the stage's input: 2 to the number of strides traded before it.
    """
    for layer in stage.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if layer.kernel_size == (3, 3):
            layer.dilation = layer.padding = (dilation, dilation)
            # The 1x1 shortcut has the same stride, but lies beside the main path.
            dilation *= layer.stride[0]
        layer.stride = (1, 1)


def _run_stages(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    features = {}
    for name in network.feature_shapes:
        features[name] = x = getattr(network, name)(x)
    return features


def _stage_shapes(channels: tuple[int, ...], strides: tuple[int, ...]) -> dict[str, FeatureShape]:
    return {
        f"layer{i}": FeatureShape(*shape)
        for i, shape in enumerate(zip(channels, strides, strict=True), start=1)
    }


def _block_aliases(last_stage: nn.Sequential) -> dict[str, str]:
    return {f"C4{i + 1}": f"layer4.{i}" for i in range(len(last_stage))}


def _load_imagenet_weights(network: nn.Module, name: str, weights: str, *, without: str) -> None:
    """Load the weights of torchvision's network ``name`` but those that start with ``without``."""
    known = get_model_weights(name).__members__
    check_choice(f"weights of {name}", weights, tuple(known))
    # The state dict comes by the name of a file on a server: it is read without executing code.
    state = known[weights].get_state_dict(progress=True, check_hash=True, weights_only=True)
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith(without)})
