import json
import logging
import math

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import SemSegEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm

from maskx.data.coco import load_coco
from maskx.data.label_maps import label_map_of_instances, write_label_map
from maskx.data.large_vocabularies import ade20k_150_classes, base_and_novel
from maskx.data.masks import encode_masks
from maskx.data.prepare.voc import prepare_voc
from maskx.data.splits import resolve_split
from maskx.detectron2 import MaskXLargeVocabularyEvaluator, MaskXSemSegEvaluator, register_coco
from maskx.detectron2.datasets import class_names_of

NAMES = ("cat", "dog", "owl", "yak")
SIZE = (12, 16)


def disturb(truth, random, share=0.4, num_classes=4):
    """A prediction that is wrong in about a share of the pixels."""
    guess = random.integers(0, num_classes + 1, truth.shape)
    known = np.where(truth == 255, 0, truth).astype(np.int64)
    return np.where(random.random(truth.shape) < share, guess, known)


def to_scores(label_map, num_labels=5):
    """Scores (K + 1, H, W) whose argmax is a label map."""
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(label_map), num_labels)
    return one_hot.permute(2, 0, 1) + 0.1


def brute_force(pairs, num_labels=5):
    """IoU by label in percent, and pixel accuracy, from sets of pixels."""
    predicted = np.concatenate([p.ravel()[t.ravel() != 255] for p, t in pairs])
    truth = np.concatenate([t.ravel()[t.ravel() != 255] for p, t in pairs])
    iou = []
    for label in range(num_labels):
        union = ((predicted == label) | (truth == label)).sum()
        both = ((predicted == label) & (truth == label)).sum()
        iou.append(100 * both / union if union else math.nan)
    return iou, 100 * (predicted == truth).mean()


def run(evaluator, image_ids, outputs):
    evaluator.reset()
    for image_id, output in zip(image_ids, outputs, strict=True):
        evaluator.process([{"image_id": image_id}], [{"sem_seg": output}])
    return evaluator.evaluate()


@pytest.fixture
def write_maps(tmp_path):
    """Write and register a data set of label maps: ``write_maps(maps)`` with ids from 1."""

    def write(maps, name="maps"):
        images = []
        for image_id, label_map in enumerate(maps, start=1):
            write_label_map(tmp_path / f"{name}{image_id}.png", label_map, num_classes=4)
            cv2.imwrite(str(tmp_path / f"{name}{image_id}.jpg"), np.zeros((*SIZE, 3), np.uint8))
            height, width = label_map.shape
            images.append(
                {"id": image_id, "file_name": f"{name}{image_id}.jpg"}
                | {"height": height, "width": width, "label_map_file_name": f"{name}{image_id}.png"}
            )
        categories = [{"id": 10 * c + 10, "name": name_} for c, name_ in enumerate(NAMES)]
        content = {"images": images, "annotations": [], "categories": categories}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        register_coco(name, path, tmp_path)
        return name

    return write


@pytest.fixture
def maps():
    """Three label maps with ignored pixels, and predictions of them."""
    random = np.random.default_rng(0)
    truths = random.integers(0, 5, (3, *SIZE))
    truths[random.random(truths.shape) < 0.2] = 255
    return truths, [disturb(truth, random) for truth in truths]


def test_it_agrees_with_a_brute_force_count(maps, write_maps, tmp_path, caplog):
    truths, predictions = maps
    split = tmp_path / "split.txt"
    split.write_text("owl\ncat\n")
    evaluator = MaskXSemSegEvaluator(write_maps(truths), split=split)
    with caplog.at_level(logging.INFO):
        results = run(evaluator, [1, 2, 3], map(to_scores, predictions))
    iou, accuracy = brute_force(list(zip(predictions, truths, strict=True)))
    assert 20 < iou[0] < 80
    assert list(results) == ["sem_seg"]
    assert results["sem_seg"] == pytest.approx(
        {
            "mIoU": np.mean(iou),
            "mIoU_A": (iou[1] + iou[3]) / 2,
            "mIoU_B": (iou[2] + iou[4]) / 2,
            "background": iou[0],
            "pixel_accuracy": accuracy,
            **{f"IoU-{name}": value for name, value in zip(NAMES, iou[1:], strict=True)},
        }
    )
    assert f"mIoU all{np.mean(iou):>14.2f}" in caplog.text
    with caplog.at_level(logging.INFO, logger="detectron2.evaluation.testing"):
        print_csv_format(results)
    assert "copypaste: mIoU,mIoU_A,mIoU_B,background,pixel_accuracy" in caplog.text


