"""Losses of LarvSeg: on pixels, on image labels, and on image labels where the class is.

"LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic Segmentation via
Category-wise Attentive Classifier" (Yu et al., PRCV 2024), Eqs. 1, 5 and 6.

Shape legend:
    N: images; L: classes that are scored, those of the batch's data set; d: channels of the
    classifier; h, w: tokens of an image, T = h * w; H, W: size of the label maps; P: (image, class)
    pairs of a batch, one for each label of each image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskx.core.checks import check_choice
from maskx.core.losses import LabelPairs, pixel_loss
from maskx.systems.larvseg.classifier import LogitFactors

POOLINGS = ("weighted", "normalised")


def segmentation_loss(
    logits: Tensor, label_maps: Tensor, *, ignore: int, size: tuple[int, int] | None = None
) -> Tensor:
    """Mean cross-entropy over the known pixels of the batch.

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


def image_level_loss(factors: LogitFactors, pairs: LabelPairs) -> Tensor:
    """Cross-entropy of each label to the mean logits of its image.

    The logits are averaged over the tokens. The other labels of the image are left out of the
    softmax.

    Args:
        factors: of the logits of the batch.
        pairs: labels of the batch.

    Returns:
        Scalar, the mean over the pairs. Zero, with a graph through everything that made the logits,
        when there is none.
    """
    if pairs.num_slots == 0:
        return factors.zero()
    pooled = factors.tokens.mean(dim=(2, 3))
    logits = factors.pooled_logits(pooled, pooled.new_ones(len(pooled)))
    return _label_losses(logits[pairs.images], pairs).mean()


def attentive_loss(
    factors: LogitFactors,
    pairs: LabelPairs,
    attention: Tensor,
    ready: Tensor,
    *,
    pooling: str = "weighted",
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

    Returns:
        Scalar, the sum over the ready pairs by the number of all pairs. Zero, with a graph through
        everything that made the logits, when there is none.
    """
    check_choice("pooling of the attentive loss", pooling, POOLINGS)
    if pairs.num_slots == 0:
        return factors.zero()
    attention = attention.detach()
    if pooling == "weighted":
        weights = attention / attention.shape[-1]
    else:
        weights = attention / attention.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    pooled = pairs.unpad(factors.pool(pairs.pad(weights)))
    logits = factors.pooled_logits(pooled, weights.sum(dim=-1))
    return (_label_losses(logits, pairs) * ready).mean()


def _label_losses(logits: Tensor, pairs: LabelPairs) -> Tensor:
    """Cross-entropy of each of (P, L) logits, without the other labels of the image: (P,)."""
    others = pairs.present(logits.shape[1])[pairs.images]
    others = others.scatter(1, pairs.classes[:, None], False)
    return F.cross_entropy(
        logits.masked_fill(others, float("-inf")), pairs.classes, reduction="none"
    )
