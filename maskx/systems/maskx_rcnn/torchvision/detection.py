"""Detectors on the embedded host: the model interface of both hosts, and inference."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from tqdm import tqdm

from maskx.data.image_samples import read_image_sample
from maskx.data.masks import encode_masks


class SampleDetector(nn.Module):
    """Drives a torchvision detector with samples, as Detectron2 drives its models.

    Args:
        detector: a detector of torchvision, whose label 0 is the background.
    """

    def __init__(self, detector: GeneralizedRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, samples: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Compute losses in training, detections in evaluation.

        Args:
            samples: each with ``image`` (3, H, W) uint8 RGB and, in training, ``instances`` as
                made by :class:`maskx.systems.maskx_rcnn.samples.InstanceMapper`.

        Returns:
            A dictionary of scalar losses, or per sample ``{"instances": {...}}`` with
            ``pred_boxes`` (R, 4) XYXY pixels, ``scores`` (R,), ``pred_classes`` (R,) class
            indices and ``pred_masks`` (R, H, W) bool.
        """
        device = next(self.parameters()).device
        images = [sample["image"].to(device).float() / 255 for sample in samples]
        if not self.training:
            return [{"instances": _instances(d)} for d in self.detector(images)]
        targets = [_target(sample["instances"], device) for sample in samples]
        return self.detector(images, targets)


@torch.inference_mode()
def detect(
    model: SampleDetector,
    records: Sequence[dict[str, Any]],
    category_ids: Sequence[int],
    *,
    batch_size: int = 8,
    description: str = "evaluation",
) -> list[dict[str, Any]]:
    """Run a model over records.

    Args:
        model: the model; it is put into evaluation mode.
        records: records of :func:`maskx.data.coco.load_coco`.
        category_ids: id in the file by class index.
        batch_size: images at a time.
        description: label of the progress bar.

    Returns:
        Detections in COCO's results format.
    """
    model.eval()
    read_image = read_image_sample
    results = []
    with tqdm(total=len(records), desc=description, unit="img") as progress:
        for start in range(0, len(records), batch_size):
            samples = [read_image(record) for record in records[start : start + batch_size]]
            for sample, output in zip(samples, model(samples), strict=True):
                results += _coco_results(sample["image_id"], output["instances"], category_ids)
            progress.update(len(samples))
    return results


def _target(instances: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {
        "boxes": instances["gt_boxes"].to(device),
        "labels": instances["gt_classes"].to(device) + 1,
        "masks": instances["gt_masks"].to(device, torch.uint8),
        "has_masks": instances["gt_has_mask"].to(device),
    }


def _instances(detection: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "pred_boxes": detection["boxes"],
        "scores": detection["scores"],
        "pred_classes": detection["labels"] - 1,
        "pred_masks": detection["masks"][:, 0] >= 0.5,
    }


def _coco_results(
    image_id: int | str, instances: dict[str, Tensor], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    boxes = instances["pred_boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(
        instances["pred_classes"].tolist(),
        boxes.tolist(),
        instances["scores"].tolist(),
        encode_masks(instances["pred_masks"].cpu().numpy()),
        strict=True,
    )
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[class_index],
            "bbox": box,
            "score": score,
            "segmentation": mask,
        }
        for class_index, box, score, mask in rows
    ]
