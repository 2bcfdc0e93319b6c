"""Category-wise attention maps of LarvSeg: where in an image a class is.

Section 3.3 of "LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic
Segmentation via Category-wise Attentive Classifier" (Yu et al., PRCV 2024). Nothing here has a
gradient.

Shape legend:
    N: images; L: classes that are scored; d: channels of the classifier; T: tokens of an image;
    P: (image, class) pairs of a batch, one for each label of each image; S: largest number of
    labels of an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskx.core.label_pairs import LabelPairs
from maskx.systems.larvseg.memory_bank import MemoryBank

# A class is in the background of a single-label image when the mean cosine of its 5 best tokens is
# above this.
_MIN_BACKGROUND_COSINE = 0.35
_BACKGROUND_TOKENS = 5
# Classes whose maps are made at a time: 1,024 tokens of one pair take 4 MB.
_CLASS_CHUNK = 1024


@torch.no_grad()
def top_token_means(
    tokens: Tensor, class_vectors: Tensor, pairs: LabelPairs, num_tokens: int
) -> Tensor:
    """Average, for each pair, the tokens of the image that are most like the class.

    Args:
        tokens: (N, d, h, w) of unit norm.
        class_vectors: (L, d) of unit norm.
        pairs: of the batch.
        num_tokens: how many; an image with fewer tokens gives all of them.

    Returns:
        (P, d).
    """
    tokens = tokens.flatten(2)
    cosines = pairs.pad(class_vectors[pairs.classes]) @ tokens
    num_tokens = min(num_tokens, tokens.shape[-1])
    best = cosines.topk(num_tokens, dim=-1).indices
    weights = torch.zeros_like(cosines).scatter(-1, best, 1 / num_tokens)
    return pairs.unpad(weights @ tokens.transpose(1, 2))


@torch.no_grad()
def attention_maps(
    tokens: Tensor,
    pairs: LabelPairs,
    foreground: Tensor,
    known: Tensor,
    background: Tensor | None = None,
) -> Tensor:
    """Compute the category-wise attention map of each pair (Eqs. 3 and 4).

    ``A = sigmoid(norm(S_fg - S_bg))`` with ``S = f . mean``, the z-score over the tokens as norm.
    S_bg is the mean over the background's classes; without one, A is that of S_fg alone.

    Args:
        tokens: (N, d, h, w) of unit norm.
        pairs: of the batch.
        foreground: (P, d) mean of the class of each pair.
        known: (P,) bool: whether that mean is one. A class without images is no background.
        background: (P, T) map S_bg, see :func:`pseudo_background`; None takes the other labels of
            the image as its background.

    Returns:
        (P, T) in (0, 1); of no meaning for a pair whose mean is not known.
    """
    tokens = tokens.flatten(2)
    if background is None:
        # S is linear in the mean: f . fg - mean(f . bg) = f . (fg - mean(bg)).
        own = foreground * known[:, None]
        others = pairs.pad(own).sum(dim=1)[pairs.images] - own
        known = known.to(tokens.dtype)
        count = pairs.pad(known).sum(dim=1)[pairs.images] - known
        foreground = foreground - others / count.clamp(min=1)[:, None]
    scores = pairs.unpad(pairs.pad(foreground) @ tokens)
    if background is not None:
        scores = scores - background
    return F.layer_norm(scores, scores.shape[-1:], eps=1e-5).sigmoid()


@torch.no_grad()
def pseudo_background(
    tokens: Tensor,
    pairs: LabelPairs,
    foreground: Tensor,
    bank: MemoryBank,
    class_indices: Tensor,
) -> Tensor:
    """Guess what else is in images of which one label is known.

    Background of a pair are the classes with images in the bank whose 5 best tokens have a mean
    cosine above 0.35, and whose map is negatively correlated with that of the foreground.

    Args:
        tokens: (N, d, h, w) of unit norm.
        pairs: of the batch.
        foreground: (P, d) mean of the class of each pair.
        bank: with the means of the classes.
        class_indices: (L,) rows of the bank: the classes that may be background.

    Returns:
        (P, T) mean map of the background's classes, zero where there is none.
    """
    tokens = tokens.flatten(2)
    scores = pairs.unpad(pairs.pad(foreground) @ tokens)
    centred = scores - scores.mean(dim=-1, keepdim=True)
    total = torch.zeros_like(scores)
    count = scores.new_zeros(len(scores), 1)
    for chunk in class_indices.split(_CLASS_CHUNK):
        maps = (bank.class_means(chunk) @ tokens)[pairs.images]
        best = maps.topk(min(_BACKGROUND_TOKENS, maps.shape[-1]), dim=-1).values.mean(dim=-1)
        # The sign of the covariance is that of the correlation; the map of the class itself has 1.
        covariance = (maps @ centred[:, :, None]).squeeze(-1)
        kept = bank.seen(chunk) & (best > _MIN_BACKGROUND_COSINE) & (covariance < 0)
        kept = kept.to(maps.dtype)
        total += (kept[:, None] @ maps).squeeze(1)
        count += kept.sum(dim=-1, keepdim=True)
    return total / count.clamp(min=1)
