"""Trunks of the mask head: the layers between the pooled RoI features and their upsampling.

``conv`` is the trunk of Mask R-CNN and of Mask^X R-CNN. ``residual`` and ``hourglass`` are for
deeper heads. Deep-MAC ("The Surprising Impact of Mask-Head Architecture on Novel Class
Segmentation", Birodkar et al., ICCV 2021) found that heads which do equally well on classes with
masks differ much on classes without, where deep ones, such as hourglass networks, do best if they
are trained on ground-truth boxes.

Cost at C = in_channels = 256 and P = 14; time of a training step (forward and backward pass) of the
class-agnostic head on 32 RoIs, deconvolution included, measured on one CPU core:

    trunk       num_convs   3x3 convolutions   parameters   time
    conv        4           4                  2.36 M       1
    residual    4           4                  2.36 M       1.0
    hourglass   2           10                 5.90 M       1.3
    hourglass   4           20                 11.80 M      2.3

Shape legend:
    R: number of RoIs; C: channels of the mask head; P: resolution of the pooled RoI features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.checks import check_choice
from maskx.core.layers import msra_fill

TRUNKS = ("conv", "residual", "hourglass")

_SMALLEST_SIZE = 4  # of the RoI features in an hourglass

# Initial weights of the second convolution of a residual pair, as a multiple of MSRAFill. At 1 and
# without norm, an hourglass of 20 convolutions makes features (C = 256) 80 times as large as those
# of four plain ones, and on drawn discs (C = 64) a learning rate of 0.02 ends in NaN. At 0.1 the
# features are 4 times as large, and the loss falls from the first steps on.
_BRANCH_SCALE = 0.1


def trunk_layers(
    trunk: str,
    *,
    in_channels: int,
    channels: int,
    num_convs: int,
    pool_size: int,
    norm: Callable[[int], nn.Module] | None = None,
) -> dict[str, nn.Module]:
    """Make the layers of a trunk, which are applied one after the other.

    Args:
        trunk: ``conv`` (3x3 convolutions in a row), ``residual`` (the same in pairs with a skip,
            see :class:`ResidualPair`) or ``hourglass`` (see :class:`Hourglass`).
        num_convs: number of 3x3 convolutions; per resolution and direction in an hourglass. Even
            and at least 2 but for ``conv``.
        pool_size: P; at least 7 for ``hourglass``.

    Returns:
        The layers by name, which together map (R, in_channels, P, P) to (R, C, P, P) features.
        Those of ``conv`` carry the names of Detectron2's ``MaskRCNNConvUpsampleHead``.
    """
    check_choice("mask trunk", trunk, TRUNKS)
    if trunk == "conv":
        widths = [in_channels] + [channels] * num_convs
        return {
            f"mask_fcn{index + 1}": _ConvNormReLU(widths[index], channels, norm)
            for index in range(num_convs)
        }
    if num_convs < 2 or num_convs % 2:
        raise ValueError(
            f"The mask trunk '{trunk}' is made of pairs of convolutions, so num_convs must be even "
            f"and at least 2, got {num_convs}."
        )
    if trunk == "residual":
        return {"mask_residual": _residual_pairs(in_channels, channels, num_convs, norm)}
    if _half(pool_size) < _SMALLEST_SIZE:
        raise ValueError(
            f"The mask trunk 'hourglass' halves the RoI features while they keep a size of "
            f"{_SMALLEST_SIZE}, so pool_size must be at least {2 * _SMALLEST_SIZE - 1}, got "
            f"{pool_size}. Pool larger features, or use the trunk 'residual'."
        )
    return {"mask_hourglass": Hourglass(in_channels, channels, num_convs, pool_size, norm)}


class ResidualPair(nn.Module):
    """Two 3x3 convolutions with a skip: ``relu(skip(x) + conv2(relu(conv1(x))))``.

    The skip is the identity, or a 1x1 convolution where the number of channels changes.
    """

    def __init__(
        self, in_channels: int, channels: int, norm: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _ConvNormReLU(in_channels, channels, norm)
        self.conv2 = _ConvNorm(channels, channels, norm)
        self.skip = nn.Identity()
        if in_channels != channels:
            self.skip = _ConvNorm(in_channels, channels, norm, kernel_size=1)
        with torch.no_grad():
            self.conv2.weight *= _BRANCH_SCALE

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, in_channels, H, W) to (R, C, H, W) features."""
        return F.relu(self.skip(x) + self.conv2(self.conv1(x)))


class Hourglass(nn.Module):
    """Residual pairs over ever smaller features and back, with skips (Newell et al., ECCV 2016).

    Convolutions at the full resolution, on the way down and on the way up, keep the details;
    those at the smallest see the whole RoI. As in the paper, max pooling halves and
    nearest-neighbour interpolation doubles, and features of one resolution are added.

    Args:
        num_convs: number of 3x3 convolutions on the way down, on the way up, and at the smallest
            resolution.
        size: P. It is halved, rounded up, while at least 4 is left: 14, 7, 4.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_convs: int,
        size: int,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.down = _residual_pairs(in_channels, channels, num_convs, norm)
        self.inner = None
        if _half(size) >= _SMALLEST_SIZE:
            self.inner = Hourglass(channels, channels, num_convs, _half(size), norm)
            self.up = _residual_pairs(channels, channels, num_convs, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, in_channels, P, P) to (R, C, P, P) features."""
        x = self.down(x)
        if self.inner is None:
            return x
        # For odd sizes too, each pixel gets back the value of the window that it was pooled in.
        inner = self.inner(F.max_pool2d(x, 2, ceil_mode=True))
        return self.up(x + F.interpolate(inner, size=x.shape[-2:], mode="nearest"))


class _ConvNorm(nn.Conv2d):
    """Convolution with optional norm; parameter names as in Detectron2's Conv2d."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Callable[[int], nn.Module] | None,
        kernel_size: int = 3,
    ) -> None:
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, bias=norm is None)
        self.norm = norm(out_channels) if norm is not None else None
        msra_fill(self)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


class _ConvNormReLU(_ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def _residual_pairs(
    in_channels: int, channels: int, num_convs: int, norm: Callable[[int], nn.Module] | None
) -> nn.Sequential:
    widths = [in_channels] + [channels] * (num_convs // 2 - 1)
    return nn.Sequential(*[ResidualPair(width, channels, norm) for width in widths])


def _half(size: int) -> int:
    return (size + 1) // 2
