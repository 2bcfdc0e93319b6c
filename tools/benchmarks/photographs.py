"""Peak memory of Mask^X R-CNN on a photograph: its cost is to follow the training size.

Each number is the largest resident memory of a process of its own, so it holds whatever Python,
PyTorch and the image decoder take as well.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from maskx.core.files import write_json

__all__ = ["photograph_rows", "write_photograph"]

_TASKS = ("nothing", "train", "predict")
_CONFIG = Path(__file__).parents[2] / "configs/MaskX/quick_schedules/maskx_scenes_cpu.yaml"


def photograph_rows(
    *, megapixels: float, objects: int, image_size: int, hosts: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Measure a training step and a prediction, masks encoded, of one photograph.

    Args:
        megapixels: of the photograph, which is 4 by 3.
        objects: with masks in it, and given boxes whose masks are predicted.
        image_size: shorter side in training and prediction.
        hosts: of "pip" and "detectron2".

    Returns:
        Rows of :func:`memory_row` by host and task; "nothing" has read neither image nor
        annotations. The floor is that and the decoded image, the alternative has all masks at the
        size of the photograph beside it, a byte a pixel.
    """
    from benchmarks.measure import memory_row  # not found where this file runs by itself

    rows, table = [], f"photograph of {megapixels:g} megapixels"
    settings = {"megapixels": megapixels, "objects": objects, "image_size": image_size}
    pixels = round(megapixels * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        json_file = write_photograph(Path(folder), megapixels=megapixels, objects=objects)
        for host in hosts:
            floor = alternative = 0
            for task in _TASKS:
                command = [sys.executable, __file__, host, task, str(json_file), str(image_size)]
                finished = subprocess.run(command, capture_output=True, text=True, check=False)
                if finished.returncode:
                    raise RuntimeError(f"{host}, {task}: {finished.stderr[-2000:]}")
                peak = json.loads(finished.stdout.splitlines()[-1])
                parts = {"alternative": alternative or peak, "floor": floor or peak}
                rows.append(memory_row(table, f"{host}, {task}", peak, **parts, **settings))
                if task == "nothing":
                    floor = peak + 3 * pixels
                    alternative = floor + objects * pixels
    return rows


def write_photograph(folder: Path, *, megapixels: float, objects: int) -> Path:
    """Write a JPEG and an annotation file of objects of all sizes: polygons, every third an RLE.

    Returns:
        The annotation file; the image lies beside it.
    """
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    height = round(width * 3 / 4)
    random_state = np.random.RandomState(0)
    coarse = random_state.randint(0, 256, (60, 80, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(folder / "photograph.jpg"), image)
    annotations = []
    for index in range(objects):
        side = np.array([width, height]) * random_state.uniform(0.05, 0.6)
        corner = random_state.uniform(0, 1, 2) * (np.array([width, height]) - side)
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) / 2 + 0.5
        segmentation: Any = [(corner + circle * side).ravel().tolist()]
        if index % 3 == 0:
            segmentation = _run_lengths(segmentation, height, width)
        annotations.append(
            {
                "id": index + 1,
                "image_id": 1,
                "category_id": index % 4 + 1,
                "bbox": [*corner.tolist(), *side.tolist()],
                "segmentation": segmentation,
                "area": float(side.prod()),
                "iscrowd": 0,
            }
        )
    image_entry = {"id": 1, "file_name": "photograph.jpg", "height": height, "width": width}
    path = folder / "annotations.json"
    write_json(
        path,
        {
            "images": [image_entry],
            "annotations": annotations,
            "categories": [{"id": i + 1, "name": f"class {i + 1}"} for i in range(4)],
        },
    )
    return path


def _run_lengths(polygons: list[list[float]], height: int, width: int) -> dict[str, Any]:
    from maskx.data.masks import decode_segmentation, encode_masks

    return encode_masks(decode_segmentation(polygons, height, width)[None])[0]


def _run_pip(task: str, json_file: Path, size: int) -> None:
    import torch

    from maskx.data.coco import load_coco
    from maskx.data.images import read_image_sample
    from maskx.systems.maskx_rcnn.samples import InstanceMapper, masks_of_boxes
    from maskx.torchvision import SampleDetector, maskx_rcnn

    model = SampleDetector(maskx_rcnn(5, detector={"min_size": size}))
    if task == "nothing":
        return
    (record,) = load_coco(json_file, json_file.parent).records
    if task == "train":
        sample = InstanceMapper(range(4), sizes=model.sizes)(record, np.random.RandomState(0))
        sum(model.train()([sample]).values()).backward()
        return
    boxes, classes = _objects(record)
    sample = read_image_sample(record, model.shrink)
    with torch.inference_mode():
        model.eval()([sample])
    masks_of_boxes(model, sample, boxes, classes).encode()


def _run_detectron2(task: str, json_file: Path, size: int) -> None:
    import torch
    from detectron2.data import DatasetCatalog
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    from maskx.detectron2 import MaskXDatasetMapper, get_cfg, register_coco
    from maskx.systems.maskx_rcnn.samples import masks_of_boxes

    cfg = get_cfg()
    cfg.merge_from_file(str(_CONFIG))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.WEIGHTS = 4, ""
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (size,), 2 * size
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = size, 2 * size
    cfg.INPUT.MASK_FORMAT, cfg.DATASETS.MASKX.SPLIT = "bitmask", "all"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("photograph",)
    model = build_model(cfg)
    if task == "nothing":
        return
    register_coco("photograph", json_file, json_file.parent)
    (record,) = DatasetCatalog.get("photograph")
    sample = MaskXDatasetMapper(cfg, is_train=task == "train")(record)
    if task == "train":
        with EventStorage():
            sum(model.train()([sample]).values()).backward()
        return
    boxes, classes = _objects(record)
    with torch.inference_mode():
        model.eval()([sample])
    masks_of_boxes(model, sample, boxes, classes).encode()


def _objects(record: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    annotations = record["annotations"]
    boxes = torch.tensor([a["bbox"] for a in annotations])
    return boxes, torch.tensor([a["class_index"] for a in annotations])


if __name__ == "__main__":
    run = {"pip": _run_pip, "detectron2": _run_detectron2}[sys.argv[1]]
    run(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
