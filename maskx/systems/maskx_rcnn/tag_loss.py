"""Loss of images of which labels alone are known (Detic, Zhou et al., ECCV 2022).

An object is somewhere, and the largest proposal most likely covers it, if with much around it. So
the labels of the image are those of this proposal ("max-size"), and train the classifier of the
detector: no box, no background and no mask is learned from them.

Shape legend:
    N: number of images with labels; K: number of foreground classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskx.core.global_mean import global_mean


def check_tag_loss_weight(weight: float, *, freeze_detector: bool = False) -> None:
    """Refuse a weight that is out of range, or where the classifier does not learn."""
    if not weight >= 0:
        raise ValueError(
            f"The weight of the tag loss (MODEL.MASKX.TAG_LOSS_WEIGHT) is {weight}. Allowed: 0, "
            "which is off, or more; 0.1 in Detic."
        )
    if weight and freeze_detector:
        raise ValueError(
            f"The weight of the tag loss (MODEL.MASKX.TAG_LOSS_WEIGHT) is {weight}, but tags teach "
            "the detector, which is frozen. Set it to 0, or FREEZE_DETECTOR False."
        )


def largest_boxes(boxes: Sequence[Tensor], tags: Sequence[Tensor]) -> list[Tensor]:
    """Choose the largest proposal of each image that has tags.

    Args:
        boxes: per image (R_i, 4) XYXY, the proposals.
        tags: per image the labels, none of an image that is not to be looked at.

    Returns:
        Per image (1, 4), or (0, 4) without tags or proposals.
    """
    found = []
    for own, labels in zip(boxes, tags, strict=True):
        if len(own) and len(labels):
            areas = (own[:, 2:] - own[:, :2]).prod(dim=1)
            found.append(own[areas.argmax()][None])
        else:
            found.append(own[:0])
    return found


def tag_loss(
    class_logits: Tensor, columns: Sequence[Tensor], *, is_sigmoid: bool = False
) -> Tensor:
    """Ask a box of each image for the labels of the image.

    Args:
        class_logits: (N, K + 1) with the background, of a softmax classifier; (N, K) of one whose
            classes are independent.
        columns: per image the columns of its labels, at least one.
        is_sigmoid: whether it is of the second kind.

    Returns:
        Mean over the images: of -log p, averaged over the labels; of the second kind, of the binary
        cross-entropy, summed over the classes. Zero with graph without images.
    """
    if class_logits.dtype != torch.float64:
        class_logits = class_logits.float()
    targets = torch.zeros_like(class_logits)
    for row, own in zip(targets, columns, strict=True):
        row[own] = 1
    if is_sigmoid:
        total = F.binary_cross_entropy_with_logits(class_logits, targets, reduction="sum")
    else:
        shares = targets / targets.sum(dim=1, keepdim=True)
        total = -(shares * class_logits.log_softmax(dim=1)).sum()
    return global_mean(total, len(class_logits))
