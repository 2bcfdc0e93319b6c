"""Samples of LarvSeg on both hosts: joint data sets to train on, images with truth to evaluate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from maskx.core.images import warp_image, warp_label_map
from maskx.core.sample_models import Sample
from maskx.core.text import listed
from maskx.data.coco import CocoData
from maskx.data.images import read_image_sample
from maskx.data.label_maps import ignore_label, things_and_stuff_label_map
from maskx.data.things_and_stuff import things_and_stuff
from maskx.engine.batches import RecordMapper
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.larvseg.joint_sets import JointBatches, JointDataSet, JointSets, joint_sets

Record = Mapping[str, Any]

_MASK, _IMAGE = Supervision.MASK.value, Supervision.IMAGE.value


class JointMapper:
    """Reads the records of joint sets, each with the supervision of its data set.

    Args:
        sets: data sets that are trained on together; their records are not read.
        flip: mirror half of the samples from left to right.
        min_crop: smallest side of a random crop as a share of the image's; 1 takes whole images.

    """

    def __init__(self, sets: JointSets, *, flip: bool = True, min_crop: float = 1.0) -> None:
        if not 0 < min_crop <= 1:
            raise ValueError(
                f"min_crop (DATASETS.MASKX.JOINT.MIN_CROP) is {min_crop}. Allowed: above 0 and at "
                "most 1."
            )
        self.sets, self.flip, self.min_crop = sets.without_records(), flip, min_crop

    def __call__(self, record: Record, random_state: np.random.RandomState) -> Sample:
        """Make a training sample.

        Returns:
            ``image`` (3, S, S) uint8 RGB with S of the data set, ``height``, ``width``,
            ``image_id``, ``file_name``, ``data_set``, ``single_label``, ``attention``; of "image"
            data sets ``image_labels``, class indices; of "mask" data sets ``sem_seg`` (S, S) int64,
            class index + 1 and ``ignore_label`` where nothing is known.
        """
        data_set = self.sets.of_record(record)
        sample = read_image_sample(record) | {
            "file_name": record["file_name"],
            "data_set": data_set.name,
            "single_label": data_set.single_label,
            "attention": data_set.attention,
        }
        maps = {"image": sample["image"]}
        if data_set.reads_pixels:
            maps["sem_seg"] = torch.from_numpy(self.sets.label_map(record))
        where = random_crop(maps["image"].shape[-2:], self.min_crop, random_state)
        maps = {name: values[(..., *where)] for name, values in maps.items()}
        sample["image"] = warp_image(maps["image"], data_set.image_size)
        if data_set.reads_pixels:
            sem_seg = warp_label_map(maps["sem_seg"], data_set.image_size)
        if data_set.supervision == _MASK:
            sample["sem_seg"] = sem_seg
        elif data_set.crop_level_labels:
            found = set(sem_seg.unique().tolist()) - {ignore_label(self.sets.num_classes)}
            sample["image_labels"] = sorted(label - 1 for label in found)
        else:
            sample["image_labels"] = self.sets.image_labels(record)
        if self.flip and random_state.randint(2):
            for key in sample.keys() & {"image", "sem_seg"}:
                sample[key] = sample[key].flip(-1)
        return sample


def random_crop(
    size: tuple[int, int], min_crop: float, random_state: np.random.RandomState
) -> tuple[slice, slice]:
    """Draw the rows and columns of a random part of an image of size (H, W), of its aspect ratio.

    ``min_crop`` is its smallest side as a share of the image's, above 0; 1 draws nothing and is
    all.
    """
    if min_crop == 1:
        return slice(0, size[0]), slice(0, size[1])
    share = random_state.uniform(min_crop, 1)
    lengths = [max(1, round(share * side)) for side in size]
    starts = [
        random_state.randint(side - length + 1) for side, length in zip(size, lengths, strict=True)
    ]
    rows, columns = (slice(a, a + n) for a, n in zip(starts, lengths, strict=True))
    return rows, columns


class MappedSets(Dataset):
    """Training samples by data set, record and seed of the augmentation."""

    def __init__(self, sets: JointSets, mapper: RecordMapper) -> None:
        self.sets, self.mapper = sets, mapper

    def __len__(self) -> int:
        return sum(len(each.records) for each in self.sets.data_sets)

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        which, index, seed = key
        return self.mapper(self.sets.data_sets[which].records[index], np.random.RandomState(seed))

    def batches(self, start: int, stop: int, **order: int) -> JointBatches:
        """Lists of keys of the steps ``start`` to ``stop``, see :class:`JointBatches`."""
        num_records = [len(each.records) for each in self.sets.data_sets]
        ratios = [each.ratio for each in self.sets.data_sets]
        return JointBatches(num_records, ratios, start, stop, **order)


def joint_batches(
    sets: JointSets, mapper: JointMapper, *, start: int, stop: int, num_workers: int, **order: int
) -> DataLoader:
    """Lists of samples of the steps ``start`` to ``stop``, each of one data set.

    ``num_workers`` processes read images, 0 reads them in this one; for ``order`` see
    :class:`JointBatches`.
    """
    mapped = MappedSets(sets, mapper)
    batches = mapped.batches(start, stop, **order)
    return DataLoader(mapped, batch_sampler=batches, num_workers=num_workers, collate_fn=list)


@dataclass(frozen=True)
class LabelledImages:
    """Records with true label maps to evaluate on, and their class list."""

    records: Sequence[Record]
    class_names: tuple[str, ...]


def labelled_images(data: CocoData) -> LabelledImages:
    """Take the stuff of a file as classes if it has any."""
    if data.records and all("sem_seg_file_name" in record for record in data.records):
        return LabelledImages(*things_and_stuff(data))
    return LabelledImages(data.records, tuple(data.class_names))


def true_label_map(record: Record, class_names: Sequence[str]) -> np.ndarray:
    """Read or draw the label map of a record to compare with.

    Returns:
        (H, W), class index + 1, the first of those that share a name, and ``ignore_label`` where
        nothing is known. A pixel of label 0 is of no class, so it is unknown.
    """
    first = {name: index for index, name in reversed([*enumerate(class_names)])}
    ignore = ignore_label(len(class_names))
    labels = np.full(ignore + 1, ignore)
    labels[1 : len(class_names) + 1] = [first[name] + 1 for name in class_names]
    return labels[things_and_stuff_label_map(record, len(class_names))]


def classes_to_predict(class_names: Sequence[str], table_names: Sequence[str]) -> tuple[int, ...]:
    """Return the class index in the table of each class of a test set.

    Raises:
        ValueError: the table lacks one.
    """
    index_of = {name: index for index, name in enumerate(table_names)}
    missing = [name for name in dict.fromkeys(class_names) if name not in index_of]
    if missing:
        raise ValueError(
            f"{len(missing)} of the classes to predict are not among the {len(index_of)} of the "
            f"model: {listed(missing)}. Give images of its classes, or a model of these."
        )
    return tuple(index_of[name] for name in class_names)


def sets_of_one_file(train_data: CocoData, split: CategorySplit, *, image_size: int) -> JointSets:
    """Make two data sets of one file: masks of base classes, and image labels.

    Images with masks teach those of the base classes, and the stuff if the file has any. Images
    with image labels alone teach these, and so do those with masks; the stuff is among them, as
    walls and floors are among the labels of the paper's images. If the file has no images with
    image labels alone, every second image keeps its masks and the others only their image labels.

    ``split`` has the base classes in A, the novel ones in B.
    """
    images = labelled_images(train_data)
    masks = [r for r in images.records if r["supervision"] == _MASK]
    tagged = [r for r in images.records if r["supervision"] == _IMAGE]
    masks, tagged = (masks, tagged + masks) if tagged else (masks[::2], masks[1::2])
    novel = set(split.without_masks)
    shared = {"class_names": images.class_names, "image_size": image_size}
    with_masks = [name for name in images.class_names if name not in novel]
    return joint_sets(
        [
            JointDataSet("masks", masks, supervision=_MASK, with_masks=with_masks, **shared),
            JointDataSet("image labels", tagged, supervision=_IMAGE, **shared),
        ]
    )
