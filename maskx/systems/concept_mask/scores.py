"""How well maps and masks of concepts fit the truth, per concept and per level of supervision.

The measures of ConceptMask (Wang et al., ECCV 2018, section 5), all in [0, 1]. They are taken per
concept and image of which the concept is known to be, averaged over the images of a concept, and
then over the concepts of a level, so that rare concepts count as much as frequent ones.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from maskx.systems.concept_mask.network import normalise_maps

__all__ = [
    "LEVELS",
    "ConceptScores",
    "ThetaFit",
    "fit_existence_threshold",
    "fit_theta",
    "format_concept_table",
    "pointing_hit",
    "soft_iou",
]

LEVELS = ("mask", "box", "image", "unseen", "unseen_blended")
"""What a concept was learned from, at most; unseen ones are not in the vocabulary, and are found by
Eq. 1 alone, or with maps that are blended with those of the nearest concept with boxes."""

_MEASURES = ("pointing", "soft_iou", "precision", "recall", "iou", "chance")


def pointing_hit(attention: np.ndarray, truth: np.ndarray) -> bool:
    """Tell whether the largest value of an (H, W) map lies on the (H, W) bool truth.

    Of several largest ones the first, row by row, counts; a constant map points nowhere.
    """
    flat = attention.ravel()
    best = int(flat.argmax())
    return bool(truth.ravel()[best] and flat[best] > flat.min())


def soft_iou(attention: np.ndarray, truth: np.ndarray) -> float:
    """Compute the IoU of a map without a threshold (Eq. 5): sum(a G) / sum(max(a, G)).

    Args:
        attention: (H, W) in [0, 1].
        truth: (H, W) bool.

    Returns:
        NaN if both are zero everywhere.
    """
    inside = float(attention[truth].sum(dtype=np.float64))
    union = float(attention.sum(dtype=np.float64)) - inside + np.count_nonzero(truth)
    return inside / union if union > 0 else math.nan


class ConceptScores:
    """Sums of the measures per concept. Those of several processes are added with `merge`.

    The measures are pointing, soft IoU, precision, recall, IoU and chance, the share of the image
    that is the concept, which is what pointing at a random pixel reaches.

    Args:
        names: of all concepts that may be measured.
        levels: of `LEVELS`, one per concept.
    """

    def __init__(self, names: Sequence[str], levels: Sequence[str]) -> None:
        if len(names) != len(levels):
            raise ValueError(f"There are {len(names)} concepts, but {len(levels)} levels.")
        for name, level in zip(names, levels, strict=True):
            if level not in LEVELS:
                raise ValueError(
                    f"Concept {name!r} has the level {level!r}. Allowed: {', '.join(LEVELS)}."
                )
        self._row = {name: row for row, name in enumerate(names)}
        if len(self._row) < len(names):
            twice = next(name for row, name in enumerate(names) if self._row[name] != row)
            raise ValueError(f"Concept {twice!r} stands twice among the names. Name each once.")
        self.names, self.levels = tuple(names), tuple(levels)
        self.sums = np.zeros((len(names), len(_MEASURES)))
        self.counts = np.zeros(len(names), np.int64)

    def update(
        self,
        concept: str,
        *,
        attention: np.ndarray,
        mask: np.ndarray,
        truth: np.ndarray,
        image_id: int | str,
    ) -> None:
        """Measure one concept in one image that shows it; the precision of an empty mask is 0.

        Args:
            concept: its name.
            attention: (H, W) in [0, 1].
            mask: (H, W) bool.
            truth: (H, W) bool, not empty.
            image_id: for errors.
        """
        if concept not in self._row:
            raise ValueError(
                f"Concept {concept!r} is not among the {len(self.names)} that are measured."
            )
        where = f"concept {concept!r} in image {image_id!r}"
        for name, array in (("attention", attention), ("mask", mask), ("truth", truth)):
            if array.ndim != 2 or array.shape != truth.shape:
                raise ValueError(
                    f"The {name} of {where} has shape {array.shape}, the truth {truth.shape}. "
                    "Allowed: (H, W), all equal."
                )
            if (array.dtype == bool) == (name == "attention"):
                allowed = "float" if name == "attention" else "bool"
                raise ValueError(
                    f"The {name} of {where} has dtype {array.dtype}. Allowed: {allowed}."
                )
        # Written so that NaN is refused too; float32 may exceed 1 by its rounding.
        if not (attention.min() >= 0 and attention.max() <= 1 + 1e-5):
            raise ValueError(
                f"The attention of {where} is from {attention.min():g} to {attention.max():g}. "
                "Allowed: [0, 1]. Normalise it first."
            )
        area = np.count_nonzero(truth)
        if area == 0:
            raise ValueError(
                f"The truth of {where} is empty. Measure concepts in images that show them."
            )
        hit = np.count_nonzero(mask & truth)
        predicted = np.count_nonzero(mask)
        row = self._row[concept]
        self.sums[row] += (
            pointing_hit(attention, truth),
            soft_iou(attention, truth),
            hit / predicted if predicted else 0.0,
            hit / area,
            hit / (predicted + area - hit),
            area / truth.size,
        )
        self.counts[row] += 1

    def merge(self, other: "ConceptScores") -> None:
        """Add the measures of other images, such as those of another process."""
        if (self.names, self.levels) != (other.names, other.levels):
            raise ValueError(
                f"Measures of {len(other.names)} concepts cannot be added to those of "
                f"{len(self.names)}: names and levels must be the same, in one order."
            )
        self.sums += other.sums
        self.counts += other.counts

    def evaluate(self) -> dict[str, Any]:
        """Compute the means.

        Returns:
            ``levels``: by level the means over its concepts and ``num_concepts``, how many were
            measured; None for a level of which none was. ``concepts``: by name, of those measured,
            the means over images, ``level`` and ``num_images``.
        """
        measured = self.counts > 0
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        levels: dict[str, Any] = {}
        for level in LEVELS:
            rows = measured & (np.array(self.levels, dtype=object) == level)
            levels[level] = None
            if rows.any():
                levels[level] = _by_measure(means[rows].mean(axis=0))
                levels[level]["num_concepts"] = int(rows.sum())
        concepts = {
            self.names[row]: {
                "level": self.levels[row],
                **_by_measure(means[row]),
                "num_images": int(self.counts[row]),
            }
            for row in np.flatnonzero(measured)
        }
        return {"levels": levels, "concepts": concepts}


def format_concept_table(result: Mapping[str, Any], *, concepts: bool = False) -> str:
    """Lay out what `ConceptScores.evaluate` returns as a Markdown table.

    With `concepts` there is a row per concept too, the highest IoU first.
    """
    titles = ("pointing", "soft IoU", "precision", "recall", "IoU", "chance")
    lines = [f"| level | concepts | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for level, found in result["levels"].items():
        if found is None:
            lines.append(f"| {level} | 0 |{' - |' * len(titles)}")
        else:
            lines.append(f"| {level} | {found['num_concepts']} | {_cells(found)} |")
    if concepts:
        lines += ["", lines[0].replace("| level | concepts |", "| concept | level |"), lines[1]]
        rows = sorted(result["concepts"].items(), key=lambda item: -item[1]["iou"])
        lines += [f"| {name} | {found['level']} | {_cells(found)} |" for name, found in rows]
    return "\n".join(lines)


class ThetaFit(NamedTuple):
    """The best share of a concept's own map in a blend, and the mean soft IoU by share."""

    theta: float
    scores: dict[float, float]


