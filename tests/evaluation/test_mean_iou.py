import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.splits import resolve_split
from maskx.evaluation.mean_iou import MeanIoU, format_table

TRUTH = np.array([[0, 0, 1, 1], [0, 2, 2, 255]])
PREDICTED = np.array([[0, 1, 1, 1], [0, 2, 0, 3]])


def brute_force(images, num_classes, ignore=255):
    """IoU by label and pixel accuracy in percent from a confusion matrix, pixel by pixel."""
    confusion = np.zeros((num_classes + 1, num_classes + 1), int)
    for predicted, truth in images:
        for p, t in zip(predicted.flat, truth.flat, strict=True):
            if t != ignore:
                confusion[t, p] += 1
    iou = []
    for label in range(num_classes + 1):
        true_positive = confusion[label, label]
        union = confusion[label].sum() + confusion[:, label].sum() - true_positive
        iou.append(100 * true_positive / union if union else math.nan)
    total = confusion.sum()
    return iou, 100 * np.trace(confusion) / total if total else math.nan


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def count(images, num_classes):
    counts = MeanIoU(num_classes)
    for image_id, (predicted, truth) in enumerate(images):
        counts.update(predicted, truth, image_id)
    return counts


def draw_images(random, num_classes, num_images, ignore=255):
    images = []
    for _ in range(num_images):
        size = random.integers(1, 6, 2)
        predicted, truth = random.integers(0, num_classes + 1, (2, *size))
        truth = np.where(random.random(size) < 0.5, predicted, truth)
        truth[random.random(size) < 0.2] = ignore
        images.append((predicted, truth))
    return images


def test_hand_computed_values():
    result = count([(PREDICTED, TRUTH)], 4).evaluate({"A": [0, 3], "B": [1, 2], "none": [3]})
    # background: 2 of 4 pixels; class 0: 2 of 3; class 1: 1 of 2; class 2: only where the truth
    # ignores; class 3: nowhere.
    assert result["background"] == pytest.approx(50)
    assert result["per_class"] == pytest.approx([200 / 3, 50, math.nan, math.nan], nan_ok=True)
    expected = {"all": (50 + 200 / 3 + 50) / 3, "A": 200 / 3, "B": 50, "none": math.nan}
    assert result["mIoU"] == pytest.approx(expected, nan_ok=True)
    assert list(result["mIoU"]) == ["all", "A", "B", "none"]
    assert result["pixel_accuracy"] == pytest.approx(500 / 7)


def test_undecided_pixels_are_missed_and_predict_nothing():
    predicted = np.where([[1, 0, 1, 0], [0, 0, 0, 1]], 255, PREDICTED)
    counts = MeanIoU(4)
    counts.update(predicted, TRUTH, 0, allow_undecided=True)
    result = counts.evaluate()
    # background: 1 of 3 pixels and one predicted elsewhere; class 0: 1 of 2 and one elsewhere;
    # class 1: 1 of 2. The last undecided pixel is one that the truth ignores.
    assert counts.predicted.tolist() == [2, 2, 1, 0, 0]
    assert counts.true.tolist() == [3, 2, 2, 0, 0]
    assert result["background"] == pytest.approx(100 / 4)
    assert result["per_class"] == pytest.approx([100 / 3, 50, math.nan, math.nan], nan_ok=True)
    assert result["pixel_accuracy"] == pytest.approx(300 / 7)
    with pytest.raises(ValueError, match=r"prediction for image 0 has the value 255\. Allowed: .*"):
        counts.update(predicted, TRUTH, 0)
    with pytest.raises(ValueError, match=r"for image 0 has the value 5\. Allowed: .*255 .ignore"):
        counts.update(np.where(predicted == 0, 5, predicted), TRUTH, 0, allow_undecided=True)


def test_a_class_that_was_predicted_but_is_not_in_the_truth_has_iou_0():
    result = count([(np.array([[0, 2]]), np.array([[0, 0]]))], 2).evaluate()
    assert result["per_class"] == pytest.approx([math.nan, 0], nan_ok=True)
    assert result["mIoU"] == {"all": pytest.approx((50 + 0) / 2)}


def test_nothing_counted_is_nan():
    for counts in (MeanIoU(2), count([(np.zeros((2, 2), int), np.full((2, 2), 255))], 2)):
        result = counts.evaluate({"A": [0], "B": []})
        values = [*result["mIoU"].values(), *result["per_class"]]
        assert all(map(math.isnan, [*values, result["background"], result["pixel_accuracy"]]))


@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 2**16))
def test_it_agrees_with_a_confusion_matrix(num_classes, num_images, seed):
    random = np.random.default_rng(seed)
    images = draw_images(random, num_classes, num_images)
    group = random.permutation(num_classes)[: random.integers(0, num_classes + 1)]
    result = count(images, num_classes).evaluate({"B": group})
    iou, accuracy = brute_force(images, num_classes)
    close = {"rel": 1e-12, "nan_ok": True}
    assert result["background"] == pytest.approx(iou[0], **close)
    assert result["per_class"] == pytest.approx(iou[1:], **close)
    assert result["pixel_accuracy"] == pytest.approx(accuracy, **close)
    assert result["mIoU"]["all"] == pytest.approx(mean(iou), **close)
    assert result["mIoU"]["B"] == pytest.approx(mean([iou[c + 1] for c in group]), **close)


