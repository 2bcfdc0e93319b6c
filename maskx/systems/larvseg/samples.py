"""Samples of LarvSeg: joint data sets in training, images with true label maps in evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from maskx.core.images import warp_image, warp_label_map
from maskx.core.sample_models import Sample
from maskx.data.coco import CocoData
from maskx.data.image_samples import read_image_sample
from maskx.data.label_maps import ignore_label
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.larvseg.joint_sets import (
    UNKNOWN,
    JointBatches,
    JointDataSet,
    JointSets,
    joint_sets,
    random_crop,
    things_and_stuff,
    things_and_stuff_label_map,
)

__all__ = [
    "JointMapper",
    "LabelledImages",
    "joint_batches",
    "labelled_images",
    "read_sample",
    "sets_of_one_file",
    "split_groups",
    "table_label_map",
]

_BACKGROUND = "background"  # name of the class of label 0 in data without stuff

Record = Mapping[str, Any]


class JointMapper:
    """Reads the records of joint sets, each with the supervision of its data set.

    Args:
        sets: data sets that are trained on together.
        flip: mirror half of the samples.
        min_crop: smallest side of a random crop as a share of the image's; 1 takes whole images.

    Raises:
        ValueError: the share is not in (0, 1].
    """

    def __init__(self, sets: JointSets, *, flip: bool = True, min_crop: float = 1.0) -> None:
        if not 0 < min_crop <= 1:
            raise ValueError(f"min_crop must be above 0 and at most 1, got {min_crop}.")
        self.sets, self.flip, self.min_crop = sets, flip, min_crop

    def __call__(self, record: Record, random_state: np.random.RandomState) -> Sample:
        """Make a training sample.

        Returns:
            ``image`` (3, S, S) uint8 RGB with S of the data set, ``height``, ``width``,
            ``image_id``, ``data_set``, ``single_label``; of "image" data sets ``image_labels``,
            positions among the classes that the data set scores; of "mask" data sets
            ``label_map`` (S, S) int64 positions, -1 where nothing is known.
        """
        data_set = self.sets.of_record(record)
        sample = read_sample(record)
        sample |= {"data_set": data_set.name, "single_label": data_set.single_label}
        is_mask = data_set.supervision == Supervision.MASK.value
        needs_pixels = is_mask or data_set.crop_level_labels
        maps = {"image": sample["image"]}
        if needs_pixels:
            maps["label_map"] = torch.from_numpy(self.sets.label_map(record))
        where = random_crop(maps["image"].shape[-2:], self.min_crop, random_state)
        maps = {name: values[(..., *where)] for name, values in maps.items()}
        sample["image"] = warp_image(maps["image"], data_set.image_size)
        if needs_pixels:
            label_map = warp_label_map(maps["label_map"], data_set.image_size)
        if is_mask:
            sample["label_map"] = label_map
        elif data_set.crop_level_labels:
            found = label_map.unique().tolist()
            sample["image_labels"] = [label for label in found if label != UNKNOWN]
        else:
            sample["image_labels"] = self.sets.image_labels(record)
        if self.flip and random_state.randint(2):
            for key in sample.keys() & {"image", "label_map"}:
                sample[key] = sample[key].flip(-1)
        return sample


def joint_batches(
    sets: JointSets,
    mapper: JointMapper,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    num_workers: int = 0,
) -> DataLoader:
    """Batches of the iterations ``start`` to ``stop``, each of one data set.

    See :class:`maskx.systems.larvseg.joint_sets.JointBatches`; ``num_workers`` processes read
    images.

    Returns:
        An iterable of lists of ``batch_size`` samples.
    """
    return DataLoader(
        _MappedSets(sets, mapper),
        batch_sampler=JointBatches(
            [len(each.records) for each in sets.data_sets],
            [each.ratio for each in sets.data_sets],
            batch_size=batch_size,
            seed=seed,
            start=start,
            stop=stop,
        ),
        num_workers=num_workers,
        collate_fn=list,
    )


class _MappedSets(Dataset):
    def __init__(self, sets: JointSets, mapper: JointMapper) -> None:
        self.sets, self.mapper = sets, mapper

    def __len__(self) -> int:
        return sum(len(each.records) for each in self.sets.data_sets)

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        which, index, seed = key
        record = self.sets.data_sets[which].records[index]
        return self.mapper(record, np.random.RandomState(seed))


def read_sample(record: Record) -> Sample:
    """Read an image alone: its labels are of its own class list."""
    return read_image_sample(record)


@dataclass(frozen=True)
class LabelledImages:
    """Images to evaluate on.

    Attributes:
        records: with true label maps.
        class_names: of their class list.
        background: name of the class that label 0 is; None where it does not occur.
    """

    records: Sequence[Record]
    class_names: tuple[str, ...]
    background: str | None = None


def labelled_images(data: CocoData) -> LabelledImages:
    """Take the stuff of a file as classes if it has any; else its background is one class."""
    if all("sem_seg_file_name" in record for record in data.records):
        return LabelledImages(*things_and_stuff(data))
    return LabelledImages(data.records, data.class_names, _BACKGROUND)


def table_label_map(test: LabelledImages, record: Record, table_names: Sequence[str]) -> np.ndarray:
    """Read or draw the true label map of a record in the labels of a class table.

    Returns:
        (H, W), table index + 1, and `ignore_label` where nothing is known or the table lacks the
        class. No pixel is 0.
    """
    return _table_labels(test, tuple(table_names))[
        things_and_stuff_label_map(record, len(test.class_names))
    ]


def _table_labels(test: LabelledImages, table_names: tuple[str, ...]) -> np.ndarray:
    """Labels in the table by label of the test data."""
    place = {name: index + 1 for index, name in enumerate(table_names)}
    ignore = ignore_label(len(table_names))
    labels = np.full(ignore_label(len(test.class_names)) + 1, ignore, np.int64)
    labels[: len(test.class_names) + 1] = [
        place.get(name, ignore) for name in (test.background, *test.class_names)
    ]
    return labels


def sets_of_one_file(train_data: CocoData, split: CategorySplit, *, image_size: int) -> JointSets:
    """Make two data sets of one file: masks of base classes, and image labels.

    Images with masks teach those of the base classes, and the ground: the stuff if the file has
    any, else the background. Images with image labels alone teach these, and so do those with
    masks; the ground is one of them, as walls and floors are among the labels of the paper's
    images. If the file has no images with image labels alone, every second image keeps its masks
    and the others only their image labels.

    Args:
        train_data: the file.
        split: A the base classes, B the novel ones.
        image_size: of both data sets.

    Raises:
        ValueError: there is nothing to learn masks or image labels from.
    """
    images = labelled_images(train_data)
    masks = [r for r in images.records if r["supervision"] == Supervision.MASK.value]
    tagged = [r for r in images.records if r["supervision"] == Supervision.IMAGE.value]
    masks, tagged = (masks, tagged + masks) if tagged else (masks[::2], masks[1::2])
    novel = set(split.without_masks)
    return joint_sets(
        [
            JointDataSet(
                "masks",
                masks,
                images.class_names,
                supervision="mask",
                image_size=image_size,
                with_masks=[name for name in images.class_names if name not in novel],
                background=images.background,
            ),
            JointDataSet(
                "image labels",
                tagged,
                images.class_names,
                supervision="image",
                image_size=image_size,
                background=images.background,
            ),
        ]
    )


def split_groups(
    images: LabelledImages, split: CategorySplit, table_names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Table indices of the base and of the novel classes; a background is in neither."""
    novel = set(split.without_masks)
    known = set(images.class_names)
    sides: dict[str, list[int]] = {"base": [], "novel": []}
    for index, name in enumerate(table_names):
        if name in known:
            sides["novel" if name in novel else "base"].append(index)
    return {side: tuple(indices) for side, indices in sides.items()}