def test_prepared_voc_is_evaluated_from_its_files(tmp_path):
    """From VOC's folders to mean IoU, by Detectron2's loader and its evaluation loop."""
    voc, lists = tmp_path / "VOC2012", tmp_path / "VOC2012/ImageSets/Segmentation"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (voc / folder).mkdir(parents=True)
    lists.mkdir(parents=True)
    random = np.random.default_rng(0)
    truths = {}
    for number, folder in enumerate(["Class", "Class", "Class", "ClassAug"], start=1):
        truths[number] = random.integers(0, 21, SIZE, np.uint8)
        truths[number][0] = 255
        name = f"2007_{number:06d}"
        cv2.imwrite(str(voc / f"Segmentation{folder}/{name}.png"), truths[number])
        cv2.imwrite(str(voc / f"JPEGImages/{name}.jpg"), np.zeros((*SIZE, 3), np.uint8))
    (lists / "train.txt").write_text("2007_000001\n")
    (lists / "val.txt").write_text("2007_000002\n2007_000003\n")
    sbd, output = voc / "SegmentationClassAug", tmp_path / "voc2012"
    prepare_voc(voc, sbd, output, allow_other_counts=True)
    for part, level in (("val", "mask"), ("trainaug", "mask"), ("trainaug_tags", "image")):
        register_coco(part, output / f"voc2012_{part}.json", voc / "JPEGImages")
        records = DatasetCatalog.get(part)
        assert [record["supervision"] for record in records] == [level, level]
    predictions = {n: disturb(truths[n], random, num_classes=20) for n in (2, 3)}

    def model(inputs):
        return [{"sem_seg": torch.as_tensor(predictions[i["image_id"] % 10])} for i in inputs]

    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    loader = build_detection_test_loader(DatasetCatalog.get("val"), mapper=mapper)
    results = inference_on_dataset(model, loader, MaskXSemSegEvaluator("val"))["sem_seg"]
    iou, accuracy = brute_force([(predictions[n], truths[n]) for n in (2, 3)], num_labels=21)
    assert results["mIoU"] == pytest.approx(np.mean(iou))
    assert results["IoU-tvmonitor"] == pytest.approx(iou[20])
    assert results["pixel_accuracy"] == pytest.approx(accuracy)


def test_label_maps_are_scored_as_scores_are(maps, write_maps):
    truths, predictions = maps
    evaluator = MaskXSemSegEvaluator(write_maps(truths))
    expected = run(evaluator, [1, 2, 3], map(to_scores, predictions))
    found = run(evaluator, [1, 2, 3], map(torch.as_tensor, predictions))
    np.testing.assert_equal(found, expected)
    small = [torch.as_tensor(p, dtype=torch.uint8) for p in predictions]
    np.testing.assert_equal(run(evaluator, [1, 2, 3], small), expected)


def test_objects_are_drawn_where_there_is_no_label_map(tiny_train, scenes):
    """The same from our reader, and from Detectron2's with its other kind of boxes."""
    records = load_coco(*scenes).records
    truths = [label_map_of_instances(record, 4) for record in records]
    random = np.random.default_rng(0)
    predictions = [disturb(truth, random) for truth in truths]
    iou, _ = brute_force(list(zip(predictions, truths, strict=True)))
    register_coco_instances("core", {}, *map(str, scenes))
    for name in (tiny_train, "core"):
        evaluator = MaskXSemSegEvaluator(name, split="scenes_half")
        results = run(evaluator, [r["image_id"] for r in records], map(to_scores, predictions))
        assert results["sem_seg"]["mIoU"] == pytest.approx(np.mean(iou))
        assert results["sem_seg"]["background"] == pytest.approx(iou[0])


def test_boxes_of_detectron2_are_ignored_in_their_own_form(write_coco):
    """A box [x, y, width, height] without a mask is no background, whoever reads it."""
    json_file, root = write_coco([{"category_id": 10, "bbox": [20, 10, 5, 6]}])
    register_coco("ours", json_file, root)
    register_coco_instances("core", {}, str(json_file), str(root))
    predicted = torch.zeros(40, 60, dtype=torch.int64)
    predicted[10:16, 20:25] = 2
    for name in ("ours", "core"):
        results = run(MaskXSemSegEvaluator(name), [7], [predicted])["sem_seg"]
        assert results["background"] == results["mIoU"] == results["pixel_accuracy"] == 100
        assert math.isnan(results["IoU-cat"])
    predicted[16, 20] = 2
    results = run(MaskXSemSegEvaluator("core"), [7], [predicted])["sem_seg"]
    assert results["pixel_accuracy"] == pytest.approx(100 * (1 - 1 / (40 * 60 - 30)))