def fit_theta(
    maps: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    *,
    thetas: Sequence[float] = tuple(round(0.05 * step, 2) for step in range(1, 21)),
) -> ThetaFit:
    """Choose the theta of ``theta a_q + (1 - theta) a_p`` on images with true masks.

    The measure is the soft IoU of the blended maps, each brought to [0, 1] as the segmentation
    network gets them, and averaged over the A attention sizes; mean over the images of a concept,
    then over concepts. Of equal thetas the largest is taken.

    Args:
        maps: concept, its own maps a_q (A, H, W), those of the nearest concept with boxes a_p
            (A, H, W), and the truth (H, W) bool; read once.
        thetas: values to try, in [0, 1]. 0 is none of them by default: a concept would have no
            map of its own, and all with one nearest concept the same.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for concept, own, nearest, truth in maps:
        blends = (torch.from_numpy(theta * own + (1 - theta) * nearest) for theta in thetas)
        scores = [soft_iou(normalise_maps(each).mean(dim=0).numpy(), truth) for each in blends]
        sums[concept] = sums.get(concept, 0) + np.array(scores)
        counts[concept] = counts.get(concept, 0) + 1
    if not sums:
        raise ValueError("There is no image with a true mask to fit theta on. Give at least one.")
    means = np.mean([sums[concept] / counts[concept] for concept in sums], axis=0)
    best = max(range(len(thetas)), key=lambda i: (means[i], thetas[i]))
    by_theta = {theta: float(mean) for theta, mean in zip(thetas, means, strict=True)}
    return ThetaFit(float(thetas[best]), by_theta)


def fit_existence_threshold(scores: np.ndarray, present: np.ndarray) -> float:
    """Choose above which score a concept is said to be in an image: that of the best F1.

    Args:
        scores: (N,) of images.
        present: (N,) bool, whether they show the concept.

    Returns:
        Halfway between two scores, or just below the lowest, of equally good ones the largest; NaN
        where no image or every image shows the concept: nothing can be told from them.
    """
    scores, present = np.asarray(scores, np.float64), np.asarray(present, bool)
    if scores.ndim != 1 or scores.shape != present.shape or not np.isfinite(scores).all():
        raise ValueError(
            f"There are scores of shape {scores.shape} for {present.shape} images. Allowed: one "
            "finite number for each."
        )
    if not present.any() or present.all():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(present[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + present.sum())
    # Equal scores are on one side: only the last of them can be the lowest above the threshold.
    is_last = np.append(ordered[1:] < ordered[:-1], True)
    best = int(np.argmax(np.where(is_last, f1, -1.0)))
    if best + 1 < len(ordered):
        return float((ordered[best] + ordered[best + 1]) / 2)
    # In the precision of the scores and of what the threshold is kept in.
    return float(np.nextafter(np.float32(ordered[best]), np.float32(-np.inf)))


def _by_measure(means: np.ndarray) -> dict[str, float]:
    return dict(zip(_MEASURES, means.tolist(), strict=True))


def _cells(found: Mapping[str, Any]) -> str:
    return " | ".join(f"{found[measure]:.3f}" for measure in _MEASURES)
