import cv2
import numpy as np

from maskx.data.coco import load_coco
from maskx.data.masks import encode_masks
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.evaluation.instance_figures import (
    confident_detections,
    interesting_records,
    save_pictures,
)


def test_the_picture_shows_the_confident_detections_of_both_sides(tmp_path):
    json_file = generate_scenes(tmp_path, count=3, size=64, num_categories=4, seed=1)
    data = load_coco(json_file, tmp_path)
    split = resolve_split("scenes_half", data.class_names)
    of_a, of_b = (indices[0] for indices in (split.indices_with_masks, split.indices_without_masks))
    square, other = np.zeros((2, 64, 64), bool)
    square[10:30, 5:25] = other[40:60, 40:50] = True
    square, other = encode_masks(np.stack([square, other]))

    def detection(image_id, class_index, score, segmentation, bbox):
        return {
            "image_id": image_id,
            "category_id": data.category_ids[class_index],
            "score": score,
            "segmentation": segmentation,
            "bbox": bbox,
        }

    detections = [
        detection(0, of_a, 0.9, square, [5, 10, 20, 20]),
        detection(0, of_b, 0.49, other, [40, 40, 10, 20]),  # not confident
        detection(0, of_b, 0.8, square, [5, 10, 20, 20]),  # the same pixels as a surer one
        detection(2, of_b, 0.6, square, [5, 10, 20, 20]),
        detection(2, of_a, 0.7, other, [40, 40, 10, 20]),
    ]
    confident = confident_detections(data, detections)
    scores = {image_id: [d["score"] for d in found] for image_id, found in confident.items()}
    assert scores == {0: [0.9], 1: [], 2: [0.7, 0.6]}
    # First the image with both sides, last the one without anything.
    shown = [record["image_id"] for record in interesting_records(data, confident, split)]
    assert shown == [2, 0, 1]

    (path,) = save_pictures(tmp_path, data, {"maskx": detections}, split)
    assert path == tmp_path / "predictions.png"
    methods = {"maskx": detections, "grabcut": [d for d in detections if d["image_id"] == 2]}
    paths = save_pictures(tmp_path, data, methods, split)
    assert paths == [tmp_path / "predictions.png", tmp_path / "comparison.png"]
    one_row, two_rows = (cv2.imread(str(path)).shape for path in paths)
    assert two_rows[0] > 1.5 * one_row[0]
