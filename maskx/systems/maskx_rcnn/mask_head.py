"""Mask head of Mask^X R-CNN and its baselines: trunks, predictors, fused MLP, loss, targets.

"Learning to Segment Every Thing" (Hu et al., CVPR 2018), sections 3.1-3.3; trunk of Mask R-CNN.

Every predictor computes the logits of the one class a RoI needs (its ground-truth class in
training, its predicted class at inference), so cost and memory per RoI do not depend on K.

Shape legend:
    R: number of RoIs; K: number of foreground classes; C: channels of the mask head;
    P: resolution of the pooled RoI features; M = 2 * P: resolution of the masks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from maskx.core.checks import check_choice, default_of
from maskx.core.extra_state import EXTRA_STATE, pack_state, unpack_state
from maskx.core.global_mean import global_mean
from maskx.core.layers import msra_fill
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights, WeightTransfer

PREDICTORS = ("transfer", "class_agnostic", "class_specific")
TRUNKS = ("conv", "residual", "hourglass")
MLP_BRANCHES = ("none", "single_fc", "bottleneck")

# Channels that the light MLP branch keeps: 8 * M * M * M * M weights instead of C * M * M * M * M,
# that is 4.9 M parameters instead of 157.4 M at C = 256 and M = 28.
_BOTTLENECK_CHANNELS = 8

_SMALLEST_SIZE = 4  # of the RoI features in an hourglass

# Initial weights of the second convolution of a residual pair, as a multiple of MSRAFill. At 1 and
# without norm, an hourglass of 20 convolutions makes features (C = 256) 80 times as large as those
# of four plain ones, and on drawn discs (C = 64) a learning rate of 0.02 ends in NaN. At 0.1 the
# features are 4 times as large, and the loss falls from the first steps on.
_BRANCH_SCALE = 0.1

_VERSION = 2  # of what a head says of itself in a checkpoint


def class_logits(features: Tensor, class_weights: Tensor) -> Tensor:
    """Apply to (R, C, M, M) features the 1x1 convolutions (R, C) of the RoIs' own classes."""
    num_rois, channels, height, width = features.shape
    columns = features.reshape(num_rois, channels, height * width)
    return torch.bmm(class_weights[:, None], columns).reshape(num_rois, height, width)


