"""Losses that several systems use, and the pairs of an image and a label that they run over."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskx.core.global_mean import global_mean


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
    return global_mean(total, (label_maps != ignore).sum())


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, mean over images and classes.

    Args:
        logits: (N, K).
        labels: (N, K) in {0, 1}.

    Returns:
        Scalar. Zero, with a graph through everything that made ``logits``, when N is 0.
    """
    total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return global_mean(total / max(logits.shape[1], 1), len(logits))


class LabelPairs(NamedTuple):
    """The labels of the images of a batch, one row for each label of each image.

    Attributes:
        images: (P,) int64, positions in the batch, in rising order.
        slots: (P,) int64, position of the label among those of its image.
        classes: (P,) int64, labels: positions among the L classes that are scored.
    """

    images: Tensor
    slots: Tensor
    classes: Tensor
    num_images: int
    num_slots: int

    def pad(self, values: Tensor) -> Tensor:
        """Lay (P, ...) values out as (N, S, ...), with zeros where an image has fewer labels."""
        shape = (self.num_images, self.num_slots, *values.shape[1:])
        return values.new_zeros(shape).index_put((self.images, self.slots), values)

    def unpad(self, values: Tensor) -> Tensor:
        """Take the (P, ...) values of the pairs from (N, S, ...)."""
        return values[self.images, self.slots]

    def present(self, num_classes: int) -> Tensor:
        """Return (N, L) bool: which classes an image has."""
        present = torch.zeros(
            self.num_images, num_classes, dtype=torch.bool, device=self.classes.device
        )
        return present.index_put((self.images, self.classes), torch.ones_like(self.classes) > 0)


def label_pairs(
    image_labels: Sequence[Sequence[int]],
    num_classes: int,
    device: torch.device | str | None = None,
) -> LabelPairs:
    """List the (image, class) pairs of a batch; a label that is there twice counts once.

    Args:
        image_labels: for each image the labels known to be present; may be empty.
        num_classes: L.

    Raises:
        ValueError: a label is out of range.
    """
    rows = []
    num_slots = 0
    for image, labels in enumerate(image_labels):
        distinct = sorted({int(label) for label in labels})
        unknown = [label for label in distinct if not 0 <= label < num_classes]
        if unknown:
            raise ValueError(
                f"image {image} of the batch has image_labels {unknown}; the labels of "
                f"{num_classes} classes are 0 to {num_classes - 1}. Are the classes that are "
                "scored those of the data set?"
            )
        rows += [(image, slot, label) for slot, label in enumerate(distinct)]
        num_slots = max(num_slots, len(distinct))
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(device)
    return LabelPairs(*table.unbind(dim=1), len(image_labels), num_slots)
