"""Data of ConceptMask in Detectron2: word table and split, training and test sets, evaluation.

Data sets have class lists of their own, which are matched with the word table by name. Each stage
sees of ``DATASETS.TRAIN`` what it learns from and nothing else; see
:mod:`maskx.systems.concept_mask.concept_sets`.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from maskx.core.word_table import WordTable, load_word_table, save_word_table
from maskx.data.coco import CocoData
from maskx.data.tag_lists import TagList, read_tag_list, tag_list
from maskx.detectron2.adapters import in_format, seeded_train_loader, test_loader
from maskx.detectron2.datasets import check_file, check_registered, class_names_of, records_of
from maskx.detectron2.hooks import architecture_of
from maskx.systems.concept_mask.concept_sets import (
    ConceptSplit,
    concept_sets,
    read_concept_split,
    scene_concept_split,
    vocabulary_difference,
)
from maskx.systems.concept_mask.evaluation import ConceptTest, concept_test, format_concept_table
from maskx.systems.concept_mask.overlap import concept_overlap, save_overlap
from maskx.systems.concept_mask.query import read_unseen_words
from maskx.systems.concept_mask.samples import ConceptMapper
from maskx.systems.concept_mask.tag_vectors import learn_word_vectors

logger = logging.getLogger(__name__)

KEYS = "MODEL.MASKX.CONCEPT_MASK"
SCENES_SPLIT = "scenes_concepts"
"""Value of ``MODEL.MASKX.CONCEPT_MASK.SPLIT`` for the generated scenes with concepts."""
# What `concept_sets` calls the data of each stage, and what it returns.
_STAGE_SETS = {1: ("tags", "tagged"), 2: ("boxes", "boxed"), 3: ("masks", "masked")}


def concept_table(cfg: CfgNode) -> WordTable:
    """Read the word table of a configuration."""
    path = cfg.MODEL.MASKX.CONCEPT_MASK.WORD_TABLE
    if not path:
        raise ValueError(
            f"{KEYS}.WORD_TABLE is empty. Name a table of tools/learn_word_vectors.py, or train "
            "with tools/train_concept_mask.py, which makes one of the tags of stage 1."
        )
    return _table(path, Path(path).stat().st_mtime_ns if Path(path).is_file() else 0)


def unseen_words(cfg: CfgNode) -> WordTable | None:
    """Read ``TEST.MASKX.UNSEEN_WORDS``; see :func:`read_unseen_words`."""
    path = cfg.TEST.MASKX.UNSEEN_WORDS
    return read_unseen_words(path, concept_table(cfg)) if path else None


def concept_split(cfg: CfgNode) -> ConceptSplit:
    """Return which concepts of the word table have boxes, and which masks."""
    names, spec = concept_table(cfg).names, cfg.MODEL.MASKX.CONCEPT_MASK.SPLIT
    stage = architecture_of(cfg).stage
    if not spec:
        if stage > 1:
            raise ValueError(
                f"{KEYS}.SPLIT is empty, but stage {stage}, {cfg.MODEL.META_ARCHITECTURE}, learns "
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
            f"{KEYS}.SPLIT is '{SCENES_SPLIT}', but the table {KEYS}.WORD_TABLE is of another "
            f"vocabulary: {difference}. Make a table of the tags of generated scenes."
        )
    return split


def check_concept_data(cfg: CfgNode) -> None:
    """Check what can be checked before any annotation of a training set is read."""
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    split = concept_split(cfg)
    for name in cfg.DATASETS.TRAIN:
        check_registered(name)
    for name in cfg.DATASETS.TEST:
        concept_test_data(cfg, name, with_records=False)
    if architecture_of(cfg).stage == 3 and cfg.DATASETS.TRAIN and not split.masked:
        raise ValueError(
            f"{KEYS}.SPLIT '{keys.SPLIT}' has no concept with masks, which stage 3 learns from. "
            "List some of the boxed concepts in 'masked'."
        )
    batch, num_processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch < 2 * num_processes or batch % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch} for {num_processes} process(es). Allowed: multiples "
            f"of {num_processes} from {2 * num_processes} on, since batch norm needs two images in "
            "each."
        )
    flip, size = cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MASKX.SIZE
    for name, value, is_right, allowed in (
        ("INPUT.RANDOM_FLIP", flip, flip in ("horizontal", "none"), "horizontal, none"),
        ("INPUT.MASKX.SIZE", size, size >= 1, "1 or more"),
        (f"{KEYS}.MAX_CONCEPTS", keys.MAX_CONCEPTS, keys.MAX_CONCEPTS >= 1, "1 or more"),
        (f"{KEYS}.NUM_MATCHED", keys.NUM_MATCHED, keys.NUM_MATCHED >= 1, "1 or more"),
    ):
        if not is_right:
            raise ValueError(f"{name} is {value!r}. Allowed for ConceptMask: {allowed}.")


def concept_records(cfg: CfgNode, split: ConceptSplit | None = None) -> list[dict[str, Any]]:
    """Read what the stage learns from of all data sets of ``DATASETS.TRAIN``.

    See :class:`maskx.systems.concept_mask.concept_sets.ConceptSets`.
    """
    argument, chosen = _STAGE_SETS[architecture_of(cfg).stage]
    split = split or concept_split(cfg)
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty. Name at least one registered data set.")
    records = []
    for name in cfg.DATASETS.TRAIN:
        data = _read(name, split, argument)
        folder = MetadataCatalog.get(name).image_root if isinstance(data, TagList) else ""
        records += getattr(concept_sets(split, **{argument: data}, tag_images=folder), chosen)
    return records


def training_mapper(cfg: CfgNode) -> ConceptMapper:
    """Make what makes the training samples of the stage, RGB."""
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    return ConceptMapper(
        architecture_of(cfg).stage,
        size=cfg.INPUT.MASKX.SIZE,
        attention_sizes=keys.ATTENTION_SIZES,
        masked=concept_split(cfg).masked_indices,
        max_concepts=keys.MAX_CONCEPTS,
        flip=cfg.INPUT.RANDOM_FLIP != "none",
    )


def build_concept_loader(cfg: CfgNode) -> Any:
    """Make the training loader of the stage."""
    mapper = in_format(training_mapper(cfg), cfg.INPUT.FORMAT)
    return seeded_train_loader(cfg, concept_records(cfg), mapper)


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Any:
    """Make the loader of a test set: images, with the query for what has a true mask in them."""
    test = concept_test_data(cfg, dataset_name, with_records=False)
    return test_loader(cfg, dataset_name, test.sample)


def concept_test_data(cfg: CfgNode, dataset_name: str, *, with_records: bool = True) -> ConceptTest:
    """Match the classes of a registered test set with the concepts of the model.

    Its annotations are read too if `with_records`.
    """
    class_names = class_names_of(dataset_name)
    records = records_of(dataset_name) if with_records else []
    known = (concept_split(cfg), concept_table(cfg), unseen_words(cfg))
    return concept_test(records, class_names, *known, source=f"data set '{dataset_name}'")


def make_word_table(cfg: CfgNode, path: Path) -> None:
    """Learn word vectors of the tags of ``DATASETS.TRAIN``, for the vocabulary of the split.

    They are written to `path`, where a file that is there is kept.
    """
    if path.is_file():
        return
    spec = cfg.MODEL.MASKX.CONCEPT_MASK.SPLIT
    if not spec:
        raise ValueError(
            f"{KEYS}.SPLIT and {KEYS}.WORD_TABLE are empty, so the vocabulary is not known. Name "
            f"a split, or '{SCENES_SPLIT}' for generated scenes."
        )
    split = scene_concept_split() if spec == SCENES_SPLIT else read_concept_split(spec)
    labels = [record["image_labels"] for record in concept_records(cfg, split)]
    source = f"tags of {', '.join(cfg.DATASETS.TRAIN)}"
    save_word_table(path, learn_word_vectors(tag_list(labels, split.vocabulary, source=source)))


def make_overlap(cfg: CfgNode, path: Path) -> None:
    """Write Eq. 3 of the boxes of ``DATASETS.TRAIN``; a file that is there is kept."""
    if path.is_file():
        return
    names = concept_table(cfg).names
    save_overlap(path, concept_overlap(concept_records(cfg), len(names), progress=True), names)


class MaskXConceptEvaluator(DatasetEvaluator):
    """Pointing game, soft IoU, precision, recall and IoU, by what concepts were learned from.

    The measures are means over the images of a concept, then over the concepts of a level.

    Args:
        distributed: add up the measures of all processes; otherwise each evaluates its own images.
    """

    def __init__(self, dataset_name: str, *, test: ConceptTest, distributed: bool = True) -> None:
        if not test.has_truth:
            raise ValueError(
                f"Data set '{dataset_name}' (DATASETS.TEST) has no image with a true mask or a "
                "label map, which concepts are measured on. Name another data set, or none: ()."
            )
        self._dataset_name = dataset_name
        self._test = test
        self._records = {record["image_id"]: record for record in test.records}
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._scores = self._test.new_scores()

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Take in the predictions of a batch; see :meth:`ConceptTest.measure`."""
        for sample, output in zip(inputs, outputs, strict=True):
            image_id = sample["image_id"]
            if image_id not in self._records:
                raise ValueError(
                    f"Image {image_id!r} is not among the {len(self._records)} of data set "
                    f"'{self._dataset_name}'. Was another data set given to the model?"
                )
            self._test.measure(self._scores, self._records[image_id], output)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the measures.

        Returns:
            Under "concepts", "<measure>_<level>" in [0, 1] for the levels that were measured, such
            as "pointing_box"; nothing in processes other than the main one.
        """
        scores = self._scores
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(scores, dst=0)
            if not comm.is_main_process():
                return {}
            scores = self._test.new_scores()
            for part in gathered:
                scores.merge(part)
        result = scores.evaluate()
        logger.info(
            "Concepts of '%s' by level of supervision:\n%s",
            self._dataset_name,
            format_concept_table(result),
        )
        measures = {
            f"{measure}_{level}": value
            for level, found in result["levels"].items()
            for measure, value in (found or {}).items()
        }
        return {"concepts": measures}


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
