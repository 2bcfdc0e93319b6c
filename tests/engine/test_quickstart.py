"""What all quick starts do with their data."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest

import maskx.systems  # noqa: F401 - registers them
from maskx.data.label_maps import write_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.engine.options import QuickstartOptions
from maskx.engine.quickstart import load_split_data
from maskx.engine.system import find_system


@pytest.fixture
def options(tmp_path):
    """Options for 6 scenes of which ``options(names)`` have no mask; None: none has one."""
    file = generate_scenes(tmp_path / "scenes", count=6, size=64, num_categories=4, seed=0)

    def make(names):
        content = json.loads(file.read_text(encoding="utf-8"))
        without = {c["id"] for c in content["categories"] if names is None or c["name"] in names}
        for image in content["images"]:
            del image["stuff_file_name"]
        for annotation in content["annotations"]:
            if annotation["category_id"] in without:
                del annotation["segmentation"]
        path = tmp_path / "without.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        pair = str(path), str(file.parent)
        return QuickstartOptions(
            tmp_path / "out", coco_train=pair, coco_val=pair, masks_for="scenes_half", device="cpu"
        )

    return make


@pytest.mark.parametrize("system", ["maskx", "transfernet", "larvseg", "concept_mask"])
def test_a_split_without_any_mask_is_refused(system, options):
    with pytest.raises(
        ValueError,
        match=r"'scenes_half' says that 2 .* no annotation of theirs has one: 'red lamp shade",
    ):
        find_system(system).pipeline(options(None), print)


@pytest.mark.parametrize("system", ["maskx", "transfernet", "larvseg", "concept_mask"])
def test_where_the_default_split_does_not_fit_the_option_is_named(system, options):
    made = dataclasses.replace(options(None), masks_for=None)
    with pytest.raises(ValueError, match=r"--masks-for"):
        find_system(system).pipeline(made, print)


def test_label_maps_are_no_masks_of_single_objects(options):
    made = options(None)
    path = Path(made.coco_train[0])
    content = json.loads(path.read_text(encoding="utf-8"))
    image = content["images"][0]
    label_map = np.zeros((image["height"], image["width"]), np.uint8)
    write_label_map(path.with_name("map.png"), label_map, num_classes=len(content["categories"]))
    image |= {"label_map_file_name": "map.png", "image_labels": []}
    content |= {"images": [image], "annotations": []}
    path.write_text(json.dumps(content), encoding="utf-8")
    load_split_data(made)
    with pytest.raises(ValueError, match=r"'scenes_half' says that 2 .* has one: 'red lamp shade"):
        find_system("maskx").pipeline(made, print)


def test_a_split_without_some_masks_is_said(options, caplog):
    caplog.set_level(logging.WARNING)
    train, _, split = load_split_data(options(["red lamp shade"]))
    assert split.class_names == train.class_names
    assert "1 of them have none in the training data: 'red lamp shade (" in caplog.text
