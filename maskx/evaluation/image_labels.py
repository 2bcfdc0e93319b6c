"""How well the classes of images are predicted: average precision, precision, recall and F1.

Shape legend: N images, K classes.

Average precision is that of PASCAL VOC's classification challenge since 2010, the whole area under
the precision-recall curve. Of one class: images are ranked by score; the ones down to a rank, TP of
them right, give precision p = TP / rank and recall r = TP / number of positive images, and

    AP = sum over n of (r_n - r_(n-1)) * max over m >= n of p_m,

where n runs over the different scores, from the highest, and r_0 = 0. Images of one score enter the
ranking together, so that their order in the data does not matter.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["average_precision", "evaluate_image_labels"]


def average_precision(scores: ArrayLike, is_positive: ArrayLike) -> float:
    """Average precision of one class.

    Args:
        scores: (N,) of any scale; higher means more likely.
        is_positive: (N,) bool, whether the image has the class.

    Returns:
        In [0, 1]; NaN without a positive image.
    """
    scores, is_positive = np.asarray(scores, np.float64), np.asarray(is_positive, bool)
    num_positive = is_positive.sum()
    if not num_positive:
        return math.nan
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of each score
    true_positives = np.cumsum(is_positive[order])[last]
    precision = true_positives / (last + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    gained = np.diff(true_positives, prepend=0)
    return float((gained * best_from_here).sum() / num_positive)


def evaluate_image_labels(
    scores: ArrayLike, labels: ArrayLike, *, threshold: float = 0.5
) -> dict[str, Any]:
    """Compare predicted with known image labels.

    A class that no image has is left out of every mean. A class that some image has but none is
    predicted to have has precision 0, as its recall and F1 are.

    Args:
        scores: (N, K), such as probabilities.
        labels: (N, K) of {0, 1}: what each image has.
        threshold: a class is predicted where its score is at least this.

    Returns:
        All in percent, [0, 100]: "mAP", "precision", "recall" and "F1", means over the classes; and
        "per_class", a dictionary of "AP", "precision", "recall" and "F1", lists by class index with
        NaN for a class that no image has.

    Raises:
        ValueError: the arrays are of different shapes, or hold anything but numbers and labels.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(
            f"The scores have shape {scores.shape}, the labels {labels.shape}. Allowed: both "
            "(images, classes)."
        )
    if np.isnan(scores).any():
        image, class_index = np.argwhere(np.isnan(scores))[0]
        raise ValueError(
            f"The score of image {image}, class index {class_index} is NaN, which has no rank. Did "
            "the training diverge?"
        )
    if not np.isin(labels, (0, 1)).all():
        image, class_index = np.argwhere(~np.isin(labels, (0, 1)))[0]
        raise ValueError(
            f"The label of image {image}, class index {class_index} is "
            f"{labels[image, class_index]}. Allowed: 0 and 1."
        )
    labels = labels.astype(bool)
    num_classes = scores.shape[1]
    chosen = scores >= threshold
    right, predicted, true = (a.sum(axis=0) for a in (chosen & labels, chosen, labels))
    per_class = {
        "AP": np.array([average_precision(scores[:, k], labels[:, k]) for k in range(num_classes)]),
        "precision": right / np.maximum(predicted, 1),
        "recall": right / np.maximum(true, 1),
        "F1": 2 * right / np.maximum(predicted + true, 1),
    }
    per_class = {name: np.where(true > 0, 100 * v, math.nan) for name, v in per_class.items()}
    means = {name: _mean(values) for name, values in per_class.items()}
    return {
        "mAP": means.pop("AP"),
        **means,
        "per_class": {name: values.tolist() for name, values in per_class.items()},
    }


def _mean(values: np.ndarray) -> float:
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if valid.size else math.nan
