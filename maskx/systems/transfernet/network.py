"""TransferNet: losses, network and merging of the masks of an image.

"Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional Neural Network"
(Hong et al., CVPR 2016). Source classes have masks, target classes only image labels. An attention
model finds each label of an image; a decoder that knows no classes makes its mask.

For the shape legend see `maskx.systems.transfernet.attention`. Also:
    Q: pairs whose mask is predicted; H, W: size of the images.
    Label maps: 0 the background, c + 1 class index c, one more value for unknown pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.backbones import named_feature
from maskx.core.checks import check_choice
from maskx.core.global_mean import global_mean
from maskx.systems.transfernet.attention import (
    attended_features,
    attention_weights,
    densified_attention,
    xavier_fill,
)

TRAIN_STAGES = ("attention", "joint")
DECODER_INPUTS = ("densified", "attention")

_UNKNOWN = 255  # pixels of a pair's target of which nothing is known


def pair_target(
    label_maps: Tensor, pair_images: Tensor, pair_labels: Tensor, *, ignore: int = 255
) -> Tensor:
    """Return what Eq. 8 wants of each pair: its class 1, all else 0, unknown pixels 255.

    Args:
        label_maps: (N, H, W) int64; all unknown for an image without a label map.
        pair_images: (P,).
        pair_labels: (P,).
        ignore: label of unknown pixels in `label_maps`.

    Returns:
        (P, H, W) int64 in {0, 1, 255}.
    """
    label_maps = label_maps[pair_images]
    targets = (label_maps == pair_labels[:, None, None] + 1).long()
    return targets.masked_fill(label_maps == ignore, _UNKNOWN)


def label_loss(class_logits: Tensor, pair_labels: Tensor) -> Tensor:
    """Eq. 6: softmax cross-entropy of the label of each pair, mean over the pairs.

    Args:
        class_logits: (P, L).
        pair_labels: (P,).

    Returns:
        Scalar. Zero, with a graph through everything that made ``class_logits``, when P is 0.
    """
    total = F.cross_entropy(class_logits, pair_labels, reduction="sum")
    return global_mean(total, len(pair_labels))


def mask_loss(mask_logits: Tensor, targets: Tensor) -> Tensor:
    """Eq. 8: softmax cross-entropy of background and foreground, mean over the known pixels.

    Args:
        mask_logits: (Q, 2, H, W).
        targets: (Q, H, W) int64, of :func:`pair_target`.

    Returns:
        Scalar. Zero, with a graph through everything that made ``mask_logits``, when no pixel is
        known.
    """
    total = F.cross_entropy(mask_logits, targets, ignore_index=_UNKNOWN, reduction="sum")
    return global_mean(total, (targets != _UNKNOWN).sum())


def foreground_prob(mask_logits: Tensor) -> Tensor:
    """Return the probability of the foreground of (Q, 2, H, W) mask logits as (Q, H, W).

    That of the background is halved, and both normalised again, as the reference code does at
    inference.
    """
    prob = mask_logits.softmax(dim=1)[:, 1]
    return prob / (prob + (1 - prob) / 2)


def merge_label_masks(prob_fg: Tensor, labels: Sequence[int] | Tensor) -> Tensor:
    """Merge the masks of the labels of one image: the most probable label, pixel by pixel.

    Args:
        prob_fg: (P, H, W), of :func:`foreground_prob`.
        labels: (P,) class indices.

    Returns:
        (H, W) int64 label map; background where no foreground is more probable than background.
    """
    if len(prob_fg) == 0:
        return prob_fg.new_zeros(prob_fg.shape[1:], dtype=torch.int64)
    best, which = prob_fg.max(dim=0)
    labels = torch.as_tensor(labels, device=prob_fg.device)
    return torch.where(best > 1 - best, labels[which] + 1, 0)


class MapNorm(nn.Module):
    """Layer norm over the channels and positions of a map, whatever its scale.

    Unlike that of `torch.nn.GroupNorm` the eps is relative to the mean square: attention weights
    close to 1 / M and gradients of a mean over positions vary by less than the square root of a
    usual eps. It runs in float32 under autocast, as float16 holds no such squares.

    Args:
        channels: of the maps; each has a learned scale and shift.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise (N, C, h, w) maps; one that is zero everywhere stays so but for the shift."""
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        mean = maps.mean(dim=(1, 2, 3), keepdim=True)
        square = maps.square().mean(dim=(1, 2, 3), keepdim=True)
        variance = (maps - mean).square().mean(dim=(1, 2, 3), keepdim=True)
        normalised = (maps - mean) * (variance + 1e-8 * square + 1e-20).rsqrt()
        return normalised * self.weight + self.bias


class PairNetwork(nn.Module):
    """What TransferNet shares with its baselines: the encoder, and a decoder that knows no classes.

    Args:
        encoder: backbone that maps images to a dictionary of feature maps; for a decoder that uses
            switches also with `forward_with_switches`.
        in_feature: name of the feature map.
        decoder: of `maskx.systems.transfernet.decoder`.
        freeze_encoder: do not train the encoder, and keep it in evaluation mode, as in the paper.

    Raises:
        ValueError: the decoder uses switches and the encoder has none.
    """

    def __init__(
        self, encoder: nn.Module, *, in_feature: str, decoder: nn.Module, freeze_encoder: bool
    ) -> None:
        super().__init__()
        if decoder.uses_switches and not hasattr(encoder, "forward_with_switches"):
            raise ValueError(
                f"{type(decoder).__name__} unpools with the pooling switches of the encoder, and "
                f"{type(encoder).__name__} gives none. Use VGG16, or TransposedDecoder."
            )
        self.encoder = encoder
        self.in_feature = in_feature
        self.decoder = decoder
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            encoder.requires_grad_(False)
            encoder.eval()

    def train(self, mode: bool = True) -> "PairNetwork":
        """Set training or evaluation mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        """Map (N, 3, H, W) images to (N, D, h, w) features and, for the decoder, switches."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            if self.decoder.uses_switches:
                features, switches = self.encoder.forward_with_switches(images)
            else:
                features, switches = self.encoder(images), None
        return named_feature(features, self.in_feature, self.encoder), switches


class TransferNetOutputs(NamedTuple):
    """What TransferNet predicts for pairs of an image and a label.

    Attributes:
        attention: (P, h, w) probabilities over the positions, alpha.
        densified: (P, h, w) densified attention, s.
        class_logits: (P, L) logits of the attended features.
        mask_logits: (Q, 2, H, W) logits of background and foreground; None in the stage
            ``attention``, which has no decoder yet.
    """

    attention: Tensor
    densified: Tensor
    class_logits: Tensor
    mask_logits: Tensor | None


class TransferNet(PairNetwork):
    """Encoder, attention, classifier of what is attended, and decoder.

    Args:
        encoder: see :class:`PairNetwork`.
        in_feature: see :class:`PairNetwork`.
        in_channels: D, channels of the feature map.
        num_classes: L, source and target classes.
        attention: maps features and pairs to attention logits; see
            `maskx.systems.transfernet.attention`.
        decoder: see :class:`PairNetwork`.
        hidden_channels: of the classifier, which has two fully connected layers.
        decoder_input: ``densified`` (Eq. 7) or ``attention`` (Eq. 3, the ablation).
        feature_scale: multiply the features by it, and give the decoder its input as it then is,
            as the reference does by 0.004. That number is of Caffe's VGG-16, which sees pixels up
            to 255; where they are divided by a deviation of 58, as for torchvision's weights, it is
            58 times as large. With 0 the decoder's input is normalised over its positions, then
            scaled and shifted by two learned numbers, whatever the encoder's scale.
        freeze_encoder: see :class:`PairNetwork`.
        train_stage: ``attention`` trains attention and classifier (Eq. 6), ``joint`` also the
            decoder (Eq. 9). What a stage does not train has `requires_grad` False.
        freeze_attention: do not train the attention in the stage ``joint``, the ablation.
        mask_weight: lambda of Eq. 9.

    Raises:
        ValueError: an argument is out of range or does not fit the others.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        in_feature: str,
        in_channels: int,
        num_classes: int,
        attention: nn.Module,
        decoder: nn.Module,
        hidden_channels: int = 512,
        decoder_input: str = "densified",
        feature_scale: float = 0.0,
        freeze_encoder: bool = True,
        train_stage: str = "joint",
        freeze_attention: bool = False,
        mask_weight: float = 2.0,
    ) -> None:
        check_choice("TransferNet's decoder_input", decoder_input, DECODER_INPUTS)
        check_choice("TransferNet's train_stage", train_stage, TRAIN_STAGES)
        if freeze_attention and train_stage == "attention":
            raise ValueError(
                "freeze_attention leaves only the classifier to the stage 'attention'. Use it with "
                "train_stage='joint', starting from a checkpoint of the stage 'attention'."
            )
        super().__init__(
            encoder, in_feature=in_feature, decoder=decoder, freeze_encoder=freeze_encoder
        )
        self.decoder_input = decoder_input
        self.train_stage = train_stage
        self.mask_weight = mask_weight
        self.feature_scale = feature_scale or 1.0
        self.attention = attention
        self.classifier = nn.Sequential(
            nn.Linear(in_channels, hidden_channels),
            nn.ReLU(),
            nn.Linear(hidden_channels, num_classes),
        )
        xavier_fill(self.classifier[0])
        xavier_fill(self.classifier[2])
        self.decoder_norm = nn.Identity() if feature_scale else MapNorm(1)
        if train_stage == "attention":
            self.decoder.requires_grad_(False)
            self.decoder_norm.requires_grad_(False)
        if freeze_attention:
            self.attention.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        pair_images: Tensor,
        pair_labels: Tensor,
        mask_pairs: Tensor | None = None,
    ) -> TransferNetOutputs:
        """Predict where each label is, what the attended features are, and the masks.

        Args:
            images: (N, 3, H, W), normalised.
            pair_images: (P,).
            pair_labels: (P,).
            mask_pairs: (P,) bool, the pairs whose mask is wanted, Q of them; None for all. In
                training the pairs of images with label maps, as the decoder costs most.
        """
        features, switches = self.encode(images)
        features = features * self.feature_scale
        attention = attention_weights(self.attention(features, pair_images, pair_labels))
        attended = attended_features(features, attention, pair_images)
        densified = densified_attention(features, attended, pair_images)
        mask_logits = None
        if self.train_stage == "joint":
            maps = densified if self.decoder_input == "densified" else attention
            if mask_pairs is not None:
                maps, pair_images = maps[mask_pairs], pair_images[mask_pairs]
            maps = self.decoder_norm(maps[:, None])
            mask_logits = self.decoder(maps, pair_images, switches, images.shape[-2:])
        return TransferNetOutputs(attention, densified, self.classifier(attended), mask_logits)

    def losses(
        self,
        outputs: TransferNetOutputs,
        pair_images: Tensor,
        pair_labels: Tensor,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return ``loss_labels`` (Eq. 6) and, in the stage ``joint``, ``loss_masks`` (Eq. 8, 9).

        Args:
            outputs: of :meth:`forward`.
            pair_images: (P,).
            pair_labels: (P,).
            targets: (Q, H, W), of :func:`pair_target`; only for the stage ``joint``.
        """
        losses = {"loss_labels": label_loss(outputs.class_logits, pair_labels)}
        if self.train_stage == "joint":
            losses["loss_masks"] = self.mask_weight * mask_loss(outputs.mask_logits, targets)
        return losses
