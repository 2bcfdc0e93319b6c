"""Images with tags alone get label maps, by systems that make them."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from maskx.core.sample_models import SampleModel
from maskx.data.coco import load_coco
from maskx.data.label_maps import read_label_map
from maskx.data.masks import encode_masks
from maskx.engine.completion import CompletionOptions, complete
from maskx.engine.completion_report import summary, write_report
from maskx.engine.results import Prediction
from maskx.engine.runs import Run
from maskx.engine.system import System, register_system
from maskx.engine.training import TrainingSettings, load_weights, train

CAT, DOG, OWL = 1, 2, 3  # labels in the class list of the file


class Thirds(SampleModel):
    """Sees background, a dog and a cat from left to right."""

    def __init__(self):
        super().__init__(8)
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, samples):
        return [sample | {"asked": sample["image_labels"]} for sample in samples]


class Learned(Thirds):
    def forward(self, samples):
        return {"loss_x": self.weight.sum() ** 2}


def open_thirds(run, device):
    model = Thirds().to(device)
    load_weights(model, run.weights_file)
    return model


def scores_of(result):
    """The brighter the image, the surer."""
    return result["image"].float().mean(dim=0).numpy() / 255


def label_map(result, class_names):
    assert result["asked"]
    labels = np.zeros((result["height"], result["width"]), np.int64)
    labels[:, 10:20], labels[:, 20:] = 1, 2
    return Prediction(tuple(class_names), label_map=labels, label_scores=scores_of(result))


def concepts(result, class_names):
    """Every concept in the whole right side, the later the surer."""
    masks = np.zeros((len(result["concepts"]), result["height"], result["width"]), bool)
    masks[:, :, 10:] = True
    number = len(masks)
    return Prediction(
        tuple(result["concepts"]),
        segmentations=encode_masks(masks),
        scores=np.arange(1, number + 1) / 10,
        class_indices=np.arange(number),
    )


for name, prediction in (("thirds", label_map), ("concepts", concepts)):
    system = System(name, "Thirds", lambda o, r: {}, open=open_thirds, prediction=prediction)
    register_system(name, system)


@pytest.fixture
def make_run(tmp_path):
    def make(system="thirds"):
        run = Run(system=system, host="pip", class_names=("dog", "cat", "fox"), settings={})
        settings = TrainingSettings(iterations=1, batch_size=1, learning_rate=1e-3)
        train(
            Learned(), lambda start, stop: [[{}]], settings, output_dir=tmp_path / system, run=run
        )
        return tmp_path / system

    return make


@pytest.fixture
def options(make_run, tmp_path):
    """Tags of four images: of both, of a cat, of an owl alone and of an owl and a cat."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": 20, "width": 30, "image_labels": labels}
        for i, labels in enumerate([[10, 20], [10], [30], [30, 10]])
    ]
    images.append({"id": 9, "file_name": "0.png", "height": 20, "width": 30})
    for index in range(4):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((20, 30, 3), 9 * index, np.uint8))
    box = {"id": 1, "image_id": 9, "category_id": 10, "bbox": [3, 3, 20, 12]}
    names = ((10, "cat"), (20, "dog"), (30, "owl"))
    content = {
        "images": images,
        "annotations": [box],
        "categories": [{"id": id_, "name": name} for id_, name in names],
    }
    (tmp_path / "tags.json").write_text(json.dumps(content))
    data = (str(tmp_path / "tags.json"), str(tmp_path))
    return CompletionOptions(data=data, output=tmp_path / "out.json", run=make_run(), device="cpu")


def columns(options):
    """The labels at columns 5, 15 and 25 of each image with a label map."""
    data = load_coco(options.output, options.data[1])
    assert json.loads(options.output.read_text())["info"]["label_maps"] == "predicted"
    found = {}
    for record in data.records:
        if "label_map_file_name" in record:
            path, id_ = record["label_map_file_name"], record["image_id"]
            labels = read_label_map(path, 20, 30, num_classes=3, image_id=id_)
            found[id_] = labels[7, [5, 15, 25]].tolist()
    return found


def test_pixels_are_of_classes_with_tags_or_unknown(options, caplog):
    with caplog.at_level(logging.WARNING):
        found = complete(options)
    assert "1 objects keep their boxes alone: Thirds makes label maps" in caplog.text
    assert found.label_maps.made.keys() == {0, 1, 3}
    # Of an owl alone the model knows nothing.
    assert "1 images with tags alone have no label map: the run knows none" in summary(found)
    assert columns(options) == {0: [0, DOG, CAT], 1: [0, 255, CAT], 3: [255, 255, CAT]}
    content = json.loads(options.output.read_text())
    before = json.loads(Path(options.data[0]).read_text())
    assert content["annotations"] == before["annotations"]
    assert content["images"][2] == before["images"][2]
    assert content["images"][0]["label_map_source"] == "maskx:thirds"
    assert "label_map_source" not in content["images"][2]


def test_concepts_become_label_maps_too(options, make_run):
    complete(replace(options, run=make_run("concepts")))
    assert columns(options) == {0: [0, DOG, DOG], 1: [0, CAT, CAT], 3: [255, CAT, CAT]}


