"""Tags, boxes and masks of concepts as training data of ConceptMask, and its test sets.

Data sets have class lists of their own, which are matched with the word table by name. Each stage
sees of ``DATASETS.TRAIN`` what it learns from and nothing else; see
:mod:`maskx.systems.concept_mask.concept_sets`.
"""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils import comm

from maskx.core.word_table import WordTable, load_word_table, save_word_table
from maskx.data.coco import CocoData
from maskx.data.tag_lists import TagList, read_tag_list, tag_list
from maskx.detectron2.datasets import check_file, check_registered, class_names_of, records_of
from maskx.systems.concept_mask.concept_sets import (
    ConceptSplit,
    concept_sets,
    fully_masked,
    read_concept_split,
    vocabulary_difference,
)
from maskx.systems.concept_mask.overlap import concept_overlap, save_overlap
from maskx.systems.concept_mask.samples import box_target, mask_target
from maskx.systems.concept_mask.scenes import scene_concept_split
from maskx.systems.concept_mask.steps import UNSEEN, ConceptTest, concept_test, read_unseen_words
from maskx.systems.concept_mask.tag_vectors import learn_word_vectors

__all__ = [
    "MaskXConceptMapper",
    "build_concept_loader",
    "check_concept_data",
    "concept_records",
    "concept_split",
    "concept_table",
    "concept_test_data",
    "make_overlap",
    "make_word_table",
    "unseen_words",
]

_KEYS = "MODEL.MASKX.CONCEPT_MASK"
SCENES_SPLIT = "scenes_concepts"
"""Value of ``MODEL.MASKX.CONCEPT_MASK.SPLIT`` for the generated scenes with concepts."""
# What `concept_sets` calls the data of each stage, and what it returns.
_STAGE_SETS = {1: ("tags", "tagged"), 2: ("boxes", "boxed"), 3: ("masks", "masked")}


def concept_table(cfg: CfgNode) -> WordTable:
    """Read the word table of a configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none is named, or the file is no word table.
    """
    path = cfg.MODEL.MASKX.CONCEPT_MASK.WORD_TABLE
    if not path:
        raise ValueError(
            f"{_KEYS}.WORD_TABLE is empty. Name a table of tools/learn_word_vectors.py, or train "
            "with tools/train_concept_mask.py, which makes one of the tags of stage 1."
        )
    return _table(path, Path(path).stat().st_mtime_ns if Path(path).is_file() else 0)


def unseen_words(cfg: CfgNode) -> WordTable | None:
    """Read ``TEST.MASKX.UNSEEN_WORDS``; see :func:`read_unseen_words`."""
    path = cfg.TEST.MASKX.UNSEEN_WORDS
    return read_unseen_words(path, concept_table(cfg)) if path else None


def concept_split(cfg: CfgNode) -> ConceptSplit:
    """Return which concepts of the word table have boxes, and which masks.

    Raises:
        FileNotFoundError: the split is no file.
        ValueError: none is named and the stage needs one, or it is of another vocabulary.
    """
    names, spec = concept_table(cfg).names, cfg.MODEL.MASKX.CONCEPT_MASK.SPLIT
    if not spec:
        if cfg.MODEL.MASKX.CONCEPT_MASK.STAGE > 1:
            raise ValueError(
                f"{_KEYS}.SPLIT is empty, but stage {cfg.MODEL.MASKX.CONCEPT_MASK.STAGE} learns "
                "from concepts with boxes. Name a JSON file with the lists 'boxed' and 'masked', "
                f"or '{SCENES_SPLIT}' for generated scenes."
            )
        return ConceptSplit(names, (), ())
    if spec != SCENES_SPLIT:
        return read_concept_split(spec, names)
    split = scene_concept_split()
    difference = vocabulary_difference(names, split.vocabulary)
    if difference is not None:
        raise ValueError(
            f"{_KEYS}.SPLIT is '{SCENES_SPLIT}', but the table {_KEYS}.WORD_TABLE is of another "
            f"vocabulary: {difference}. Make a table of the tags of generated scenes."
        )
    return split


def check_concept_data(cfg: CfgNode) -> None:
    """Check what can be checked before any annotation of a training set is read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: data sets, files, sizes or batch do not fit.
    """
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    split = concept_split(cfg)
    for name in cfg.DATASETS.TRAIN:
        check_registered(name)
    for name in cfg.DATASETS.TEST:
        concept_test_data(cfg, name, with_records=False)
    if keys.STAGE == 3 and cfg.DATASETS.TRAIN and not split.masked:
        raise ValueError(
            f"{_KEYS}.SPLIT '{keys.SPLIT}' has no concept with masks, which stage 3 learns from. "
            "List some of the boxed concepts in 'masked'."
        )
    batch, num_processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch < 2 * num_processes or batch % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch} for {num_processes} process(es). Allowed: multiples "
            f"of {num_processes} from {2 * num_processes} on, since batch norm needs two images in "
            "each."
        )
    if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
        raise ValueError(
            f"INPUT.RANDOM_FLIP is '{cfg.INPUT.RANDOM_FLIP}'. Allowed for ConceptMask: "
            "horizontal, none."
        )
    for name, value in (
        ("INPUT.MASKX.SIZE", cfg.INPUT.MASKX.SIZE),
        (f"{_KEYS}.MAX_CONCEPTS", keys.MAX_CONCEPTS),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}. Allowed: 1 or more.")


