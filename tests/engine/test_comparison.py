"""Predictions beside the truth, and the page of it: models that say what they are told."""

import html
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_model import OneWeight

import maskx
from maskx.cli.main import main
from maskx.data.coco import load_coco
from maskx.data.masks import encode_masks
from maskx.engine.comparison import compare, in_classes_of, panoptic_quality
from maskx.engine.results import Prediction
from maskx.engine.runs import Run
from maskx.engine.system import System, register_system
from maskx.engine.training import TrainingSettings, load_weights, train
from maskx.supervision import split_one_side

NAMES = ("cat", "dog")
SIZE = (20, 40)


def box_mask(x1, y1, x2, y2):
    mask = np.zeros(SIZE, bool)
    mask[y1:y2, x1:x2] = True
    return mask


class Told(OneWeight):
    """Predicts cats on the left half, and dogs on the right half of images with a red corner."""

    def results(self, samples):
        return [
            {"red": bool(s["image"][0, 0, 0] > 128), "concepts": s.get("concepts", NAMES)}
            for s in samples
        ]


HALVES = {"cat": (0, 0, 20, 20), "dog": (20, 0, 40, 20)}


def instances(result, class_names):
    names = NAMES if result["red"] else NAMES[:1]
    return Prediction(
        tuple(class_names),
        boxes=np.array([HALVES[name] for name in names], float),
        segmentations=encode_masks(np.array([box_mask(*HALVES[name]) for name in names])),
        scores=np.full(len(names), 0.9),
        class_indices=np.arange(len(names)),
    )


def many_instances(result, class_names):
    """Finds 120 surer things than the cat, as a model may whose configuration allows 300."""
    boxes = [(30, 0, 31, 1)] * 120 + [HALVES["cat"]]
    return Prediction(
        tuple(class_names),
        boxes=np.array(boxes, float),
        segmentations=encode_masks(np.array([box_mask(*box) for box in boxes])),
        scores=np.array([0.9] * 120 + [0.5]),
        class_indices=np.zeros(len(boxes), int),
    )


def label_maps(result, class_names):
    labels = np.where(box_mask(*HALVES["cat"]), 1, 2 if result["red"] else 0)
    return Prediction(tuple(class_names), label_map=labels)


def concepts(result, class_names):
    names = tuple(result["concepts"])
    return Prediction(
        names,
        segmentations=encode_masks(np.array([box_mask(*HALVES[name]) for name in names])),
        scores=np.ones(len(names)),
        class_indices=np.arange(len(names)),
    )


def _open(run, device):
    model = Told().to(device)
    load_weights(model, run.weights_file)
    return model


for name, prediction, more in (
    ("told_instances", instances, {}),
    ("told_many", many_instances, {}),
    ("told_maps", label_maps, {"words": {"told_gt": "Told, true labels", "cat": "the animal"}}),
    ("told_stuff", label_maps, {"has_background": False}),
    ("told_concepts", concepts, {"takes_concepts": True}),
):
    system = System(name, "Told", lambda o, r: {}, open=_open, prediction=prediction, **more)
    register_system(name, system)


@pytest.fixture
def folder(tmp_path):
    """Three images: all right; half of each object missed; nothing to compare with."""
    truth = [
        [("cat", (0, 0, 20, 20)), ("dog", (20, 0, 40, 20))],
        [("cat", (0, 0, 20, 10)), ("dog", (20, 0, 40, 10))],
        [],
    ]
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": n} for i, n in ((7, "cat"), (3, "dog"))]
    for image_id, objects in enumerate(truth, start=1):
        image = np.full((*SIZE, 3), 90, np.uint8)
        image[0, 0, 2] = 255 * (image_id == 1)
        cv2.imwrite(str(tmp_path / f"{image_id}.png"), image)
        content["images"].append(
            {"id": image_id, "file_name": f"{image_id}.png", "height": 20, "width": 40}
        )
        for name, (x1, y1, x2, y2) in objects:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": {"cat": 7, "dog": 3}[name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    (tmp_path / "val.json").write_text(json.dumps(content))
    return tmp_path


def make_run(folder, system):
    split = split_one_side("split", NAMES, with_masks=("cat",))
    run = Run(system=system, host="pip", class_names=NAMES, settings={}, split=split)
    settings = TrainingSettings(iterations=1, batch_size=1, learning_rate=1e-3)
    train(Told(), lambda start, stop: [[{}]], settings, output_dir=folder / system, run=run)
    return folder / system


@pytest.mark.parametrize(
    ("system", "measure", "images", "categories"),
    [
        # An IoU of 1/2 is not above 1/2; the dog is not found. Each AP: one of two, the first at
        # full precision, up to the recall of 1/2, which is 51 of 101 recall points.
        # The cat's second is matched at the threshold 0.5 of ten.
        ("told_instances", "mask AP", {"1.png": 1, "2.png": 0}, {"dog": 100 * 51 / 101}),
        # The 361st and the 362nd of all cats are right, the latter at the threshold 0.5 alone.
        (
            "told_many",
            "mask AP",
            {"1.png": 1 / 61.5, "2.png": 0},
            {"cat": 10 * 2 / 362 + 90 * 51 / 101 / 361},
        ),
        # Of the second image's cat 200 of 400 predicted pixels are right, and no dog is found.
        (
            "told_maps",
            "IoU",
            {"1.png": 1, "2.png": 0.25},
            {"cat": 100 * 600 / 800, "dog": 100 * 400 / 600},
        ),
        # What nobody labelled counts nowhere.
        (
            "told_stuff",
            "IoU",
            {"1.png": 1, "2.png": 0.5},
            {"cat": 100, "dog": 100 * 400 / 600},
        ),
        ("told_concepts", "mean IoU", {"1.png": 1, "2.png": 0.5}, {"cat": 75, "dog": 75}),
    ],
)
def test_images_and_categories(folder, system, measure, images, categories):
    predictor = maskx.open_run(make_run(folder, system))
    data = in_classes_of(predictor, load_coco(folder / "val.json", folder))
    found = compare(predictor, data)
    values = {record["file_name"].rpartition("/")[2]: value for record, value in found.images}
    values.pop("3.png", None)
    assert values == pytest.approx(images)
    assert found.measure == measure
    assert {name: found.categories[name] for name in categories} == pytest.approx(categories)
    ordered = [value for _, value in found.images]
    assert ordered == sorted(ordered)


