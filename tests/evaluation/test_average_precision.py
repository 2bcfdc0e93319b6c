import contextlib
import copy
import io
import json
import logging
import math

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskx.evaluation.average_precision import (
    METRICS,
    class_average_precision,
    evaluate_detections,
    format_class_table,
    format_table,
    split_average_precision,
)

SIZE = 160
CATEGORY_IDS = (11, 3, 7, 20, 5)  # not sorted, to tell class indices from positions of COCOeval
GROUPS = {"all": range(5), "A": [0, 2], "B": [1, 3, 4], "one": [3]}


def encode(mask):
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def ellipse(box):
    """Mask that fills about 3/4 of a box [x, y, width, height]."""
    x, y, width, height = box
    ys, xs = np.mgrid[:SIZE, :SIZE] + 0.5
    return ((xs - x - width / 2) / width) ** 2 + ((ys - y - height / 2) / height) ** 2 <= 0.25


def random_box(rng):
    """A box of any of COCO's three object sizes."""
    width, height = np.exp(rng.uniform(np.log(6), np.log(150), size=2))
    return [float(v) for v in (*rng.uniform(0, SIZE - np.array([width, height])), width, height)]


def make_ground_truth(annotations, num_images=1):
    return {
        "images": [{"id": n + 1, "height": SIZE, "width": SIZE} for n in range(num_images)],
        "categories": [{"id": n, "name": f"class {n}"} for n in CATEGORY_IDS],
        "annotations": annotations,
    }


def make_annotation(number, category_id, box, image_id=1, **keys):
    mask = ellipse(box)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": encode(mask),
    } | keys


def detect(annotation, score=0.9, **keys):
    """A detection that equals an annotation."""
    names = ("image_id", "category_id", "bbox", "segmentation")
    return {name: annotation[name] for name in names} | {"score": score} | keys


def toy_data(seed, categories=CATEGORY_IDS, num_images=4):
    """Random objects, a few of them crowds, and detections that hit, nearly hit and miss them."""
    rng = np.random.default_rng(seed)
    annotations, detections = [], []
    for image_id in range(1, num_images + 1):
        for _ in range(rng.integers(3, 9)):
            category_id, box = int(rng.choice(categories)), random_box(rng)
            crowd = int(rng.random() < 0.15)
            annotations.append(
                make_annotation(len(annotations) + 1, category_id, box, image_id, iscrowd=crowd)
            )
            for _ in range(rng.integers(0, 4)):
                jittered = [v * f for v, f in zip(box, rng.normal(1, 0.07, size=4), strict=True)]
                wrong = rng.random() < 0.2
                hit = make_annotation(
                    0,
                    int(rng.choice(CATEGORY_IDS)) if wrong else category_id,
                    random_box(rng) if rng.random() < 0.2 else jittered,
                    image_id,
                )
                detections.append(detect(hit, score=float(rng.random())))
    return make_ground_truth(annotations, num_images), detections


