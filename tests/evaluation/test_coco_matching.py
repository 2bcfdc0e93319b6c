"""Every implementation gives what pycocotools gives, to the last digit."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from maskx.evaluation.coco_matching import run_cocoeval

pytest.importorskip("hotcoco", reason="the extra `fast` is not installed")

SIZE = 200


def random_boxes(random, count):
    corners = random.uniform(0, SIZE - 4, (count, 2))
    sides = np.minimum(random.choice([6, 20, 60, 150], (count, 2)), SIZE - corners)
    return np.concatenate([corners, sides], axis=1).round(2)


def annotation(box, **values):
    x, y, w, h = box
    rle = mask_utils.merge(
        mask_utils.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], SIZE, SIZE)
    )
    return {"bbox": list(box), "segmentation": rle, "area": float(w * h), "iscrowd": 0} | values


def scene(seed, *, num_images=12, num_detections=30, ids=lambda i: 7 * i + 3):
    """Ground truth of 5 categories, of which one is absent, and detections that partly hit."""
    random = np.random.RandomState(seed)
    annotations, detections = [], []
    for image in range(num_images):
        boxes = random_boxes(random, random.randint(0, 6))
        for box in boxes:
            annotations.append(
                annotation(
                    box,
                    id=len(annotations) + 1,
                    image_id=ids(image),
                    category_id=int(random.choice([2, 3, 5, 11])),
                    iscrowd=int(random.rand() < 0.15),
                )
            )
        for index in range(num_detections):
            hit = len(boxes) and random.rand() < 0.7
            box = boxes[index % len(boxes)] if hit else random_boxes(random, 1)[0]
            moved = np.clip(box + random.normal(0, 2, 4), 0.5, SIZE - 1)
            moved[2:] = np.minimum(moved[2:], SIZE - moved[:2])
            found = annotation(moved)
            detections.append(
                {
                    "image_id": ids(image),
                    "category_id": int(random.choice([2, 3, 5, 11, 13])),
                    # Few values, so that scores are equal.
                    "score": float(random.randint(1, 40)) / 40,
                    "bbox": found["bbox"],
                    "segmentation": found["segmentation"],
                }
            )
    truth = {
        "images": [{"id": ids(i), "height": SIZE, "width": SIZE} for i in range(num_images)],
        "categories": [{"id": c, "name": str(c)} for c in (2, 3, 5, 11, 13)],
        "annotations": annotations,
    }
    return truth, detections


def both(truth, detections, **options):
    options = {"category_ids": [11, 2, 13, 3, 5], "max_detections": 100} | options
    return [
        run_cocoeval(truth, detections, backend=name, **options)
        for name in ("pycocotools", "hotcoco")
    ]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize(
    ("scene_options", "options"),
    [
        ({}, {}),
        ({"num_detections": 130, "num_images": 4}, {}),
        ({}, {"max_detections": 3}),
        ({}, {"category_ids": [3, 11]}),
        ({"num_detections": 0}, {}),
        ({"ids": lambda i: f"image {9 - i}"}, {}),
    ],
    ids=["plain", "more than 100", "at most 3", "some categories", "none", "ids as text"],
)
def test_the_backends_agree(iou_type, scene_options, options):
    for seed in range(3):
        truth, detections = scene(seed, **scene_options)
        evaluated = set(options.get("category_ids", (2, 3, 5, 11, 13)))
        truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] in evaluated]
        detections = [d for d in detections if d["category_id"] in evaluated]
        expected, found = both(truth, detections, iou_type=iou_type, **options)
        assert expected.shape == found.shape == (10, 101, len(evaluated), 4, 1)
        assert np.array_equal(found, expected)
        if detections and not options:
            assert (expected[:, :, 2] == -1).all()  # no ground truth
            assert 0 < expected[expected > -1].mean() < 1
