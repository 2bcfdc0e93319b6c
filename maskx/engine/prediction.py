"""Whole-image models on the embedded host: classifiers of images and of pixels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from maskx.core.sample_models import SampleClassifier
from maskx.data.images import ImageMapper
from maskx.data.label_maps import semantic_label_map
from maskx.evaluation.mean_iou import MeanIoU


@torch.inference_mode()
def predict_image_labels(
    model: SampleClassifier,
    records: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    description: str = "image labels",
) -> np.ndarray:
    """Predict which classes images have.

    Returns:
        (number of records, K) float32 probabilities.
    """
    model.eval()
    read_image = ImageMapper(model.num_classes, size=None, label_maps=False).read_image
    prob = np.zeros((len(records), model.num_classes), np.float32)
    with tqdm(total=len(records), desc=description, unit="img") as progress:
        for start in range(0, len(records), batch_size):
            samples = [read_image(record) for record in records[start : start + batch_size]]
            found = torch.stack([result["image_labels_prob"] for result in model(samples)])
            prob[start : start + len(samples)] = found.float().cpu().numpy()
            progress.update(len(samples))
    return prob


def evaluate_label_maps(
    predictions: Iterable[tuple[int | str, np.ndarray]],
    records: Sequence[Mapping[str, Any]],
    num_classes: int,
    groups: Mapping[str, Iterable[int]] | None = None,
) -> dict[str, Any]:
    """Compute the mean IoU of predicted label maps; see :class:`maskx.evaluation.mean_iou.MeanIoU`.

    Args:
        predictions: image id and (H, W) label map of each record once, in any order.
    """
    missing = {record["image_id"]: record for record in records}
    counts = MeanIoU(num_classes)
    for image_id, label_map in predictions:
        if image_id not in missing:
            raise ValueError(
                f"Image {image_id!r} was predicted, but is not among the {len(records)} records, "
                "or was predicted before. Predict each record once."
            )
        counts.update(label_map, semantic_label_map(missing.pop(image_id), num_classes), image_id)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(records)} images have no prediction, the first is "
            f"{next(iter(missing))!r}. Predict each record once."
        )
    return counts.evaluate(groups)
