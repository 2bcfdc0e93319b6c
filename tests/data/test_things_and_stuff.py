import json

import cv2
import numpy as np
import pytest

from maskx.data.coco import load_coco
from maskx.data.label_maps import ignore_label, things_and_stuff_label_map, write_label_map
from maskx.data.scenes.generator import STUFF_CATEGORIES, generate_scenes
from maskx.data.things_and_stuff import things_and_stuff


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    json_file = generate_scenes(folder, count=6, size=64, num_categories=8, seed=2, style="sparse")
    return load_coco(json_file, folder)


def test_every_pixel_of_a_scene_has_a_class(scenes):
    records, names = things_and_stuff(scenes)
    assert names == (*scenes.class_names, *(category.name for category in STUFF_CATEGORIES))
    for record in records:
        label_map = things_and_stuff_label_map(record, len(names))
        assert set(np.unique(label_map)) == {label + 1 for label in record["image_labels"]}
        stuff = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
        assert ((label_map > 8) == (stuff > 0)).all()
        assert (label_map[stuff > 0] == stuff[stuff > 0] + 8).all()


def test_a_pixel_of_neither_a_thing_nor_stuff_is_unknown(tmp_path):
    write_label_map(tmp_path / "stuff.png", np.array([[0, 0, 0, 255]]), num_classes=2)
    thing = {"id": 1, "class_index": 0, "bbox": [0, 0, 1, 1], "iscrowd": 0}
    record = {
        "image_id": 1,
        "image_labels": [0],
        "height": 1,
        "width": 4,
        "annotations": [thing | {"segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}],
        "sem_seg_file_name": str(tmp_path / "stuff.png"),
        "num_things": 4,
    }
    assert things_and_stuff_label_map(record, 6).tolist() == [[1, *[ignore_label(6)] * 3]]


def test_a_plain_record_has_its_own_label_map(tmp_path):
    write_label_map(tmp_path / "map.png", np.array([[0, 1, 255]]), num_classes=4)
    record = {"image_id": 1, "height": 1, "width": 3}
    record["label_map_file_name"] = str(tmp_path / "map.png")
    assert things_and_stuff_label_map(record, 4).tolist() == [[0, 1, ignore_label(4)]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("stuff_categories"), r"stuff_categories of the ids \[\]"),
        (lambda c: c["stuff_categories"].pop(0), r"of the ids \[2, 3, 4, 5\]. Allowed: 1, 2"),
        (lambda c: c["images"][1].pop("stuff_labels"), "image 1 has .* and stuff_labels None"),
        (lambda c: c["images"][1].update(stuff_labels=[9]), r"stuff_labels \[9\].*from 1 to 5"),
        (lambda c: c["images"][1].pop("stuff_file_name"), "image 1 has stuff_file_name None"),
    ],
)
def test_stuff_that_does_not_fit_is_named(scenes, tmp_path, change, words):
    content = json.loads(scenes.json_file.read_text())
    images = {image["id"]: place for place, image in enumerate(content["images"])}
    content["images"] = sorted(content["images"], key=lambda image: images[image["id"]])
    first = content["images"][0]["id"]
    change(content)
    for image in content["images"]:
        if "stuff_file_name" in image:
            image["stuff_file_name"] = str(scenes.json_file.parent / image["stuff_file_name"])
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    data = load_coco(path, scenes.json_file.parent)
    with pytest.raises(ValueError, match=words.replace("image 1 ", f"image {first + 1} ")):
        things_and_stuff(data)
