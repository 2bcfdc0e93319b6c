"""Predictions of `maskx.open_run` as Detectron2's structures."""

import torch
from detectron2.structures import Boxes, Instances

from maskx.engine.results import Prediction

__all__ = ["to_instances"]


def to_instances(prediction: Prediction) -> Instances:
    """Turn the instances of a prediction into Detectron2's.

    Returns:
        With ``pred_classes`` and, where the prediction has them, ``pred_boxes``, ``scores`` and
        ``pred_masks`` (N, H, W) bool.

    Raises:
        ValueError: it has a label map alone.
    """
    if prediction.class_indices is None:
        raise ValueError("The prediction has no instances, but a label map. Use its label_map.")
    instances = Instances(prediction.image_size)
    instances.pred_classes = torch.as_tensor(prediction.class_indices)
    if prediction.boxes is not None:
        instances.pred_boxes = Boxes(torch.as_tensor(prediction.boxes))
    if prediction.scores is not None:
        instances.scores = torch.as_tensor(prediction.scores)
    if prediction.segmentations is not None:
        instances.pred_masks = torch.from_numpy(prediction.masks)
    return instances
