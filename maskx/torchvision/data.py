"""From COCO records to the samples that the embedded host trains on."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskx.data.images import read_image
from maskx.data.masks import decode_segmentation

RecordMapper = Callable[[dict[str, Any], np.random.RandomState], dict[str, Any]]
"""Makes the training sample of a record; all that is random in it comes from the second."""


class InstanceMapper:
    """Reads the image of a record and makes its training target.

    Masks of categories without masks are never decoded, so nothing of them can reach a loss.

    Args:
        classes_with_masks: class indices (A) whose masks are used.
        flip: mirror half of the training samples.
    """

    def __init__(self, classes_with_masks: Collection[int], *, flip: bool = True) -> None:
        self.classes_with_masks = frozenset(classes_with_masks)
        self.flip = flip

    def read_image(self, record: dict[str, Any]) -> dict[str, Any]:
        """Read the image of a record for inference.

        Returns:
            ``image``: (3, H, W) uint8 RGB; ``height``, ``width`` in pixels; ``image_id``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no readable image, or its size is not the record's.
        """
        height, width = record["height"], record["width"]
        image = read_image(record["file_name"], height, width, record["image_id"])
        pixels = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))
        return {
            "image": torch.from_numpy(pixels),
            "height": height,
            "width": width,
            "image_id": record["image_id"],
        }

    def __call__(self, record: dict[str, Any], random_state: np.random.RandomState) -> dict:
        """Make a training sample.

        Returns:
            What :meth:`read_image` returns, with ``instances``: ``gt_boxes`` (N, 4) XYXY pixels,
            ``gt_classes`` (N,) class indices, ``gt_has_mask`` (N,) bool and ``gt_masks``
            (N, H, W) bool, all zero where there is no mask.
        """
        sample = self.read_image(record)
        height, width = sample["height"], sample["width"]
        annotations = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        has_mask = [self._has_mask(a) for a in annotations]
        masks = np.zeros((len(annotations), height, width), dtype=bool)
        for index, annotation in enumerate(annotations):
            if has_mask[index]:
                masks[index] = decode_segmentation(annotation["segmentation"], height, width)
        instances = {
            "gt_boxes": boxes,
            "gt_classes": torch.tensor([a["class_index"] for a in annotations], dtype=torch.int64),
            "gt_has_mask": torch.tensor(has_mask, dtype=torch.bool),
            "gt_masks": torch.from_numpy(masks),
        }
        if self.flip and random_state.randint(2):
            sample["image"] = sample["image"].flip(-1)
            instances["gt_masks"] = instances["gt_masks"].flip(-1)
            instances["gt_boxes"] = _flip_boxes(boxes, width)
        return sample | {"instances": instances}

    def _has_mask(self, annotation: dict[str, Any]) -> bool:
        return "segmentation" in annotation and annotation["class_index"] in self.classes_with_masks


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
        mapper: such as :class:`InstanceMapper` or :class:`maskx.torchvision.images.ImageMapper`.
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


def step_seed(*numbers: int) -> int:
    """Mix numbers into a seed of 32 bits, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


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


def _flip_boxes(boxes: Tensor, width: int) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=1)
