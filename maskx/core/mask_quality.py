"""How good a mask is that nobody drew, from 0 to 1, as far as it can be told without the true one.

Two things are known: how sure each pixel is, and the box that the object fills.

Shape legend:
    R: number of masks; H, W: their height and width.
"""

import torch
from torch import Tensor


def mask_quality(mask_prob: Tensor, boxes: Tensor) -> Tensor:
    """Judge masks that were predicted on the grids of their own boxes.

    The quality is :func:`expected_iou` times :func:`box_agreement`: a mask that does not reach the
    sides of its box has missed a part of the object.

    Args:
        mask_prob: (R, H, W) in [0, 1], which cover the boxes.
        boxes: (R, 4) XYXY in pixels.

    Returns:
        (R,) in [0, 1].
    """
    return expected_iou(mask_prob) * box_agreement(mask_prob >= 0.5, boxes, boxes)


def expected_iou(mask_prob: Tensor) -> Tensor:
    """IoU of masks with their objects, if each pixel is of the object with its probability.

    Args:
        mask_prob: (R, H, W) in [0, 1]; a mask is where it is at least 0.5.

    Returns:
        (R,) in [0, 1], 0 of an empty mask.
    """
    on = mask_prob >= 0.5
    shared = mask_prob.where(on, 0).flatten(1).sum(1)
    union = mask_prob.where(~on, 1).flatten(1).sum(1)
    return shared / union.clamp(min=torch.finfo(mask_prob.dtype).tiny)


def box_agreement(masks: Tensor, covers: Tensor, boxes: Tensor) -> Tensor:
    """IoU of the extents of masks with boxes, whose edges may lie within pixels.

    Args:
        masks: (R, H, W) bool.
        covers: (R, 4) XYXY in pixels, what each mask covers, such as the whole image.
        boxes: (R, 4) likewise, where the objects are known to be.

    Returns:
        (R,) in [0, 1], 0 of an empty mask.
    """
    low, size = covers[:, :2], covers[:, 2:] - covers[:, :2]
    sides = [_first_and_end(masks.any(dim=axis)) for axis in (1, 2)]
    first, end = (torch.stack(ends, dim=1).to(boxes) for ends in zip(*sides, strict=True))
    extent = torch.cat([low + first * size, low + end * size], dim=1)
    # A pixel that the box cuts is no disagreement.
    extent = torch.where((extent - boxes).abs() < 1, boxes, extent)
    overlap = torch.minimum(extent[:, 2:], boxes[:, 2:]) - torch.maximum(
        extent[:, :2], boxes[:, :2]
    )
    shared = overlap.clamp(min=0).prod(1)
    union = sum((each[:, 2:] - each[:, :2]).prod(1) for each in (extent, boxes)) - shared
    agreement = shared / union.clamp(min=torch.finfo(union.dtype).tiny)
    return agreement.where(masks.flatten(1).any(dim=1), 0)


def _first_and_end(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Where the true ones of (R, N) begin and end, as shares of N."""
    counts, number = flags.to(torch.uint8), flags.shape[1]
    return counts.argmax(1) / number, 1 - counts.flip(1).argmax(1) / number
