import json
import logging
import math

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import print_csv_format
from detectron2.utils import comm

from maskx.detectron2 import MaskXImageLabelEvaluator, register_coco

NAMES = ("cat", "dog", "owl", "yak")
LABELS = [[0, 2], [1], [], [0, 1], [2], [0]]


@pytest.fixture
def images(tmp_path):
    """Six images with the image labels above, registered as ``tagged``."""
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((4, 4, 3), np.uint8))
    names = [{"id": 10 * c + 10, "name": name} for c, name in enumerate(NAMES)]
    files = [
        {"id": i, "file_name": "1.png", "height": 4, "width": 4}
        | {"image_labels": [10 * c + 10 for c in labels]}
        for i, labels in enumerate(LABELS, start=1)
    ]
    content = {"images": files, "annotations": [], "categories": names}
    (tmp_path / "tags.json").write_text(json.dumps(content))
    register_coco("tagged", tmp_path / "tags.json", tmp_path)
    return tmp_path / "tags.json"


@pytest.fixture
def probs():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 4, generator=generator)


def run(evaluator, probs, ids=range(1, 7)):
    evaluator.reset()
    for image_id in ids:
        prob = probs[image_id - 1]
        evaluator.process([{"image_id": image_id}], [{"image_labels_prob": prob}])
    return evaluator.evaluate()


def slow_average_precision(scores, positives):
    """The largest precision at each recall or above, averaged over the positive images."""
    ranked = [positives[i] for i in np.argsort(-scores, kind="stable")]
    precisions = [sum(ranked[:n]) / n for n in range(1, len(ranked) + 1)]
    at_positives = [n for n, positive in enumerate(ranked) if positive]
    return 100 * np.mean([max(precisions[n:]) for n in at_positives])


def test_it_agrees_with_a_slow_count(images, probs, tmp_path, caplog):
    split = tmp_path / "split.txt"
    split.write_text("owl\ncat\n")
    with caplog.at_level(logging.INFO):
        results = run(MaskXImageLabelEvaluator("tagged", split=split), probs)
    scores = probs.numpy()
    cat, dog, owl = (
        slow_average_precision(scores[:, c], [c in labels for labels in LABELS]) for c in range(3)
    )
    found = results["image_labels"]
    assert list(results) == ["image_labels"]
    assert found["mAP"] == pytest.approx((cat + dog + owl) / 3)
    assert (found["mAP_A"], found["mAP_B"]) == pytest.approx(((cat + owl) / 2, dog))
    assert [found[f"AP-{name}"] for name in NAMES[:3]] == pytest.approx([cat, dog, owl])
    assert math.isnan(found["AP-yak"])  # no image has it
    assert {"precision", "recall", "F1"} < found.keys()
    assert f"Image labels of 6 images: mAP {found['mAP']:.2f}" in caplog.text
    with caplog.at_level(logging.INFO, logger="detectron2.evaluation.testing"):
        print_csv_format(results)
    assert "copypaste: mAP,mAP_A,mAP_B,precision,recall,F1" in caplog.text


def test_perfect_predictions_are_100(images):
    probs = torch.zeros(6, 4)
    for row, labels in zip(probs, LABELS, strict=True):
        row[labels] = 0.9
    found = run(MaskXImageLabelEvaluator("tagged"), probs)["image_labels"]
    assert {found[key] for key in ("mAP", "mAP_A", "precision", "recall", "F1")} == {100}
    assert math.isnan(found["mAP_B"])


def test_labels_of_annotations_count(tiny_train):
    """Scenes have annotations and no labels of their own."""
    records = DatasetCatalog.get(tiny_train)
    evaluator = MaskXImageLabelEvaluator(tiny_train, split="scenes_half")
    for record in records:
        prob = torch.zeros(4)
        prob[[a["category_id"] for a in record["annotations"]]] = 1
        evaluator.process([record], [{"image_labels_prob": prob}])
    assert evaluator.evaluate()["image_labels"]["mAP"] == 100


def test_processes_are_gathered(images, probs, monkeypatch):
    expected = run(MaskXImageLabelEvaluator("tagged"), probs)
    other = MaskXImageLabelEvaluator("tagged")
    for image_id in (2, 4, 6):
        prob = probs[image_id - 1]
        other.process([{"image_id": image_id}], [{"image_labels_prob": prob}])
    monkeypatch.setattr(comm, "gather", lambda data, dst: [data, other._probs])
    evaluator = MaskXImageLabelEvaluator("tagged")
    np.testing.assert_equal(run(evaluator, probs, (1, 3, 5)), expected)
    alone = MaskXImageLabelEvaluator("tagged", distributed=False)
    assert run(alone, probs, (1, 3, 5)) != expected
    monkeypatch.setattr(comm, "gather", lambda data, dst: [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert run(evaluator, probs, (1, 3, 5)) == {}


def test_nothing_is_left_after_a_reset(images, probs):
    evaluator = MaskXImageLabelEvaluator("tagged")
    run(evaluator, probs)
    assert all(map(math.isnan, run(evaluator, probs, ())["image_labels"].values()))


def test_bad_predictions_are_named(images):
    evaluator = MaskXImageLabelEvaluator("tagged")
    with pytest.raises(ValueError, match=r"Image 9 is not among the 6 of data set 'tagged'\. Was"):
        evaluator.process([{"image_id": 9}], [{"image_labels_prob": torch.zeros(4)}])
    words = r"image_labels_prob of image 2 has shape \(5,\)\. Allowed: \(4,\)"
    with pytest.raises(ValueError, match=words):
        evaluator.process([{"image_id": 2}], [{"image_labels_prob": torch.zeros(5)}])


def test_bad_data_sets_are_named(images, tmp_path):
    with pytest.raises(ValueError, match="There is no data set 'typo'"):
        MaskXImageLabelEvaluator("typo")
    with pytest.raises(FileNotFoundError, match="neither a named category split nor a file"):
        MaskXImageLabelEvaluator("tagged", split="none")
    register_coco("more", images, tmp_path, class_names=[*NAMES, "zebra"])
    with pytest.raises(ValueError, match=r"'more' annotates 4 of 5 classes: which of the others"):
        MaskXImageLabelEvaluator("more")
    lacks = {"without image_id": {"image_labels": []}, "with neither": {"image_id": 1}}
    for number, (words, record) in enumerate(lacks.items()):
        name = f"bare{number}"
        DatasetCatalog.register(name, lambda record=record: [{"file_name": "1.png", **record}])
        MetadataCatalog.get(name).thing_classes = list(NAMES)
        with pytest.raises(ValueError, match=rf"'{name}' has a record \(1\.png\) {words}"):
            MaskXImageLabelEvaluator(name)
