"""From COCO records to the samples that the embedded host trains on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
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
        records: images to learn from, at least one.
        mapper: such as :class:`InstanceMapper` or :class:`maskx.data.image_samples.ImageMapper`.
        batch_size: images per iteration.
        seed: of the order and of what is random in a sample.
        start: first iteration.
        stop: iteration after the last.
        num_workers: processes that make samples; 0 makes them in this one.

    Returns:
        An iterable of lists of ``batch_size`` samples.
    """
    return DataLoader(
        MappedRecords(records, mapper),
        batch_sampler=SeededBatches(len(records), batch_size, seed, start, stop),
        num_workers=num_workers,
        collate_fn=list,
    )


class MappedRecords(Dataset):
    """Training samples by the keys of :class:`SeededBatches`.

    Args:
        records: images to learn from.
        mapper: makes a sample of a record.
    """

    def __init__(self, records: Sequence[dict], mapper: RecordMapper) -> None:
        self.records, self.mapper = records, mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, seed = key
        return self.mapper(self.records[index], np.random.RandomState(seed))


class SeededBatches(Sampler):
    """Endlessly shuffled records of the iterations ``start`` to ``stop``.

    Yields lists of keys: index of a record, and the seed of its augmentation.

    Args:
        num_records: number of records, at least 1.
        batch_size: records per iteration.
        seed: what a batch is depends on the seed and the number of the iteration alone.
        start: first iteration.
        stop: iteration after the last.
    """

    def __init__(self, num_records: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.num_records, self.batch_size, self.seed = num_records, batch_size, seed
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = None, None
        for iteration in range(self.start, self.stop):
            batch = []
            for position in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
                if position // self.num_records != epoch:
                    epoch = position // self.num_records
                    shuffle = np.random.RandomState(step_seed(self.seed, epoch))
                    order = shuffle.permutation(self.num_records)
                index = int(order[position % self.num_records])
                batch.append((index, step_seed(self.seed, position, 1)))
            yield batch
