"""Network of LarvSeg: a cosine classifier of tokens and its losses, of masks and image labels.

"LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic Segmentation via
Category-wise Attentive Classifier" (Yu et al., PRCV 2024).

The vocabulary is the union of the classes of several data sets. A batch comes from one of them, and
only its classes are scored: ``class_indices`` holds, for each label of the data set, the class of
the vocabulary it is. Labels, in label maps and image labels, are positions in ``class_indices``.

A logit is the product of a vector of its token and one of its class. Whatever is averaged over
tokens is therefore averaged before the product, and no tensor of classes x tokens is made for it.

Shape legend:
    N: images; K: classes of the vocabulary; L: classes that are scored, those of the data set;
    C: channels of the feature map; d: channels of the classifier; h, w: size of the feature map, a
    position of which is a token, T = h * w; H, W: size of the label maps; P: (image, class) pairs
    of a batch, one for each label of each image; S: vectors per image.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.backbones import named_feature
from maskx.core.checks import check_choice
from maskx.core.global_mean import global_mean
from maskx.core.losses import LabelPairs, label_pairs, pixel_loss
from maskx.systems.larvseg.attention import (
    MemoryBank,
    attention_maps,
    pseudo_background,
    score_regions,
    top_token_means,
)

LOGIT_FORMS = ("temperature", "layernorm")
MEMORIES = ("cross_image", "single_image", "score_map", "none")
POOLINGS = ("weighted", "normalised")

# Bounds of the temperature. At 0.01 the logits of one token lie within [-100, 100].
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 1.0
_TEMPERATURE_SPAN = math.log(_MAX_TEMPERATURE / _MIN_TEMPERATURE)


class LogitFactors(NamedTuple):
    """What the logits are made of: ``logit = token . vector + shift``.

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
        """Sum weighted logits, to (..., L), from (..., d) rows of :meth:`pool`.

        ``total_weights`` (...) are the sums of the weights of each row over the tokens.
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
        self.num_classes = num_classes
        self.channels = channels = hidden_channels or in_channels
        self.logit_form = logit_form
        std = channels**-0.5
        self.feature_projection = nn.Parameter(std * torch.randn(in_channels, channels))
        self.class_projection = nn.Parameter(std * torch.randn(channels, channels))
        self.class_embeddings = nn.Parameter(torch.empty(num_classes, channels))
        nn.init.trunc_normal_(self.class_embeddings, std=0.02)
        if logit_form == "temperature":
            share = math.log(temperature / _MIN_TEMPERATURE) / _TEMPERATURE_SPAN
            self.raw_temperature = nn.Parameter(torch.tensor(math.log(share / (1 - share))))
        else:
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.shift = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("trained", torch.ones(num_classes, dtype=torch.bool))

    def set_trained(self, class_indices: Sequence[int]) -> None:
        """Say which classes the training data show; the others are never predicted.

        The embedding of a class without images stays where it was initialised, and its cosines
        would still compete with those of the others.
        """
        indices = check_class_indices(sorted(set(class_indices)), self.num_classes)
        self.trained.zero_()
        self.trained[indices.to(self.trained.device)] = True

    def temperature(self) -> Tensor:
        """Return the temperature, within its bounds; the gradient never vanishes altogether."""
        return _MIN_TEMPERATURE * torch.exp(_TEMPERATURE_SPAN * self.raw_temperature.sigmoid())

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
    their names are the same): their logits would be equal, so that neither could be learned.

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
    twice = sorted(index for index, count in Counter(indices).items() if count > 1)
    if twice:
        raise ValueError(
            f"class_indices has {twice} more than once. Labels that mean the same class must be "
            "merged into one label before training."
        )
    return torch.tensor(indices, device="cpu")  # also where weights are made elsewhere


# --- losses


def segmentation_loss(
    logits: Tensor, label_maps: Tensor, *, ignore: int, size: tuple[int, int] | None = None
) -> Tensor:
    """Mean cross-entropy over the known pixels of the batch (Eq. 1).

    Args:
        logits: (N, L, h, w), up-sampled bilinearly.
        label_maps: (N, H, W) int64, labels in [0, L) or ``ignore``; taken at the nearest pixel.
        ignore: label of the pixels of which nothing is known.
        size: at which both are compared; None for half of H x W, rounded down.

    Returns:
        Scalar. Zero, with a graph through everything that made ``logits``, when no pixel is known.
    """
    size = size or tuple(max(side // 2, 1) for side in label_maps.shape[-2:])
    # Nearest neighbours of int64 by their indices: F.interpolate has no integers, and its floats
    # end at 2^24.
    rows, columns = (
        (torch.arange(new, device=label_maps.device) * old) // new
        for new, old in zip(size, label_maps.shape[-2:], strict=True)
    )
    return pixel_loss(logits, label_maps[:, rows[:, None], columns], ignore=ignore)


def image_level_loss(
    factors: LogitFactors, pairs: LabelPairs, *, takes_part: bool = True
) -> Tensor:
    """Cross-entropy of each label to the logits of its image, averaged over the tokens.

    The other labels of the image are left out of the softmax.

    Args:
        factors: of the logits of the batch.
        pairs: labels of the batch.
        takes_part: see :func:`maskx.core.global_mean.global_mean`.

    Returns:
        Scalar, the mean over the pairs. Zero, with a graph through everything that made the logits,
        when there is none.
    """
    if pairs.num_slots == 0:
        return global_mean(factors.zero(), 0, takes_part=takes_part)
    pooled = factors.tokens.mean(dim=(2, 3))
    logits = factors.pooled_logits(pooled, pooled.new_ones(len(pooled)))
    losses = _label_losses(logits[pairs.images], pairs)
    return global_mean(losses.sum(), len(losses), takes_part=takes_part)


def attentive_loss(
    factors: LogitFactors,
    pairs: LabelPairs,
    attention: Tensor,
    ready: Tensor,
    *,
    pooling: str = "weighted",
    takes_part: bool = True,
) -> Tensor:
    """Cross-entropy of each label to the logits of its image, weighted by its attention (Eq. 5).

    Args:
        factors: of the logits of the batch; the gradient flows through these alone.
        pairs: labels of the batch.
        attention: (P, T) in [0, 1], A of the class of each pair, which weights every logit.
        ready: (P,) bool: pairs whose attention map means something; the others have loss zero.
        pooling: ``weighted``, the mean over the tokens of logit * A as in the paper; or
            ``normalised``, their sum over the sum of A, so that logits keep their size when A is
            small.
        takes_part: see :func:`maskx.core.global_mean.global_mean`.

    Returns:
        Scalar, the sum over the ready pairs by the number of all pairs. Zero, with a graph through
        everything that made the logits, when there is none.
    """
    check_choice("pooling of the attentive loss", pooling, POOLINGS)
    if pairs.num_slots == 0:
        return global_mean(factors.zero(), 0, takes_part=takes_part)
    attention = attention.detach()
    if pooling == "weighted":
        weights = attention / attention.shape[-1]
    else:
        weights = attention / attention.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    pooled = pairs.unpad(factors.pool(pairs.pad(weights)))
    logits = factors.pooled_logits(pooled, weights.sum(dim=-1))
    losses = _label_losses(logits, pairs) * ready
    return global_mean(losses.sum(), len(losses), takes_part=takes_part)


def _label_losses(logits: Tensor, pairs: LabelPairs) -> Tensor:
    """Cross-entropy of each of (P, L) logits, without the other labels of the image: (P,)."""
    others = pairs.present(logits.shape[1])[pairs.images]
    others = others.scatter(1, pairs.classes[:, None], False)
    return F.cross_entropy(
        logits.masked_fill(others, float("-inf")), pairs.classes, reduction="none"
    )


# --- network


class LarvSeg(nn.Module):
    """A backbone, a cosine classifier on one of its features, and the three losses.

    Args:
        backbone: maps (N, 3, H, W) images to a dictionary of feature maps.
        in_feature: name of the feature map that is classified.
        in_channels: C.
        num_classes: K.
        hidden_channels: d; 0 for C.
        logit_form: ``temperature`` or ``layernorm``, see :class:`CosineClassifier`.
        memory: what the attention maps of the auxiliary loss are made with. ``cross_image``: the
            images seen last (the paper's). ``single_image``: the best tokens of the image itself,
            as in the reference code. ``score_map``: in place of attention the tokens with a high
            score of the class, as the paper describes its single-image design. ``none``: there is
            no auxiliary loss (the paper's baseline).
        bank_size: images per class of the memory bank.
        warm_up: images of a class before its auxiliary loss starts; 0 for ``bank_size``.
        top_tokens: tokens of an image that represent its class.
        pooling: ``weighted`` or ``normalised``, see :func:`attentive_loss`.
        sample_classes: when above 0, training scores so many random classes of the data set, and
            all that are present in the batch, instead of all; 100 in the reference's runs with
            hundreds of classes or more.
        synchronise_bank: all workers hold the same memory bank. Each must then make its losses in
            each step. Otherwise each holds that of the images it sees, and the checkpoint that of
            the main process.
        image_weight: weight of the image-level loss.
        attentive_weight: weight of the auxiliary loss.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        in_feature: str,
        in_channels: int,
        num_classes: int,
        hidden_channels: int = 0,
        logit_form: str = "temperature",
        memory: str = "cross_image",
        bank_size: int = 20,
        warm_up: int = 0,
        top_tokens: int = 20,
        pooling: str = "weighted",
        sample_classes: int = 0,
        synchronise_bank: bool = False,
        image_weight: float = 0.1,
        attentive_weight: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("memory of LarvSeg", memory, MEMORIES)
        check_choice("pooling of LarvSeg", pooling, POOLINGS)
        if top_tokens < 1 or sample_classes < 0:
            raise ValueError(
                "top_tokens must be at least 1 and sample_classes at least 0 (all classes), got "
                f"{top_tokens} and {sample_classes}."
            )
        self.backbone, self.in_feature = backbone, in_feature
        self.num_classes = num_classes
        self.classifier = CosineClassifier(
            in_channels, num_classes, hidden_channels=hidden_channels, logit_form=logit_form
        )
        self.memory = memory
        self.bank = (
            MemoryBank(num_classes, self.classifier.channels, size=bank_size, warm_up=warm_up)
            if memory == "cross_image"
            else None
        )
        self.top_tokens, self.pooling = top_tokens, pooling
        self.sample_classes, self.synchronise_bank = sample_classes, synchronise_bank
        self.image_weight, self.attentive_weight = image_weight, attentive_weight

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) normalised images to (N, d, h, w) tokens of unit norm."""
        features = self.backbone(images)
        return self.classifier.tokens(named_feature(features, self.in_feature, self.backbone))

    def losses(
        self,
        tokens: Tensor,
        *,
        class_indices: Tensor | None = None,
        label_maps: Tensor | None = None,
        image_labels: Sequence[Sequence[int]] | None = None,
        single_label: bool = False,
        attention: bool = True,
        ignore: int = 255,
        loss_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch, which is from one data set (Eq. 6).

        A loss for which there is no supervision is zero, with a graph. The memory bank takes the
        tokens of the batch after the attention maps are made.

        Args:
            tokens: (N, d, h, w) of the batch, see :meth:`forward`.
            class_indices: (L,) int64, see the module; None for all K. Checked once by
                :func:`check_class_indices`, not here.
            label_maps: (N, H, W) int64, labels or ``ignore``; None without pixel supervision.
            image_labels: labels known to be present, for each image; None when none is known.
            single_label: the images show more than their one label says, so that the background
                of an attention map is guessed; otherwise it is the other labels of the image.
            attention: False learns image labels without attention, and the memory bank takes
                nothing of the batch.
            ignore: see :func:`segmentation_loss`.
            loss_size: see :func:`segmentation_loss`.
            generator: of the sampled classes, on the CPU.

        Returns:
            ``loss_pixels``, ``loss_labels`` and, unless ``memory`` is ``none``, ``loss_attention``,
            weighted.
        """
        device = tokens.device
        if class_indices is None:
            class_indices = torch.arange(self.num_classes, device=device)
        num_labels = len(class_indices)
        pairs = label_pairs(image_labels or [()] * len(tokens), num_labels, device)
        if len(tokens) != pairs.num_images:
            raise ValueError(
                f"image_labels has {pairs.num_images} entries for {len(tokens)} images."
            )
        every_class = class_indices
        if 0 < self.sample_classes < num_labels:
            # Random labels and all that are present in the batch, in rising order.
            is_chosen = torch.zeros(num_labels, dtype=torch.bool, device=device)
            drawn = torch.randperm(num_labels, generator=generator)[: self.sample_classes]
            is_chosen[drawn.to(device)] = True
            is_chosen[pairs.classes] = True
            if label_maps is not None:
                known = label_maps != ignore
                is_chosen[label_maps[known]] = True
            position = is_chosen.cumsum(0) - 1
            class_indices = class_indices[is_chosen]
            pairs = pairs._replace(classes=position[pairs.classes])
            if label_maps is not None:
                label_maps = position[torch.where(known, label_maps, 0)].where(known, ignore)
        class_vectors = self.classifier.class_vectors(class_indices)
        factors = self.classifier.factors(tokens, class_vectors)
        losses = {
            "loss_pixels": global_mean(factors.zero(), 0, takes_part=False)
            if label_maps is None
            else segmentation_loss(factors.dense(), label_maps, ignore=ignore, size=loss_size),
            "loss_labels": self.image_weight
            * image_level_loss(factors, pairs, takes_part=image_labels is not None),
        }
        if self.memory != "none":
            if not attention:
                pairs = label_pairs([()] * len(tokens), num_labels, device)
            maps, ready = self._attend(
                tokens, class_vectors, pairs, class_indices, every_class if single_label else None
            )
            losses["loss_attention"] = self.attentive_weight * attentive_loss(
                factors,
                pairs,
                maps,
                ready,
                pooling=self.pooling,
                takes_part=attention and image_labels is not None,
            )
        return losses

    @torch.no_grad()
    def _attend(
        self,
        tokens: Tensor,
        class_vectors: Tensor,
        pairs: LabelPairs,
        class_indices: Tensor,
        background_classes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Make the (P, T) attention maps, then remember the tokens; (P,) whether maps are ready."""
        classes = class_indices[pairs.classes]
        every = torch.ones_like(classes, dtype=torch.bool)
        if pairs.num_slots == 0:
            own = tokens.new_zeros(0, tokens.shape[1])
        elif self.memory == "score_map":
            return score_regions(tokens, class_vectors, pairs), every
        else:
            own = top_token_means(tokens, class_vectors, pairs, self.top_tokens)
        if self.bank is None:
            return attention_maps(tokens, pairs, own, every), every
        foreground = self.bank.class_means(classes)
        background = None
        if background_classes is not None:
            background = pseudo_background(tokens, pairs, foreground, self.bank, background_classes)
        known, ready = self.bank.seen(classes), self.bank.ready(classes)
        attention = attention_maps(tokens, pairs, foreground, known, background)
        self.bank.enqueue(classes, own, synchronise=self.synchronise_bank)
        return attention, ready
