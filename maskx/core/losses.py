"""Losses that several systems use."""

import torch.nn.functional as F
from torch import Tensor


def pixel_loss(logits: Tensor, label_maps: Tensor, *, ignore: int) -> Tensor:
    """Mean cross-entropy over the known pixels of the batch.

    Args:
        logits: (N, L, h, w), up-sampled bilinearly to the size of the label maps.
        label_maps: (N, H, W) int64, labels in [0, L) or `ignore`.
        ignore: label of the pixels of which nothing is known.

    Returns:
        Scalar. Zero, with a graph through everything that made ``logits``, when no pixel is known.
    """
    if label_maps.shape[-2:] != logits.shape[-2:]:
        size = label_maps.shape[-2:]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, label_maps, ignore_index=ignore, reduction="sum")
    return total / (label_maps != ignore).sum().clamp(min=1)


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy over images and classes.

    Args:
        logits: (N, K).
        labels: (N, K) in {0, 1}.

    Returns:
        Scalar. Zero, with a graph through everything that made ``logits``, when N is 0.
    """
    if logits.numel() == 0:
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