def test_panoptic_quality_by_hand():
    def instances_of(*objects):
        masks = [box_mask(*box) for _, box in objects]
        return Prediction(
            NAMES,
            boxes=np.array([box for _, box in objects], float),
            segmentations=encode_masks(np.array(masks)),
            class_indices=np.array([NAMES.index(name) for name, _ in objects]),
        )

    truth = instances_of(("cat", (0, 0, 10, 10)), ("cat", (20, 0, 30, 10)), ("dog", (0, 0, 5, 5)))
    found = instances_of(("cat", (0, 0, 10, 8)), ("cat", (0, 0, 10, 7)), ("dog", (30, 0, 40, 9)))
    # One pair, of IoU 0.8; two made up, two missed.
    assert panoptic_quality(found, truth) == pytest.approx(0.8 / (1 + 1 + 1))
    assert panoptic_quality(truth, truth) == pytest.approx(1)


def test_the_page_of_other_data(folder, capsys):
    run = make_run(folder, "told_instances")
    (folder / "3.png").write_text("no image")
    words = ["report", str(run), str(folder / "val.json"), str(folder)]
    with pytest.raises(SystemExit, match=r"3\.png"):
        main(words)
    assert main([*words, "--skip-bad"]) == 1
    text = capsys.readouterr()
    assert "2 images compared" in text.out
    assert f"left out: {folder / '3.png'}: is " in text.err
    page = (run / "report.html").read_text()
    assert f"{folder / '3.png'}: is " in page
    assert "mask AP in percent, on 2 of 2 images" in page
    assert page.count("data:image/jpeg") == 2
    assert "panoptic quality 1.00" in page
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert "report.html exists. Name another --output" in str(ending.value.code)


def test_the_page_names_categories_that_the_images_do_not_have(folder):
    run, file = make_run(folder, "told_instances"), folder / "val.json"
    assert main(["report", str(run), str(file), str(folder)]) == 0
    assert "have none of" not in (run / "report.html").read_text()
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 7]
    file.write_text(json.dumps(content))
    assert main(["report", str(run), str(file), str(folder), "--overwrite"]) == 0
    page = html.unescape((run / "report.html").read_text())
    assert "These images have none of 'dog'." in page


def test_the_page_says_what_people_call_it(folder):
    run = make_run(folder, "told_maps")
    metrics = {"mIoU": {"told_gt": {"all": 12.5}}, "IoU": {"cat": 7.25}, "tag_mAP": 31.0}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "told_gt").mkdir()
    (run / "told_gt" / "losses.csv").write_text("iteration,loss_labels\n0,2.0\n1,1.0\n")
    assert main(["report", str(run), str(folder / "val.json"), str(folder)]) == 0
    page = (run / "report.html").read_text()
    for word in ("Told, true labels", "mean IoU in percent", "loss labels: 1", "mAP of image lab"):
        assert word in page
    assert "told_gt" not in page
    assert "the animal" not in page  # a category keeps its name


def test_an_image_that_breaks_meanwhile_is_named(folder):
    predictor = maskx.open_run(make_run(folder, "told_instances"))
    data = in_classes_of(predictor, load_coco(folder / "val.json", folder))
    (folder / "1.png").write_text("no image")
    found = compare(predictor, data)
    assert [Path(record["file_name"]).name for record, _ in found.images] == ["2.png", "3.png"]
    ((name, why),) = found.failures.items()
    assert name.endswith("1.png")
    assert "cannot be read" in why


def test_categories_that_the_run_does_not_know_are_refused(folder):
    content = json.loads((folder / "val.json").read_text())
    content["categories"][1]["name"] = "fox"
    (folder / "val.json").write_text(json.dumps(content))
    words = ["report", str(make_run(folder, "told_maps")), str(folder / "val.json"), str(folder)]
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert "does not know: 'fox'" in str(ending.value.code)


@pytest.mark.parametrize("system", ["told_instances", "told_maps"])
def test_a_file_may_have_some_of_the_categories(folder, system):
    content = json.loads((folder / "val.json").read_text())
    content["categories"] = [c for c in content["categories"] if c["name"] == "dog"]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]
    (folder / "val.json").write_text(json.dumps(content))
    predictor = maskx.open_run(make_run(folder, system))
    found = compare(predictor, in_classes_of(predictor, load_coco(folder / "val.json", folder)))
    expected = {"told_instances": 100 * 51 / 101, "told_maps": 100 * 400 / 600}[system]
    assert found.categories["dog"] == pytest.approx(expected)
    assert "cat" not in found.categories or system == "told_maps"
