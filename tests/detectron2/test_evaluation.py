import contextlib
import io
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskx.detectron2 import MaskXCOCOEvaluator, register_coco

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture
def predictions(tiny_train):
    """Make inputs and outputs of a model that is wrong by ``noise``: 0 for a perfect one."""

    def make(noise):
        random = np.random.RandomState(0)
        inputs, outputs = [], []
        for record in DatasetCatalog.get(tiny_train):
            size = record["height"], record["width"]
            truth = annotations_to_instances(record["annotations"], size, mask_format="bitmask")
            instances = Instances(size)
            shift = random.normal(0, 1 + noise * 5, (len(truth), 4)) * noise
            boxes = truth.gt_boxes.tensor + torch.as_tensor(shift, dtype=torch.float32)
            instances.pred_boxes = Boxes(boxes)
            instances.pred_boxes.clip(size)
            wrong = torch.as_tensor(random.rand(len(truth)) < 0.3 * noise)
            instances.pred_classes = torch.where(
                wrong, (truth.gt_classes + 1) % 4, truth.gt_classes
            )
            instances.scores = torch.as_tensor(random.rand(len(truth)))
            rolled = [
                torch.roll(mask, tuple(random.randint(0, 1 + int(noise * 4), 2)), (0, 1))
                for mask in truth.gt_masks
            ]
            instances.pred_masks = torch.stack(rolled)
            inputs.append({"image_id": record["image_id"]})
            outputs.append({"instances": instances})
        return inputs, outputs

    return make


def run(evaluator, inputs, outputs):
    evaluator.reset()
    for sample, output in zip(inputs, outputs, strict=True):
        evaluator.process([sample], [output])
    return evaluator.evaluate()


def test_it_agrees_with_detectron2_and_with_cocoeval_on_the_categories(
    predictions, tiny_train, tmp_path
):
    inputs, outputs = predictions(noise=0.5)
    split = tmp_path / "split.txt"
    names = MetadataCatalog.get(tiny_train).thing_classes
    split.write_text(f"{names[0]}\n{names[2]}\n")
    evaluator = MaskXCOCOEvaluator(tiny_train, split=split, output_dir=str(tmp_path))
    results = run(evaluator, inputs, outputs)
    assert set(results) == {f"{t}{g}" for t in ("bbox", "segm") for g in ("", "_A", "_B")}

    core = run(COCOEvaluator(tiny_train, use_fast_impl=False), inputs, outputs)
    for task in ("bbox", "segm"):
        assert 5 < results[task]["AP"] < 95
        assert set(results[task]) == set(core[task])
        for metric, value in core[task].items():
            assert results[task][metric] == pytest.approx(value, abs=1e-9, nan_ok=True), metric

    detections = json.loads((tmp_path / "coco_instances_results.json").read_text())
    for task in ("bbox", "segm"):
        for group, ids in {"A": [1, 3], "B": [2, 4]}.items():
            expected = official(MetadataCatalog.get(tiny_train).json_file, detections, task, ids)
            found = results[f"{task}_{group}"]
            for metric, value in zip(METRICS, expected, strict=True):
                assert found[metric] == pytest.approx(value, abs=1e-9, nan_ok=True), metric


def test_images_that_the_reader_left_out_are_no_truth(predictions, tiny_train):
    inputs, outputs = predictions(noise=0)
    results = run(MaskXCOCOEvaluator(tiny_train), inputs[1:], outputs[1:])
    assert results["bbox"]["AP"] == pytest.approx(100)


