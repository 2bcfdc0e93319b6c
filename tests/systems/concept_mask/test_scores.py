import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskx.systems.concept_mask.evaluation import (
    ConceptScores,
    fit_existence_threshold,
    fit_theta,
    format_concept_table,
    pointing_hit,
    soft_iou,
)

LEFT = np.array([[True, False], [True, False]])
ATTENTION = np.array([[0.5, 0.25], [1.0, 0.0]], np.float32)


def update(scores, concept="cat", attention=ATTENTION, mask=LEFT, truth=LEFT, image_id=7):
    scores.update(concept, attention=attention, mask=mask, truth=truth, image_id=image_id)


def test_pointing_takes_the_largest_value_and_a_constant_map_points_nowhere():
    assert pointing_hit(ATTENTION, LEFT)
    assert not pointing_hit(ATTENTION, ~LEFT)
    assert not pointing_hit(np.full((2, 2), 0.7), LEFT)


def test_soft_iou_is_equation_5_by_hand():
    # sum(a G) = 0.5 + 1; sum(max(a, G)) = 1 + 0.25 + 1 + 0.
    assert soft_iou(ATTENTION, LEFT) == pytest.approx(1.5 / 2.25)
    assert math.isnan(soft_iou(np.zeros((2, 2)), np.zeros((2, 2), bool)))


@given(st.integers(0, 2**32 - 1))
def test_soft_iou_is_the_formula_and_of_masks_the_iou(seed):
    random = np.random.RandomState(seed)
    attention, truth = random.rand(5, 4), random.rand(5, 4) < 0.5
    expected = (attention * truth).sum() / np.maximum(attention, truth).sum()
    assert soft_iou(attention, truth) == pytest.approx(expected)
    mask = attention > 0.5
    union = (mask | truth).sum()
    if union:
        assert soft_iou(mask.astype(float), truth) == pytest.approx((mask & truth).sum() / union)


def test_means_are_over_images_then_over_concepts():
    scores = ConceptScores(["cat", "dog", "sky", "fog"], ["mask", "mask", "image", "box"])
    update(scores)  # all right
    wrong = np.array([[False, True], [False, False]])
    update(scores, mask=wrong, attention=wrong.astype(float))
    update(scores, "dog", truth=np.array([[True, False], [False, False]]))
    update(scores, "sky", mask=np.zeros((2, 2), bool))
    found = scores.evaluate()
    cat, dog = found["concepts"]["cat"], found["concepts"]["dog"]
    assert (cat["pointing"], cat["precision"], cat["recall"], cat["iou"]) == (0.5, 0.5, 0.5, 0.5)
    assert cat["soft_iou"] == pytest.approx((1.5 / 2.25 + 0) / 2)
    assert (cat["chance"], cat["num_images"], cat["level"]) == (0.5, 2, "mask")
    assert (dog["pointing"], dog["precision"], dog["recall"], dog["iou"]) == (0, 0.5, 1, 0.5)
    mask = found["levels"]["mask"]
    assert mask["pointing"] == 0.25  # 1/3 were it over images
    assert mask["num_concepts"] == 2
    assert found["levels"]["image"]["precision"] == 0  # of an empty mask
    assert found["levels"]["box"] is None
    assert found["levels"]["unseen"] is None
    assert "fog" not in found["concepts"]


def test_the_table_has_a_row_per_level():
    scores = ConceptScores(["cat", "dog"], ["mask", "unseen"])
    update(scores)
    lines = format_concept_table(scores.evaluate()).splitlines()
    assert (
        lines[0] == "| level | concepts | pointing | soft IoU | precision | recall | IoU | chance |"
    )
    assert lines[2] == "| mask | 1 | 1.000 | 0.667 | 1.000 | 1.000 | 1.000 | 0.500 |"
    assert lines[3] == "| box | 0 | - | - | - | - | - | - |"
    assert len(lines) == 7
    assert all(line.count("|") == 9 for line in lines)


