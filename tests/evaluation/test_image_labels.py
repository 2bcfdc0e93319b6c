import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskx.evaluation.image_labels import average_precision, evaluate_image_labels


def slow_average_precision(scores, positives):
    """Area under the precision-recall curve, point by point, from its definition."""
    total = sum(positives)
    if total == 0:
        return math.nan
    points = []
    for threshold in sorted(set(scores), reverse=True):
        chosen = [p for s, p in zip(scores, positives, strict=True) if s >= threshold]
        points.append((sum(chosen) / total, sum(chosen) / len(chosen)))
    area, before = 0.0, 0.0
    for index, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[index:])
        before = recall
    return area


@given(st.lists(st.tuples(st.sampled_from([-2.0, 0.0, 0.1, 0.5, 0.9]), st.booleans()), max_size=12))
def test_average_precision_equals_its_definition(pairs):
    scores, positives = [s for s, _ in pairs], [p for _, p in pairs]
    found = average_precision(scores, positives)
    assert found == pytest.approx(slow_average_precision(scores, positives), nan_ok=True)
    backwards = average_precision(scores[::-1], positives[::-1])
    assert backwards == pytest.approx(found, nan_ok=True)


@pytest.mark.parametrize(
    ("positives", "expected"),
    [
        ([1, 1, 0, 0], 1),
        ([0, 0, 1, 1], 1 / 2),  # precision 1/3 at recall 1/2 is lifted to 2/4
        ([1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([0, 1, 0, 0], 1 / 2),
        ([1, 1, 1, 1], 1),
    ],
)
def test_values_by_hand(positives, expected):
    assert average_precision([0.9, 0.8, 0.3, -1.0], positives) == pytest.approx(expected)


def test_equal_scores_enter_together():
    assert average_precision([0.5] * 4, [1, 0, 0, 0]) == pytest.approx(1 / 4)
    assert average_precision([math.inf, math.inf, 0.0], [0, 1, 1]) == pytest.approx(2 / 3)


def test_types_do_not_matter():
    for scores in (np.array([True, False]), np.array([3, 1], np.uint8), [2, 1]):
        assert average_precision(scores, [1, 0]) == 1


def test_measures_by_hand():
    #        class 0: TP 1, FP 1, FN 1; class 1: never predicted; class 2: in no image
    labels = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    scores = [[0.9, 0.1, 0.7], [0.6, 0.3, 0.0], [0.4, 0.2, 0.0], [0.2, 0.0, 0.0]]
    result = evaluate_image_labels(scores, labels, threshold=0.6)
    per_class = result["per_class"]
    nan = math.nan
    assert per_class["precision"] == pytest.approx([50, 0, nan], nan_ok=True)
    assert per_class["recall"] == pytest.approx([50, 0, nan], nan_ok=True)
    assert per_class["F1"] == pytest.approx([50, 0, nan], nan_ok=True)
    assert per_class["AP"] == pytest.approx([100 * (1 + 2 / 3) / 2, 100, nan], nan_ok=True)
    assert result["precision"] == result["recall"] == result["F1"] == 25
    assert result["mAP"] == pytest.approx(100 * (5 / 6 + 1) / 2)
    assert isinstance(result["mAP"], float)


def test_the_threshold_itself_is_predicted():
    result = evaluate_image_labels([[0.5], [0.4]], [[1], [1]])
    assert (result["precision"], result["recall"]) == (100, 50)
    assert result["F1"] == pytest.approx(200 / 3)


def test_nothing_to_measure_is_nan():
    for shape in ((0, 3), (4, 3), (4, 0)):
        result = evaluate_image_labels(np.zeros(shape), np.zeros(shape))
        for name in ("mAP", "precision", "recall", "F1"):
            assert math.isnan(result[name])
            assert len(result["per_class"][name.removeprefix("m")]) == shape[1]


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [
        ([0.1, 0.2], [0, 1], r"scores have shape \(2,\), the labels \(2,\)"),
        ([[0.1, 0.2]], [[0], [1]], r"shape \(1, 2\), the labels \(2, 1\)"),
        ([[0.1], [math.nan]], [[0], [1]], "score of image 1, class index 0 is NaN"),
        ([[0.1, 0.0]], [[0, 2]], r"label of image 0, class index 1 is 2\. Allowed: 0 and 1"),
        ([[0.1, 0.0]], [[math.nan, 0]], "class index 0 is nan"),
    ],
)
def test_errors_name_what_is_wrong(scores, labels, words):
    with pytest.raises(ValueError, match=words):
        evaluate_image_labels(scores, labels)
