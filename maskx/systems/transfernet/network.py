"""TransferNet: attention, losses, network and merging of the masks of an image.

"Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional Neural Network"
(Hong et al., CVPR 2016). Source classes have masks, target classes only image labels. An attention
model (section 4.2 and appendix A) finds each label of an image; a decoder that knows no classes
makes its mask.

Everything works on pairs of an image and one of its labels. What depends on the image alone is
computed once per image and never copied for each of its pairs.

Shape legend:
    N: images; P: (image, label) pairs; Q: pairs whose mask is predicted; L: classes; D: channels of
    the feature map; h, w: its size; M = h * w: its positions; d: factors; H, W: size of the images.
    pair_images (P,): index of the image of a pair, in [0, N).
    pair_labels (P,): class index of a pair, in [0, L).
    Label maps: 0 the background, c + 1 class index c, one more value for unknown pixels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.backbones import named_feature
from maskx.core.checks import check_choice
from maskx.core.global_mean import global_mean

TRAIN_STAGES = ("attention", "joint")
DECODER_INPUTS = ("densified", "attention")

_UNKNOWN = 255  # pixels of a pair's target of which nothing is known


# --- attention


def pair_matmul(rows: Tensor, matrices: Tensor, pair_images: Tensor) -> Tensor:
    """Multiply the row (P, X) of each pair by the matrix (N, X, Y) of its image, to (P, Y).

    The matrices are not copied for each pair: the rows are brought together by image, padded to the
    largest number of pairs of one image, and multiplied in one batched product. It runs in
    float32 under autocast: the products of Eq. 7 with features of VGG-16 exceed float16.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if len(matrices) == 1:  # of which all pairs are; no size follows from what a tensor holds
        with torch.autocast(rows.device.type, enabled=False):
            return rows.to(dtype) @ matrices[0].to(dtype)
    slots = (pair_images[:, None] == pair_images).tril(-1).sum(dim=1)  # place among its image's
    num_slots = int(slots.max()) + 1 if len(slots) else 0
    with torch.autocast(rows.device.type, enabled=False):
        padded = rows.new_zeros(len(matrices), num_slots, rows.shape[1], dtype=dtype)
        padded = padded.index_put((pair_images, slots), rows.to(dtype))
        return torch.bmm(padded, matrices.to(dtype))[pair_images, slots]


def attention_weights(logits: Tensor) -> Tensor:
    """Eq. 3: softmax over the positions of each (P, h, w) map; a map sums to 1."""
    return logits.flatten(1).softmax(dim=1).reshape(logits.shape)


def attended_features(features: Tensor, attention: Tensor, pair_images: Tensor) -> Tensor:
    """Eq. 5: z = Aᵀ alpha, the mean feature vector under the attention of each pair.

    Of (N, D, h, w) features A and (P, h, w) attention alpha it is (P, D).
    """
    return pair_matmul(attention.flatten(1), features.flatten(2).mT, pair_images)


def densified_attention(features: Tensor, attended: Tensor, pair_images: Tensor) -> Tensor:
    """Eq. 7: s = A z, how much each position is like what the attention has chosen.

    With Eq. 5 this is Eq. 10, s = (A Aᵀ) alpha, without the M x M Gram matrix. Of (N, D, h, w)
    features A and (P, D) attended features z it is (P, h, w).
    """
    return pair_matmul(attended, features.flatten(2), pair_images).unflatten(1, features.shape[2:])


def attention_entropy(attention: Tensor) -> Tensor:
    """Return the (P,) entropies of (P, h, w) maps over log M: 1 if uniform, 0 for one position.

    The label is an input of the attention, so Eq. 6 could be met without finding the object; the
    entropy then stays close to 1.
    """
    num_positions = attention[0].numel() if len(attention) else 1
    return torch.special.entr(attention).sum(dim=(1, 2)) / math.log(max(num_positions, 2))


class FactoredAttention(nn.Module):
    """Gate at each position: v_i = W^att relu(W^feat A_i * W^label y), for any size of image.

    Eq. 4 with the same factors at every position, so that the attention moves with the object.
    0.6 M parameters at D = 512, L = 80 and d = 1024, where Eq. 4 has 211 M.
    """

    def __init__(self, *, in_channels: int, num_classes: int, num_factors: int = 1024) -> None:
        super().__init__()
        self.feature_embed = nn.Conv2d(in_channels, num_factors, kernel_size=1)
        self.label_embed = nn.Linear(num_classes, num_factors)
        # A bias would be the same for all positions, which the softmax of Eq. 3 undoes.
        self.attend = nn.Conv2d(num_factors, 1, kernel_size=1, bias=False)
        xavier_fill(self.feature_embed)
        xavier_fill(self.label_embed)
        nn.init.normal_(self.attend.weight, std=0.01)

    def forward(self, features: Tensor, pair_images: Tensor, pair_labels: Tensor) -> Tensor:
        """Predict the (P, h, w) attention logits v of each pair from (N, D, h, w) features."""
        feature_factors = self.feature_embed(features)[pair_images]
        label_factors = _embed_labels(self.label_embed, pair_labels)
        return self.attend(F.relu(feature_factors * label_factors[:, :, None, None]))[:, 0]


