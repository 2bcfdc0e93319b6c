"""COCO evaluation of Detectron2 models, apart for categories with and without masks."""

import itertools
import json
import logging
import os
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from maskx.evaluation.average_precision import evaluate_detections, format_table
from maskx.supervision import resolve_split

__all__ = ["MaskXCOCOEvaluator"]

logger = logging.getLogger(__name__)


class MaskXCOCOEvaluator(DatasetEvaluator):
    """COCO average precision on all categories, on A (with masks) and on B, from one run.

    Args:
        dataset_name: a registered data set with ``json_file`` in its metadata.
        split: the category split, a name or a file; see :func:`maskx.supervision.resolve_split`.
        iou_types: what is evaluated, of "bbox" and "segm".
        distributed: gather the predictions of all processes; otherwise each evaluates its own.
        output_dir: where ``coco_instances_results.json`` is written; None to write nothing.

    Raises:
        ValueError: the metadata of the data set is incomplete, or the split does not fit it.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        split: str | os.PathLike = "all",
        iou_types: tuple[str, ...] = ("bbox", "segm"),
        distributed: bool = True,
        output_dir: str | None = None,
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        missing = [
            key
            for key in ("json_file", "thing_classes", "thing_dataset_id_to_contiguous_id")
            if metadata.get(key) is None
        ]
        if missing:
            raise ValueError(
                f"The metadata of data set '{dataset_name}' lacks {', '.join(missing)}. Register "
                "it with maskx.detectron2.register_coco or Detectron2's register_coco_instances, "
                "and load it once."
            )
        self._json_file = metadata.json_file
        self._class_names = metadata.thing_classes
        class_index = metadata.thing_dataset_id_to_contiguous_id
        self._category_ids = sorted(class_index, key=class_index.get)
        self._groups = resolve_split(split, self._class_names).groups()
        self._iou_types = iou_types
        self._distributed = distributed
        self._output_dir = output_dir
        self._results: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forget all predictions."""
        self._results = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in the predictions of a batch.

        Args:
            inputs: with ``image_id``.
            outputs: with ``instances``, in pixels of the original images.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to(torch.device("cpu"))
            for result in instances_to_coco_json(instances, sample["image_id"]):
                result["category_id"] = self._category_ids[result["category_id"]]
                self._results.append(result)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compare the predictions with the annotation file.

        Returns:
            For "bbox" and "segm" AP, AP50, AP75, APs, APm, APl in percent (0 without detections,
            NaN without ground truth) and, as "AP-<class>", the AP of each class; under "bbox_A",
            "segm_B" and so on those of the categories with (A) and without masks (B). Empty in
            processes other than the main one.
        """
        results = self._results
        if self._distributed:
            comm.synchronize()
            results = list(itertools.chain.from_iterable(comm.gather(results, dst=0)))
            if not comm.is_main_process():
                return {}
        if not results:
            logger.warning("The model detected nothing: every AP is 0.")
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as file:
                json.dump(results, file)
        scores = evaluate_detections(
            PathManager.get_local_path(self._json_file),
            results,
            category_ids=self._category_ids,
            groups=self._groups,
            iou_types=self._iou_types,
        )
        logger.info("Evaluation on A (with masks) and B (without):\n%s", format_table(scores))
        return self._flatten(scores)

    def _flatten(self, scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
        """Arrange scores in the form of Detectron2: {task: {metric: value}}."""
        flat = {}
        for iou_type, result in scores.items():
            per_class = zip(self._class_names, result["per_class"], strict=True)
            flat[iou_type] = result["all"] | {f"AP-{name}": value for name, value in per_class}
            for group in ("A", "B"):
                flat[f"{iou_type}_{group}"] = result[group]
        return flat
