"""Decoders of TransferNet: from a coarse map of one label to its mask at image size.

"Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional Neural Network"
(Hong et al., CVPR 2016), section 4.3; layers of the reference code.

Both have the attribute `uses_switches` and the same forward. For the shape legend see
`maskx.systems.transfernet.network`; H, W: size of the image.
"""

import itertools
import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.layers import msra_fill

# Of the reference: number of convolutions at 1/8, 1/4 and 1/2 of the image's size. The last of each
# has the channels of the next finer resolution.
_CONVS_PER_STAGE = (3, 3, 2)


class UnpoolingDecoder(nn.Module):
    """Deconvolution network that unpools to where the pooling of the encoder took its maxima.

    conv 1 -> 512 | unpool | 512, 512, 256 | unpool | 256, 256, 128 | unpool | 128, 64 | unpool |
    64, 64 | 1x1 conv 2: 7.7 M weights. All others are 3x3 with a ReLU. The reference's
    deconvolutions have stride 1, so they are convolutions.

    Args:
        channels: channels of the encoder's pooled feature maps, from the last pooling to the
            first. The default is that of VGG-16.
    """

    uses_switches = True

    def __init__(self, *, channels: tuple[int, int, int, int] = (512, 256, 128, 64)) -> None:
        super().__init__()
        self.first = _conv_relu(1, channels[0])
        stages = []
        for (width, narrow), num_convs in zip(
            itertools.pairwise(channels), _CONVS_PER_STAGE, strict=True
        ):
            widths = [width] * num_convs + [narrow]
            stages.append(nn.Sequential(*itertools.starmap(_conv_relu, itertools.pairwise(widths))))
        last = channels[-1]
        stages.append(nn.Sequential(_conv_relu(last, last), _conv_relu(last, last)))
        self.stages = nn.ModuleList(stages)
        self.predictor = nn.Conv2d(last, 2, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                _gaussian_fill(layer)

    def forward(
        self,
        maps: Tensor,
        pair_images: Tensor,
        switches: Sequence[Tensor],
        image_size: tuple[int, int],
    ) -> Tensor:
        """Predict the masks of the pairs.

        Args:
            maps: (P, 1, h, w), h = H // 16 and w = W // 16.
            pair_images: (P,).
            switches: of the poolings from the first to the last, (N, C, H // 2, W // 2) and so on:
                indices of `torch.nn.functional.max_pool2d`.
            image_size: (H, W).

        Returns:
            (P, 2, H, W) logits of background and foreground.
        """
        height, width = image_size
        x = self.first(maps)
        for level, (stage, indices) in enumerate(zip(self.stages, reversed(switches), strict=True)):
            shift = len(self.stages) - 1 - level
            x = stage(unpool(x, indices[pair_images], (height >> shift, width >> shift)))
        return self.predictor(x)


class TransposedDecoder(nn.Module):
    """Decoder without pooling switches, for any backbone and any size of image.

    Each transposed convolution doubles the size and is followed by a 3x3 convolution.

    Args:
        stride: stride of the feature map in image pixels, a power of two.
        widths: channels at each resolution, from the feature map's to the image's: one more than
            there are doublings. By default 64, halved at each down to 16.
    """

    uses_switches = False

    def __init__(self, *, stride: int, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        if stride < 1 or stride & (stride - 1):
            raise ValueError(f"The decoder's stride is {stride}. Allowed: powers of two.")
        num_doublings = int(math.log2(stride))
        if widths is None:
            widths = [max(64 >> level, 16) for level in range(num_doublings + 1)]
        if len(widths) != num_doublings + 1 or min(widths) < 1:
            raise ValueError(
                f"The decoder's widths are {tuple(widths)}. A stride of {stride} needs "
                f"{num_doublings + 1} of them, 1 or more each."
            )
        layers = [_conv_relu(1, widths[0]), _conv_relu(widths[0], widths[0])]
        for before, after in itertools.pairwise(widths):
            layers += [
                nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1),
                nn.ReLU(),
                _conv_relu(after, after),
            ]
        self.layers = nn.Sequential(*layers)
        self.predictor = nn.Conv2d(widths[-1], 2, kernel_size=1)
        for layer in self.layers.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                msra_fill(layer)
        _gaussian_fill(self.predictor)

    def forward(
        self,
        maps: Tensor,
        pair_images: Tensor,
        switches: None,
        image_size: tuple[int, int],
    ) -> Tensor:
        """Predict the masks of the pairs from maps and image size, which need be no multiple."""
        mask_logits = self.predictor(self.layers(maps))
        if mask_logits.shape[2:] != tuple(image_size):
            mask_logits = F.interpolate(mask_logits, tuple(image_size), mode="bilinear")
        return mask_logits


def unpool(maps: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Write each value to the position its pooling took the maximum from, and 0 elsewhere.

    The same as `torch.nn.functional.max_unpool2d` but, being a scatter, also deterministic on CUDA.

    ``indices`` are positions in the flattened plane of ``size``, of the shape of the maps.
    """
    if maps.shape != indices.shape:
        raise ValueError(
            f"The decoder unpools maps of shape {tuple(maps.shape)} with pooling switches of shape "
            f"{tuple(indices.shape)}. Allowed: the same shape. Its input must come from the "
            "feature after the encoder's last pooling, conv5_3 of VGG16."
        )
    plane = maps.new_zeros(*maps.shape[:2], math.prod(size))
    return plane.scatter(2, indices.flatten(2), maps.flatten(2)).unflatten(2, size)


def _conv_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU())


def _gaussian_fill(layer: nn.Conv2d) -> None:
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
