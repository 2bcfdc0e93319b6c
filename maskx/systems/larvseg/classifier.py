"""Cosine classifier of LarvSeg, for vocabularies of which only a part is scored at a time.

"LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic Segmentation via
Category-wise Attentive Classifier" (Yu et al., PRCV 2024).

Both forms of the logits are products of one vector per token with one vector per class. Whatever
is averaged over tokens is therefore averaged before the product with the classes, and no tensor of
classes x tokens is made for it.

Shape legend:
    N: images; K: classes of the vocabulary; L: classes that are scored, those of a data set;
    C: channels of the feature map; d: channels of the classifier; h, w: size of the feature map, a
    position of which is a token; T = h * w; S: vectors per image.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.checks import check_choice

LOGIT_FORMS = ("temperature", "layernorm")

# Bounds of the temperature. At 0.01 the logits of one token lie within [-100, 100].
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 1.0


class LogitFactors(NamedTuple):
    """What the logits are products of: ``logit = token . vector + shift``.

    Attributes:
        tokens: (N, d, h, w), scaled.
        vectors: (L, d).
        shift: scalar.
    """

    tokens: Tensor
    vectors: Tensor
    shift: Tensor

    def dense(self) -> Tensor:
        """Compute the (N, L, h, w) logits of every token."""
        return F.conv2d(self.tokens, self.vectors[:, :, None, None]) + self.shift

    def pool(self, weights: Tensor) -> Tensor:
        """Sum the tokens of each image with (N, S, T) weights, to (N, S, d)."""
        return weights @ self.tokens.flatten(2).transpose(1, 2)

    def pooled_logits(self, pooled: Tensor, total_weights: Tensor) -> Tensor:
        """Compute the sums over tokens of weighted logits.

        Args:
            pooled: (..., d) rows of :meth:`pool`.
            total_weights: (...) sums of their weights over the tokens.

        Returns:
            (..., L).
        """
        return pooled @ self.vectors.T + (total_weights * self.shift).unsqueeze(-1)

    def zero(self) -> Tensor:
        """Return a zero with a graph through everything that made the logits."""
        return 0 * (self.tokens.sum() + self.vectors.sum() + self.shift)


class CosineClassifier(nn.Module):
    """Cosine between projected tokens and projected class embeddings, and the logits made of it.

    The logits of a token are either its cosines over a learned temperature within [0.01, 1]
    (``temperature``), or its cosines after a layer norm over the classes that are scored, with one
    learned scale and shift for all of them (``layernorm``, the form of the reference code). Under
    ``layernorm`` a logit depends on which other classes are scored.

    Args:
        in_channels: C.
        num_classes: K.
        hidden_channels: d; 0 for C.
        logit_form: ``temperature`` or ``layernorm``.
        temperature: at the start of training.

    Attributes:
        trained: (K,) bool, in the checkpoint: the classes that training showed, all of them until
            :meth:`set_trained` is called.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_channels: int = 0,
        logit_form: str = "temperature",
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        check_choice("logit_form of CosineClassifier", logit_form, LOGIT_FORMS)
        if not _MIN_TEMPERATURE < temperature < _MAX_TEMPERATURE:
            raise ValueError(
                f"temperature must lie between {_MIN_TEMPERATURE} and {_MAX_TEMPERATURE}, got "
                f"{temperature}."
            )
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        channels = hidden_channels or in_channels
        self.num_classes = num_classes
        self.channels = channels
        self.logit_form = logit_form
        std = channels**-0.5
        self.feature_projection = nn.Parameter(std * torch.randn(in_channels, channels))
        self.class_projection = nn.Parameter(std * torch.randn(channels, channels))
        self.class_embeddings = nn.Parameter(torch.empty(num_classes, channels))
        nn.init.trunc_normal_(self.class_embeddings, std=0.02)
        if logit_form == "temperature":
            span = math.log(_MAX_TEMPERATURE / _MIN_TEMPERATURE)
            share = math.log(temperature / _MIN_TEMPERATURE) / span
            self.raw_temperature = nn.Parameter(torch.tensor(math.log(share / (1 - share))))
        else:
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.shift = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("trained", torch.ones(num_classes, dtype=torch.bool))

    def set_trained(self, class_indices: Sequence[int]) -> None:
        """Say which classes the training data show; the others are never predicted.

        The embedding of a class without images stays where it was initialised, and its cosines
        would still compete with those of the others.

        Raises:
            ValueError: a class index is out of range.
        """
        indices = check_class_indices(sorted(set(class_indices)), self.num_classes)
        self.trained.zero_()
        self.trained[indices.to(self.trained.device)] = True

    def temperature(self) -> Tensor:
        """Return the temperature, within its bounds; the gradient never vanishes altogether."""
        span = math.log(_MAX_TEMPERATURE / _MIN_TEMPERATURE)
        return _MIN_TEMPERATURE * torch.exp(span * self.raw_temperature.sigmoid())

    def tokens(self, features: Tensor) -> Tensor:
        """Map (N, C, h, w) features to (N, d, h, w) tokens of unit norm."""
        return F.normalize(F.conv2d(features, self.feature_projection.T[:, :, None, None]), dim=1)

    def class_vectors(self, class_indices: Tensor | None = None) -> Tensor:
        """Return the (L, d) vectors of unit norm of the given classes, or of all K."""
        embeddings = self.class_embeddings
        if class_indices is not None:
            embeddings = embeddings[class_indices]
        return F.normalize(embeddings @ self.class_projection, dim=1)

    def factors(self, tokens: Tensor, class_vectors: Tensor) -> LogitFactors:
        """Factor the logits of tokens for the classes that are scored.

        Args:
            tokens: (N, d, h, w) of unit norm, see :meth:`tokens`.
            class_vectors: (L, d) of unit norm, see :meth:`class_vectors`.
        """
        if self.logit_form == "temperature":
            return LogitFactors(tokens / self.temperature(), class_vectors, tokens.new_zeros(()))
        # The mean and the variance of f . c over the classes are f . mean(c) and f^T Cov(c) f.
        centred = class_vectors - class_vectors.mean(dim=0)
        covariance = centred.T @ centred / len(class_vectors)
        projected = F.conv2d(tokens, covariance[:, :, None, None])
        variance = (tokens * projected).sum(dim=1, keepdim=True)
        return LogitFactors(self.scale * tokens * (variance + 1e-5).rsqrt(), centred, self.shift)


def check_class_indices(class_indices: Sequence[int], num_classes: int) -> Tensor:
    """Check the classes that a data set scores, and return them as an int64 tensor.

    Two labels of a data set may not share a class (such as the seven walls of COCO-Stuff, once
    their names are the same): their logits would be equal, so that neither could be learned. Merge
    them in the label maps.

    Args:
        class_indices: position i holds the class index in the vocabulary of label i.
        num_classes: K.

    Raises:
        ValueError: there is none, one is out of range or is there twice.
    """
    indices = [int(index) for index in class_indices]
    if not indices:
        raise ValueError("class_indices is empty: a data set scores at least one class.")
    unknown = sorted({index for index in indices if not 0 <= index < num_classes})
    if unknown:
        raise ValueError(f"class_indices has {unknown}. Allowed: 0 to {num_classes - 1}.")
    if len(set(indices)) < len(indices):
        twice = sorted(index for index, count in Counter(indices).items() if count > 1)
        raise ValueError(
            f"class_indices has {twice} more than once. Labels that mean the same class must be "
            "merged into one label before training."
        )
    return torch.tensor(indices, device="cpu")  # also where weights are made elsewhere
