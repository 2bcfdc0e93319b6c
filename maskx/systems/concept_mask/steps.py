"""Questions to a trained ConceptMask, what it finds, and what is fitted for it, on either host.

Wang et al., "ConceptMask: Large-Scale Segmentation from Semantic Concepts" (ECCV 2018). Networks
are those of :mod:`maskx.systems.concept_mask.network`, in evaluation mode; records those of
:func:`maskx.data.coco.load_coco`.
"""

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskx.core.word_table import WordTable, load_word_table, spelled, word_table_from_file
from maskx.data.masks import decode_segmentation
from maskx.data.tag_lists import read_vocabulary
from maskx.systems.concept_mask.concept_sets import ConceptSplit, fully_masked
from maskx.systems.concept_mask.network import (
    ConceptMask,
    ConceptQuery,
    ConceptResults,
    concept_query,
)
from maskx.systems.concept_mask.scores import fit_existence_threshold, fit_theta
from maskx.systems.concept_mask.segmenter import resize_maps

__all__ = [
    "ConceptTest",
    "FoundConcept",
    "batch_targets",
    "concept_test",
    "concept_truths",
    "fit_concepts",
    "found_concepts",
    "image_tensor",
    "named_query",
    "read_unseen_words",
]

logger = logging.getLogger(__name__)

UNSEEN, NOT_ASKED = -1, -2
"""Index of a concept that is asked for by its vector; of one that has none."""

_CHUNK = 1024  # concepts whose maps are made at a time

Record = Mapping[str, Any]
ReadImage = Callable[[Record], Tensor]
"""Reads the image of a record: (3, H, W), normalised, on the device of the network."""


@dataclass(frozen=True, eq=False)
class FoundConcept:
    """One concept in one image.

    Attributes:
        initial: (H, W) in [0, 1], the map of its word vector alone (Eq. 1).
        attention: (H, W) in [0, 1], the refined or blended map. Both are normalised: `existence`
            tells how strong the map is.
        mask_prob: (H, W) in [0, 1].
        mask: (H, W) bool, above 0.5.
        existence: how much it seems to be in the image.
        exists: whether that is above its threshold.
    """

    initial: np.ndarray
    attention: np.ndarray
    mask_prob: np.ndarray
    mask: np.ndarray
    existence: float
    exists: bool


def read_unseen_words(path: str | os.PathLike[str], table: WordTable) -> WordTable:
    """Read words that are found by their vectors alone.

    Args:
        path: ``.npy`` file of ``tools/learn_word_vectors.py --fold-in``, or CLIP's, with its words
            beside it in a ``.txt`` or ``.json`` file of the same name; or a word table.
        table: of the model.

    Raises:
        FileNotFoundError: there is no such file, or none with the words.
        ValueError: the file cannot be used, or its vectors have another length than the table's.
    """
    path = Path(path)
    if path.suffix == ".npy" and path.is_file():
        text, other = path.with_suffix(".txt"), path.with_suffix(".json")
        words = text if text.is_file() else other
        if not words.is_file():
            raise FileNotFoundError(
                f"The unseen words '{path}' need their names beside them: '{text}', one per line, "
                f"or '{other}', a list."
            )
        unseen = word_table_from_file(path, read_vocabulary(words))
    else:
        unseen = load_word_table(path)
    if unseen.dim != table.dim:
        raise ValueError(
            f"The unseen words '{path}' have vectors of length {unseen.dim}, the word table of "
            f"length {table.dim}. Fold the words into that table, see tools/learn_word_vectors.py "
            "--fold-in."
        )
    return unseen


def named_query(
    table: WordTable, unseen: WordTable | None, concepts: Sequence[str | int | np.ndarray]
) -> tuple[list[str], ConceptQuery]:
    """Resolve what a user asks for.

    Args:
        table: of the model.
        unseen: words that are not in it, found by their vectors alone; None without.
        concepts: names of either table, concept indices, or vectors.

    Returns:
        The name of each, "vector" and its position for one that was given as a vector; and the
        query.

    Raises:
        ValueError: the list is empty, a word is in both tables, or a concept is not known or asked
            for twice.
    """
    extra = {} if unseen is None else dict(zip(unseen.names, unseen.vectors, strict=True))
    both = sorted(set(extra) & set(table.names))
    if both:
        raise ValueError(
            f"'{both[0]}' is among the unseen words, but the word table has it. Leave it out."
        )
    if isinstance(concepts, str) or len(concepts) == 0:
        table.resolve(concepts)  # says what is wrong
    wanted = [extra.get(spelled(c), c) if isinstance(c, str) else c for c in concepts]
    indices, vectors = table.resolve(wanted)
    names = [
        table.names[index] if index >= 0 else spelled(c) if isinstance(c, str) else f"vector {i}"
        for i, (c, index) in enumerate(zip(concepts, indices.tolist(), strict=True))
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"'{twice[0]}' is asked for twice. Name each concept once.")
    return names, concept_query(indices, vectors)


