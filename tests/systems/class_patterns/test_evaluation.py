import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.label_maps import write_label_map
from maskx.evaluation.mean_iou import MeanIoU
from maskx.systems.class_patterns.evaluation import evaluate_proxy_masks
from maskx.systems.class_patterns.proxy_masks import mask_path

TRUTH = np.array([[0, 0, 1, 1], [0, 2, 2, 255]])
MASK = np.array([[0, 255, 1, 255], [1, 2, 255, 255]])


def write_images(folder, images, num_classes):
    """Write masks and true label maps; returns records."""
    records = []
    for number, (mask, truth) in enumerate(images):
        image_id, path = f"set/{number}", folder / f"truth_{number}.png"
        write_label_map(path, truth, num_classes=num_classes)
        write_label_map(mask_path(folder, image_id), mask, num_classes=num_classes)
        height, width = truth.shape
        records.append(
            {"image_id": image_id, "height": height, "width": width}
            | {"label_map_file_name": str(path), "annotations": [], "image_labels": []}
        )
    return records


def evaluate(folder, images, num_classes):
    return evaluate_proxy_masks(write_images(folder, images, num_classes), folder, num_classes)


def test_hand_computed_values(tmp_path):
    result = evaluate(tmp_path, [(MASK, TRUTH)], 2)
    # Missed: background 1 of 3; class 0 1 of 2 and one elsewhere; class 1 1 of 2.
    missed, decided = result["undecided_missed"], result["decided_only"]
    assert missed["background"] == pytest.approx(100 / 3)
    assert missed["per_class"] == pytest.approx([100 / 3, 50])
    assert missed["pixel_accuracy"] == pytest.approx(300 / 7)
    # Decided: background 1 of 2; class 0 1 of 1 and one elsewhere; class 1 1 of 1.
    assert decided["background"] == pytest.approx(50)
    assert decided["per_class"] == pytest.approx([50, 100])
    assert decided["mIoU"]["all"] == pytest.approx(200 / 3)
    assert decided["pixel_accuracy"] == pytest.approx(75)
    assert result["undecided"] == pytest.approx(300 / 7)


@pytest.mark.parametrize("num_classes", [20, 300])
@given(seed=st.integers(0, 2**16))
def test_counts_are_those_of_the_decided_pixels(tmp_path_factory, num_classes, seed):
    random = np.random.default_rng(seed)
    folder = tmp_path_factory.getbasetemp()
    ignore = 255 if num_classes == 20 else 65535
    images, plain = [], MeanIoU(num_classes)
    for image_id in range(2):
        mask, truth = random.integers(0, 4, (2, 4, 5))
        mask[random.random(mask.shape) < 0.3] = ignore
        truth[random.random(mask.shape) < 0.2] = ignore
        images.append((mask, truth))
        is_decided = mask != ignore
        plain.update(mask[is_decided][None], truth[is_decided][None], image_id)
    result = evaluate(folder, images, num_classes)
    np.testing.assert_equal(result["decided_only"], plain.evaluate())
    known = np.concatenate([mask[truth != ignore] for mask, truth in images])
    assert result["undecided"] == pytest.approx(100 * (known == ignore).mean())
    right = sum(int(((mask == truth) & (truth != ignore)).sum()) for mask, truth in images)
    accuracy = result["undecided_missed"]["pixel_accuracy"]
    assert accuracy == pytest.approx(100 * right / known.size)


def test_the_truth_itself_has_100_percent(tmp_path):
    result = evaluate(tmp_path, [(TRUTH, TRUTH)], 2)
    assert result["undecided"] == 0
    for counted in (result["undecided_missed"], result["decided_only"]):
        assert counted["mIoU"] == {"all": 100}


def test_nothing_known_or_decided(tmp_path):
    unknown = np.full((2, 3), 255)
    assert math.isnan(evaluate(tmp_path, [(unknown * 0, unknown)], 2)["undecided"])
    result = evaluate(tmp_path, [(unknown, unknown * 0)], 2)
    assert result["undecided"] == 100
    assert result["undecided_missed"]["mIoU"]["all"] == 0
    assert math.isnan(result["decided_only"]["mIoU"]["all"])


def test_missing_masks_and_masks_of_other_classes_are_named(tmp_path):
    records = write_images(tmp_path, [(MASK, TRUTH)], 2)
    with pytest.raises(ValueError, match=r"image 'set/0'\) has the value 2 at row"):
        evaluate_proxy_masks(records, tmp_path, 1)
    mask_path(tmp_path, "set/0").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(image 'set/0'\): there is no such file"):
        evaluate_proxy_masks(records, tmp_path, 2)
