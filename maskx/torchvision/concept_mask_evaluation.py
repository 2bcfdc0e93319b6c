"""How good the maps and masks of ConceptMask are, and the values that are fitted for it."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskx.data.coco import CocoData, load_coco
from maskx.data.concept_sets import ConceptSplit
from maskx.data.word_table import WordTable, spelled
from maskx.evaluation.concept_scores import (
    ConceptScores,
    fit_existence_threshold,
    fit_theta,
)
from maskx.modeling.concept_mask import ConceptQuery, concept_query
from maskx.modeling.concept_segmenter import normalise_maps, resize_maps
from maskx.modeling.weight_transfer import check_choice
from maskx.torchvision.concept_mask_models import (
    SEGMENTATION,
    SampleConceptMask,
    open_concept_mask,
    save_fitted,
)
from maskx.torchvision.concept_mask_samples import Record, concept_truths, read_sample

__all__ = [
    "MASKS",
    "ConceptTest",
    "concept_test",
    "evaluate_concepts",
    "evaluate_existence",
    "fit_concepts",
    "fit_run",
]

logger = logging.getLogger(__name__)

MASKS = ("segmentation", "attention")
"""What masks are made by: the segmentation network, or the attention maps above 0.5."""

_UNSEEN = -1  # index of a concept that is asked for by its vector
_CHUNK = 1024  # concepts whose maps are made at a time


@dataclass(frozen=True, eq=False)
class ConceptTest:
    """Images with true masks of concepts, and what these are to a model.

    Attributes:
        records: as of :func:`maskx.data.coco.load_coco`.
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


def concept_test(
    data: CocoData, split: ConceptSplit, table: WordTable, unseen: WordTable | None = None
) -> ConceptTest:
    """Match the categories of a file with the concepts of a model by name.

    Args:
        data: images with true masks.
        split: levels of the vocabulary.
        table: vectors of the vocabulary.
        unseen: vectors of concepts that training knew nothing of.

    Raises:
        ValueError: no category has a vector.
    """
    known = {name: index for index, name in enumerate(table.names)}
    extra = {} if unseen is None else dict(zip(unseen.names, unseen.vectors, strict=True))
    indices = np.full(len(data.class_names), -2, np.int64)
    vectors = np.ones((len(data.class_names), table.dim), np.float32)
    for row, name in enumerate(map(spelled, data.class_names)):
        if name in known:
            indices[row], vectors[row] = known[name], table.vectors[known[name]]
        elif name in extra:
            indices[row], vectors[row] = _UNSEEN, extra[name]
    missing = [data.class_names[row] for row in np.flatnonzero(indices == -2)]
    if len(missing) == len(indices):
        raise ValueError(
            f"None of the {len(indices)} categories of '{data.json_file}' is in the word table, "
            f"such as '{missing[0]}'. Give images of its concepts."
        )
    if missing:
        logger.warning(
            "%s: %d of %d categories have no vector and are not measured, such as '%s'.",
            *(data.json_file, len(missing), len(indices), missing[0]),
        )
    levels = tuple(split.level_of(max(index, _UNSEEN)) for index in indices.tolist())
    return ConceptTest(data.records, data.class_names, indices, vectors, levels)


def evaluate_concepts(
    model: SampleConceptMask,
    test: ConceptTest,
    *,
    kind: str = "blended",
    masks: str = "segmentation",
    description: str = "evaluation",
) -> dict[str, Any]:
    """Measure maps and masks of all concepts that images show; one image is held at a time.

    Args:
        model: the model of any stage; it is put into evaluation mode.
        test: images with true masks.
        kind: of attention, see :meth:`maskx.modeling.concept_mask.ConceptMask.attention`. Maps are
            brought to [0, 1] and averaged over the image sizes.
        masks: of `MASKS`. Before stage 3 both are the same.
        description: label of the progress bar.

    Returns:
        What :meth:`maskx.evaluation.concept_scores.ConceptScores.evaluate` returns.
    """
    check_choice("masks", masks, MASKS)
    network = model.eval().network
    scores = ConceptScores(test.names, test.levels)
    for record in tqdm(test.records, desc=description, unit="img"):
        truths = _truths(test, record)
        if not truths:
            continue
        size = (record["height"], record["width"])
        with torch.inference_mode():
            image = model.preprocess([read_sample(record)])
            maps = network.embedding_maps(image)
            attention = network.attention(maps, test.query(list(truths)), kind=kind)
            shown = _full_size(attention, size).mean(dim=0).cpu().numpy()
            if masks == "attention":
                found = shown > 0.5
            else:
                found = (network.segment(image, attention, size)[0] > 0.5).cpu().numpy()
        for row, (concept, truth) in enumerate(truths.items()):
            scores.update(
                test.names[concept],
                attention=shown[row],
                mask=found[row],
                truth=truth,
                image_id=record["image_id"],
            )
    return scores.evaluate()


def evaluate_existence(model: SampleConceptMask, test: ConceptTest) -> dict[str, float]:
    """Measure which concepts of the vocabulary are said to be in images.

    Args:
        model: with fitted thresholds; it is put into evaluation mode.
        test: images whose tags are complete.

    Returns:
        ``precision`` and ``recall`` over all pairs of an image and a concept; NaN where nothing is
        said or there.
    """
    scores, present = _existence_scores(model, test, "existence")
    said = scores > model.network.existence_thresholds.cpu().numpy()
    hits, num_said, num_present = map(np.count_nonzero, (said & present, said, present))
    return {
        "precision": float(hits / num_said) if num_said else math.nan,
        "recall": float(hits / num_present) if num_present else math.nan,
    }


