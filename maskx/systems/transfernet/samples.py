"""Samples of TransferNet: masks of source images, tags of target images; on both hosts."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from maskx.core.sample_models import Sample
from maskx.core.seeds import step_seed
from maskx.data.images import ImageMapper
from maskx.engine.batches import MappedRecords, RecordMapper, SeededBatches
from maskx.supervision import Supervision
from maskx.systems.transfernet.transfer_sets import transfer_label_map, visible_labels

__all__ = ["AlternatingBatches", "TransferMapper", "alternating_batches", "check_batch_size"]

Record = Mapping[str, Any]


class TransferMapper:
    """Makes samples of the records of :func:`maskx.systems.transfernet.transfer_sets`.

    Args:
        num_classes: number of classes K of source and target, without the background.
        size: side in pixels of the squares that images and label maps are warped to.
        flip: mirror half of the samples.
        masks: make label maps where the record has masks; without, no mask is opened or decoded.
    """

    def __init__(
        self, num_classes: int, *, size: int, flip: bool = True, masks: bool = True
    ) -> None:
        form = {"size": size, "flip": flip}
        self._tags = ImageMapper(num_classes, label_maps=False, **form)
        read_label_map = functools.partial(transfer_label_map, num_classes=num_classes)
        self._masks = ImageMapper(
            num_classes, label_maps=True, read_label_map=read_label_map, **form
        )
        self.masks = masks

    def __call__(self, record: Record, random_state: np.random.RandomState) -> Sample:
        """Make a training sample, as :class:`maskx.data.images.ImageMapper` does.

        Returns:
            With ``sem_seg`` where the record has masks; ``image_labels`` are then the labels of at
            least one pixel of it. The label map of a record that only has tags is not made.
        """
        if not self.masks or record["supervision"] != Supervision.MASK.value:
            return self._tags(record, random_state)
        sample = self._masks(record, random_state)
        sample["image_labels"] = visible_labels(sample["image_labels"], sample["sem_seg"].numpy())
        return sample

    def read(self, record: Record) -> Sample:
        """Read the image of a record and its true labels, for evaluation; it is not warped."""
        return self._tags.read_image(record)


def alternating_batches(
    source: Sequence[Record],
    target: Sequence[Record],
    mapper: RecordMapper,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    num_workers: int = 0,
) -> DataLoader:
    """Batches of the iterations ``start`` to ``stop``, half source and half target images.

    As with :func:`maskx.engine.batches.training_batches`, what an iteration sees depends on the
    seed and its number alone. Source images come first.
    """
    return DataLoader(
        MappedRecords([*source, *target], mapper),
        batch_sampler=AlternatingBatches(len(source), len(target), batch_size, seed, start, stop),
        num_workers=num_workers,
        collate_fn=list,
    )


def check_batch_size(batch_size: int) -> None:
    """Refuse batches that cannot be half source, half target images.

    Raises:
        ValueError: the batch size is odd.
    """
    if batch_size % 2:
        raise ValueError(
            f"The batch size is {batch_size}. Allowed: even numbers, as half of a batch are source "
            "images and half target images."
        )


class AlternatingBatches(Sampler):
    """Keys as of :class:`maskx.engine.batches.SeededBatches`, half source and half target images.

    Each half is shuffled endlessly on its own. Every process gets as many of either.

    Args:
        num_source: number of source images, which come first in the list of records.
        num_target: number of target images.
        batch_size: see ``SeededBatches``, as for all others.
    """

    def __init__(
        self,
        num_source: int,
        num_target: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        **processes: int,
    ) -> None:
        check_batch_size(batch_size)
        self.num_source = num_source
        self.halves = [
            SeededBatches(number, batch_size // 2, step_seed(seed, side), start, stop, **processes)
            for side, number in enumerate((num_source, num_target))
        ]

    def __len__(self) -> int:
        return len(self.halves[0])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for source, target in zip(*self.halves, strict=True):
            yield source + [(index + self.num_source, seed) for index, seed in target]