def official_metrics(ground_truth, detections, iou_type, category_ids, evaluator=COCOeval):
    """The six metrics by pycocotools alone, restricted with params.catIds."""
    region = {"bbox": "bbox", "segm": "segmentation"}[iou_type]
    keys = ("image_id", "category_id", "score", region)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, **copy.deepcopy(ground_truth)}
        coco.createIndex()
        results = coco.loadRes([{key: detection[key] for key in keys} for detection in detections])
        evaluation = evaluator(coco, results, iou_type)
        evaluation.params.catIds = sorted(category_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [100 * value if value > -1 else math.nan for value in evaluation.stats[:6]]
    return dict(zip(METRICS, values, strict=True))


def evaluate(ground_truth, detections, **kwargs):
    return evaluate_detections(
        ground_truth, detections, **{"category_ids": CATEGORY_IDS, "groups": GROUPS, **kwargs}
    )


def numbers(results):
    """All numbers of a result in one list, for comparison with NaN and rounding."""
    if isinstance(results, int | float):
        return [results]
    values = results.values() if isinstance(results, dict) else results
    return [number for value in values for number in numbers(value)]


# --- agreement with pycocotools


@pytest.mark.parametrize("seed", range(6))
def test_every_group_equals_cocoeval_restricted_to_its_categories(seed):
    ground_truth, detections = toy_data(seed)
    results = evaluate(ground_truth, detections)
    for iou_type in ("bbox", "segm"):
        for name, indices in GROUPS.items():
            ids = [CATEGORY_IDS[index] for index in indices]
            expected = official_metrics(ground_truth, detections, iou_type, ids)
            assert results[iou_type][name] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert any(0 < results[iou_type]["all"][metric] < 100 for metric in METRICS)


def test_per_class_follows_the_class_indices():
    ground_truth, detections = toy_data(0, categories=CATEGORY_IDS[:4])
    results = evaluate(ground_truth, detections, iou_types=["segm"])
    assert list(results) == ["segm"]
    per_class = results["segm"]["per_class"]
    for category_id, value in zip(CATEGORY_IDS, per_class, strict=True):
        expected = official_metrics(ground_truth, detections, "segm", [category_id])["AP"]
        assert value == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert math.isnan(per_class[4])
    assert results["segm"]["all"]["AP"] == pytest.approx(np.nanmean(per_class), abs=1e-9)


def test_categories_may_be_a_part_of_the_file():
    ground_truth, detections = toy_data(1)
    ids = (20, 3)
    detections = [detection for detection in detections if detection["category_id"] in ids]
    results = evaluate(ground_truth, detections, category_ids=ids, groups={"all": [0, 1]})
    for iou_type in ("bbox", "segm"):
        expected = official_metrics(ground_truth, detections, iou_type, ids)
        assert results[iou_type]["all"] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_real_annotations(shared_data):
    file = shared_data / "coco_mini" / "annotations" / "instances_val2017.json"
    ground_truth = json.loads(file.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    ids = sorted(category["id"] for category in ground_truth["categories"])
    rng = np.random.default_rng(0)
    detections = []
    for annotation in ground_truth["annotations"]:
        if annotation["iscrowd"] or rng.random() < 0.3:
            continue
        rles = mask_utils.frPyObjects(annotation["segmentation"], *sizes[annotation["image_id"]])
        # Taking only the first part of an object makes some detections poor.
        detections.append(detect(annotation, float(rng.random()), segmentation=rles[0]))
    groups = {"all": range(80), "A": range(0, 80, 3), "B": [k for k in range(80) if k % 3]}
    results = evaluate_detections(file, detections, category_ids=ids, groups=groups)
    assert results["segm"]["num_ignored_without_mask"] == 0
    for iou_type in ("bbox", "segm"):
        for name, indices in groups.items():
            expected = official_metrics(
                ground_truth, detections, iou_type, [ids[index] for index in indices]
            )
            assert results[iou_type][name] == pytest.approx(expected, abs=1e-9)


# --- the rule of LVIS


class LvisEval(COCOeval):
    """COCOeval with what lvis-api does otherwise: what is not known is not counted as wrong."""

    def evaluateImg(self, image_id, category_id, area, limit):
        image = self.cocoGt.imgs[image_id]
        known = category_id in image["neg_category_ids"] or self._gts[image_id, category_id]
        if not known:
            return None
        found = super().evaluateImg(image_id, category_id, area, limit)
        if found and category_id in image["not_exhaustive_category_ids"]:
            found["dtIgnore"] |= found["dtMatches"] == 0
        return found


@pytest.mark.parametrize("seed", range(3))
def test_lvis_file_is_scored_by_the_rule_of_lvis(seed):
    ground_truth, detections = toy_data(seed, num_images=8)
    federated, rng = copy.deepcopy(ground_truth), np.random.default_rng(seed)
    for annotation in federated["annotations"]:
        annotation["iscrowd"] = 0
    for image in federated["images"]:
        found = {a["category_id"] for a in federated["annotations"] if a["image_id"] == image["id"]}
        others = [int(id_) for id_ in CATEGORY_IDS if id_ not in found]
        image["neg_category_ids"] = [id_ for id_ in others if rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [id_ for id_ in found if rng.random() < 0.4]
    for category, letter in zip(federated["categories"], "rrffc", strict=True):
        category["frequency"] = letter
    results = evaluate(federated, detections)
    assert not {"rare", "common", "frequent"} & evaluate(ground_truth, detections)["bbox"].keys()
    groups = {**GROUPS, "rare": [0, 1], "common": [4], "frequent": [2, 3]}
    for iou_type in ("bbox", "segm"):
        for name, indices in groups.items():
            ids = [CATEGORY_IDS[index] for index in indices]
            expected = official_metrics(federated, detections, iou_type, ids, LvisEval)
            assert results[iou_type][name] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        without = official_metrics(federated, detections, iou_type, CATEGORY_IDS)
        assert results[iou_type]["all"]["AP"] > without["AP"]


# --- known answers

BOXES = [[5.0, 5, 20, 20], [40.0, 5, 60, 60], [5.0, 70, 150, 88]]  # small, medium, large


def three_sizes():
    """One object of each size for the first two classes only."""
    return make_ground_truth(
        [
            make_annotation(3 * k + n + 1, category_id, box, image_id=k + 1)
            for k, category_id in enumerate(CATEGORY_IDS[:2])
            for n, box in enumerate(BOXES)
        ],
        num_images=2,
    )


def test_perfect_detections_score_100():
    ground_truth = three_sizes()
    results = evaluate(ground_truth, [detect(a) for a in ground_truth["annotations"]])
    for result in results.values():
        for group in ("all", "A", "B"):
            assert result[group] == pytest.approx(dict.fromkeys(METRICS, 100.0))
        assert all(math.isnan(value) for value in result["one"].values())
        assert result["per_class"] == pytest.approx([100.0, 100.0] + [math.nan] * 3, nan_ok=True)
        assert all(type(value) is float for value in result["all"].values())


def test_no_detections_score_0_or_nan():
    results = evaluate(three_sizes(), [])
    for result in results.values():
        assert result["all"] == dict.fromkeys(METRICS, 0.0)
        assert all(math.isnan(value) for value in result["one"].values())


def test_only_images_that_were_looked_at_are_scored(caplog):
    ground_truth, detections = toy_data(0)
    seen = [image["id"] for image in ground_truth["images"][1:]]
    detections = [d for d in detections if d["image_id"] in seen]
    smaller = {
        **ground_truth,
        "images": [image for image in ground_truth["images"] if image["id"] in seen],
        "annotations": [a for a in ground_truth["annotations"] if a["image_id"] in seen],
    }
    expected = numbers(evaluate(smaller, detections))
    assert not caplog.records
    np.testing.assert_allclose(
        numbers(evaluate(ground_truth, detections, image_ids=seen)), expected
    )
    assert "1 of the 4 images of the ground truth were not predicted" in caplog.text
    whole = numbers(evaluate(ground_truth, detections))
    assert not np.allclose(whole, expected, equal_nan=True)


def test_no_ground_truth_is_nan():
    results = evaluate(make_ground_truth([]), [])
    assert all(math.isnan(value) for value in results["segm"]["all"].values())


def test_detections_in_a_crowd_are_neither_right_nor_wrong():
    one = make_annotation(1, 3, BOXES[1])
    crowd = make_annotation(2, 3, BOXES[2], iscrowd=1)
    inside = detect(make_annotation(0, 3, [60.0, 90, 50, 30]), score=1.0)
    assert evaluate(make_ground_truth([one]), [detect(one), inside])["segm"]["all"]["AP"] < 60
    for result in evaluate(make_ground_truth([one, crowd]), [detect(one), inside]).values():
        assert result["all"]["AP"] == pytest.approx(100)


def test_size_of_a_detected_mask_is_not_that_of_its_box():
    # The wrong detection is a thin diagonal: 160 pixels, small, in a box of the whole image.
    one = make_annotation(1, 3, BOXES[0])
    diagonal = detect(one, score=1.0, bbox=[0, 0, SIZE, SIZE], segmentation=encode(np.eye(SIZE)))
    results = evaluate(make_ground_truth([one]), [detect(one), diagonal])
    assert results["segm"]["all"]["APs"] == pytest.approx(50)
    assert results["bbox"]["all"]["APs"] == pytest.approx(100)


def test_limit_on_detections():
    ground_truth = make_ground_truth([make_annotation(n + 1, 3, BOXES[n]) for n in range(3)])
    detections = [detect(annotation) for annotation in ground_truth["annotations"]]
    results = evaluate(ground_truth, detections, max_detections=1)
    assert results["segm"]["all"]["AP"] == pytest.approx(100 * 34 / 101)  # recall 1/3 of 0:.01:1


def test_annotation_with_id_0_can_be_found():
    one = make_annotation(0, 3, BOXES[0])
    assert evaluate(make_ground_truth([one]), [detect(one)])["bbox"]["all"]["AP"] > 99


def test_missing_area_and_iscrowd_are_filled_in():
    full = three_sizes()
    bare = copy.deepcopy(full)
    for annotation in bare["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    detections = [detect(annotation) for annotation in full["annotations"][1:]]
    expected = numbers(evaluate(full, detections))
    assert numbers(evaluate(bare, detections)) == pytest.approx(expected, nan_ok=True)


# --- ground truth without masks


@pytest.mark.parametrize(
    "no_mask", [None, [], "absent", [[1, 2, 3, 4]], {"size": [SIZE, SIZE], "counts": "broken"}]
)
def test_object_without_mask_is_ignored_for_masks_and_counted(no_mask, caplog):
    masked, boxed = make_annotation(1, 3, BOXES[1]), make_annotation(2, 3, BOXES[2])
    detections = [detect(masked, 0.5), detect(boxed, 0.9)]
    boxed["segmentation"] = no_mask
    if no_mask == "absent":
        del boxed["segmentation"]
    with caplog.at_level(logging.WARNING):
        results = evaluate(make_ground_truth([masked, boxed]), detections)
    assert results["segm"]["num_ignored_without_mask"] == 1
    assert results["segm"]["all"]["AP"] == pytest.approx(100)
    # Missing it is no error either, and for boxes it is an object as any other.
    results = evaluate(make_ground_truth([masked, boxed]), detections[:1])
    assert results["segm"]["all"]["AP"] == pytest.approx(100)
    assert results["bbox"]["all"]["AP"] == pytest.approx(100 * 51 / 101)
    (message,) = caplog.messages[:1]
    assert "1 of 2 annotations have no usable mask" in message
    assert len(caplog.messages) == 2


def test_every_pixel_of_a_box_is_ignored():
    masked, boxed = make_annotation(1, 3, BOXES[1]), make_annotation(2, 3, [10.6, 100.6, 8.7, 5.7])
    mask = np.zeros((SIZE, SIZE))
    mask[100:107, 10:20] = 1  # all pixels that the box touches
    wrong = detect(boxed, 1.0, segmentation=encode(mask))
    del boxed["segmentation"]
    results = evaluate(make_ground_truth([masked, boxed]), [detect(masked), wrong])
    assert results["segm"]["all"]["AP"] == pytest.approx(100)


def test_masks_of_other_classes_do_not_profit_from_an_ignored_box():
    masked, boxed = make_annotation(1, 3, BOXES[1]), make_annotation(2, 7, BOXES[2])
    wrong = detect(boxed, 1.0, category_id=3)
    del boxed["segmentation"]
    results = evaluate(make_ground_truth([masked, boxed]), [detect(masked), wrong])
    assert results["segm"]["all"]["AP"] == pytest.approx(50)


def test_only_boxes_give_no_mask_metrics():
    ground_truth = three_sizes()
    detections = [detect(annotation) for annotation in ground_truth["annotations"]]
    for annotation in ground_truth["annotations"]:
        del annotation["segmentation"], annotation["area"]
    results = evaluate(ground_truth, detections)
    assert all(math.isnan(value) for value in results["segm"]["all"].values())
    assert results["segm"]["num_ignored_without_mask"] == 6
    assert results["bbox"]["all"]["AP"] == pytest.approx(100)
    assert "num_ignored_without_mask" not in results["bbox"]


# --- manners


def test_nothing_is_changed_or_printed(capsys, tmp_path):
    ground_truth, detections = toy_data(2)
    ground_truth["annotations"][0]["segmentation"] = []
    before = copy.deepcopy((ground_truth, detections))
    results = evaluate(ground_truth, detections)
    assert (ground_truth, detections) == before
    assert capsys.readouterr().out == ""
    file = tmp_path / "val.json"
    file.write_text(json.dumps(ground_truth))
    expected = numbers(results)
    assert numbers(evaluate(file, detections)) == pytest.approx(expected, nan_ok=True)


def test_table():
    results = evaluate(three_sizes(), [], groups={"all": range(5), "B": [4]}, iou_types=["segm"])
    results["segm"]["all"]["AP"] = 100.0
    assert format_table(results).splitlines() == [
        "IoU   group      AP    AP50    AP75     APs     APm     APl",
        "segm  all    100.00    0.00    0.00    0.00    0.00    0.00",
        "segm  B           -       -       -       -       -       -",
    ]


# --- the array functions


def test_metrics_of_a_precision_array():
    precision = np.full((10, 101, 3, 4, 2), -1.0)
    precision[:, :, 0] = 0.2
    precision[0, :, 0, 0] = 0.5  # IoU 0.50, all sizes
    precision[5, :, 0, 0] = 0.3  # IoU 0.75
    precision[:, :, 0, 1] = 0.6
    precision[:, :, 0, 2] = 0.7
    precision[:, :, 1, 3] = 0.4
    precision[..., 0] = 0.9  # another limit on detections
    metrics = split_average_precision(precision, [0, 1])
    expected = {"AP": 24, "AP50": 50, "AP75": 30, "APs": 60, "APm": 70, "APl": 30}
    assert metrics == pytest.approx(expected)
    assert tuple(metrics) == METRICS
    assert all(math.isnan(value) for value in split_average_precision(precision, []).values())
    assert class_average_precision(precision) == pytest.approx(
        [24, math.nan, math.nan], nan_ok=True
    )


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match=r"shape \(10, 101, 80, 4\); allowed: \(T, R, K, A, M\)"):
        split_average_precision(np.zeros((10, 101, 80, 4)), [0])
    with pytest.raises(ValueError, match="10 IoU thresholds and 4 object sizes"):
        split_average_precision(np.zeros((5, 101, 80, 4, 1)), [0])


# --- errors


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_id": 9}, "Detection 1 has image_id 9; allowed: the ids of the 1 images"),
        ({"category_id": 0}, "Detection 1 has category_id 0; allowed: the 5 ids.*class index"),
        ({"score": math.nan}, "Detection 1 has score nan; allowed: a finite number"),
        ({"bbox": [1, 2, 3]}, r"Detection 1 has bbox \[1, 2, 3\]; allowed: 4 finite numbers"),
        ({"bbox": [1, 2, 3, math.inf]}, "has bbox .*inf"),
        ({"bbox": None}, "has bbox None"),
        ({"segmentation": encode(np.ones((28, 28)))}, r"size \[28, 28\]; .*\[160, 160\]. Paste"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, "segmentation that is no RLE dict"),
        ({"segmentation": {"size": [SIZE] * 2, "counts": [9]}}, "segmentation that is no RLE dict"),
    ],
)
def test_bad_detections_are_named(keys, message):
    one = make_annotation(1, 3, BOXES[0])
    with pytest.raises(ValueError, match=message):
        evaluate(make_ground_truth([one]), [detect(one), detect(one, **keys)])


def test_only_what_is_scored_is_required_of_a_detection():
    one = make_annotation(1, 3, BOXES[0])
    detection = detect(one)
    del detection["segmentation"]
    assert evaluate(make_ground_truth([one]), [detection], iou_types=["bbox"])
    with pytest.raises(ValueError, match=r"Detection 0 lacks \['segmentation'\]; required: \['im"):
        evaluate(make_ground_truth([one]), [detection])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"category_ids": [3, 8]}, "category_ids has 8, which the ground truth lacks; .*5 categ"),
        ({"category_ids": [3, 3]}, "category_ids has repeated ids; allowed: .*each once"),
        ({"groups": {"A": [0, 5]}}, "Group 'A' holds class index 5; allowed: class indices 0 to 4"),
        ({"groups": {"A": [-1]}}, "Group 'A' holds class index -1"),
        ({"groups": {"per_class": [1]}}, "Group 'per_class' has the name of a result"),
        ({"iou_types": ["keypoints"]}, "iou_types has 'keypoints'; allowed: 'bbox' and 'segm'"),
    ],
)
def test_bad_requests_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        evaluate(three_sizes(), [], **kwargs)


@pytest.mark.parametrize("bbox", [[1], [1.0, 1.0, float("nan"), 5.0]])
def test_ground_truth_boxes_that_cannot_be_read_are_left_out_and_counted(bbox, caplog):
    one, bad = make_annotation(1, 3, BOXES[0]), make_annotation(5, 3, BOXES[1], bbox=bbox)
    results = evaluate(make_ground_truth([one, bad]), [detect(one)])
    assert results["bbox"]["all"]["AP"] == results["segm"]["all"]["AP"] == pytest.approx(100)
    assert "1 annotations of the ground truth have a bbox that is not 4 finite" in caplog.text


def test_bad_ground_truth_is_named(tmp_path):
    with pytest.raises(ValueError, match="ground truth: lacks the list 'annotations'"):
        evaluate({"images": []}, [])
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        evaluate(tmp_path / "none.json", [])


def test_a_table_of_the_categories():
    results = {"bbox": {"per_class": [50.0, math.nan]}, "segm": {"per_class": [0.0, 12.345]}}
    assert format_class_table(results, ["cat", "polar bear"]).splitlines() == [
        "category      bbox    segm",
        "cat          50.00    0.00",
        "polar bear       -   12.35",
    ]
