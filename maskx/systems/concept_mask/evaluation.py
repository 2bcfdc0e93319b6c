"""How good the maps and masks of ConceptMask are, and the values that are fitted for it."""

import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maskx.core.checks import check_choice
from maskx.data.coco import load_coco
from maskx.systems.concept_mask.model import (
    SEGMENTATION,
    SampleConceptMask,
    open_concept_mask,
    save_fitted,
)
from maskx.systems.concept_mask.scores import ConceptScores
from maskx.systems.concept_mask.segmenter import mean_maps
from maskx.systems.concept_mask.steps import ConceptTest, concept_test, fit_concepts

__all__ = [
    "MASKS",
    "evaluate_concepts",
    "evaluate_existence",
    "fit_run",
]

MASKS = ("segmentation", "attention")
"""What masks are made by: the segmentation network, or the attention maps above 0.5."""


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
        kind: of attention, see :meth:`maskx.systems.concept_mask.network.ConceptMask.attention`.
        Maps are
            brought to [0, 1] and averaged over the image sizes.
        masks: of `MASKS`. Before stage 3 both are the same.
        description: label of the progress bar.

    Returns:
        What :meth:`maskx.systems.concept_mask.scores.ConceptScores.evaluate` returns.
    """
    check_choice("masks", masks, MASKS)
    network = model.eval().network
    scores = ConceptScores(test.names, test.levels)
    for record in tqdm(test.records, desc=description, unit="img"):
        truths = test.truths(record)
        if not truths:
            continue
        size = (record["height"], record["width"])
        with torch.inference_mode():
            image = model.read_image(record)[None]
            maps = network.embedding_maps(image)
            attention = network.attention(maps, test.query(list(truths)), kind=kind)
            shown = mean_maps(attention, size)[0].cpu().numpy()
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
    network = model.eval().network
    thresholds = network.existence_thresholds
    hits = num_said = num_present = 0
    for record in tqdm(test.records, desc="existence", unit="img"):
        with torch.inference_mode():
            maps = network.embedding_maps(model.read_image(record)[None])
            said = (network.vocabulary_existence(maps)[0] > thresholds).cpu().numpy()
        shown = test.indices[list(record["image_labels"])]
        shown = shown[shown >= 0]
        hits += int(said[shown].sum())
        num_said += int(said.sum())
        num_present += len(shown)
    return {
        "precision": hits / num_said if num_said else math.nan,
        "recall": hits / num_present if num_present else math.nan,
    }


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
        What :func:`maskx.systems.concept_mask.steps.fit_concepts` returns.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be used.
    """
    model, table, split = open_concept_mask(run, device=device)
    data = load_coco(json_file, image_root, strict=strict)
    test = concept_test(data.records, data.class_names, split, table, source=str(data.json_file))
    fitted = fit_concepts(model.network, test, model.read_image)
    save_fitted(model, Path(run) / SEGMENTATION)
    return fitted
