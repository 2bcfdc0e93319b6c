"""ConceptMask on the embedded host: tags of many concepts, boxes of some, masks of few.

Wang et al., "ConceptMask: Large-Scale Segmentation from Semantic Concepts" (ECCV 2018), in the
steps of :class:`maskx.systems.concept_mask.chain.ConceptMaskChain`, from data to measures and
a picture.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskx.core.word_table import WordTable
from maskx.data.coco import CocoData, load_coco
from maskx.data.tag_lists import read_tag_list, tag_list
from maskx.supervision import CategorySplit
from maskx.systems.concept_mask.chain import ConceptMaskChain, ConceptMaskSettings
from maskx.systems.concept_mask.concept_sets import ConceptSplit, concept_sets
from maskx.systems.concept_mask.evaluation import evaluate_concepts, evaluate_existence
from maskx.systems.concept_mask.image_samples import Record, read_sample
from maskx.systems.concept_mask.predictor import ConceptPredictor, ConceptRow, draw_concepts
from maskx.systems.concept_mask.scenes import (
    generate_concept_scenes,
    scene_concept_split,
    write_scene_tags,
)
from maskx.systems.concept_mask.scores import LEVELS, format_concept_table
from maskx.systems.concept_mask.steps import ConceptTest, concept_test, fit_concepts
from maskx.systems.concept_mask.tag_vectors import fold_in_words, learn_word_vectors

__all__ = [
    "ConceptData",
    "coco_concept_data",
    "draw_test_concepts",
    "format_concept_mask",
    "learn_concept_mask",
    "open_chain",
    "scene_concept_data",
]

_FITTING_SHARE, _MAX_FITTING = 0.1, 150
# Rows of the picture by level; most for what has neither boxes nor masks.
_FIGURE_ROWS = {"mask": 1, "box": 2, "image": 3, "unseen": 2}
_TRAINED_WITH = {"mask": "masks", "box": "boxes", "image": "tags only", "unseen": "unseen word"}


@dataclass(frozen=True, eq=False)
class ConceptData:
    """What a chain of trainings learns from and is measured on.

    Attributes:
        train: images of which training may see what the split says.
        fitting: images of no training. Theta and the existence thresholds are fitted on them,
            with their true masks of image-level concepts and all their tags of the vocabulary; not
            with anything of an unseen concept.
        val: images with true masks.
        split: levels of the concepts.
        table: vectors of the vocabulary.
        unseen: vectors of the concepts that are not in it; None without.
    """

    train: CocoData
    fitting: CocoData
    val: CocoData
    split: ConceptSplit
    table: WordTable
    unseen: WordTable | None = None

    def test(self, data: CocoData) -> ConceptTest:
        """Take images to measure on."""
        return concept_test(
            data.records,
            data.class_names,
            self.split,
            self.table,
            self.unseen,
            source=str(data.json_file),
        )


def scene_concept_data(
    folder: Path, *, num_train: int, num_val: int, num_tags: int, size: int, seed: int
) -> ConceptData:
    """Generate scenes with concepts of every level, and learn word vectors from tags of others.

    Args:
        folder: of the files; it is created.
        num_train: scenes to train on.
        num_val: scenes to measure on.
        num_tags: lists of tags, of scenes of which there is no image. Of the same lists with the
            names of the unseen concepts, the vectors of these are folded in.
        size: of the scenes in pixels.
        seed: of everything.
    """
    files = []
    for name, count, number in (
        ("train", num_train, 3 * seed),
        ("val", num_val, 3 * seed + 1),
    ):
        json_file = generate_concept_scenes(
            folder / name, count=count, size=size, seed=number, progress=True
        )
        files.append(load_coco(json_file, folder / name))
    split = scene_concept_split()
    tags, all_tags = (
        write_scene_tags(
            folder / name, count=num_tags, seed=3 * seed + 2, unseen=unseen, progress=True
        )
        for name, unseen in (("tags.jsonl", False), ("tags_unseen.jsonl", True))
    )
    table = learn_word_vectors(read_tag_list(tags, vocabulary=split.vocabulary))
    vectors = fold_in_words(table, read_tag_list(all_tags), split.unseen)
    unseen = WordTable(
        split.unseen, vectors, np.ones(len(vectors)), source=f"words folded into {table.source}"
    )
    train, fitting = _without_fitting(files[0])
    return ConceptData(train, fitting, files[1], split, table, unseen)


def coco_concept_data(train: CocoData, val: CocoData, split: CategorySplit) -> ConceptData:
    """Take the categories of a file as concepts, all with tags and boxes and some with masks.

    Word vectors are learned from which categories are in the training images together; a category
    that is in none with another one has no vector and is left out.

    Args:
        train: images to train on.
        val: images to measure on.
        split: categories with masks, and the others.

    Raises:
        ValueError: fewer than two categories are left, or none with masks.
    """
    labels = [record["image_labels"] for record in train.records]
    paired = sorted({label for each in labels if len(each) > 1 for label in each})
    names = tuple(train.class_names[label] for label in paired)
    if len(paired) < 2:
        raise ValueError(
            f"'{train.json_file}' has no two categories in one image, so no word vectors can be "
            "learned from its tags. Give images with more tags."
        )
    place = {label: index for index, label in enumerate(paired)}
    known = [[place[label] for label in each if label in place] for each in labels]
    table = learn_word_vectors(tag_list(known, names, source=str(train.json_file)))
    masked = tuple(name for name in names if name in set(split.with_masks))
    left_out = tuple(name for name in train.class_names if name not in set(names))
    concepts = ConceptSplit(vocabulary=names, boxed=names, masked=masked, unseen=left_out)
    train, fitting = _without_fitting(train)
    return ConceptData(train, fitting, val, concepts, table)


def _without_fitting(data: CocoData) -> tuple[CocoData, CocoData]:
    """Keep the last images out of the training."""
    count = min(_MAX_FITTING, max(1, round(_FITTING_SHARE * len(data.records))))
    train, fitting = data.records[:-count], data.records[-count:]
    return replace(data, records=train), replace(data, records=fitting)


def open_chain(
    data: ConceptData,
    settings: ConceptMaskSettings,
    *,
    output: Path,
    resume: bool = False,
    device: torch.device,
) -> ConceptMaskChain:
    """Make the trainings of some data.

    Args:
        data: what to learn from.
        settings: what to do.
        output: folder of the checkpoints.
        resume: go on with an interrupted run.
        device: where to compute.

    Raises:
        ValueError: there is nothing to learn from at some level.
    """
    sets = concept_sets(data.split, tags=data.train, boxes=data.train, masks=data.train)
    return ConceptMaskChain(
        sets,
        data.table,
        settings,
        output=output,
        resume=resume,
        unseen=data.unseen,
        identity={"annotation file": data.train.json_file.name},
        device=device,
    )


def learn_concept_mask(
    data: ConceptData,
    settings: ConceptMaskSettings,
    *,
    output: Path,
    resume: bool = False,
    device: torch.device,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Train the three stages, fit theta and thresholds, evaluate each level and draw concepts.

    Args:
        data: what to learn from and to measure on.
        settings: what to do.
        output: folder of the results.
        resume: go on with an interrupted run.
        device: where to compute.
        report: receives the lines for the reader.

    Returns:
        ``levels``: measures of the final masks and maps by level; ``concepts``: by concept;
        ``original``: by level those of the maps of stage 1, whose masks are the maps above 0.5;
        ``existence``, ``fitted``, ``num_images`` and ``step_seconds``.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: data or settings cannot be used, or a checkpoint is of another run.
    """
    chain = open_chain(data, settings, output=output, resume=resume, device=device)
    counts = {name: len(getattr(chain.sets, name)) for name in ("tagged", "boxed", "masked")}
    report(
        f"{counts['tagged']} training images with tags of {len(data.split.vocabulary)} concepts, "
        f"{counts['boxed']} with boxes of {len(data.split.boxed)}, {counts['masked']} with masks "
        f"of {len(data.split.masked)}; {len(data.split.unseen)} concepts are unseen"
    )
    test = data.test(data.val)
    models = {stage: chain.model(stage) for stage in (1, 2, 3)}
    with chain.timed("fitting"):
        fitted = fit_concepts(models[3].network, data.test(data.fitting), models[3].read_image)
        chain.save_fitted(3)
    with chain.timed("evaluation"):
        found = evaluate_concepts(models[3], test, description="evaluation")
        original = evaluate_concepts(models[1], test, description="stage 1: evaluation")
        existence = evaluate_existence(models[3], test)
    with chain.timed("picture"):
        predictor = ConceptPredictor(models[3], data.table, unseen=data.unseen)
        stage_1 = ConceptPredictor(models[1], data.table, unseen=data.unseen)
        draw_test_concepts(output / "predictions.png", predictor, stage_1, test)
    metrics = {
        **found,
        "original": original["levels"],
        "existence": existence,
        "fitted": fitted,
        "num_images": counts,
        "step_seconds": {name: round(value, 1) for name, value in chain.seconds.items()},
    }
    report("\n" + format_concept_mask(metrics))
    return metrics