def test_merged_scores_are_those_of_all_images():
    together, one, other = (ConceptScores(["cat"], ["mask"]) for _ in range(3))
    for scores in (together, one):
        update(scores)
    for scores in (together, other):
        update(scores, mask=~LEFT)
    one.merge(other)
    assert one.evaluate() == together.evaluate()
    with pytest.raises(ValueError, match="names and levels must be the same"):
        one.merge(ConceptScores(["cat"], ["box"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concept": "bat"}, "'bat' is not among the 1 that are measured"),
        ({"truth": LEFT & False}, "truth of concept 'cat' in image 7 is empty"),
        ({"mask": LEFT[:1]}, r"mask of concept 'cat' in image 7 has shape \(1, 2\)"),
        ({"mask": ATTENTION}, "mask of concept 'cat' in image 7 has dtype float32. Allowed: bool"),
        ({"attention": LEFT}, "has dtype bool. Allowed: float"),
        ({"attention": ATTENTION * 2}, r"from 0 to 2. Allowed: \[0, 1\]"),
        ({"attention": ATTENTION * math.nan}, "from nan to nan"),
    ],
)
def test_what_cannot_be_measured_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        update(ConceptScores(["cat"], ["mask"]), **changes)


@pytest.mark.parametrize(
    ("names", "levels", "words"),
    [
        (["a"], [], "1 concepts, but 0 levels"),
        (
            ["a"],
            ["masks"],
            "'a' has the level 'masks'. Allowed: mask, box, image, unseen",
        ),
        (["a", "a"], ["box", "box"], "'a' stands twice"),
    ],
)
def test_bad_concept_lists_are_named(names, levels, words):
    with pytest.raises(ValueError, match=words):
        ConceptScores(names, levels)


def test_theta_is_where_the_blend_fits_best():
    own = np.array([[[1.0, 0.0], [0.0, 0.0]]])
    nearest = np.array([[[0.0, 0.0], [1.0, 0.0]]])
    # Half of each makes, after min-max, exactly the left column.
    fit = fit_theta([("q", own, nearest, LEFT)], thetas=(0.0, 0.5, 1.0))
    assert fit.theta == 0.5
    assert fit.scores == {0.0: 0.5, 0.5: 1.0, 1.0: 0.5}
    for own, nearest, theta in ((LEFT, ~LEFT, 1.0), (~LEFT, LEFT, 0.0)):
        maps = (own[None] * 1.0, nearest[None] * 1.0)
        assert fit_theta([("q", *maps, LEFT)], thetas=(0.0, 1.0)).theta == theta
    # Of equal ones the largest: that with least blending.
    assert fit_theta([("q", LEFT[None] * 1.0, LEFT[None] * 1.0, LEFT)]).theta == 1.0


def test_a_theta_of_0_is_not_tried():
    """All concepts with one nearest concept would have the same map, that of another."""
    fit = fit_theta([("q", ~LEFT[None] * 1.0, LEFT[None] * 1.0, LEFT)])
    assert min(fit.scores) == 0.05
    assert fit.theta == 0.45  # of equal ones the largest


def test_maps_of_several_image_sizes_are_averaged_after_each_was_normalised():
    own = np.stack([LEFT * 5.0 + 3, np.full((2, 2), 7.0)])  # one is constant and becomes 0
    fit = fit_theta([("q", own, own, LEFT)], thetas=(1.0,))
    assert fit.scores == {1.0: 0.5}


def test_theta_counts_concepts_alike_however_many_images_they_have():
    good, bad = LEFT[None].astype(float), (~LEFT)[None].astype(float)
    maps = [("a", good, bad, LEFT)] * 3 + [("b", bad, good, LEFT)]
    fit = fit_theta(maps, thetas=(0.0, 1.0))
    assert fit.scores == {0.0: 0.5, 1.0: 0.5}
    with pytest.raises(ValueError, match="no image with a true mask to fit theta on"):
        fit_theta([])


def test_the_existence_threshold_separates_what_can_be_separated():
    assert fit_existence_threshold([0.1, 0.9, 0.3, 0.7], [0, 1, 0, 1]) == pytest.approx(0.5)
    assert math.isnan(fit_existence_threshold([0.1, 0.9], [0, 0]))
    assert math.isnan(fit_existence_threshold([0.1, 0.9], [1, 1]))
    with pytest.raises(ValueError, match="Allowed: one finite number for each"):
        fit_existence_threshold([0.1], [1, 0])


@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=12).filter(
        lambda rows: 0 < sum(present for _, present in rows) < len(rows)
    )
)
def test_no_other_existence_threshold_has_a_higher_f1(rows):
    scores = np.array([score / 6 for score, _ in rows], np.float32)
    present = np.array([present for _, present in rows])

    def f1(threshold):
        said = scores > np.float32(threshold)
        return 2 * (said & present).sum() / (said.sum() + present.sum())

    best = max(f1(step / 6 - 1 / 12) for step in range(8))
    assert f1(fit_existence_threshold(scores, present)) == pytest.approx(best)
