"""What makes the samples of maskx fit Detectron2's engine: order, channel order, random state."""

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.utils import comm
from PIL import Image

from maskx.core.images import resize_in_strips
from maskx.data.images import read_image_sample
from maskx.data.splits import check_masks
from maskx.detectron2.datasets import (
    check_class_list,
    class_names_of,
    record_from_detectron2,
    records_of,
    split_from_config,
)
from maskx.detectron2.evaluation import ScoresEvaluator
from maskx.detectron2.hooks import Detectron2Hooks
from maskx.engine.batches import (
    MappedRecords,
    RecordMapper,
    SeededBatches,
    SeededLoader,
    part_of_batch,
)
from maskx.engine.system import System
from maskx.supervision import CategorySplit

Sample = dict[str, Any]

_LARGE = 2**25  # bytes of an image, of 11 megapixels


def in_format(read: Callable[..., Sample], image_format: str) -> Callable[..., Sample]:
    """Make samples whose images are RGB have the channel order of the model.

    Args:
        read: makes a sample with ``image`` (3, H, W) RGB, of a record and whatever else.
    """
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT is {image_format!r}. Allowed: RGB, BGR.")
    return _InBGR(read) if image_format == "BGR" else read


class _InBGR:  # a class, as other processes read images
    def __init__(self, read: Callable[..., Sample]) -> None:
        self.read = read

    def __call__(self, *args: Any) -> Sample:
        sample = self.read(*args)
        return sample | {"image": sample["image"].flip(0)}


class PhotographInput(T.AugInput):
    """An image to augment. It is resized as Detectron2 does it, but in less memory."""

    def transform(self, tfm: T.Transform) -> None:
        """Apply a transform to the image, and keep the new one."""
        image = self.image
        is_plain = image.dtype == np.uint8 and image.shape[2:] == (3,)
        is_large = image.nbytes >= _LARGE and len(image) <= 2 * image.shape[1]
        resizes = isinstance(tfm, T.ResizeTransform) and tfm.interp == Image.BILINEAR
        if resizes and is_plain and is_large:
            self.image = resize_in_strips(image, tfm.new_h, tfm.new_w)
        else:
            super().transform(tfm)


class SeededMapper:
    """Give a mapper of Detectron2, which draws from NumPy's global state, a state of its own."""

    def __init__(self, mapper: Callable[[Mapping[str, Any]], Sample]) -> None:
        self.mapper = mapper

    def __call__(self, record: Mapping[str, Any], random_state: np.random.RandomState) -> Sample:
        """Map a record; all that is random in it comes from ``random_state``."""
        seed = int(random_state.randint(2**31))
        states = np.random.get_state(), random.getstate()
        np.random.seed(seed)
        random.seed(seed)
        try:
            return self.mapper(record)
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


def seed_of(cfg: CfgNode) -> int:
    """Return ``SEED``, or one that all processes share where none is set."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def seeded_train_loader(
    cfg: CfgNode,
    records: Sequence[Mapping[str, Any]],
    mapper: RecordMapper,
    batches: Callable[..., Iterable[list[Any]]] | None = None,
    *,
    split: CategorySplit | None = None,
) -> SeededLoader:
    """Make a training loader whose batches follow from ``SEED`` and the iteration alone.

    All processes together see what one would have seen. Records are held serialised.

    Args:
        mapper: makes a sample, in the channel order of ``INPUT.FORMAT``.
        batches: as :class:`SeededBatches`, which is the default, but without ``num_records``.
        split: whose categories A must have masks in the records; None where none is learned from.
    """
    if split is not None:
        check_masks(map(record_from_detectron2, records), split)
    batches = functools.partial(SeededBatches, len(records)) if batches is None else batches
    processes = {"rank": comm.get_rank(), "num_processes": comm.get_world_size()}
    size = cfg.SOLVER.IMS_PER_BATCH
    part_of_batch(size, **processes)
    return SeededLoader(
        MappedRecords(DatasetFromList(list(records), copy=False), mapper),
        functools.partial(batches, size, seed_of(cfg), **processes),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def test_loader(
    cfg: CfgNode, dataset_name: str, read: Callable[[Mapping[str, Any]], Sample]
) -> Any:
    """Make the loader of a test set."""
    return build_detection_test_loader(
        records_of(dataset_name),
        mapper=in_format(read, cfg.INPUT.FORMAT),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


class AspectGroupedBatches(SeededBatches):
    """The batches of :class:`SeededBatches` in another order: wide images apart from high ones.

    That saves padding, as Detectron2's own grouping does. To start later the keys of all batches
    before are drawn again, at about a million a second.

    Args:
        is_wide: of each record, whether its image is wider than high.
        *args: of :class:`SeededBatches`, but for ``num_records``, as are the keywords.
    """

    def __init__(self, is_wide: Sequence[bool], *args: Any, **kwargs: Any) -> None:
        super().__init__(len(is_wide), *args, **kwargs)
        self.is_wide = is_wide

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        groups: dict[bool, list] = defaultdict(list)
        iteration = 0
        for (key,) in SeededBatches(len(self.is_wide), 1, self.seed, 0, 2**62):
            group = groups[self.is_wide[key[0]]]
            group.append(key)
            if len(group) == self.batch_size:
                if iteration >= self.start:
                    yield group[self.part]
                group.clear()
                iteration += 1
                if iteration >= self.stop:
                    return


def hooks_of_system(system: System, settings: Callable[[CfgNode], Any]) -> Detectron2Hooks:
    """Make the hooks of a system that gives ``samples`` and ``scores``."""

    def class_names(cfg: CfgNode) -> Sequence[str]:
        return class_names_of((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[0])

    def train_loader(cfg: CfgNode) -> SeededLoader:
        records = [r for name in cfg.DATASETS.TRAIN for r in records_of(name)]
        split = split_from_config(cfg)
        mapper = in_format(system.samples(settings(cfg), class_names(cfg), split), cfg.INPUT.FORMAT)
        return seeded_train_loader(cfg, records, mapper, split=split)

    def evaluator(cfg: CfgNode, dataset_name: str) -> ScoresEvaluator:
        split = split_from_config(cfg)
        make_scores = functools.partial(system.scores, class_names_of(dataset_name), split)
        return ScoresEvaluator(dataset_name, make_scores)

    def check(cfg: CfgNode) -> None:
        first, *others = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        for name in others:
            check_class_list(name, class_names_of(first), first)

    return Detectron2Hooks(
        system=system.name,
        check=check,
        train_loader=train_loader,
        test_loader=lambda cfg, name: test_loader(cfg, name, read_image_sample),
        evaluator=evaluator,
        class_names=class_names,
    )