def test_crowds_are_ignored(write_coco):
    crowd = np.zeros((1, 40, 60), bool)
    crowd[0, 10:16, 20:25] = True
    (mask,) = encode_masks(crowd)
    annotation = {"category_id": 10, "bbox": [20, 10, 5, 6], "iscrowd": 1, "segmentation": mask}
    json_file, root = write_coco([annotation])
    register_coco("ours", json_file, root)
    register_coco_instances("core", {}, str(json_file), str(root))
    for name in ("ours", "core"):
        predicted = torch.as_tensor(crowd[0] * 3)
        assert run(MaskXSemSegEvaluator(name), [7], [predicted])["sem_seg"]["mIoU"] == 100


def run_core(name, outputs):
    """Detectron2's own evaluator on the label maps of a data set."""
    records = [
        {"file_name": record["file_name"], "sem_seg_file_name": record["label_map_file_name"]}
        for record in DatasetCatalog.get(name)
    ]
    DatasetCatalog.register("core", lambda: records)
    MetadataCatalog.get("core").set(stuff_classes=["background", *NAMES], ignore_label=255)
    evaluator = SemSegEvaluator("core", distributed=False)
    evaluator.reset()
    for record, output in zip(records, outputs, strict=True):
        evaluator.process([record], [{"sem_seg": output}])
    return evaluator.evaluate()["sem_seg"]


def test_it_agrees_with_detectron2_where_every_class_occurs(maps, write_maps):
    truths, predictions = maps
    name = write_maps(truths)
    scores = [to_scores(prediction) for prediction in predictions]
    found = run(MaskXSemSegEvaluator(name), [1, 2, 3], scores)["sem_seg"]
    core = run_core(name, scores)
    assert found["mIoU"] == pytest.approx(core["mIoU"])
    assert found["background"] == pytest.approx(core["IoU-background"])
    assert found["pixel_accuracy"] == pytest.approx(core["pACC"])
    for name in NAMES:
        assert found[f"IoU-{name}"] == pytest.approx(core[f"IoU-{name}"])


def test_detectron2_leaves_out_a_class_that_is_only_predicted(maps, write_maps):
    truths, predictions = maps
    truths[truths >= 3] = 255  # owl is only predicted, yak neither
    predictions = [np.where(prediction == 4, 0, prediction) for prediction in predictions]
    name = write_maps(truths)
    scores = [to_scores(prediction) for prediction in predictions]
    found = run(MaskXSemSegEvaluator(name), [1, 2, 3], scores)["sem_seg"]
    core = run_core(name, scores)
    assert found["IoU-owl"] == 0
    assert math.isnan(core["IoU-owl"])
    assert math.isnan(found["IoU-yak"])
    assert math.isnan(core["IoU-yak"])
    assert found["mIoU"] == pytest.approx(core["mIoU"] * 3 / 4)
    assert found["pixel_accuracy"] == pytest.approx(core["pACC"])


