import numpy as np
import pytest
from detect_concepts import measure_detections

from maskx.data.masks import encode_masks
from maskx.engine.results import Prediction
from maskx.systems.concept_mask.concept_sets import ConceptSplit

SPLIT = ConceptSplit(("cat", "dog", "sky"), boxed=("cat", "dog"), masked=("cat",))


def rectangle(x1, x2):
    mask = np.zeros((4, 10), bool)
    mask[:, x1:x2] = True
    return mask


def record(*shown):
    """An image of classes cat, dog, sky, zebra with an object for each (class, x1, x2)."""
    annotations = [
        {
            "id": n,
            "class_index": c,
            "bbox": [x1, 0, x2, 4],
            "iscrowd": 0,
            "segmentation": encode_masks(rectangle(x1, x2)[None])[0],
        }
        for n, (c, x1, x2) in enumerate(shown)
    ]
    return {"image_id": 1, "file_name": "1", "height": 4, "width": 10, "annotations": annotations}


def test_union_of_what_is_found_or_the_surest():
    found = [("dog", 0, 4, 0.9), ("dog", 4, 6, 0.6), ("dog", 6, 10, 0.1)]
    found += [("cat", 0, 5, 0.2), ("cat", 0, 9, 0.3)]
    prediction = Prediction(
        ("dog", "cat"),
        segmentations=encode_masks(np.stack([rectangle(x1, x2) for _, x1, x2, _ in found])),
        scores=np.array([score for *_, score in found]),
        class_indices=np.array([("dog", "cat").index(name) for name, *_ in found]),
    )
    names = ("cat", "dog", "sky", "zebra")
    shown = [record((0, 0, 10), (1, 0, 3), (1, 5, 8), (3, 0, 1))]
    result, unknown = measure_detections(
        lambda file: prediction, shown, names, SPLIT, found_names=("dog", "cat")
    )
    assert unknown == ["sky", "zebra"]
    # Dogs: columns 0 to 5 are sure; the truth is 0 to 2 and 5 to 7. Cats: the surest has 9 of 10.
    assert result["levels"]["box"]["iou"] == pytest.approx(4 / 8)
    assert result["levels"]["box"]["precision"] == pytest.approx(4 / 6)
    assert result["levels"]["mask"]["iou"] == pytest.approx(9 / 10)
    assert result["levels"]["image"] is None


def test_what_is_not_found_counts_with_0():
    empty = Prediction(
        ("dog",),
        segmentations=[],
        scores=np.zeros(0),
        class_indices=np.zeros(0, int),
        image=np.zeros((4, 10, 3), np.uint8),
    )
    shown = [record((1, 0, 3))]
    result, _ = measure_detections(
        lambda file: empty, shown, ("cat", "dog"), SPLIT, found_names=["dog"]
    )
    assert result["concepts"]["dog"]["iou"] == 0