class ForOneSize(nn.Module):
    """Fully connected layers for one (h, w) of feature maps, which checkpoints hold as well."""

    what = "FullyConnectedAttention"

    def __init__(self, feature_size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("feature_size", torch.tensor(feature_size))
        self.size = tuple(feature_size)

    def check_size(self, maps: Tensor) -> None:
        """Refuse feature maps of another size."""
        if tuple(maps.shape[2:]) != self.size:
            ours, theirs = (f"{h} x {w}" for h, w in (maps.shape[2:], self.size))
            raise ValueError(
                f"{self.what} got a feature map of {ours} positions. Allowed: {theirs}, for which "
                "it was made. Give images of that size, or use the form for any size."
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        found = tuple(state_dict.get(f"{prefix}feature_size", self.feature_size).tolist())
        if found != self.size:
            ours, theirs = (f"{h} x {w}" for h, w in (self.size, found))
            raise ValueError(
                f"This {self.what} is made for feature maps of {ours} positions, but the "
                f"checkpoint for {theirs}. Use the input size that the checkpoint was trained "
                "with, or the form for any size."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class FullyConnectedAttention(ForOneSize):
    """Eq. 4 as published, for one size of image: v = W^att (W^feat vec(A) * W^label y) + b.

    Like the reference code it has one more fully connected layer with a ReLU before W^att, and a
    bias in every layer. At D = 512, 20 x 20 positions and d = 1024, W^feat alone has 209.7 M
    weights.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        feature_size: tuple[int, int],
        num_factors: int = 1024,
    ) -> None:
        super().__init__(feature_size)
        num_positions = math.prod(feature_size)
        self.feature_embed = nn.Linear(in_channels * num_positions, num_factors)
        self.label_embed = nn.Linear(num_classes, num_factors)
        self.hidden = nn.Linear(num_factors, num_factors)
        self.attend = nn.Linear(num_factors, num_positions)
        for layer in (self.feature_embed, self.label_embed, self.hidden):
            xavier_fill(layer)
        nn.init.normal_(self.attend.weight, std=0.01)
        nn.init.zeros_(self.attend.bias)

    def forward(self, features: Tensor, pair_images: Tensor, pair_labels: Tensor) -> Tensor:
        """Predict the (P, h, w) attention logits v of each pair from (N, D, h, w) features."""
        self.check_size(features)
        feature_factors = self.feature_embed(features.flatten(1))[pair_images]
        label_factors = _embed_labels(self.label_embed, pair_labels)
        hidden = F.relu(self.hidden(feature_factors * label_factors))
        return self.attend(hidden).unflatten(1, self.size)


def xavier_fill(layer: nn.Conv2d | nn.Linear) -> None:
    """Initialise a layer as Caffe's xavier filler: uniform, variance 1 / fan_in, zero bias."""
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    nn.init.zeros_(layer.bias)


def _embed_labels(layer: nn.Linear, labels: Tensor) -> Tensor:
    """Return what `layer` makes of the one-hot vectors of the labels, without making those."""
    return F.embedding(labels, layer.weight.mT) + layer.bias


# --- losses and masks


def pair_target(
    label_maps: Tensor, pair_images: Tensor, pair_labels: Tensor, *, ignore: int = 255
) -> Tensor:
    """Return what Eq. 8 wants of each pair: (P, H, W), its class 1, all else 0, unknown pixels 255.

    ``label_maps`` are (N, H, W) int64, with ``ignore`` where nothing is known.
    """
    label_maps = label_maps[pair_images]
    targets = (label_maps == pair_labels[:, None, None] + 1).long()
    return targets.masked_fill(label_maps == ignore, _UNKNOWN)


def label_loss(class_logits: Tensor, pair_labels: Tensor) -> Tensor:
    """Eq. 6: softmax cross-entropy of the label of each pair, mean over the pairs.

    Zero, with a graph through everything that made the (P, L) ``class_logits``, when P is 0.
    """
    total = F.cross_entropy(class_logits, pair_labels, reduction="sum")
    return global_mean(total, len(pair_labels))


def mask_loss(mask_logits: Tensor, targets: Tensor) -> Tensor:
    """Eq. 8: softmax cross-entropy of background and foreground, mean over the known pixels.

    Zero, with a graph through everything that made the (Q, 2, H, W) ``mask_logits``, when no pixel
    is known of the (Q, H, W) targets of :func:`pair_target`.
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
    """Merge the (P, H, W) foreground probabilities of (P,) labels of an image to a label map.

    Each pixel has the most probable label; background where none is more probable than background.
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
    usual eps. It runs in float32 under autocast, as float16 holds no such squares. Each channel has
    a learned scale and shift.
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
        decoder: of `maskx.systems.transfernet.decoder`.
        freeze_encoder: do not train the encoder, and keep it in evaluation mode, as in the paper.
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
        in_channels: D.
        num_classes: L, source and target classes.
        attention: :class:`FactoredAttention` or :class:`FullyConnectedAttention`.
        hidden_channels: of the classifier, which has two fully connected layers.
        decoder_input: ``densified`` (Eq. 7) or ``attention`` (Eq. 3, the ablation).
        feature_scale: multiply the features by it, and give the decoder its input as it then is,
            as the reference does by 0.004. That number is of Caffe's VGG-16, which sees pixels up
            to 255; where they are divided by a deviation of 58, as for torchvision's weights, it is
            58 times as large. With 0 the decoder's input is normalised over its positions, then
            scaled and shifted by two learned numbers, whatever the encoder's scale.
        train_stage: ``attention`` trains attention and classifier (Eq. 6), ``joint`` also the
            decoder (Eq. 9). What a stage does not train has `requires_grad` False.
        freeze_attention: do not train the attention in the stage ``joint``, the ablation.
        mask_weight: lambda of Eq. 9.
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

        ``mask_pairs`` (P,) bool are the pairs whose mask is wanted, Q of them; None for all. In
        training they are those of images with label maps, as the decoder costs most.
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

        These need ``targets`` (Q, H, W), of :func:`pair_target`.
        """
        losses = {"loss_labels": label_loss(outputs.class_logits, pair_labels)}
        if self.train_stage == "joint":
            losses["loss_masks"] = self.mask_weight * mask_loss(outputs.mask_logits, targets)
        return losses