def official(json_file, detections, task, category_ids):
    """The six numbers of COCOeval restricted to some categories, in percent."""
    keys = ("image_id", "category_id", "score", {"segm": "segmentation"}.get(task, task))
    detections = [{key: d[key] for key in keys} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        evaluation = COCOeval(truth, truth.loadRes(detections), task)
        evaluation.params.catIds = category_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [math.nan if value < 0 else 100 * value for value in evaluation.stats[:6]]


def test_perfect_predictions_score_100(predictions, tiny_train):
    results = run(MaskXCOCOEvaluator(tiny_train, split="scenes_half"), *predictions(noise=0))
    for task in ("bbox", "segm", "bbox_A", "segm_A", "bbox_B", "segm_B"):
        assert results[task]["AP"] == pytest.approx(100)
    per_class = {f"AP-{name}" for name in MetadataCatalog.get(tiny_train).thing_classes}
    assert set(results["segm"]) == {*METRICS, *per_class}


def test_a_file_of_lvis_is_scored_by_its_rule(predictions, tiny_train, tmp_path):
    """A detection where nobody looked for its category is not wrong; frequencies stand beside."""
    metadata = MetadataCatalog.get(tiny_train)
    content = json.loads(Path(metadata.json_file).read_text())
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for category, letter in zip(content["categories"], "rcff", strict=True):
        category["frequency"] = letter
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    register_coco("lvis", tmp_path / "lvis.json", metadata.image_root)
    inputs, outputs = predictions(noise=0)
    for output in outputs:  # what is there is found as what is not there too, and surer so
        found = output["instances"]
        others = set(range(4)) - set(found.pred_classes.tolist())
        wrong = [found[:] for _ in others]
        for each, index in zip(wrong, others, strict=True):
            each.pred_classes = torch.full_like(found.pred_classes, index)
            each.scores = torch.ones(len(found))
        output["instances"] = Instances.cat([found, *wrong])
    plain, federated = (
        run(MaskXCOCOEvaluator(name), inputs, outputs) for name in (tiny_train, "lvis")
    )
    for task in ("bbox", "segm"):
        assert plain[task]["AP"] < 99
        for name in ("", "_rare", "_common", "_frequent"):
            assert federated[f"{task}{name}"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("processed", [True, False])
def test_no_predictions_score_0(predictions, tiny_train, processed):
    inputs, outputs = predictions(noise=0)
    outputs = [{"instances": output["instances"][:0]} for output in outputs]
    evaluator = MaskXCOCOEvaluator(tiny_train, split="scenes_half")
    results = run(evaluator, *((inputs, outputs) if processed else ([], [])))
    assert results["segm"]["AP"] == results["segm_B"]["AP"] == results["bbox_A"]["AP50"] == 0


def test_without_b_its_metrics_are_nan(predictions, tiny_train):
    results = run(MaskXCOCOEvaluator(tiny_train), *predictions(noise=0.5))
    assert results["segm_A"] == {m: results["segm"][m] for m in METRICS}
    assert all(map(math.isnan, results["segm_B"].values()))


def test_annotations_without_masks_can_be_evaluated(write_coco):
    box = {"category_id": 10, "bbox": [5, 5, 20, 20]}
    masked = {"category_id": 20, "bbox": [30, 5, 20, 20]}
    masked["segmentation"] = [[30, 5, 50, 5, 50, 25, 30, 25]]
    register_coco("farm", *write_coco([box, masked]))
    instances = Instances((40, 60), scores=torch.tensor([0.9, 0.8]))
    instances.pred_boxes = Boxes([[5.0, 5, 25, 25], [30, 5, 50, 25]])
    instances.pred_classes = torch.tensor([0, 1])
    instances.pred_masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    instances.pred_masks[0, 5:25, 5:25] = instances.pred_masks[1, 5:25, 30:50] = True
    results = run(MaskXCOCOEvaluator("farm"), [{"image_id": 7}], [{"instances": instances}])
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP-dog"] == pytest.approx(100)
    assert math.isnan(results["segm"]["AP-cat"])


def test_half_labelled_data_has_the_numbers_of_cocoeval(predictions, tiny_train, tmp_path):
    """Boxes are scored over all objects, masks over the categories that have some."""
    file = Path(MetadataCatalog.get(tiny_train).json_file)
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        if annotation["category_id"] in (1, 2):
            del annotation["segmentation"]
    half = tmp_path / "half.json"
    half.write_text(json.dumps(content))
    register_coco("half", half, file.parent)
    inputs, outputs = predictions(noise=0.5)
    results = run(MaskXCOCOEvaluator("half", output_dir=str(tmp_path)), inputs, outputs)
    detections = json.loads((tmp_path / "coco_instances_results.json").read_text())
    for task, category_ids in {"bbox": [1, 2, 3, 4], "segm": [3, 4]}.items():
        expected = official(file, detections, task, category_ids)
        assert 5 < expected[0] < 95
        for metric, value in zip(METRICS, expected, strict=True):
            assert results[task][metric] == pytest.approx(value, abs=1e-9, nan_ok=True), metric


def test_boxes_alone(predictions, tiny_train):
    inputs, outputs = predictions(noise=0)
    for output in outputs:
        output["instances"].remove("pred_masks")
    results = run(MaskXCOCOEvaluator(tiny_train, iou_types=("bbox",)), inputs, outputs)
    assert set(results) == {"bbox", "bbox_A", "bbox_B"}


def test_processes_are_gathered(predictions, tiny_train, monkeypatch):
    inputs, outputs = predictions(noise=0.5)
    expected = run(MaskXCOCOEvaluator(tiny_train), inputs, outputs)
    other = MaskXCOCOEvaluator(tiny_train)
    other.process(inputs[3:], outputs[3:])
    monkeypatch.setattr(
        comm, "gather", lambda data, dst: [data, (other._results, 0, other._image_ids)]
    )
    results = run(MaskXCOCOEvaluator(tiny_train), inputs[:3], outputs[:3])
    np.testing.assert_equal(results, expected)
    monkeypatch.setattr(comm, "gather", lambda data, dst: [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert run(MaskXCOCOEvaluator(tiny_train), inputs[:3], outputs[:3]) == {}


def test_classes_without_annotations_are_left_out_and_counted(
    predictions, tiny_train, scenes, tmp_path, caplog
):
    """The same predictions score as in the data set's own class list."""
    inputs, outputs = predictions(noise=0.5)
    names = MetadataCatalog.get(tiny_train).thing_classes
    larger = ["zebra", names[2], names[0], "cat", names[3], names[1]]
    register_coco("part", *scenes, class_names=larger)
    (tmp_path / "own.txt").write_text(f"{names[0]}\n{names[3]}\n")
    (tmp_path / "larger.txt").write_text(f"cat\n{names[0]}\n{names[3]}\n")
    expected = run(MaskXCOCOEvaluator(tiny_train, split=tmp_path / "own.txt"), inputs, outputs)

    place = torch.tensor([larger.index(name) for name in names])
    for output in outputs:
        instances = output["instances"]
        instances.pred_classes = place[instances.pred_classes]
        others = instances[:1]  # of classes 0 and 3, which the file does not annotate
        others.pred_classes = torch.tensor([0])
        more = Instances.cat([others, instances, others])
        more.pred_classes[-1] = 3
        output["instances"] = more
    evaluator = MaskXCOCOEvaluator("part", split=tmp_path / "larger.txt", output_dir=str(tmp_path))
    with caplog.at_level(logging.INFO):
        results = run(evaluator, inputs, outputs)
    assert results == expected
    assert 5 < results["segm_A"]["AP"] < 95
    (message,) = [m for m in caplog.messages if "left out" in m]
    assert message.startswith("12 detections of classes that ")

    detections = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {d["category_id"] for d in detections} == {1, 2, 3, 4}
    for task in ("bbox", "segm"):
        for group, ids in {"": [1, 2, 3, 4], "_A": [1, 4], "_B": [2, 3]}.items():
            stats = official(MetadataCatalog.get("part").json_file, detections, task, ids)
            found = [results[f"{task}{group}"][metric] for metric in METRICS]
            assert found == pytest.approx(stats, abs=1e-9, nan_ok=True)


def test_left_out_detections_of_all_processes_are_counted(
    predictions, tiny_train, scenes, monkeypatch, caplog
):
    inputs, outputs = predictions(noise=0)
    names = MetadataCatalog.get(tiny_train).thing_classes
    register_coco("part", *scenes, class_names=["zebra", *names])
    for output in outputs:
        output["instances"].pred_classes[:] = 0
    evaluator = MaskXCOCOEvaluator("part")
    monkeypatch.setattr(comm, "gather", lambda data, dst: [data, ([], 1000, [])])
    with caplog.at_level(logging.INFO):
        results = run(evaluator, inputs, outputs)
    total = 1000 + sum(len(output["instances"]) for output in outputs)
    assert f"{total} detections of classes that" in caplog.text
    assert "There is no detection to score: every AP is 0." in caplog.text
    assert results["bbox"]["AP"] == 0
    evaluator.reset()
    assert evaluator._num_left_out == 0


def test_incomplete_metadata_is_named():
    DatasetCatalog.register("bare", lambda: [])
    MetadataCatalog.get("bare").thing_classes = ["cat"]
    with pytest.raises(ValueError, match=r"'bare' lacks json_file, thing_dataset_id_to_contig"):
        MaskXCOCOEvaluator("bare")
