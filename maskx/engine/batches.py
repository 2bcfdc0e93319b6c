"""Batches of samples that follow from a seed and the number of the iteration, on either host."""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from maskx.core.seeds import step_seed

RecordMapper = Callable[[dict[str, Any], np.random.RandomState], dict[str, Any]]
"""Makes the training sample of a record; all that is random in it comes from the second."""


def training_batches(
    records: Sequence[dict],
    mapper: RecordMapper,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    num_workers: int = 0,
) -> DataLoader:
    """Batches of the iterations ``start`` to ``stop``, endlessly shuffled.

    What an iteration sees depends on the seed and its number alone, so a resumed run sees what
    the interrupted one would have seen, with any number of workers.

    Args:
        mapper: such as :class:`maskx.data.images.ImageMapper`.
    """
    return DataLoader(
        MappedRecords(records, mapper),
        batch_sampler=SeededBatches(len(records), batch_size, seed, start, stop),
        num_workers=num_workers,
        collate_fn=list,
    )


class MappedRecords(Dataset):
    """Training samples by the keys of :class:`SeededBatches`."""

    def __init__(self, records: Sequence[dict], mapper: RecordMapper) -> None:
        self.records, self.mapper = records, mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, seed = key
        return self.mapper(self.records[index], np.random.RandomState(seed))


class SeededBatches(Sampler):
    """Endlessly shuffled records of the iterations ``start`` to ``stop``.

    Yields lists of keys: index of a record, and the seed of its augmentation. Of several processes
    each gets its part of a batch: together they see what one process would have seen.

    Args:
        batch_size: records per iteration, of all processes together.
    """

    def __init__(
        self,
        num_records: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        *,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.num_records, self.batch_size, self.seed = num_records, batch_size, seed
        self.start, self.stop = start, stop
        self.part = part_of_batch(batch_size, rank, num_processes)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = None, None
        for iteration in range(self.start, self.stop):
            batch = []
            first = iteration * self.batch_size
            for position in range(first + self.part.start, first + self.part.stop):
                if position // self.num_records != epoch:
                    epoch = position // self.num_records
                    shuffle = np.random.RandomState(step_seed(self.seed, epoch))
                    order = shuffle.permutation(self.num_records)
                index = int(order[position % self.num_records])
                batch.append((index, step_seed(self.seed, position, 1)))
            yield batch


def part_of_batch(batch_size: int, rank: int, num_processes: int) -> slice:
    """Return which samples of a batch a process gets."""
    if batch_size % num_processes:
        raise ValueError(
            f"The batch size is {batch_size}, which {num_processes} processes cannot share. "
            f"Allowed: multiples of {num_processes}."
        )
    size = batch_size // num_processes
    return slice(rank * size, (rank + 1) * size)


class SeededLoader:
    """Endless batches of samples, from any iteration on.

    Args:
        dataset: gives a sample by its key, such as :class:`MappedRecords`.
        batches: called with ``start`` and ``stop``, makes the lists of keys of these iterations,
            such as :class:`SeededBatches` with its other arguments bound.

    Attributes:
        start: iteration of the first batch of an iterator; to be set before that is made, so that
            a resumed training sees what the interrupted one would have seen.
        images: names of those of the batch that came last, for messages.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Callable[[int, int], Iterable[list[Any]]],
        *,
        num_workers: int = 0,
    ) -> None:
        self.dataset, self.batches, self.num_workers = dataset, batches, num_workers
        self.start = 0
        self.images: list[str] = []
        self._running: Generator[list[dict[str, Any]], None, None] | None = None

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        self.close()
        self._running = self._batches()
        return self._running

    def close(self) -> None:
        """End the processes that read ahead for the last iterator, which ends too.

        Else they live until the garbage collector finds them, and then it waits 5 s for each.
        """
        if self._running is not None:
            self._running.close()

    def _batches(self) -> Generator[list[dict[str, Any]], None, None]:
        batches = DataLoader(
            self.dataset,
            batch_sampler=self.batches(self.start, sys.maxsize),
            num_workers=self.num_workers,
            collate_fn=list,
            # A new iterator draws a seed: not from the state of the step that asks for it.
            generator=torch.Generator(),
        )
        for batch in batches:
            self.images = image_names(batch)
            yield batch


def image_names(batch: Iterable[Any]) -> list[str]:
    """Name the images of a batch, by their files or else their ids, for messages."""
    names = []
    for sample in batch:
        keys = ("file_name", "image_id") if isinstance(sample, Mapping) else ()
        names += [str(sample[key]) for key in keys if key in sample][:1]
    return names