def image_tensor(image: np.ndarray, channels: str) -> Tensor:
    """Turn an image that a user gives into (3, H, W) uint8.

    Args:
        image: (H, W, 3) uint8.
        channels: their order, for messages.

    Raises:
        ValueError: the image is of another kind.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"The image has shape {image.shape} and dtype {image.dtype}. Allowed: (H, W, 3) "
            f"uint8, {channels}."
        )
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def found_concepts(result: ConceptResults, names: Sequence[str]) -> dict[str, FoundConcept]:
    """Take apart what was predicted for one image.

    Args:
        result: of :meth:`maskx.systems.concept_mask.network.ConceptMask.predict`.
        names: of its concepts.
    """
    tensors = (result.initial, result.attention, result.mask_prob, result.masks)
    arrays = (each.cpu().numpy() for each in tensors)
    scores = zip(result.existence.tolist(), result.exists.tolist(), strict=True)
    return {
        name: FoundConcept(*parts, *score)
        for name, score, *parts in zip(names, scores, *arrays, strict=True)
    }


def batch_targets(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the targets of samples of stage 2 or 3 behind each other.

    The concepts of all images are the P pairs.

    Args:
        samples: at least one, with ``concepts``, a list of concept indices; and ``boxes`` (B, 4)
            and ``box_rows`` (B,), positions in the list, or ``masks`` (P, S, S).

    Returns:
        ``concepts`` of each image; and ``boxes`` and ``box_rows``, positions in the pairs, or
        ``masks`` of all.
    """
    targets: dict[str, Any] = {"concepts": [sample["concepts"] for sample in samples]}
    if "masks" in samples[0]:
        return targets | {"masks": torch.cat([sample["masks"] for sample in samples])}
    ends = itertools.accumulate(len(concepts) for concepts in targets["concepts"])
    rows = [
        sample["box_rows"] + end - len(sample["concepts"])
        for sample, end in zip(samples, ends, strict=True)
    ]
    boxes = torch.cat([sample["boxes"] for sample in samples])
    return targets | {"boxes": boxes, "box_rows": torch.cat(rows)}


def concept_truths(record: Record) -> Iterator[tuple[int, np.ndarray]]:
    """Draw the true mask of each concept of an image: the union of its annotations.

    A concept of which an annotation has no mask is left out, since part of a mask is no truth, and
    so is one of which nothing is visible.

    Yields:
        Class index and (H, W) bool, in the order of the indices.
    """
    height, width = record["height"], record["width"]
    for index in fully_masked(record["annotations"]):
        truth = np.zeros((height, width), bool)
        for annotation in record["annotations"]:
            if annotation["class_index"] == index:
                truth |= decode_segmentation(annotation["segmentation"], height, width)
        if truth.any():
            yield index, truth


@dataclass(frozen=True, eq=False)
class ConceptTest:
    """Images with true masks of concepts, and what these are to a model.

    Attributes:
        records: images.
        names: concepts by class index of the records.
        indices: (K,) row of each in the word table; -1 for an unseen one, -2 for one that is
            neither in the table nor has a vector, which is not measured.
        vectors: (K, k) float32.
        levels: of each; "unseen" too where it is not measured.
    """

    records: Sequence[Record]
    names: tuple[str, ...]
    indices: np.ndarray
    vectors: np.ndarray
    levels: tuple[str, ...]

    def query(self, classes: Sequence[int]) -> ConceptQuery:
        """Ask for some class indices."""
        rows = list(classes)
        return concept_query(self.indices[rows], self.vectors[rows])

    def truths(self, record: Record) -> dict[int, np.ndarray]:
        """Draw the true masks of an image by class index, of what can be asked for."""
        return {c: truth for c, truth in concept_truths(record) if self.indices[c] >= UNSEEN}


def concept_test(
    records: Sequence[Record],
    class_names: Sequence[str],
    split: ConceptSplit,
    table: WordTable,
    unseen: WordTable | None = None,
    *,
    source: str,
) -> ConceptTest:
    """Match the classes of a data set with the concepts of a model by name.

    Args:
        records: images with true masks.
        class_names: by class index of the records.
        split: levels of the vocabulary.
        table: vectors of the vocabulary.
        unseen: vectors of concepts that training knew nothing of.
        source: name of the data set, for messages.

    Raises:
        ValueError: no class has a vector.
    """
    known = {name: index for index, name in enumerate(table.names)}
    extra = {} if unseen is None else dict(zip(unseen.names, unseen.vectors, strict=True))
    indices = np.full(len(class_names), NOT_ASKED, np.int64)
    vectors = np.ones((len(class_names), table.dim), np.float32)
    for row, name in enumerate(map(spelled, class_names)):
        if name in known:
            indices[row], vectors[row] = known[name], table.vectors[known[name]]
        elif name in extra:
            indices[row], vectors[row] = UNSEEN, extra[name]
    missing = [class_names[row] for row in np.flatnonzero(indices == NOT_ASKED)]
    if len(missing) == len(indices):
        raise ValueError(
            f"None of the {len(indices)} classes of '{source}' is in the word table, such as "
            f"'{missing[0]}'. Give images of its concepts."
        )
    if missing and records:
        logger.warning(
            "%s: %d of %d classes have no vector and are not measured, such as '%s'.",
            *(source, len(missing), len(indices), missing[0]),
        )
    levels = tuple(split.level_of(max(index, UNSEEN)) for index in indices.tolist())
    return ConceptTest(records, tuple(class_names), indices, vectors, levels)


