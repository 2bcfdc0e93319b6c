"""Attention of TransferNet: from features and a label to where the label is.

"Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional Neural Network"
(Hong et al., CVPR 2016), section 4.2 and appendix A.

Everything works on pairs of an image and one of its labels. What depends on the image alone is
computed once per image and never copied for each of its pairs.

Shape legend:
    N: images; P: (image, label) pairs; L: classes; D: channels of the feature map; h, w: its size;
    M = h * w: its positions; d: factors.
    pair_images (P,): index of the image of a pair, in [0, N).
    pair_labels (P,): class index of a pair, in [0, L).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pair_matmul(rows: Tensor, matrices: Tensor, pair_images: Tensor) -> Tensor:
    """Multiply the row of each pair by the matrix of the pair's image.

    The matrices are not copied for each pair: the rows are brought together by image, padded to the
    largest number of pairs of one image, and multiplied in one batched product. It runs in
    float32 under autocast: the products of Eq. 7 with features of VGG-16 exceed float16.

    Args:
        rows: (P, X).
        matrices: (N, X, Y).
        pair_images: (P,).

    Returns:
        (P, Y), of float32 or wider.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
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

    Args:
        features: (N, D, h, w), A.
        attention: (P, h, w), alpha.
        pair_images: (P,).

    Returns:
        (P, D).
    """
    return pair_matmul(attention.flatten(1), features.flatten(2).mT, pair_images)


def densified_attention(features: Tensor, attended: Tensor, pair_images: Tensor) -> Tensor:
    """Eq. 7: s = A z, how much each position is like what the attention has chosen.

    With Eq. 5 this is Eq. 10, s = (A Aᵀ) alpha, without the M x M Gram matrix.

    Args:
        features: (N, D, h, w), A.
        attended: (P, D), z.
        pair_images: (P,).

    Returns:
        (P, h, w).
    """
    return pair_matmul(attended, features.flatten(2), pair_images).unflatten(1, features.shape[2:])


def attention_entropy(attention: Tensor) -> Tensor:
    """Return the entropy of each attention map, 1 for a uniform map and 0 for a single position.

    The label is an input of the attention, so Eq. 6 could be met without finding the object; the
    entropy then stays close to 1.

    Args:
        attention: (P, h, w), each map sums to 1.

    Returns:
        (P,) in [0, 1], entropy over log M.
    """
    num_positions = attention[0].numel() if len(attention) else 1
    return torch.special.entr(attention).sum(dim=(1, 2)) / math.log(max(num_positions, 2))


class FactoredAttention(nn.Module):
    """Gate at each position: v_i = W^att relu(W^feat A_i * W^label y), for any size of image.

    Eq. 4 with the same factors at every position, so that the attention moves with the object.
    0.6 M parameters at D = 512, L = 80 and d = 1024, where Eq. 4 has 211 M.

    Args:
        in_channels: D.
        num_classes: L.
        num_factors: d.
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


class FullyConnectedAttention(nn.Module):
    """Eq. 4 as published, for one size of image: v = W^att (W^feat vec(A) * W^label y) + b.

    Like the reference code it has one more fully connected layer with a ReLU before W^att, and a
    bias in every layer. At D = 512, 20 x 20 positions and d = 1024, W^feat alone has 209.7 M
    weights.

    Args:
        in_channels: D.
        num_classes: L.
        feature_size: (h, w) of the only feature map that fits.
        num_factors: d.

    Raises:
        ValueError: on loading, a checkpoint made for another feature map; in forward, a feature
            map of another size.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        feature_size: tuple[int, int],
        num_factors: int = 1024,
    ) -> None:
        super().__init__()
        num_positions = math.prod(feature_size)
        self.feature_embed = nn.Linear(in_channels * num_positions, num_factors)
        self.label_embed = nn.Linear(num_classes, num_factors)
        self.hidden = nn.Linear(num_factors, num_factors)
        self.attend = nn.Linear(num_factors, num_positions)
        for layer in (self.feature_embed, self.label_embed, self.hidden):
            xavier_fill(layer)
        nn.init.normal_(self.attend.weight, std=0.01)
        nn.init.zeros_(self.attend.bias)
        self.register_buffer("feature_size", torch.tensor(feature_size))
        self._feature_size = tuple(feature_size)

    def forward(self, features: Tensor, pair_images: Tensor, pair_labels: Tensor) -> Tensor:
        """Predict the (P, h, w) attention logits v of each pair from (N, D, h, w) features."""
        check_feature_size("FullyConnectedAttention", features.shape[2:], self._feature_size)
        feature_factors = self.feature_embed(features.flatten(1))[pair_images]
        label_factors = _embed_labels(self.label_embed, pair_labels)
        hidden = F.relu(self.hidden(feature_factors * label_factors))
        return self.attend(hidden).unflatten(1, self._feature_size)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        found = state_dict.get(f"{prefix}feature_size", self.feature_size)
        check_feature_size("This FullyConnectedAttention", self._feature_size, found.tolist(), True)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_feature_size(
    what: str, found: Sequence[int], expected: Sequence[int], is_checkpoint: bool = False
) -> None:
    """Refuse a feature map of another size than fully connected weights were made for.

    Args:
        what: what has the weights.
        found: (h, w) of the feature map or, when loading, of the model.
        expected: (h, w) that the weights were made for.
        is_checkpoint: the weights are those of a checkpoint.

    Raises:
        ValueError: the sizes differ.
    """
    if tuple(found) == tuple(expected):
        return
    ours, theirs = (f"{height} x {width}" for height, width in (found, expected))
    if is_checkpoint:
        raise ValueError(
            f"{what} is made for feature maps of {ours} positions, but the checkpoint for {theirs}."
            " Use the input size that the checkpoint was trained with, or the form for any size."
        )
    raise ValueError(
        f"{what} got a feature map of {ours} positions. Allowed: {theirs}, for which it was made. "
        "Give images of the size that it was made for, or use the form for any size."
    )


def xavier_fill(layer: nn.Conv2d | nn.Linear) -> None:
    """Initialise a layer as Caffe's xavier filler: uniform, variance 1 / fan_in, zero bias."""
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    nn.init.zeros_(layer.bias)


def _embed_labels(layer: nn.Linear, labels: Tensor) -> Tensor:
    """Return what `layer` makes of the one-hot vectors of the labels, without making those."""
    return F.embedding(labels, layer.weight.mT) + layer.bias
