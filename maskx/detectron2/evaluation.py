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

from maskx.data.splits import resolve_split
from maskx.evaluation.average_precision import evaluate_detections, format_table

__all__ = ["MaskXCOCOEvaluator"]

logger = logging.getLogger(__name__)


class MaskXCOCOEvaluator(DatasetEvaluator):
    """COCO average precision on all categories, on A (with masks) and on B, from one run.

    A data set may annotate only some of its class list (``class_names`` of
    :func:`maskx.detectron2.register_coco`). Then the other classes are not scored, and are neither
    in A nor in B: whether a detection of one of them is right is not known. Such detections are
    left out and counted.

    Args:
        dataset_name: a registered data set with ``json_file`` in its metadata.
        split: the category split, a name or a file; see :func:`maskx.data.splits.resolve_split`.
        iou_types: what is evaluated, of "bbox" and "segm".
        distributed: gather the predictions of all processes; otherwise each evaluates its own.
        output_dir: where ``coco_instances_results.json`` is written; None to write nothing.
        max_detections: scored for each image and category, ``TEST.DETECTIONS_PER_IMAGE``.

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
        max_detections: int = 100,
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
        class_names = metadata.thing_classes
        # The classes that the file annotates.
        class_index = metadata.thing_dataset_id_to_contiguous_id
        self._category_id = {index: category_id for category_id, index in class_index.items()}
        self._class_names = [class_names[index] for index in self._category_id]
        position = {index: place for place, index in enumerate(self._category_id)}
        self._groups = {
            group: [position[index] for index in indices if index in position]
            for group, indices in resolve_split(split, class_names).groups().items()
        }
        self._iou_types = iou_types
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_detections = max_detections
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._results: list[dict[str, Any]] = []
        self._num_left_out = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in the predictions of a batch.

        Args:
            inputs: with ``image_id``.
            outputs: with ``instances``, in pixels of the original images.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to(torch.device("cpu"))
            is_annotated = [c in self._category_id for c in instances.pred_classes.tolist()]
            self._num_left_out += is_annotated.count(False)
            instances = instances[torch.tensor(is_annotated, dtype=torch.bool)]
            for result in instances_to_coco_json(instances, sample["image_id"]):
                result["category_id"] = self._category_id[result["category_id"]]
                self._results.append(result)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compare the predictions with the annotation file.

        Returns:
            For "bbox" and "segm" AP, AP50, AP75, APs, APm, APl in percent (0 without detections,
            NaN without ground truth) and, as "AP-<class>", the AP of each class; under "bbox_A",
            "segm_B" and so on those of the categories with (A) and without masks (B). Empty in
            processes other than the main one.
        """
        results, num_left_out = self._results, self._num_left_out
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather((results, num_left_out), dst=0)
            if not comm.is_main_process():
                return {}
            results = list(itertools.chain.from_iterable(part for part, _ in gathered))
            num_left_out = sum(number for _, number in gathered)
        if num_left_out:
            logger.info(
                "%d detections of classes that %s does not annotate are left out; %d are scored.",
                *(num_left_out, self._json_file, len(results)),
            )
        if not results:
            logger.warning("There is no detection to score: every AP is 0.")
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as file:
                json.dump(results, file)
        scores = evaluate_detections(
            PathManager.get_local_path(self._json_file),
            results,
            category_ids=list(self._category_id.values()),
            groups=self._groups,
            iou_types=self._iou_types,
            max_detections=self._max_detections,
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
