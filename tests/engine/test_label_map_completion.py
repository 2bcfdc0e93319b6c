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
from maskx.engine.completion_report import summary
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


def label_map(result, class_names):
    assert result["asked"]
    labels = np.zeros((result["height"], result["width"]), np.int64)
    labels[:, 10:20], labels[:, 20:] = 1, 2
    return Prediction(tuple(class_names), label_map=labels)


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
    assert found.label_maps.keys() == {0, 1, 3}
    # Of an owl alone the model knows nothing.
    assert "1 images with tags alone have no label map: the run knows none" in summary(found)
    assert columns(options) == {0: [0, DOG, CAT], 1: [0, 255, CAT], 3: [255, 255, CAT]}
    content = json.loads(options.output.read_text())
    before = json.loads(Path(options.data[0]).read_text())
    assert content["annotations"] == before["annotations"]
    assert content["images"][2] == before["images"][2]


def test_concepts_become_label_maps_too(options, make_run):
    complete(replace(options, run=make_run("concepts")))
    assert columns(options) == {0: [0, DOG, DOG], 1: [0, CAT, CAT], 3: [255, CAT, CAT]}


def test_a_teacher_beside_it_segments_the_boxes(options):
    found = complete(replace(options, teacher="teachers:ellipses"))
    assert [each.annotation_id for each in found.masks] == [1]
    assert len(found.label_maps) == 3


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
    assert found.label_maps.keys() == {0, 3}


def test_label_maps_that_exist_are_not_overwritten(options):
    complete(options)
    options.output.unlink()
    with pytest.raises(FileExistsError, match="out_label_maps holds label maps already"):
        complete(options)
    assert len(complete(replace(options, overwrite=True)).label_maps) == 3


def test_agreement_needs_masks_in_boxes(options):
    with pytest.raises(ValueError, match="agree compares masks in boxes, but a run of Thirds"):
        complete(replace(options, teacher="teachers:ellipses", agree=0.5))
    assert not options.output.exists()