def fit_concepts(network: ConceptMask, test: ConceptTest, read_image: ReadImage) -> dict[str, Any]:
    """Fit theta and the existence thresholds on validation images and set them in the network.

    Both thetas are fitted on image-level concepts: that of unseen ones with concepts that are asked
    for by nothing but their vector, so that no unseen concept is needed. A concept that no image
    shows, or every one, gets the threshold of all together.

    Args:
        network: of stage 2 or 3.
        test: images whose tags are complete, with true masks of image-level concepts.
        read_image: reads the image of a record.

    Returns:
        ``theta_image`` and ``theta_unseen``, None if no image-level concept has a mask;
        ``existence_threshold_unseen``; and ``own_thresholds``, for how many concepts there is one
        of their own.

    Raises:
        ValueError: there is no image, or the network is of stage 1.
    """
    if network.stage == 1:
        raise ValueError(
            "Stage 1 of ConceptMask blends no maps, so there is nothing to fit. Give a model of "
            "stage 2 or 3."
        )
    if not test.records:
        raise ValueError("There is no image to fit theta and thresholds on. Give at least one.")
    fitted: dict[str, Any] = {"theta_image": None, "theta_unseen": None}
    of_images = [c for c, level in enumerate(test.levels) if level == "image"]
    if any(set(of_images) & test.truths(record).keys() for record in test.records):
        for name, by_vector in (("theta_image", False), ("theta_unseen", True)):
            maps = _own_and_nearest(network, test, of_images, read_image, by_vector=by_vector)
            fitted[name] = fit_theta(maps).theta
    else:
        logger.warning(
            "None of the %d images has a mask of a concept with tags only: theta stays as it is.",
            len(test.records),
        )
    scores, present = _existence_scores(network, test, read_image, "fitting existence")
    of_all = fit_existence_threshold(scores.ravel(), present.ravel())
    thresholds = np.array(
        [fit_existence_threshold(*each) for each in zip(scores.T, present.T, strict=True)]
    )
    own = np.isfinite(thresholds)
    cosines, is_there = _existence_scores(
        network, test, read_image, "fitting unseen", by_vector=True
    )
    unseen = fit_existence_threshold(cosines.ravel(), is_there.ravel())
    network.set_fitted(
        theta_image=fitted["theta_image"],
        theta_unseen=fitted["theta_unseen"],
        existence_thresholds=torch.from_numpy(np.where(own, thresholds, of_all)),
        existence_threshold_unseen=unseen,
    )
    return fitted | {
        "existence_threshold_unseen": None if math.isnan(unseen) else unseen,
        "own_thresholds": int(own.sum()),
    }


@torch.inference_mode()
def _own_and_nearest(
    network: ConceptMask,
    test: ConceptTest,
    classes: Sequence[int],
    read_image: ReadImage,
    *,
    by_vector: bool,
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield what `fit_theta` reads, of some classes."""
    for record in tqdm(test.records, desc="fitting theta", unit="img"):
        truths = {c: truth for c, truth in test.truths(record).items() if c in classes}
        if not truths:
            continue
        query = test.query(list(truths))
        if by_vector:
            query = ConceptQuery(torch.full_like(query.indices, UNSEEN), query.vectors)
        maps = network.embedding_maps(read_image(record)[None])
        size = (record["height"], record["width"])
        own, nearest = (
            torch.stack([resize_maps(each, size)[0] for each in attention]).cpu().numpy()
            for attention in (network.attention(maps, query, kind=k) for k in ("own", "nearest"))
        )
        for row, (concept, truth) in enumerate(truths.items()):
            yield test.names[concept], own[:, row], nearest[:, row], truth


@torch.inference_mode()
def _existence_scores(
    network: ConceptMask,
    test: ConceptTest,
    read_image: ReadImage,
    description: str,
    *,
    by_vector: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Score the whole vocabulary, or its concepts as if they were unseen, for every image.

    Returns:
        (N, V) scores and (N, V) bool, whether the image shows the concept.
    """
    queries = [
        ConceptQuery(torch.full((len(chunk),), UNSEEN), chunk)
        for chunk in network.vectors.split(_CHUNK)
    ]
    scores = np.zeros((len(test.records), len(network.vectors)), np.float32)
    present = np.zeros(scores.shape, bool)
    for row, record in enumerate(tqdm(test.records, desc=description, unit="img")):
        maps = network.embedding_maps(read_image(record)[None])
        if by_vector:
            found = torch.cat([network.existence(maps, query) for query in queries], dim=1)
        else:
            found = network.vocabulary_existence(maps)
        scores[row] = found[0].cpu().numpy()
        shown = test.indices[list(record["image_labels"])]
        present[row, shown[shown >= 0]] = True
    return scores, present
