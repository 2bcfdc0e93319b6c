"""Pairs of an image and one of its labels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LabelPairs(NamedTuple):
    """The labels of the images of a batch, one row for each label of each image.

    Attributes:
        images: (P,) int64, positions in the batch, in rising order.
        slots: (P,) int64, position of the label among those of its image.
        classes: (P,) int64, labels: positions among the L classes that are scored.
        num_images: N.
        num_slots: S.
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
        device: of the result.

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