def test_processes_are_gathered(maps, write_maps, monkeypatch):
    truths, predictions = maps
    name = write_maps(truths)
    scores = [to_scores(prediction) for prediction in predictions]
    expected = run(MaskXSemSegEvaluator(name), [1, 2, 3], scores)
    other = MaskXSemSegEvaluator(name)
    other.process([{"image_id": 3}], [{"sem_seg": scores[2]}])
    sent = []

    def gather(data, dst):
        sent.append(data)
        return [data, other._counts]

    monkeypatch.setattr(comm, "gather", gather)
    evaluator = MaskXSemSegEvaluator(name)
    np.testing.assert_equal(run(evaluator, [1, 2], scores[:2]), expected)
    np.testing.assert_equal(evaluator.evaluate(), expected)  # nothing is added twice
    alone = MaskXSemSegEvaluator(name, distributed=False)
    assert run(alone, [1, 2], scores[:2]) != expected
    assert len(sent) == 2
    monkeypatch.setattr(comm, "gather", lambda data, dst: [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert run(evaluator, [1, 2], scores[:2]) == {}


def test_nothing_is_left_after_a_reset(maps, write_maps):
    truths, predictions = maps
    evaluator = MaskXSemSegEvaluator(write_maps(truths))
    run(evaluator, [1], [to_scores(predictions[0])])
    results = run(evaluator, [], [])["sem_seg"]
    assert all(map(math.isnan, results.values()))


@pytest.mark.parametrize(
    ("sem_seg", "message"),
    [
        (torch.zeros(4, *SIZE), r"\(4, 12, 16\) and dtype torch\.float32\. Allowed: scores \(5, H"),
        (torch.zeros(SIZE), r"\(12, 16\) and dtype torch\.float32"),
        (torch.zeros(5, *SIZE, dtype=torch.int64), r"\(5, 12, 16\) and dtype torch\.int64"),
    ],
)
def test_predictions_of_another_form_are_named(maps, write_maps, sem_seg, message):
    evaluator = MaskXSemSegEvaluator(write_maps(maps[0]))
    with pytest.raises(ValueError, match=rf"sem_seg of image 2 has shape {message}"):
        evaluator.process([{"image_id": 2}], [{"sem_seg": sem_seg}])


def test_predictions_that_do_not_fit_the_truth_are_named(maps, write_maps):
    evaluator = MaskXSemSegEvaluator(write_maps(maps[0]))
    with pytest.raises(ValueError, match=r"image 2 has shape \(6, 8\), its truth \(12, 16\)\. Res"):
        evaluator.process([{"image_id": 2}], [{"sem_seg": torch.zeros(5, 6, 8)}])
    with pytest.raises(ValueError, match=r"image 2 has the value 5\. Allowed"):
        evaluator.process([{"image_id": 2}], [{"sem_seg": torch.full(SIZE, 5)}])
    with pytest.raises(ValueError, match=r"Image 4 is not among the 3 of data set 'maps'\. Was"):
        evaluator.process([{"image_id": 4}], [{"sem_seg": torch.zeros(SIZE)}])


def test_bad_data_sets_are_named(maps, write_maps, scenes, tmp_path):
    with pytest.raises(ValueError, match="There is no data set 'typo'"):
        MaskXSemSegEvaluator("typo")
    with pytest.raises(FileNotFoundError, match="neither a named category split nor a file"):
        MaskXSemSegEvaluator(write_maps(maps[0]), split="none")
    register_coco("files", tmp_path / "maps.json", tmp_path, class_names=[*NAMES, "zebra"])
    with pytest.raises(ValueError, match=r"maps\.json: image \d has a label map, .* list of 5 cl"):
        MaskXSemSegEvaluator("files")
    names = [c["name"] for c in json.loads(scenes[0].read_text())["categories"]]
    register_coco("more", *scenes, class_names=[*names, "zebra"])
    message = (
        "data set 'more' has 4 categories, which are not its class list of 5, or not in its order"
        r"\. .*without class_names"
    )
    with pytest.raises(ValueError, match=message):
        MaskXSemSegEvaluator("more")
    DatasetCatalog.register("bare", lambda: [{"file_name": "a.jpg"}])
    MetadataCatalog.get("bare").thing_classes = ["cat"]
    with pytest.raises(ValueError, match=r"'bare' has a record \(a\.jpg\) without image_id"):
        MaskXSemSegEvaluator("bare")


def test_ids_that_are_known_only_after_reading_are_checked():
    def read():
        MetadataCatalog.get("late").thing_dataset_id_to_contiguous_id = {1: 0}
        return []

    DatasetCatalog.register("late", read)
    MetadataCatalog.get("late").thing_classes = ["cat", "dog"]
    with pytest.raises(ValueError, match=r"'late' has 1 categories, .* or not in its order"):
        MaskXSemSegEvaluator("late")


# Large vocabularies


def test_base_and_novel_classes_are_scored_without_a_background(maps, write_maps, tmp_path, caplog):
    truths, predictions = maps
    labels = [np.maximum(prediction, 1) for prediction in predictions]
    split = tmp_path / "split.txt"
    split.write_text("owl\ncat\n")
    evaluator = MaskXLargeVocabularyEvaluator(write_maps(truths), split=resolve_split(split, NAMES))
    with caplog.at_level(logging.INFO):
        results = run(evaluator, [1, 2, 3], map(torch.from_numpy, labels))
    known = np.where(truths == 0, 255, truths)
    iou, accuracy = brute_force(list(zip(labels, known, strict=True)))
    assert results["sem_seg"] == pytest.approx(
        {
            "mIoU": np.mean(iou[1:]),
            "mIoU_base": (iou[1] + iou[3]) / 2,
            "mIoU_novel": (iou[2] + iou[4]) / 2,
            "pixel_accuracy": accuracy,
            **{f"IoU-{name}": value for name, value in zip(NAMES, iou[1:], strict=True)},
        }
    )
    assert "maps: 4 classes, 2 base and 2 novel (split" in caplog.text
    assert "background" not in caplog.text
    assert f"mIoU novel{(iou[2] + iou[4]) / 2:>12.2f}" in caplog.text


def test_without_a_split_there_is_neither_base_nor_novel(maps, write_maps, caplog):
    evaluator = MaskXLargeVocabularyEvaluator(write_maps(maps[0]))
    with caplog.at_level(logging.INFO):
        results = run(evaluator, [1], [torch.ones(SIZE, dtype=torch.int64)])["sem_seg"]
    assert results["mIoU"] > 0
    assert math.isnan(results["mIoU_base"])
    assert math.isnan(results["mIoU_novel"])
    assert "4 classes, 0 base and 0 novel (no split)" in caplog.text


def test_ids_of_one_name_are_one_class(maps, write_maps):
    """As COCO-Stuff's seven kinds of wall are, by LarvSeg's names."""
    name = write_maps(maps[0])
    DatasetCatalog.register("walls", lambda: DatasetCatalog.get(name))
    MetadataCatalog.get("walls").thing_classes = ["wall", "dog", "wall", "yak"]
    evaluator = MaskXLargeVocabularyEvaluator("walls")
    first = np.array([1, 1, 2, 1, 4, *[1] * 251])  # the label of a name is that of its first id
    perfect = [torch.from_numpy(first[truth]) for truth in maps[0]]
    results = run(evaluator, [1, 2, 3], perfect)["sem_seg"]
    assert {n for n in results if n.startswith("IoU-")} == {"IoU-wall", "IoU-dog", "IoU-yak"}
    assert results["mIoU"] == results["pixel_accuracy"] == 100


def test_things_and_stuff_are_both_scored(make_joint_cfg):
    """Perfect predictions have 100 in both, made from the files alone."""
    name = "maskx_scenes_sparse_stuff_val"
    things = class_names_of("maskx_scenes_sparse_train")
    evaluator = MaskXLargeVocabularyEvaluator(name)
    data = load_coco(MetadataCatalog.get(name).json_file, MetadataCatalog.get(name).image_root)
    for record in data.records:
        labels = label_map_of_instances(record, 4).astype(np.int64)
        ground = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
        labels[ground > 0] = len(things) + ground[ground > 0]
        sample = {"image_id": record["image_id"]}
        evaluator.process([sample], [{"sem_seg": torch.from_numpy(labels)}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["mIoU"] == results["pixel_accuracy"] == 100
    known = [n for n, value in results.items() if n.startswith("IoU-") and value == 100]
    assert len(known) >= 6


@pytest.mark.parametrize(
    ("split", "num_base", "num_novel"), [("ade150_raw", 58, 92), ("ade150_renamed", 63, 87)]
)
def test_both_rules_of_the_paper_divide_ade20k(tmp_path, caplog, split, num_base, num_novel):
    names = [entry.name for entry in ade20k_150_classes()]
    label_map = np.arange(1, 151, dtype=np.uint8).reshape(10, 15)
    write_label_map(tmp_path / "1_labels.png", label_map, num_classes=150)
    record = {"file_name": "1.png", "image_id": 1, "height": 10, "width": 15}
    record["label_map_file_name"] = str(tmp_path / "1_labels.png")
    DatasetCatalog.register("ade", lambda: [record])
    MetadataCatalog.get("ade").thing_classes = names
    evaluator = MaskXLargeVocabularyEvaluator("ade", split=resolve_split(split, names))
    base = base_and_novel(split)[0]
    predicted = label_map.astype(np.int64)
    # Every novel pixel is wrong, and takes the first base class.
    wrong = np.array([name not in base for name in names]).reshape(10, 15)
    predicted[wrong] = names.index(base[0]) + 1
    with caplog.at_level(logging.INFO):
        results = run(evaluator, [1], [torch.from_numpy(predicted)])["sem_seg"]
    assert f"150 classes, {num_base} base and {num_novel} novel (split {split})" in caplog.text
    expected = 100 * (num_base - 1 + 1 / (num_novel + 1)) / num_base
    assert results["mIoU_base"] == pytest.approx(expected)
    assert results["mIoU_novel"] == 0
    assert results["mIoU"] == pytest.approx(expected * num_base / 150)
