"""Cases around the networks: annotations that are read, COCO AP, mean IoU."""

import contextlib
import io
import json
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO

from benchmarks.measure import Case
from maskx.data.coco import load_coco
from maskx.data.masks import encode_masks
from maskx.evaluation.average_precision import evaluate_detections
from maskx.evaluation.coco_matching import BACKENDS, run_cocoeval
from maskx.evaluation.mean_iou import MeanIoU

__all__ = ["annotation_file", "average_precision_cases", "mean_iou_cases", "reading_cases"]

_HEIGHT, _WIDTH = 480, 640
_OBJECTS = 7  # per image, as COCO has them
_MAP = (512, 683)


def annotation_file(num_images: int) -> dict[str, Any]:
    """Make a file of 80 categories, polygons of 4 to 150 points, every 86th object a crowd."""
    random_ = random.Random(0)
    annotations = []
    for number in range(1, _OBJECTS * num_images + 1):
        points = min(150, 4 + int(random_.expovariate(1 / 25)))
        x, y, radius = random_.uniform(100, 540), random_.uniform(100, 380), random_.uniform(5, 90)
        angles = [2 * math.pi * k / points for k in range(points)]
        polygon = [
            round(value, 2)
            for t in angles
            for value in (x + radius * math.cos(t), y + radius * math.sin(t))
        ]
        left, top, right, bottom = (
            f(polygon[k::2]) for f, k in ((min, 0), (min, 1), (max, 0), (max, 1))
        )
        segmentation: Any = [polygon]
        if is_crowd := number % 86 == 0:
            first = int(left) * _HEIGHT
            count = max(1, int(right - left)) * _HEIGHT
            rest = _HEIGHT * _WIDTH - first - count
            segmentation = {"size": [_HEIGHT, _WIDTH], "counts": [first, count, rest]}
            top, bottom = 0.0, float(_HEIGHT)
        annotations.append(
            {
                "id": number,
                "image_id": random_.randrange(num_images) + 1,
                "category_id": random_.randrange(80) + 1,
                "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                "area": round(math.pi * radius**2, 2),
                "iscrowd": int(is_crowd),
                "segmentation": segmentation,
            }
        )
    images = [
        {"id": n + 1, "file_name": f"{n:012d}.jpg", "height": _HEIGHT, "width": _WIDTH}
        for n in range(num_images)
    ]
    categories = [{"id": n + 1, "name": f"class {n + 1}"} for n in range(80)]
    return {"images": images, "annotations": annotations, "categories": categories}


def reading_cases(num_images: int) -> Iterator[Case]:
    """Read an annotation file: pycocotools without a check, maskx with all of them."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "annotations.json"
    path.write_text(json.dumps(annotation_file(num_images)), encoding="utf-8")
    settings, size = {"images": num_images}, path.stat().st_size
    with path.open(encoding="utf-8") as file:
        content = json.load(file)

    def alternative() -> None:
        coco = COCO()
        coco.dataset = json.loads(path.read_bytes())
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco.createIndex()

    def ours(folder: tempfile.TemporaryDirectory = folder) -> int:  # which is kept as long
        return len(load_coco(path, folder.name, check_images=False).records)

    assert ours() == len(content["images"])
    yield Case("pycocotools", alternative, 0, settings, size, traced=True)
    yield Case("load_coco", ours, 0, settings, size, traced=True)


def average_precision_cases(num_images: int) -> Iterator[Case]:
    """Score masks that are near the truth: the evaluation alone, then with all checks."""
    truth = annotation_file(num_images)
    random_ = random.Random(1)
    detections = []
    columns, rows = np.meshgrid(np.arange(_WIDTH), np.arange(_HEIGHT))
    for annotation in truth["annotations"]:
        x, y, width, height = annotation["bbox"]
        x, y = x + width / 2 + random_.uniform(-4, 4), y + height / 2 + random_.uniform(-4, 4)
        mask = ((columns - x) / width) ** 2 + ((rows - y) / height) ** 2 <= 0.25
        if not mask.any():
            continue
        (rle,) = encode_masks(mask[None])
        keys = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        detections.append({**keys, "score": random_.random(), "segmentation": rle})
    ids = [category["id"] for category in truth["categories"]]
    num_bytes = sum(len(d["segmentation"]["counts"]) for d in detections)
    settings = {"images": num_images, "detections": len(detections)}
    options = {"category_ids": ids, "iou_type": "segm", "max_detections": 100}

    def alternative() -> np.ndarray:
        return run_cocoeval(truth, detections, backend="pycocotools", **options)

    def ours() -> dict[str, Any]:
        return evaluate_detections(
            truth, detections, category_ids=ids, groups={"all": range(80)}, iou_types=["segm"]
        )

    yield Case("pycocotools", alternative, 0, settings, num_bytes, traced=True)
    fastest = next(iter(BACKENDS))
    yield Case(f"evaluate_detections ({fastest})", ours, 0, settings, num_bytes, traced=True)


def mean_iou_cases(num_classes: int) -> Iterator[Case]:
    """Count the pixels of a label map: in a confusion matrix, as evaluators do it, and in ours."""
    random_ = np.random.RandomState(0)
    coarse = random_.randint(1, num_classes + 1, (16, 22))
    truth = coarse.repeat(32, axis=0).repeat(32, axis=1)[: _MAP[0], : _MAP[1]]
    is_wrong = random_.rand(*truth.shape) < 0.2
    predicted = np.where(is_wrong, random_.randint(0, num_classes + 1, truth.shape), truth)
    small = np.uint8 if num_classes < 255 else np.int32
    settings, side = {"classes": num_classes}, num_classes + 1
    compact = [labels.astype(small) for labels in (predicted, truth)]
    num_bytes = sum(labels.nbytes for labels in compact)
    if side**2 <= 2**24:
        table = np.zeros((side, side), np.int64)

        def by_numpy() -> np.ndarray:
            pairs = np.bincount(side * predicted.ravel() + truth.ravel(), minlength=side**2)
            return np.add(table, pairs.reshape(table.shape), out=table)

        tensors = torch.from_numpy(predicted.copy()), torch.from_numpy(truth.copy())
        counts = torch.zeros(side, side, dtype=torch.int64)

        def by_torch() -> torch.Tensor:
            pairs = tensors[0].flatten() * side + tensors[1].flatten()
            return counts.add_(torch.bincount(pairs, minlength=side**2).reshape(side, side))

        yield Case("confusion matrix, numpy", by_numpy, 0, settings, num_bytes, traced=True)
        yield Case("confusion matrix, torch", by_torch, 0, settings, num_bytes)
    measure = MeanIoU(num_classes)

    def ours() -> MeanIoU:
        measure.update(*compact, 1)
        return measure

    yield Case("MeanIoU", ours, 0, settings, num_bytes, traced=True)