@given(st.integers(0, 5), st.integers(0, 2**16))
def test_merged_counts_are_those_of_all_images(first, seed):
    images = draw_images(np.random.default_rng(seed), 3, 5)
    merged = count(images[:first], 3)
    merged.merge(pickle.loads(pickle.dumps(count(images[first:], 3))))
    np.testing.assert_equal(merged.evaluate(), count(images, 3).evaluate())


def test_large_vocabularies():
    num_classes = 21_841
    images = draw_images(np.random.default_rng(0), num_classes, 3, ignore=65535)
    counts = count(images, num_classes)
    assert counts.true.nbytes + counts.predicted.nbytes + counts.intersections.nbytes < 600_000
    expected = mean(
        100
        * (same := sum(int(((p == c) & (t == c)).sum()) for p, t in images))
        / (sum(int(((p == c) & (t != 65535)).sum() + (t == c).sum()) for p, t in images) - same)
        for c in {int(v) for p, t in images for v in (*p[t != 65535], *t[t != 65535])}
    )
    assert counts.evaluate()["mIoU"]["all"] == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint64])
def test_types_of_integers(dtype):
    found = count([(PREDICTED.astype(np.uint8), TRUTH.astype(dtype))], 4).evaluate()
    np.testing.assert_equal(found, count([(PREDICTED, TRUTH)], 4).evaluate())


def test_tensors_and_groups_of_a_split():
    split = resolve_split("all", ("cat", "dog", "owl"))
    counts = MeanIoU(3)
    counts.update(torch.from_numpy(PREDICTED), torch.from_numpy(TRUTH), 1)
    means = counts.evaluate(split.groups())["mIoU"]
    assert list(means) == ["all", "A", "B"]
    assert means["all"] == pytest.approx((50 + 200 / 3 + 50) / 3)  # with the background
    assert means["A"] == pytest.approx((200 / 3 + 50) / 2)
    assert math.isnan(means["B"])


def test_table():
    result = count([(PREDICTED, TRUTH)], 4).evaluate({"all": range(4), "A": [0, 3], "B": [3]})
    assert format_table(result) == "\n".join(
        [
            "mIoU all         55.56",
            "mIoU A           66.67",
            "mIoU B               -",
            "IoU background   50.00",
            "pixel accuracy   71.43",
        ]
    )


def test_the_table_has_no_row_of_a_background_that_is_not_there():
    result = count([(np.array([[1, 2]]), np.array([[1, 1]]))], 2).evaluate()
    assert format_table(result) == "mIoU all         25.00\npixel accuracy   50.00"


ZEROS = np.zeros((2, 3), int)


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (ZEROS, ZEROS.T, r"prediction for image 7 has shape \(2, 3\), its truth \(3, 2\)\. Resize"),
        (ZEROS + 0.5, ZEROS, r"prediction for image 7 has shape \(2, 3\) and dtype float64\. Allo"),
        (ZEROS[None], ZEROS, r"prediction for image 7 has shape \(1, 2, 3\) and dtype int64\. A"),
        (ZEROS, ZEROS > 0, r"truth for image 7 has shape \(2, 3\) and dtype bool"),
        (
            ZEROS + 5,
            ZEROS,
            r"prediction for image 7 has the value 5\. .*1 to 4 \(class index \+ 1\)\.$",
        ),
        (ZEROS + 255, ZEROS + 255, r"prediction for image 7 has the value 255"),
        (ZEROS - 1, ZEROS, r"prediction for image 7 has the value -1"),
        (ZEROS, ZEROS + 5, r"truth of image 7 has the value 5\. Allowed: .*, 255 \(ignore\)\.$"),
        (ZEROS, ZEROS - 1, r"truth of image 7 has the value -1"),
    ],
)
def test_bad_label_maps_are_named_and_not_counted(predicted, truth, message):
    counts = MeanIoU(4)
    with pytest.raises(ValueError, match=message):
        counts.update(predicted, truth, 7)
    assert not counts.predicted.any()
    assert not counts.true.any()


@pytest.mark.parametrize("index", [-1, 4])
def test_bad_groups_are_named(index):
    with pytest.raises(ValueError, match=f"Group 'A' holds class index {index}. Allowed: 0 to 3"):
        MeanIoU(4).evaluate({"A": [0, index]})


def test_counts_of_other_classes_are_not_merged():
    with pytest.raises(ValueError, match=r"Counts of 3 classes .* to counts of 4 classes\. Count"):
        MeanIoU(4).merge(MeanIoU(3))
