import dataclasses

import cv2
import numpy as np
import pytest
import torch
from toy_model import OneWeight

import maskx
from maskx.data.masks import PastedMasks
from maskx.engine.predictor import Predictor
from maskx.engine.results import Prediction, instances_prediction
from maskx.engine.runs import Run, read_run, write_run
from maskx.engine.system import System, register_system
from maskx.engine.training import TrainingSettings, load_weights, train


class Brightest(OneWeight):
    """Says which channel is the brightest, plus what it was asked to add."""

    def __init__(self):
        super().__init__(3)

    def results(self, samples):
        found = [(s["image"].float().to(self.device) * self.weight[:, None, None]) for s in samples]
        return [
            {"sem_seg": image.argmax(0) + 1 + sample.get("add", 0)}
            for image, sample in zip(found, samples, strict=True)
        ]


def _open(run, device):
    model = Brightest().to(device)
    load_weights(model, run.weights_file)
    return model


def _prediction(result, class_names):
    return Prediction(tuple(class_names), label_map=result["sem_seg"].cpu().numpy())


SYSTEM = System(
    name="brightest",
    title="Brightest",
    pipeline=lambda options, report: {},
    open=_open,
    prediction=_prediction,
)
register_system("brightest", SYSTEM)
RUN = Run(system="brightest", host="pip", class_names=("red", "green", "blue"), settings={})
IMAGE = np.zeros((4, 6, 3), np.uint8)
IMAGE[:, :3, 0], IMAGE[:, 3:, 2] = 200, 200  # red, then blue


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    settings = TrainingSettings(iterations=1, batch_size=1, learning_rate=1e-3)
    train(Brightest(), lambda start, stop: [[{}]], settings, output_dir=path, run=RUN)
    return path


def test_a_run_folder_becomes_a_predictor(folder, tmp_path):
    predictor = maskx.open_run(folder, device="cpu")
    assert predictor.class_names == ("red", "green", "blue")
    found = predictor(IMAGE)
    assert found.label_map.tolist() == [[1, 1, 1, 3, 3, 3]] * 4
    assert found.names == ["red", "blue"]
    assert np.array_equal(found.image, IMAGE)
    assert predictor(IMAGE[:, :, ::-1], order="BGR").names == ["red", "blue"]
    assert predictor(IMAGE, order="BGR").label_map[0].tolist() == [3, 3, 3, 1, 1, 1]
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), IMAGE[:, :, ::-1])
    for given in (path, str(path)):
        assert np.array_equal(predictor(given).label_map, found.label_map)


def test_a_system_is_told_what_else_is_asked(folder):
    assert maskx.open_run(folder)(IMAGE, add=1).label_map[0].tolist() == [2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize(
    "image", [IMAGE[0], IMAGE.astype(float), IMAGE[:, :, :1], IMAGE[:0], np.zeros((4, 6, 4), "u1")]
)
def test_what_is_no_image_is_refused(folder, image):
    with pytest.raises(ValueError, match=r"The image has shape .*Allowed: \(height, width, 3\)"):
        maskx.open_run(folder)(image)


def test_masks_of_boxes_are_refused_where_there_are_label_maps_alone(folder):
    with pytest.raises(ValueError, match=r"Brightest makes label maps .* Give a run of Mask"):
        maskx.open_run(folder).masks_of_boxes(IMAGE, [[0, 0, 2, 2]], ["red"])


def test_images_and_orders_that_cannot_be_are_named(folder, tmp_path):
    predictor = maskx.open_run(folder)
    with pytest.raises(ValueError, match=r"order is 'GBR'\. Allowed: 'RGB', 'BGR'"):
        predictor(IMAGE, order="GBR")
    with pytest.raises(FileNotFoundError, match=r"none\.png': there is no such file"):
        predictor(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png' cannot be read"):
        predictor(tmp_path / "text.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "seventh"}, r"holds a run of another system\. There is no system 'seventh'"),
        ({"host": "mmdet"}, r"run of the host 'mmdet'\. Allowed: pip, detectron2"),
    ],
)
def test_runs_that_cannot_be_opened_are_named(folder, tmp_path, changes, message):
    content = read_run(folder).as_json() | changes
    write_run(tmp_path, Run.from_json(content, "here"))
    with pytest.raises(ValueError, match=message):
        maskx.open_run(tmp_path)


def test_weights_that_are_gone_or_damaged_are_named(folder, tmp_path):
    run = read_run(folder)
    write_run(tmp_path, run)
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pth': there are no weights"):
        maskx.open_run(tmp_path)
    (tmp_path / run.weights).write_bytes(run.weights_file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"checkpoint\.pth' is no checkpoint, or is damaged"):
        maskx.open_run(tmp_path)


def test_a_run_that_lacks_a_setting_is_named(tmp_path):
    run = Run(system="maskx", host="pip", class_names=("red",), settings={"backbone": "small"})
    write_run(tmp_path, run)
    with pytest.raises(ValueError, match=r"the settings in run\.json lack 'image_size'\. Restore"):
        maskx.open_run(tmp_path, device="cpu")


def test_what_the_front_door_offers():
    assert {"open_run", "CategorySplit", "resolve_split", "load_coco"} <= set(dir(maskx))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = maskx.nothing


class Masks(PastedMasks):
    """Says which masks were asked for."""

    asked = ()

    def __getitem__(self, item):
        Masks.asked = item.tolist()
        return super().__getitem__(item)


def test_masks_below_the_threshold_are_not_made():
    scores = torch.tensor([0.9, 0.2, 0.5])
    boxes = torch.tensor([[0.0, 0, 3, 4], [1, 1, 4, 4], [2, 0, 6, 3]])
    result = {
        "pred_boxes": boxes,
        "scores": scores,
        "pred_classes": torch.tensor([0, 1, 2]),
        "pred_masks": Masks(torch.ones(3, 4, 4), boxes, (4, 6)),
    }
    system = dataclasses.replace(SYSTEM, prediction=instances_prediction)
    predictor = Predictor(RUN, system, lambda samples: [{"instances": result}], lambda image: {})
    (found,) = predictor.many([IMAGE], threshold=0.5)
    assert Masks.asked == [True, False, True]
    whole = predictor(IMAGE).above(0.5)
    assert found.names == whole.names == ["red", "blue"]
    assert found.segmentations == whole.segmentations
    np.testing.assert_array_equal(found.boxes, whole.boxes)
