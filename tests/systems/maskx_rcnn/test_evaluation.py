import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from maskx.data.coco import load_coco
from maskx.data.images import read_image_sample
from maskx.data.masks import decode_segmentation, encode_masks
from maskx.data.scenes.generator import generate_scenes
from maskx.supervision import CategorySplit
from maskx.systems.maskx_rcnn.evaluation import by_grabcut, by_model, mean_iou_of_boxes
from maskx.systems.maskx_rcnn.samples import masks_of_boxes
from maskx.torchvision import SampleDetector, maskx_rcnn


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    path = generate_scenes(folder, count=3, size=64, num_categories=4, seed=0)
    return load_coco(path, folder)


@pytest.fixture
def split(data):
    return CategorySplit("half", data.class_names, data.class_names[:2], data.class_names[2:])


def drawn(record, objects):
    size = record["height"], record["width"]
    masks = [decode_segmentation(each["segmentation"], *size) for each in objects]
    return encode_masks(np.array(masks))


def test_true_masks_have_an_iou_of_one_and_none_of_zero(data, split):
    found = mean_iou_of_boxes(drawn, data, split, description="")
    assert found == {"all": 1.0, "A": 1.0, "B": 1.0}

    def nothing(record, objects):
        return encode_masks(np.zeros((len(objects), record["height"], record["width"]), bool))

    found = mean_iou_of_boxes(nothing, data, split, description="")
    assert found == {"all": 0.0, "A": 0.0, "B": 0.0}


def test_masks_that_nobody_drew_are_not_the_truth(data, split):
    records = [
        record
        | {
            "annotations": [
                each | ({"segmentation_source": "grabcut"} if each["class_index"] > 1 else {})
                for each in record["annotations"]
            ]
        }
        for record in data.records
    ]
    found = mean_iou_of_boxes(drawn, replace(data, records=records), split, description="")
    assert found["A"] == 1
    assert math.isnan(found["B"])


def test_a_detector_is_asked_about_images_as_small_as_it_takes_them(data, split):
    model = SampleDetector(maskx_rcnn(5, channels=8, num_convs=1, detector={"min_size": 48}))
    found = mean_iou_of_boxes(by_model(model), data, split, description="")
    assert all(0 <= value < 1 for value in found.values())
    (record, *_), one = data.records, []
    of_whole = read_image_sample(record)
    for each in record["annotations"]:
        boxes, classes = torch.tensor([each["bbox"]]), torch.tensor([each["class_index"]])
        one += masks_of_boxes(model, of_whole, boxes, classes).encode()
    assert by_model(model)(record, record["annotations"]) == one


def test_grabcut_is_measured_in_the_same_boxes(data, split):
    found = mean_iou_of_boxes(by_grabcut, data, split, description="")
    assert all(0.1 < value < 1 for value in found.values())
