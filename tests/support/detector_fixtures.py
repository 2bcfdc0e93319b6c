"""A tiny data set and detectors that train a step in tenths of a second."""

import pytest
import torch

from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.systems.maskx_rcnn.torchvision import SampleDetector, maskx_rcnn


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    json_file = generate_scenes(folder, count=8, size=64, num_categories=8, seed=5)
    return load_coco(json_file, folder)


@pytest.fixture(scope="session")
def split(scenes):
    return resolve_split("scenes_half", scenes.class_names)


@pytest.fixture
def make_detector(scenes):
    def make(**mask_branch):
        torch.manual_seed(0)
        num_classes = len(scenes.class_names) + 1
        branch = {"channels": 8, "num_convs": 1} | mask_branch
        return SampleDetector(maskx_rcnn(num_classes, detector={"min_size": 64}, **branch))

    return make
