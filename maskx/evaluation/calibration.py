"""From a score to a quality: how good masks with such a score were, where the truth is known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "MIN_MASKS",
    "Calibration",
    "ReliabilityRow",
    "cross_validated",
    "fit_calibration",
    "reliability_table",
    "share_of_error",
]

MIN_MASKS = 20
"""Masks whose truth is known, below which a calibration would say more of them than of others."""

_BIN, _MOST_BINS, _FOLDS = 10, 20, 5


@dataclass(frozen=True, eq=False)
class Calibration:
    """A quality for every score: between the knots on a line, beyond them constant.

    Attributes:
        scores: of the knots, ascending.
        qualities: of the knots, never falling.
    """

    scores: np.ndarray
    qualities: np.ndarray

    def __call__(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the quality of each score, as mean IoU that is expected."""
        return np.interp(np.asarray(scores, dtype=float), self.scores, self.qualities)


@dataclass(frozen=True)
class ReliabilityRow:
    """Masks whose quality is in a range.

    Attributes:
        low: the range begins here.
        high: and ends here.
        count: masks in it.
        quality: their mean quality.
        iou: their mean IoU with the truth.
    """

    low: float
    high: float
    count: int
    quality: float
    iou: float


def fit_calibration(scores: Sequence[float], ious: Sequence[float]) -> Calibration:
    """Fit an isotonic calibration to masks whose truth is known.

    Masks are put into bins of at least ten by their score, so that no single one makes a step; then
    neighbours that fall are pooled.

    Args:
        scores: of masks, at least one.
        ious: of each with the truth, in [0, 1].
    """
    order = np.argsort(scores, kind="stable")
    scores, ious = (np.asarray(values, dtype=float)[order] for values in (scores, ious))
    bins = np.array_split(np.arange(len(scores)), max(1, min(_MOST_BINS, len(scores) // _BIN)))
    blocks: list[tuple[float, float, int]] = []  # mean score, mean IoU, masks
    for members in bins:
        block = scores[members].mean(), ious[members].mean(), len(members)
        while blocks and blocks[-1][1] >= block[1]:
            block = _pooled(blocks.pop(), block)
        blocks.append(block)
    knots = np.array(blocks)
    return Calibration(knots[:, 0], knots[:, 1])


def cross_validated(
    scores: Sequence[float], ious: Sequence[float], groups: Sequence[object]
) -> np.ndarray:
    """Return the quality that each mask gets from a calibration that did not see its group.

    Args:
        scores: of masks.
        ious: of each with the truth.
        groups: of each, such as the image it is in; at least two different ones.
    """
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    fold = np.array([names[group] for group in groups]) % min(_FOLDS, len(names))
    scores, ious = np.asarray(scores, dtype=float), np.asarray(ious, dtype=float)
    qualities = np.empty(len(scores))
    for index in np.unique(fold):
        held_out = fold == index
        qualities[held_out] = fit_calibration(scores[~held_out], ious[~held_out])(scores[held_out])
    return qualities


def reliability_table(
    qualities: Sequence[float], ious: Sequence[float], *, bins: int = 10
) -> list[ReliabilityRow]:
    """Compare qualities with what they stand for, range by range; empty ranges are left out."""
    qualities, ious = np.asarray(qualities, dtype=float), np.asarray(ious, dtype=float)
    index = np.minimum((qualities * bins).astype(int), bins - 1)
    return [
        ReliabilityRow(
            i / bins,
            (i + 1) / bins,
            int((index == i).sum()),
            float(qualities[index == i].mean()),
            float(ious[index == i].mean()),
        )
        for i in np.unique(index).tolist()
    ]


def share_of_error(
    qualities: Sequence[float], ious: Sequence[float], *, worst: float = 0.2
) -> float:
    """Return how much of the whole error, 1 - IoU, is in the masks of the worst qualities.

    Args:
        qualities: of masks, at least one.
        ious: of each with the truth.
        worst: share of the masks that is looked at.
    """
    order = np.argsort(qualities, kind="stable")
    error = 1 - np.asarray(ious, dtype=float)[order]
    total = error.sum()
    return float(error[: round(worst * len(error))].sum() / total) if total else 0.0


def _pooled(
    first: tuple[float, float, int], second: tuple[float, float, int]
) -> tuple[float, float, int]:
    count = first[2] + second[2]
    score, iou = (
        (a * first[2] + b * second[2]) / count for a, b in zip(first[:2], second[:2], strict=True)
    )
    return score, iou, count
