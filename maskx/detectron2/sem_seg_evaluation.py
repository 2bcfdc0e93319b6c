"""Mean IoU of Detectron2 models, apart for categories with and without masks."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from maskx.data.label_maps import semantic_label_map
from maskx.data.splits import resolve_split
from maskx.detectron2.datasets import class_names_of, records_of
from maskx.evaluation.mean_iou import MeanIoU, format_table

__all__ = ["MaskXSemSegEvaluator"]

logger = logging.getLogger(__name__)


class MaskXSemSegEvaluator(DatasetEvaluator):
    """Mean IoU on the background and all categories, on A (with masks) and on B, from one run.

    The truth is the label map of each record or, where it has none, is drawn from its objects; see
    :func:`maskx.data.label_maps.semantic_label_map`. One image is read at a time.

    Args:
        dataset_name: a registered data set.
        split: the category split, a name or a file; see :func:`maskx.data.splits.resolve_split`.
        distributed: add up the counts of all processes; otherwise each evaluates its own images.

    Raises:
        FileNotFoundError: the split is neither a known name nor a file.
        ValueError: the data set is not registered, its records have no ids, the split does not fit
            it, or its class list is not that of its annotation file.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        split: str | os.PathLike = "all",
        distributed: bool = True,
    ) -> None:
        self._class_names = class_names_of(dataset_name)
        self._groups = resolve_split(split, self._class_names).groups()
        num_classes = len(self._class_names)
        records = records_of(dataset_name)  # Detectron2's reader sets the ids only now
        class_index = MetadataCatalog.get(dataset_name).get(
            "thing_dataset_id_to_contiguous_id", {id_: id_ for id_ in range(num_classes)}
        )
        # Label maps count the categories of their file in the order of their ids, and where it
        # annotates only some of the classes, nothing is known to be background.
        if [class_index[id_] for id_ in sorted(class_index)] != list(range(num_classes)):
            raise ValueError(
                f"The annotation file of data set '{dataset_name}' has {len(class_index)} "
                f"categories, which are not its class list of {num_classes}, or not in its order. "
                "Mean IoU needs them equal: register the file without class_names."
            )
        if any("image_id" not in record for record in records):
            raise ValueError(
                f"Data set '{dataset_name}' has records without image_id, which this evaluator "
                "finds the truth by. Give each record its own."
            )
        self._dataset_name = dataset_name
        self._records = {record["image_id"]: record for record in records}
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._counts = MeanIoU(len(self._class_names))

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in the predictions of a batch.

        Args:
            inputs: with ``image_id``.
            outputs: with ``sem_seg`` of the size of the original image: scores (K + 1, H, W),
                background first, or a label map (H, W) of integers from 0, the background, to K.

        Raises:
            ValueError: an image is not in the data set, or a prediction is of another form.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            image_id = sample["image_id"]
            if image_id not in self._records:
                raise ValueError(
                    f"Image {image_id!r} is not among the {len(self._records)} of data set "
                    f"'{self._dataset_name}'. Was another data set given to the model?"
                )
            predicted = self._label_map(output["sem_seg"], image_id)
            truth = self._truth(self._records[image_id])
            self._counts.update(predicted.cpu().numpy(), truth, image_id)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the measures from what was counted.

        Returns:
            Under "sem_seg" in percent "mIoU" (background and all categories), "mIoU_A" and
            "mIoU_B" (categories with and without masks), "background" (its IoU),
            "pixel_accuracy" and "IoU-<class>"; NaN where nothing was counted. Empty in processes
            other than the main one.
        """
        counts = self._counts
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(counts, dst=0)
            if not comm.is_main_process():
                return {}
            counts = MeanIoU(len(self._class_names))
            for part in gathered:
                counts.merge(part)
        result = counts.evaluate(self._groups)
        return {"sem_seg": self._measures(result)}

    def _measures(self, result: Mapping[str, Any]) -> dict[str, float]:
        logger.info("Evaluation on A (with masks) and B (without):\n%s", format_table(result))
        means = result["mIoU"]
        return {
            "mIoU": means["all"],
            "mIoU_A": means["A"],
            "mIoU_B": means["B"],
            "background": result["background"],
            "pixel_accuracy": result["pixel_accuracy"],
            **self._per_class(result),
        }

    def _per_class(self, result: Mapping[str, Any]) -> dict[str, float]:
        pairs = zip(self._class_names, result["per_class"], strict=True)
        return {f"IoU-{name}": value for name, value in pairs}

    def _truth(self, record: Mapping[str, Any]) -> np.ndarray:
        return semantic_label_map(record, len(self._class_names))

    def _label_map(self, sem_seg: torch.Tensor, image_id: int | str) -> torch.Tensor:
        is_float = sem_seg.is_floating_point()
        num_labels = len(self._class_names) + 1
        if is_float and sem_seg.ndim == 3 and sem_seg.shape[0] == num_labels:
            return sem_seg.argmax(dim=0)
        if not is_float and sem_seg.ndim == 2:
            return sem_seg
        raise ValueError(
            f"sem_seg of image {image_id!r} has shape {tuple(sem_seg.shape)} and dtype "
            f"{sem_seg.dtype}. Allowed: scores ({num_labels}, H, W), background first, or a label "
            "map (H, W) of integers."
        )