def concept_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """Read what the stage learns from, of all data sets of ``DATASETS.TRAIN``.

    Returns:
        Records with concept indices, as of
        :class:`maskx.systems.concept_mask.concept_sets.ConceptSets`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no data set is named, one has a concept that is not in the vocabulary, or one
            has nothing to learn from.
    """
    return _records(cfg, concept_split(cfg))


def build_concept_loader(cfg: CfgNode) -> Any:
    """Make the training loader of the stage."""
    return build_detection_train_loader(
        cfg,
        mapper=MaskXConceptMapper(cfg, is_train=True),
        dataset=concept_records(cfg),
        aspect_ratio_grouping=False,  # all images become squares, and those of tag lists lack sizes
    )


def concept_test_data(cfg: CfgNode, dataset_name: str, *, with_records: bool = True) -> ConceptTest:
    """Match the classes of a test set with the concepts of the model.

    Args:
        cfg: the configuration.
        dataset_name: of a registered data set with true masks.
        with_records: read its annotations too.

    Raises:
        ValueError: it is not registered, or none of its classes has a vector.
    """
    class_names = class_names_of(dataset_name)
    records = records_of(dataset_name) if with_records else []
    return concept_test(
        records,
        class_names,
        concept_split(cfg),
        concept_table(cfg),
        unseen_words(cfg),
        source=f"data set '{dataset_name}'",
    )


def make_word_table(cfg: CfgNode, path: Path) -> None:
    """Learn word vectors of the tags of ``DATASETS.TRAIN``, for the vocabulary of the split.

    Args:
        cfg: of stage 1; its WORD_TABLE is not read.
        path: file to write; one that is there is kept.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the split lists no vocabulary, or the tags are too few for word vectors.
    """
    if path.is_file():
        return
    spec = cfg.MODEL.MASKX.CONCEPT_MASK.SPLIT
    if not spec:
        raise ValueError(
            f"{_KEYS}.SPLIT and {_KEYS}.WORD_TABLE are empty, so the vocabulary is not known. Name "
            f"a split, or '{SCENES_SPLIT}' for generated scenes."
        )
    split = scene_concept_split() if spec == SCENES_SPLIT else read_concept_split(spec)
    labels = [record["image_labels"] for record in _records(cfg, split)]
    source = f"tags of {', '.join(cfg.DATASETS.TRAIN)}"
    save_word_table(path, learn_word_vectors(tag_list(labels, split.vocabulary, source=source)))


