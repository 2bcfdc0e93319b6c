import dataclasses
import json
import sys
import types

import cv2
import numpy as np
import pytest

from maskx.data.coco import load_coco
from maskx.data.formats.table import read_dataset, write_dataset
from maskx.data.masks import encode_masks
from maskx.engine.results import Prediction

NAMES = ("cat", "dog", "horse")
MASKS = np.zeros((2, 20, 30), bool)
MASKS[0, 2:8, 3:10] = True
MASKS[1, 10:20, 15:30] = True
INSTANCES = Prediction(
    NAMES,
    boxes=np.array([[3, 2, 10, 8], [15, 10, 30, 20.5]]),
    segmentations=encode_masks(MASKS),
    scores=np.array([0.9, 0.25]),
    class_indices=np.array([2, 0]),
)
LABEL_MAP = np.zeros((20, 30), np.int64)
LABEL_MAP[:5], LABEL_MAP[5:8], LABEL_MAP[19] = 2, 3, 255  # 255 is not known
PIXELS = Prediction(NAMES, label_map=LABEL_MAP)
EMPTY = Prediction(
    NAMES,
    boxes=np.zeros((0, 4)),
    segmentations=[],
    scores=np.zeros(0),
    class_indices=np.zeros(0, int),
    image=np.zeros((20, 30, 3), np.uint8),
)


def test_instances_have_names_and_masks():
    assert INSTANCES.names == ["horse", "cat"]
    assert INSTANCES.image_size == (20, 30)
    assert np.array_equal(INSTANCES.masks, MASKS)
    assert EMPTY.names == []
    assert EMPTY.masks.shape == (0, 20, 30)


def test_a_label_map_has_the_names_of_the_classes_that_are_there():
    assert PIXELS.names == ["dog", "horse"]
    assert PIXELS.image_size == (20, 30)
    assert PIXELS.masks is None


def test_instances_above_a_threshold():
    found = INSTANCES.above(0.5)
    assert (found.names, found.scores.tolist(), len(found.boxes)) == (["horse"], [0.9], 1)
    assert np.array_equal(found.masks, MASKS[:1])
    assert PIXELS.above(0.5) is PIXELS


def test_remarks_stay_with_their_instances():
    remarked = dataclasses.replace(INSTANCES, remarks=[None, "30% 'dog'"], image=EMPTY.image)
    (entry,) = remarked.above(0.5).to_coco(7)
    assert "remark" not in entry
    assert remarked.to_coco(7)[1]["remark"] == "30% 'dog'"
    plain = dataclasses.replace(remarked, remarks=None)
    assert not np.array_equal(remarked.plot(side=300), plain.plot(side=300))


def test_results_of_coco_are_of_the_ids_of_the_file():
    first, second = INSTANCES.to_coco(7, category_ids=(10, 20, 30))
    assert first | {"segmentation": None} == {
        "image_id": 7,
        "category_id": 30,
        "bbox": [3, 2, 7, 6],
        "score": 0.9,
        "segmentation": None,
    }
    assert second["bbox"] == [15, 10, 15, 10.5]
    assert second["segmentation"] == encode_masks(MASKS)[1]
    assert [entry["category_id"] for entry in PIXELS.to_coco("a")] == [2, 3]
    assert PIXELS.to_coco("a")[0]["bbox"] == [0, 0, 30, 5]
    assert PIXELS.to_coco("a")[0]["segmentation"] == encode_masks(LABEL_MAP[None] == 2)[0]
    assert EMPTY.to_coco(7) == []


def test_masks_without_boxes_are_annotations_that_are_read_and_exported(tmp_path):
    """As of ConceptMask: a box around each mask, and nothing of one that is empty."""
    masks = encode_masks(np.stack([MASKS[0], np.zeros_like(MASKS[0]), MASKS[1]]))
    indices, scores = np.arange(3), np.array([0.9, 0.8, 0.7])
    found = Prediction(NAMES, segmentations=masks, scores=scores, class_indices=indices)
    assert [entry["category_id"] for entry in found.to_coco(1)] == [1, 3]
    annotations = found.to_annotations(1, source="maskx:run", first_id=5)
    assert [a["id"] for a in annotations] == [5, 6]
    assert [a["area"] for a in annotations] == [42, 150]
    assert [a["bbox"] for a in annotations] == [[3, 2, 7, 6], [15, 10, 15, 10]]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    image = {"id": 1, "file_name": "0.png", "height": 20, "width": 30}
    content = {"images": [image], "annotations": annotations, "categories": categories}
    (tmp_path / "found.json").write_text(json.dumps(content))
    (record,) = load_coco(tmp_path / "found.json", tmp_path, check_images=False).records
    assert [a["class_index"] for a in record["annotations"]] == [0, 2]
    dataset = read_dataset(tmp_path / "found.json")
    assert not [
        what for what in write_dataset(dataset, tmp_path / "out", "labelme") if "mask" in what
    ]
    shapes = json.loads((tmp_path / "out" / "0.json").read_text())["shapes"]
    assert {shape["label"] for shape in shapes} == {"cat", "horse"}