def format_concept_mask(metrics: Mapping[str, Any]) -> str:
    """Lay out the measures in tables."""
    times = ", ".join(f"{name} {value:.0f}" for name, value in metrics["step_seconds"].items())
    absent = [level for level in LEVELS if metrics["levels"][level] is None]
    lines = ["Masks, and the attention maps they are made from:"]
    lines += [format_concept_table(metrics), "Attention maps of stage 1, masks above 0.5 of them:"]
    lines.append(format_concept_table({"levels": metrics["original"]}))
    if absent:
        lines.append(f"No concept to measure of level {', '.join(absent)}.")
    found = metrics["existence"]
    lines.append(
        f"Concepts said to exist: precision {found['precision']:.3f}, recall {found['recall']:.3f}"
    )
    return "\n".join([*lines, f"Seconds: {times}"])


def draw_test_concepts(
    path: Path, predictor: ConceptPredictor, stage_1: ConceptPredictor, test: ConceptTest
) -> None:
    """Draw concepts of every level: image, map of stage 1, refined map, mask and truth.

    Every row is of another image. Where no image shows a concept, nothing is drawn.

    Args:
        path: PNG file to write.
        predictor: of the final model.
        stage_1: of the model of stage 1.
        test: images with true masks.
    """
    rows: list[ConceptRow] = []
    used: set[int | str] = set()
    for level, count in _FIGURE_ROWS.items():
        of_level = [c for c, each in enumerate(test.levels) if each == level]
        # Spread over the list, whose neighbours are of one kind; then those between.
        step = max(1, len(of_level) // count)
        for concept in itertools.chain(*(of_level[start::step] for start in range(step))):
            if count == 0:
                break
            record, truth = _largest(test, concept, used)
            if record is None:
                continue
            count -= 1
            used.add(record["image_id"])
            image = np.ascontiguousarray(read_sample(record)["image"].permute(1, 2, 0).numpy())
            asked = test.vectors[concept] if test.indices[concept] < 0 else test.names[concept]
            (found,), (first,) = (each(image, [asked]).values() for each in (predictor, stage_1))
            rows.append(
                ConceptRow(
                    f"{test.names[concept]} ({_TRAINED_WITH[level]})",
                    image,
                    maps={"stage 1": first.attention, "refined": found.attention},
                    masks={"mask": found.mask, "truth": truth},
                )
            )
    if rows:
        draw_concepts(path, rows)


def _largest(
    test: ConceptTest, concept: int, used: set[int | str]
) -> tuple[Record | None, np.ndarray | None]:
    """Find the image, not yet used, in which a concept is largest, and its truth there."""
    best, best_truth, best_share = None, None, 0.0
    for record in test.records:
        if record["image_id"] in used or concept not in record["image_labels"]:
            continue
        truth = test.truths(record).get(concept)
        if truth is not None and truth.mean() > best_share:
            best, best_truth, best_share = record, truth, truth.mean()
    return best, best_truth