def test_a_teacher_beside_it_segments_the_boxes(options):
    found = complete(replace(options, teacher="teachers:ellipses"))
    assert [each.annotation_id for each in found.masks] == [1]
    assert len(found.label_maps.made) == 3


def test_what_is_said_of_the_file_stays(options):
    content = json.loads(Path(options.data[0]).read_text()) | {"info": {"year": 2024}}
    Path(options.data[0]).write_text(json.dumps(content))
    complete(options)
    assert json.loads(options.output.read_text())["info"] == {
        "year": 2024,
        "label_maps": "predicted",
    }


def test_an_image_that_cannot_be_read_is_named(options, tmp_path):
    path = tmp_path / "1.png"
    whole = path.read_bytes()
    middle = bytes(len(whole) - 100)  # which reading the annotations does not look at
    path.write_bytes(whole[:60] + middle + whole[-40:])
    found = complete(options)
    assert list(found.failures) == [str(path)]
    assert found.label_maps.made.keys() == {0, 3}


def test_label_maps_that_exist_are_not_overwritten(options):
    complete(options)
    options.output.unlink()
    with pytest.raises(FileExistsError, match="out_label_maps holds label maps already"):
        complete(options)
    assert len(complete(replace(options, overwrite=True)).label_maps.made) == 3


def test_agreement_needs_masks_in_boxes(options):
    with pytest.raises(ValueError, match="agree compares masks in boxes, but a run of Thirds"):
        complete(replace(options, teacher="teachers:ellipses", agree=0.5))
    assert not options.output.exists()


def brightnesses(folder, count, right):
    """Images with label maps, of which the share that is right grows with their brightness."""
    images = []
    for index in range(count):
        level = (index + 1) / count
        name, map_name = f"known_{index}.png", f"map_{index}.png"
        cv2.imwrite(str(folder / name), np.full((20, 30, 3), round(255 * level), np.uint8))
        truth = np.zeros((20, 30), np.uint8)
        truth[:, 10:20], truth[:, 20:] = DOG, CAT
        truth[round(20 * right(level)) :] = OWL  # which is never found
        cv2.imwrite(str(folder / map_name), truth)
        images.append(
            {"id": index, "file_name": name, "height": 20, "width": 30}
            | {"image_labels": [10, 20, 30], "label_map_file_name": map_name}
        )
    return images


@pytest.fixture
def known(options, tmp_path):
    content = json.loads(Path(options.data[0]).read_text())
    images = brightnesses(tmp_path, 40, right=lambda level: level)
    path = tmp_path / "known.json"
    path.write_text(json.dumps(content | {"images": images, "annotations": []}))
    return str(path), str(tmp_path)


def qualities(options):
    images = json.loads(options.output.read_text())["images"]
    return {i["id"]: i["label_map_quality"] for i in images if "label_map_quality" in i}


def test_without_known_label_maps_the_quality_is_the_score(options):
    found = complete(options)
    assert qualities(options) == pytest.approx({0: 0, 1: 9 / 255, 3: 27 / 255}, abs=1e-3)
    names = [Path(each.file_name).name for each in found.label_maps.worst_first]
    assert names == ["0.png", "1.png", "3.png"]
    assert "scores of the run itself, not calibrated: that takes 20 images" in summary(found)


def test_qualities_are_calibrated_on_label_maps_that_the_run_did_not_see(options, known, tmp_path):
    found = complete(replace(options, calibrate=known))
    maps = found.label_maps
    assert maps.is_calibrated
    assert len(maps.known) == 40
    assert "calibrated on 40 label maps that were known" in summary(found)
    # What is expected is what comes, on images that the calibration did not see.
    errors = [abs(each.quality - each.iou) for each in maps.known]
    assert np.mean(errors) < 0.08
    assert np.ptp([each.iou for each in maps.known]) > 0.4
    # As dark as the darkest ten, they are as good; the surest of them comes last.
    darkest = np.mean([each.iou for each in maps.known[:10]])
    assert qualities(options) == pytest.approx(dict.fromkeys((0, 1, 3), darkest), abs=1e-3)
    assert [Path(e.file_name).name for e in maps.worst_first] == ["0.png", "1.png", "3.png"]
    write_report(tmp_path / "out.html", found, "Completed")
    page = (tmp_path / "out.html").read_text()
    assert "Reliability, on label maps that were known" in page
    assert page.index("Label maps, the worst first") < page.index("000000_0.png")


def test_label_maps_of_a_low_quality_are_not_written(options):
    found = complete(replace(options, min_quality=0.03))
    assert found.label_maps.made.keys() == {1, 3}
    assert "1 images with tags alone have no label map: the quality is below 0.03" in summary(found)
    assert qualities(options).keys() == {1, 3}


def test_label_maps_of_an_earlier_completion_are_no_truth(options, known):
    path = Path(known[0])
    content = json.loads(path.read_text())
    for image in content["images"][:25]:
        image |= {"label_map_source": "maskx:first", "label_map_quality": 0.9}
    path.write_text(json.dumps(content))
    found = complete(replace(options, calibrate=known))
    assert len(found.label_maps.known) == 15
    assert not found.label_maps.is_calibrated