def test_an_object_whose_mask_is_empty_keeps_a_box_of_its_own():
    masks = encode_masks(np.stack([MASKS[0], np.zeros_like(MASKS[0])]))
    found = dataclasses.replace(INSTANCES, segmentations=masks)
    assert found.to_coco(7)[1].keys() >= {"bbox", "segmentation"}  # a detection of either is scored
    with_mask, boxed = found.to_annotations(7, source="maskx:run")
    assert with_mask["area"] == 42
    assert boxed["bbox"] == [15, 10, 15, 10.5]
    assert not boxed.keys() & {"segmentation", "area"}


def test_a_drawing_shows_where_things_are(tmp_path):
    path = tmp_path / "drawn.png"
    picture = PIXELS.plot(path, side=300)
    assert picture.shape == (300, 300, 3)
    assert np.array_equal(cv2.imread(str(path))[:, :, ::-1], picture)
    assert not np.array_equal(picture, Prediction(NAMES, label_map=0 * LABEL_MAP).plot(side=300))
    plain = EMPTY.plot(side=300)
    drawn = Prediction(**(vars(INSTANCES) | {"image": EMPTY.image})).plot(side=300)
    inside = (slice(30, 70), slice(40, 90))  # of the first mask, at a scale of 10
    assert (drawn[inside] != plain[inside]).any()
    without_boxes = vars(INSTANCES) | {"boxes": None, "scores": None}
    assert Prediction(**without_boxes).plot(side=300).shape == (300, 300, 3)
    both = Prediction(**(vars(INSTANCES) | {"label_map": LABEL_MAP}))
    assert both.plot(side=300).shape == (300, 600, 3)


class Detections:
    """What ``supervision.Detections`` takes."""

    def __init__(self, xyxy, mask, confidence, class_id, data):
        self.xyxy, self.mask, self.confidence = xyxy, mask, confidence
        self.class_id, self.data = class_id, data

    @classmethod
    def empty(cls):
        return cls(np.zeros((0, 4)), None, None, np.zeros(0), {})


def test_detections_of_supervision(monkeypatch):
    module = types.ModuleType("supervision")
    module.Detections = Detections
    monkeypatch.setitem(sys.modules, "supervision", module)
    found = INSTANCES.to_supervision()
    assert found.xyxy.dtype == np.float32
    assert np.array_equal(found.mask, MASKS)
    assert found.data["class_name"].tolist() == ["horse", "cat"]
    assert found.confidence == pytest.approx([0.9, 0.25])
    pixels = PIXELS.to_supervision()
    assert pixels.class_id.tolist() == [1, 2]
    assert pixels.xyxy.tolist() == [[0, 0, 30, 5], [0, 5, 30, 8]]
    assert pixels.confidence is None
    assert len(EMPTY.to_supervision().xyxy) == 0
    assert len(Prediction(NAMES, label_map=0 * LABEL_MAP).to_supervision().xyxy) == 0
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        INSTANCES.to_supervision()


def test_supervision_takes_them():
    supervision = pytest.importorskip("supervision", reason="the extra `dev` has it")
    remarked = dataclasses.replace(INSTANCES, remarks=[None, "a part of a dog"])
    found = remarked.to_supervision()
    (sure,) = found[found.confidence > 0.5]["class_name"]
    assert sure == "horse"
    assert found["remark"].tolist() == ["", "a part of a dog"]
    assert found.area.tolist() == MASKS.sum((1, 2)).tolist()
    picture = EMPTY.image.copy()
    for annotator in (supervision.MaskAnnotator(), supervision.LabelAnnotator()):
        drawn = annotator.annotate(picture.copy(), found)
        assert (drawn != picture).any()
    both = supervision.Detections.merge([found, EMPTY.to_supervision()])
    assert len(both) == 2
    boxes_alone = dataclasses.replace(INSTANCES, segmentations=None).to_supervision()
    assert boxes_alone.mask is None
    assert boxes_alone.area.tolist() == [42, 157.5]
    assert PIXELS.to_supervision().box_area.tolist() == [150, 90]
    nowhere = encode_masks(MASKS & np.array([True, False])[:, None, None])
    masks_alone = dataclasses.replace(INSTANCES, boxes=None, segmentations=nowhere)
    assert masks_alone.to_supervision().xyxy.tolist() == [[3, 2, 10, 8]]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "needs class_indices of instances, or a label_map"),
        ({"boxes": np.zeros((1, 4))}, r"Instances need a class index each.*'boxes': 1"),
        (
            {"class_indices": np.zeros(2, int), "scores": np.zeros(1)},
            r"one of each part: \{'scores': 1, 'class_indices': 2\}",
        ),
        (
            {"label_map": LABEL_MAP, "image": np.zeros((30, 20, 3), np.uint8)},
            r"different sizes: \[\(20, 30\), \(30, 20\)\]",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Prediction(NAMES, **parts)
