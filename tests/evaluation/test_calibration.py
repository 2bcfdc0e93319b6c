import numpy as np
import pytest

from maskx.evaluation.calibration import (
    cross_validated,
    fit_calibration,
    reliability_table,
    share_of_error,
)


@pytest.fixture
def overconfident():
    """Scores of 400 masks whose IoU is, with noise, the square of the score."""
    random = np.random.RandomState(0)
    scores = random.uniform(0, 1, 400)
    return scores, np.clip(scores**2 + random.normal(0, 0.05, 400), 0, 1)


def test_a_quality_is_the_mean_iou_of_such_masks(overconfident):
    calibration = fit_calibration(*overconfident)
    for score in (0.2, 0.5, 0.8):
        assert calibration([score])[0] == pytest.approx(score**2, abs=0.04)


def test_qualities_never_fall_and_stay_in_range():
    random = np.random.RandomState(1)
    scores = random.uniform(0, 1, 90)
    found = fit_calibration(scores, random.uniform(0, 1, 90))(np.linspace(-1, 2, 50))
    assert (np.diff(found) >= 0).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_falling_bins_are_pooled_to_their_mean():
    scores = np.repeat([0.1, 0.9], 10)
    ious = np.repeat([0.8, 0.4], 10)
    np.testing.assert_allclose(fit_calibration(scores, ious)([0.0, 0.5, 1.0]), 0.6)


def test_few_masks_have_one_quality():
    assert fit_calibration([0.2, 0.7], [0.4, 0.6])([0.1, 0.9]).tolist() == [0.5, 0.5]


def test_the_quality_of_a_mask_does_not_come_from_its_own_image():
    """Two images: the calibration of one is what the other has."""
    scores = [0.5] * 4
    found = cross_validated(scores, [1.0, 1.0, 0.2, 0.2], ["a", "a", "b", "b"])
    assert found.tolist() == [0.2, 0.2, 1.0, 1.0]


def test_calibrated_qualities_are_reliable_and_the_scores_are_not(overconfident):
    scores, ious = overconfident
    qualities = cross_validated(scores, ious, range(400))

    def largest_gap(values):
        return max(abs(row.quality - row.iou) for row in reliability_table(values, ious))

    assert largest_gap(qualities) < 0.1
    assert largest_gap(scores) > 0.2


def test_the_rows_of_the_table():
    low, high = reliability_table([0.05, 0.15, 1.0, 0.17], [0.0, 0.2, 0.9, 0.4])[::2]
    assert (low.low, low.high, low.count, low.quality, low.iou) == (0, 0.1, 1, 0.05, 0.0)
    assert (high.low, high.high, high.count, high.iou) == (0.9, 1.0, 1, 0.9)


def test_the_worst_hold_a_share_of_the_error():
    ious = [0.1, 0.9, 0.9, 0.9, 0.9]
    assert share_of_error([0.2, 0.5, 0.6, 0.7, 0.8], ious) == pytest.approx(0.9 / 1.3)
    assert share_of_error([0.9, 0.5, 0.6, 0.7, 0.8], ious) == pytest.approx(0.1 / 1.3)
    assert share_of_error([0.9], [1.0]) == 0