def fit_concepts(model: SampleConceptMask, test: ConceptTest) -> dict[str, Any]:
    """Fit theta and the existence thresholds on validation images and set them in the model.

    Both thetas are fitted on image-level concepts: that of unseen ones with concepts that are asked
    for by nothing but their vector, so that no unseen concept is needed. A concept that no image
    shows, or every one, gets the threshold of all together.

    Args:
        model: of stage 2 or 3; it is put into evaluation mode.
        test: images whose tags are complete, with true masks of image-level concepts.

    Returns:
        ``theta_image`` and ``theta_unseen``, None if no image-level concept has a mask;
        ``existence_threshold_unseen``; and ``own_thresholds``, for how many concepts there is one
        of their own.

    Raises:
        ValueError: there is no image.
    """
    if not test.records:
        raise ValueError("There is no image to fit theta and thresholds on. Give at least one.")
    fitted: dict[str, Any] = {"theta_image": None, "theta_unseen": None}
    if any(_image_level(test, _truths(test, record)) for record in test.records):
        for name, by_vector in (("theta_image", False), ("theta_unseen", True)):
            fitted[name] = fit_theta(_own_and_nearest(model, test, by_vector)).theta
    else:
        logger.warning(
            "None of the %d images has a mask of a concept with tags only: theta stays at 1.",
            len(test.records),
        )
    scores, present = _existence_scores(model, test, "fitting existence")
    of_all = fit_existence_threshold(scores.ravel(), present.ravel())
    thresholds = np.array(
        [fit_existence_threshold(*each) for each in zip(scores.T, present.T, strict=True)]
    )
    own = np.isfinite(thresholds)
    by_vector, is_there = _existence_scores(model, test, "fitting unseen", by_vector=True)
    fitted["existence_threshold_unseen"] = fit_existence_threshold(
        by_vector.ravel(), is_there.ravel()
    )
    model.network.set_fitted(
        theta_image=fitted["theta_image"],
        theta_unseen=fitted["theta_unseen"],
        existence_thresholds=torch.from_numpy(np.where(own, thresholds, of_all)),
        existence_threshold_unseen=_none_if_nan(fitted["existence_threshold_unseen"]),
    )
    return fitted | {"own_thresholds": int(own.sum())}


def fit_run(
    run: str | Path,
    json_file: str | Path,
    image_root: str | Path,
    *,
    strict: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Fit theta and the thresholds of a finished run on images, and write them to its checkpoint.

    Args:
        run: folder of the run.
        json_file: COCO-format file with tags and true masks of concepts.
        image_root: folder of its images.
        strict: see :func:`maskx.data.coco.load_coco`.
        device: where to compute.

    Returns:
        What :func:`fit_concepts` returns.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be used.
    """
    model, table, split = open_concept_mask(run, device=device)
    data = load_coco(json_file, image_root, strict=strict)
    fitted = fit_concepts(model, concept_test(data, split, table))
    save_fitted(model, Path(run) / SEGMENTATION)
    return fitted


@torch.inference_mode()
def _own_and_nearest(
    model: SampleConceptMask, test: ConceptTest, by_vector: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield what `fit_theta` reads, of image-level concepts."""
    network = model.eval().network
    for record in tqdm(test.records, desc="fitting theta", unit="img"):
        truths = _image_level(test, _truths(test, record))
        if not truths:
            continue
        query = test.query(list(truths))
        if by_vector:
            query = ConceptQuery(torch.full_like(query.indices, _UNSEEN), query.vectors)
        maps = network.embedding_maps(model.preprocess([read_sample(record)]))
        size = (record["height"], record["width"])
        own, nearest = (
            torch.stack([resize_maps(each, size)[0] for each in attention]).cpu().numpy()
            for attention in (network.attention(maps, query, kind=k) for k in ("own", "nearest"))
        )
        for row, (concept, truth) in enumerate(truths.items()):
            yield test.names[concept], own[:, row], nearest[:, row], truth


@torch.inference_mode()
def _existence_scores(
    model: SampleConceptMask, test: ConceptTest, description: str, *, by_vector: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Score the whole vocabulary, or its concepts as if they were unseen, for every image.

    Returns:
        (N, V) scores and (N, V) bool, whether the image shows the concept.
    """
    network = model.eval().network
    vectors = network.vectors
    queries = [
        ConceptQuery(torch.full((len(chunk),), _UNSEEN), chunk) for chunk in vectors.split(_CHUNK)
    ]
    scores = np.zeros((len(test.records), len(vectors)), np.float32)
    present = np.zeros(scores.shape, bool)
    for row, record in enumerate(tqdm(test.records, desc=description, unit="img")):
        maps = network.embedding_maps(model.preprocess([read_sample(record)]))
        if by_vector:
            found = torch.cat([network.existence(maps, query) for query in queries], dim=1)
        else:
            found = network.vocabulary_existence(maps)
        scores[row] = found[0].cpu().numpy()
        shown = test.indices[list(record["image_labels"])]
        present[row, shown[shown >= 0]] = True
    return scores, present


def _truths(test: ConceptTest, record: Record) -> dict[int, np.ndarray]:
    """True masks by class index, of what can be asked for."""
    return {c: truth for c, truth in concept_truths(record) if test.indices[c] >= _UNSEEN}


def _image_level(test: ConceptTest, truths: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    return {c: truth for c, truth in truths.items() if test.levels[c] == "image"}


def _full_size(attention: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Bring maps of one image to its size and to [0, 1]: (sizes, C, H, W)."""
    return torch.stack([normalise_maps(resize_maps(each, size))[0] for each in attention])


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
