"""Scenes of images with eight classes."""

import pytest

from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    json_file = generate_scenes(folder, count=8, size=64, num_categories=8, seed=5)
    return load_coco(json_file, folder)