def make_overlap(cfg: CfgNode, path: Path) -> None:
    """Compute Eq. 3 on the boxes of ``DATASETS.TRAIN``.

    Args:
        cfg: of stage 2; its OVERLAP is not read.
        path: file to write; one that is there is kept.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is nothing to learn from.
    """
    if path.is_file():
        return
    split = concept_split(cfg)
    overlap = concept_overlap(_records(cfg, split), len(split.vocabulary), progress=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_overlap(path, overlap, split.vocabulary)


class MaskXConceptMapper:
    """Map records of concepts to samples of one of the three stages.

    A training sample has ``image`` (3, S, S) uint8, warped to a square, ``height``, ``width``,
    ``image_id``, ``file_name``; and in

    - stage 1 ``image_labels``, concept indices;
    - stage 2 ``concepts``, concept indices, ``boxes`` (B, 4) XYXY in pixels of the square and
      ``box_rows`` (B,), the position of each box's concept;
    - stage 3 ``concepts`` and ``masks`` (P, M, M) bool.

    A test sample has ``image`` (3, H, W), as it is in the file, ``class_indices``, those of the
    data set that have a true mask, and ``query``, which asks for them.

    Args:
        is_train: whether it is used in training.
        image_format: "BGR" or "RGB".
        stage: 1, 2 or 3, in training.
        image_size: S.
        mask_size: M.
        masked: concept indices whose masks are learned from.
        max_concepts: most concepts of an image in stage 3, drawn at random.
        flip: mirror half of the training samples.
        test: of the test set, in evaluation; its records are not read.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        image_format: str,
        stage: int = 1,
        image_size: int = 320,
        mask_size: int = 320,
        masked: Collection[int] = (),
        max_concepts: int = 4,
        flip: bool = True,
        test: ConceptTest | None = None,
    ) -> None:
        self.is_train = is_train
        self.image_format = image_format
        self.stage = stage
        self.image_size, self.mask_size = image_size, mask_size
        self.masked = frozenset(masked)
        self.max_concepts = max_concepts
        self.flip = flip
        self.test = test

    @classmethod
    def from_config(
        cls, cfg: CfgNode, is_train: bool = True, *, dataset_name: str | None = None
    ) -> dict[str, Any]:
        """Read the arguments from a configuration; ``dataset_name`` is the test set."""
        shared = {"is_train": is_train, "image_format": cfg.INPUT.FORMAT}
        if not is_train:
            return shared | {"test": concept_test_data(cfg, dataset_name, with_records=False)}
        keys, size = cfg.MODEL.MASKX.CONCEPT_MASK, cfg.INPUT.MASKX.SIZE
        # The network warps the image of stage 3 to the sizes of the attention maps itself.
        sizes = (size, *keys.ATTENTION_SIZES) if keys.STAGE == 3 else (size,)
        return shared | {
            "stage": keys.STAGE,
            "image_size": max(sizes),
            "mask_size": size,
            "masked": concept_split(cfg).masked_indices,
            "max_concepts": keys.MAX_CONCEPTS,
            "flip": cfg.INPUT.RANDOM_FLIP != "none",
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Map a record to a sample; the record stays as it is."""
        kept = ("file_name", "image_id", "height", "width")
        sample = {key: record[key] for key in kept if key in record}
        image = utils.read_image(record["file_name"], format=self.image_format)
        utils.check_image_size(sample, image)  # adds the size where it is not known
        if not self.is_train:
            return sample | {"image": _to_tensor(image)} | self._question(record)
        size = self.image_size
        image = T.ResizeTransform(*image.shape[:2], size, size).apply_image(image)
        flip = bool(self.flip and np.random.randint(2))
        sample["image"] = _to_tensor(image[:, ::-1] if flip else image)
        return sample | self._targets(record, flip)

    def _targets(self, record: dict[str, Any], flip: bool) -> dict[str, Any]:
        if self.stage == 1:
            return {"image_labels": list(record["image_labels"])}
        if self.stage == 2:
            concepts, boxes, rows = box_target(record, size=self.image_size, flip=flip)
            targets = {"boxes": torch.from_numpy(boxes), "box_rows": torch.from_numpy(rows)}
            return {"concepts": concepts} | targets
        concepts, masks = mask_target(
            record,
            masked=self.masked,
            size=self.mask_size,
            flip=flip,
            max_concepts=self.max_concepts,
            # Detectron2 seeds NumPy's global source in each process that reads images.
            rng=np.random.default_rng(np.random.randint(2**31)),
        )
        return {"concepts": concepts, "masks": torch.from_numpy(masks)}

    def _question(self, record: dict[str, Any]) -> dict[str, Any]:
        classes = fully_masked(record["annotations"])
        classes = [c for c in classes if self.test.indices[c] >= UNSEEN]
        return {"class_indices": classes, "query": self.test.query(classes)}


def _records(cfg: CfgNode, split: ConceptSplit) -> list[dict[str, Any]]:
    argument, chosen = _STAGE_SETS[cfg.MODEL.MASKX.CONCEPT_MASK.STAGE]
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty. Name at least one registered data set.")
    records = []
    for name in cfg.DATASETS.TRAIN:
        data = _read(name, split, argument)
        folder = MetadataCatalog.get(name).image_root if isinstance(data, TagList) else ""
        sets = concept_sets(split, **{argument: data}, tag_images=folder)
        records += getattr(sets, chosen)
    return records


def _read(name: str, split: ConceptSplit, argument: str) -> CocoData | TagList:
    """Read a data set in its own class list."""
    check_registered(name)
    metadata = MetadataCatalog.get(name)
    file = metadata.get("tag_list")
    if file is not None:
        if argument != "tags":
            raise ValueError(
                f"Data set '{name}' (DATASETS.TRAIN) is a tag list, which has no {argument}. It is "
                "for stage 1; name a COCO-format data set."
            )
        check_file(file, metadata.remedy)
        # Words that are rarer than those of the table are no concepts; they are counted.
        return read_tag_list(file, vocabulary=split.vocabulary, strict=False)
    records = records_of(name)
    names = class_names_of(name)
    # For the messages, which name the file that is to be corrected.
    json_file = Path(metadata.get("json_file", f"data set '{name}'"))
    return CocoData(json_file, records, tuple(names), tuple(range(len(names))), {})


@functools.lru_cache(maxsize=2)
def _table(path: str, mtime_ns: int) -> WordTable:
    """Read a table once; the modification time serves the cache alone."""
    return load_word_table(path)


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