def mask_loss(mask_logits: Tensor, mask_targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy over the pixels of the RoIs that have a mask.

    Without RoIs it is zero with a graph, so that every process has a gradient for every parameter.

    Args:
        mask_logits: (R, M, M) of the ground-truth class.
        mask_targets: (R, M, M), bool or in [0, 1].
        weights: (R,) factors of the RoIs, such as the quality of masks that nobody drew; None is 1.
            The sum is divided by the number of RoIs, so that doubtful ones teach less.
    """
    mask_logits = mask_logits.to(torch.promote_types(mask_logits.dtype, torch.float32))
    targets = mask_targets.to(mask_logits.dtype)
    if weights is not None:
        weights = weights.to(mask_logits).reshape(-1, *[1] * (mask_logits.dim() - 1))
    total = F.binary_cross_entropy_with_logits(mask_logits, targets, weights, reduction="sum")
    return global_mean(total, mask_logits.numel())


def crop_mask_targets(masks: Tensor, boxes: Tensor, mask_indices: Tensor, size: int) -> Tensor:
    """Cut the training target of each box out of full-image masks.

    Args:
        masks: (N, H, W) masks of one image, bool or {0, 1}.
        boxes: (R, 4) XYXY absolute pixels.
        mask_indices: (R,) which mask belongs to each box.

    Returns:
        (R, M, M) bool; a target pixel is on where at least half of its area is.
    """
    rois = torch.cat([mask_indices[:, None].to(boxes), boxes], dim=1)
    cropped = roi_align(masks[:, None].to(boxes), rois, (size, size), 1.0, 0, aligned=True)
    return cropped[:, 0] >= 0.5


class TransferPredictor(WeightTransfer):
    """FCN mask predictor whose 1x1 weights come from weight transfer. It has no bias."""

    def forward(
        self, features: Tensor, class_indices: Tensor, detector: DetectorWeights | None = None
    ) -> Tensor:
        """Predict (R, M, M) logits of the given classes from (R, C, M, M) features."""
        return class_logits(features, super().forward(class_indices, detector))


class ClassAgnosticPredictor(nn.Conv2d):
    """One mask for every class: the baseline of the paper."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, kernel_size=1)
        _init_predictor(self)

    def forward(
        self, features: Tensor, class_indices: Tensor, detector: DetectorWeights | None = None
    ) -> Tensor:
        """Predict (R, M, M) logits, the same for every class, from (R, C, M, M) features."""
        return super().forward(features)[:, 0]


class ClassSpecificPredictor(nn.Conv2d):
    """Learned weights per class, as in Mask R-CNN: the oracle when every class has masks.

    The parameters are those of the K-channel 1x1 convolution, so its checkpoints load.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes, kernel_size=1)
        _init_predictor(self)

    def forward(
        self, features: Tensor, class_indices: Tensor, detector: DetectorWeights | None = None
    ) -> Tensor:
        """Predict (R, M, M) logits of the given classes from (R, C, M, M) features."""
        logits = class_logits(features, self.weight[class_indices, :, 0, 0])
        return logits + self.bias[class_indices, None, None]


def make_predictor(
    name: str, channels: int, num_classes: int | None, **transfer: Any
) -> TransferPredictor | ClassAgnosticPredictor | ClassSpecificPredictor:
    """Make a mask predictor.

    Args:
        num_classes: K; may be None where nothing is learned or stored per class.
        **transfer: further arguments of :class:`WeightTransfer`, for ``transfer`` only.
    """
    check_choice("mask predictor", name, PREDICTORS)
    if name == "transfer":
        return TransferPredictor(out_channels=channels, num_classes=num_classes, **transfer)
    if name == "class_agnostic":
        return ClassAgnosticPredictor(channels)
    if num_classes is None:
        raise ValueError("The mask predictor 'class_specific' needs the argument num_classes.")
    return ClassSpecificPredictor(channels, num_classes)


class MaskMLP(nn.Module):
    """Class-agnostic fully connected mask branch that is fused with the FCN (section 3.3).

    It sees the whole box at once and catches its gist, where the FCN catches its details.

    Args:
        branch: ``single_fc`` is the paper's single layer C * M * M -> M * M (157.4 M parameters at
            C = 256, M = 28); ``bottleneck`` first reduces the features to 8 channels (4.9 M).
    """

    def __init__(self, channels: int, mask_size: int, branch: str) -> None:
        super().__init__()
        self.reduce = None
        if branch == "bottleneck":
            self.reduce = nn.Conv2d(channels, _BOTTLENECK_CHANNELS, kernel_size=1)
            msra_fill(self.reduce)
            channels = _BOTTLENECK_CHANNELS
        self.fc = nn.Linear(channels * mask_size**2, mask_size**2)
        _init_predictor(self.fc)

    def forward(self, features: Tensor) -> Tensor:
        """Predict (R, M, M) logits from (R, C, M, M) features."""
        if self.reduce is not None:
            features = F.relu(self.reduce(features))
        return self.fc(features.flatten(1)).reshape(-1, *features.shape[-2:])


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

    ``conv`` is the trunk of Mask R-CNN and of Mask^X R-CNN. ``residual`` and ``hourglass`` are
    for deeper heads. Deep-MAC ("The Surprising Impact of Mask-Head Architecture on Novel Class
    Segmentation", Birodkar et al., ICCV 2021) found that heads which do equally well on classes
    with masks differ much on classes without, where deep ones, such as hourglass networks, do
    best if they are trained on ground-truth boxes.

    Cost at C = in_channels = 256 and P = 14; time of a training step (forward and backward
    pass) of the class-agnostic head on 32 RoIs, deconvolution included, measured on one CPU
    core:

        trunk       num_convs   3x3 convolutions   parameters   time
        conv        4           4                  2.36 M       1
        residual    4           4                  2.36 M       1.0
        hourglass   2           10                 5.90 M       1.3
        hourglass   4           20                 11.80 M      2.3

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


class MaskXHead(nn.Module):
    """Mask head for partial supervision, used by both hosts.

    Parameters carry the names of Detectron2's ``MaskRCNNConvUpsampleHead``, so its checkpoints
    initialise the trunk ``conv`` and the upsampling.

    Args:
        num_classes: K; None in a model that learns nothing per class, as with a text classifier:
            its checkpoints fit any class list.
        trunk: layers before the upsampling: ``conv`` (Mask R-CNN's), ``residual`` or
            ``hourglass``, see :func:`trunk_layers`.
        num_convs: number of 3x3 convolutions of the trunk; per resolution and direction in an
            hourglass.
        predictor: ``transfer`` (Mask^X), ``class_agnostic`` (baseline) or ``class_specific``
            (Mask R-CNN, the oracle when all categories have masks).
        mlp: fused MLP branch: ``none``, ``single_fc`` or ``bottleneck``, see :class:`MaskMLP`.
        transfer_inputs: see :class:`WeightTransfer`, like the arguments that follow.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int | None,
        pool_size: int = 14,
        channels: int = 256,
        trunk: str = "conv",
        num_convs: int = 4,
        norm: Callable[[int], nn.Module] | None = None,
        predictor: str = "transfer",
        mlp: str = "none",
        transfer_inputs: str = default_of(WeightTransfer, "inputs"),
        transfer_layers: int = default_of(WeightTransfer, "num_layers"),
        transfer_activation: str = default_of(WeightTransfer, "activation"),
        stop_gradient: bool = default_of(WeightTransfer, "stop_gradient"),
        transfer_mix: float = default_of(WeightTransfer, "mix"),
        transfer_dropout: float = default_of(WeightTransfer, "dropout"),
        transfer_normalise: bool = default_of(WeightTransfer, "normalise"),
        detector_channels: int | None = None,
        class_vectors: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice("MLP branch", mlp, MLP_BRANCHES)
        if class_vectors is not None and len(class_vectors) != num_classes:
            raise ValueError(
                f"class_vectors has {len(class_vectors)} rows for {num_classes} classes; there "
                "must be one row per class, by class index."
            )
        self.mask_size = 2 * pool_size
        layers = trunk_layers(
            trunk,
            in_channels=in_channels,
            channels=channels,
            num_convs=num_convs,
            pool_size=pool_size,
            norm=norm,
        )
        deconv = nn.ConvTranspose2d(channels if num_convs else in_channels, channels, 2, stride=2)
        msra_fill(deconv)
        layers |= {"deconv": deconv, "deconv_relu": nn.ReLU()}
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._feature_layers = tuple(layers)

        self.predictor = make_predictor(
            predictor,
            channels,
            num_classes,
            inputs=transfer_inputs,
            detector_channels=detector_channels,
            class_vectors=class_vectors,
            num_layers=transfer_layers,
            activation=transfer_activation,
            stop_gradient=stop_gradient,
            mix=transfer_mix,
            dropout=transfer_dropout,
            normalise=transfer_normalise,
        )
        self.mlp = None if mlp == "none" else MaskMLP(channels, self.mask_size, mlp)

        self.architecture: dict[str, Any] = {
            "trunk": trunk,
            "num_convs": num_convs,
            "channels": channels,
            "predictor": predictor,
            "mlp": mlp,
            "num_classes": num_classes,
        }
        if predictor == "transfer":
            self.architecture |= {
                "transfer_inputs": transfer_inputs,
                "transfer_layers": transfer_layers,
                "transfer_activation": transfer_activation,
            }
            if transfer_mix:  # the checkpoint says which classes were taught
                self.architecture["transfer_mix"] = transfer_mix
            if transfer_normalise:
                self.architecture["transfer_normalise"] = True

    def forward(
        self,
        roi_features: Tensor,
        class_indices: Tensor,
        detector: DetectorWeights | None = None,
    ) -> Tensor:
        """Predict (R, M, M) mask logits of (R,) classes from (R, in_channels, P, P) features."""
        features = roi_features
        for name in self._feature_layers:
            features = getattr(self, name)(features)
        mask_logits = self.predictor(features, class_indices, detector)
        if self.mlp is not None:
            mask_logits = mask_logits + self.mlp(features)
        return mask_logits

    def get_extra_state(self) -> Tensor:
        """Describe the architecture; it is saved beside the weights."""
        return pack_state(self.architecture, version=_VERSION)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a checkpoint of another architecture instead of keeping random weights.

        A checkpoint of another code base describes none; it is taken as it is.
        """
        found, own = unpack_state(state, version=_VERSION, what="a mask head"), self.architecture
        ignored = set()
        # K may differ where nothing depends on it, and for fine-tuning, but not in evaluation.
        if self.training or own["num_classes"] is None:
            ignored = {"num_classes"}
        if any(found.get(key) != own.get(key) for key in (found.keys() | own.keys()) - ignored):
            raise ValueError(
                "The checkpoint was made by another mask head.\n"
                f"  checkpoint: {_describe(found)}\n  this model: {_describe(own)}\n"
                "Use the configuration that the checkpoint was trained with, or another checkpoint."
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Without a description, torch would call the extra state missing.
        state_dict.setdefault(f"{prefix}{EXTRA_STATE}", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _init_predictor(layer: nn.Conv2d | nn.Linear) -> None:
    # Larger weights make the first mask losses overflow, say the reference's comments.
    nn.init.normal_(layer.weight, std=0.001)
    nn.init.zeros_(layer.bias)


def _describe(architecture: dict[str, Any]) -> str:
    return ", ".join(f"{k} {'any' if v is None else v}" for k, v in architecture.items())
