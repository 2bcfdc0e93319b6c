"""Evaluation of Detectron2 models, apart for categories with (A) and without masks (B)."""

import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from maskx.data.label_maps import semantic_label_map
from maskx.data.masks import encode_each
from maskx.data.splits import resolve_split
from maskx.detectron2.datasets import class_names_of, records_of
from maskx.engine.system import Scores
from maskx.evaluation.average_precision import (
    evaluate_detections,
    format_class_table,
    format_table,
)
from maskx.evaluation.image_labels import evaluate_image_labels
from maskx.evaluation.mean_iou import MeanIoU
from maskx.evaluation.mean_iou import format_table as format_iou_table

logger = logging.getLogger(__name__)


def _gathered(part: Any, distributed: bool = True) -> list[Any]:
    """Parts of all processes, of this one first; empty in others than the main one."""
    if not distributed:
        return [part]
    comm.synchronize()
    return comm.gather(part, dst=0) or []


class ScoresEvaluator(DatasetEvaluator):
    """Evaluates results by the counts of a system, gathered from all processes.

    Args:
        make_scores: makes empty counts, see :class:`maskx.engine.system.Scores`.
    """

    def __init__(self, dataset_name: str, make_scores: Callable[[], Scores]) -> None:
        self._records = {r["image_id"]: r for r in records_of(dataset_name)}
        self._make_scores = make_scores
        self.reset()

    def reset(self) -> None:
        """Forget all results."""
        self._scores = self._make_scores()

    def process(self, inputs: list[dict[str, Any]], outputs: list[Mapping[str, Any]]) -> None:
        """Take in the results of a batch."""
        for sample, result in zip(inputs, outputs, strict=True):
            self._scores.update(self._records[sample["image_id"]], result)

    def evaluate(self) -> dict[str, Any]:
        """Return the metrics; nothing in processes other than the main one."""
        parts = _gathered(self._scores)
        for other in parts[1:]:
            parts[0].merge(other)
        return parts[0].results() if parts else {}


class MaskXCOCOEvaluator(DatasetEvaluator):
    """COCO average precision on all categories, on A (with masks) and on B, from one run.

    A data set may annotate only some of its class list (``class_names`` of
    :func:`maskx.detectron2.register_coco`). Then the other classes are not scored, and are neither
    in A nor in B: whether a detection of one of them is right is not known. Such detections are
    left out and counted.

    Args:
        dataset_name: a registered data set with ``json_file`` in its metadata.
        split: a name or a file; see :func:`maskx.data.splits.resolve_split`.
        distributed: gather the predictions of all processes; otherwise each evaluates its own.
        output_dir: where ``coco_instances_results.json`` is written; None to write nothing.
        max_detections: scored for each image and category, ``TEST.DETECTIONS_PER_IMAGE``.
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
        self._image_ids: list[int | str] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in the predictions of a batch."""
        for sample, output in zip(inputs, outputs, strict=True):
            self._image_ids.append(sample["image_id"])
            instances = output["instances"].to(torch.device("cpu"))
            is_annotated = [c in self._category_id for c in instances.pred_classes.tolist()]
            self._num_left_out += is_annotated.count(False)
            instances = instances[torch.tensor(is_annotated, dtype=torch.bool)]
            masks = []
            if instances.has("pred_masks"):  # of which Detectron2 has several in memory at a time
                masks = encode_each(instances.pred_masks)
                instances.remove("pred_masks")
            results = instances_to_coco_json(instances, sample["image_id"])
            for result, mask in itertools.zip_longest(results, masks):
                result["category_id"] = self._category_id[result["category_id"]]
                if mask is not None:
                    result["segmentation"] = mask
                self._results.append(result)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compare the predictions with the annotation file.

        Returns:
            For "bbox" and "segm" AP, AP50, AP75, APs, APm, APl in percent (0 without detections,
            NaN without ground truth) and "AP-<class>"; under "bbox_A", "segm_B" and so on those of
            A and B, and of "rare", "common" and "frequent" where the file is of LVIS. Empty in
            processes other than the main one.
        """
        own = (self._results, self._num_left_out, self._image_ids)
        parts = _gathered(own, self._distributed)
        if not parts:
            return {}
        results, numbers, image_ids = zip(*parts, strict=True)
        results = list(itertools.chain.from_iterable(results))
        num_left_out = sum(numbers)
        if num_left_out:
            logger.info(
                "%d detections of classes that %s does not annotate are left out; %d are scored.",
                num_left_out,
                self._json_file,
                len(results),
            )
        if not results:
            logger.warning("There is no detection to score: every AP is 0.")
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as file:
                json.dump(results, file)
        is_here = os.path.isfile(self._json_file)  # and needs no copy for COCO's own tools
        scores = evaluate_detections(
            self._json_file if is_here else PathManager.get_local_path(self._json_file),
            results,
            category_ids=list(self._category_id.values()),
            groups=self._groups,
            iou_types=self._iou_types,
            max_detections=self._max_detections,
            image_ids=list(itertools.chain.from_iterable(image_ids)) or None,
        )
        logger.info("Evaluation on A (with masks) and B (without):\n%s", format_table(scores))
        by_class = format_class_table(scores, self._class_names)
        logger.info("Average precision by category:\n%s", by_class)
        return self._flatten(scores)

    def _flatten(self, scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
        """Arrange scores in the form of Detectron2: {task: {metric: value}}."""
        flat = {}
        for iou_type, result in scores.items():
            per_class = zip(self._class_names, result["per_class"], strict=True)
            flat[iou_type] = result["all"] | {f"AP-{name}": value for name, value in per_class}
            groups = {g: v for g, v in result.items() if g != "all" and isinstance(v, dict)}
            flat |= {f"{iou_type}_{group}": values for group, values in groups.items()}
        return flat


class _RecordEvaluator(DatasetEvaluator):
    """What evaluators have in common whose truth is in the records of a registered data set.

    Args:
        split: a name or a file; see :func:`maskx.data.splits.resolve_split`.
        distributed: gather what all processes saw; otherwise each evaluates its own images.
    """

    def __init__(
        self, dataset_name: str, *, split: str | os.PathLike = "all", distributed: bool = True
    ) -> None:
        self._dataset_name, self._distributed = dataset_name, distributed
        self._class_names = class_names_of(dataset_name)
        self._groups = resolve_split(split, self._class_names).groups()
        records = records_of(dataset_name)  # Detectron2's reader sets the ids only now
        for record in records:
            if "image_id" not in record:
                raise ValueError(
                    f"Data set '{dataset_name}' has a record ({record['file_name']}) without "
                    "image_id, which the truth is found by. Give each record its own."
                )
        self._records = {record["image_id"]: record for record in records}
        self.reset()

    def _check_known(self, image_id: int | str) -> None:
        if image_id not in self._records:
            raise ValueError(
                f"Image {image_id!r} is not among the {len(self._records)} of data set "
                f"'{self._dataset_name}'. Was another data set given to the model?"
            )


class MaskXImageLabelEvaluator(_RecordEvaluator):
    """Mean average precision of image labels on all categories, on A (with masks) and on B.

    The truth is the image labels of each record, given or of its annotations; see
    :func:`maskx.evaluation.image_labels.evaluate_image_labels` for the measures.
    """

    def __init__(self, dataset_name: str, **options: Any) -> None:
        super().__init__(dataset_name, **options)
        check_all_classes_known(dataset_name)
        for record in self._records.values():
            if "image_labels" not in record:
                raise ValueError(
                    f"Data set '{dataset_name}' has a record ({record['file_name']}) with neither "
                    "image_labels nor annotations, so its labels are not known."
                )
        self._labels = {id_: record["image_labels"] for id_, record in self._records.items()}

    def reset(self) -> None:
        """Forget all predictions."""
        self._probs: list[tuple[int | str, np.ndarray]] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in the predictions of a batch.

        Args:
            outputs: with ``image_labels_prob`` (K,), probabilities.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            image_id, prob = sample["image_id"], output["image_labels_prob"]
            self._check_known(image_id)
            if prob.shape != (len(self._class_names),):
                raise ValueError(
                    f"image_labels_prob of image {image_id!r} has shape {tuple(prob.shape)}. "
                    f"Allowed: ({len(self._class_names)},), one probability per class."
                )
            self._probs.append((image_id, prob.float().cpu().numpy()))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the measures of all images predicted.

        Returns:
            Under "image_labels" in percent "mAP" (over all categories that some image has),
            "mAP_A", "mAP_B", "precision", "recall" and "F1" (means over the classes, at a
            probability of 0.5) and "AP-<class>"; NaN where there is nothing to average. Empty in
            processes other than the main one.
        """
        parts = _gathered(self._probs, self._distributed)
        if not parts:
            return {}
        probs = list(itertools.chain.from_iterable(parts))
        shape = (len(probs), len(self._class_names))
        labels = np.zeros(shape, bool)
        for row, (image_id, _) in enumerate(probs):
            labels[row, self._labels[image_id]] = True
        scores = np.array([prob for _, prob in probs], np.float32).reshape(shape)
        result = evaluate_image_labels(scores, labels)
        per_class = np.array(result["per_class"]["AP"])
        summary = {
            "mAP": result["mAP"],
            "mAP_A": _mean(per_class[list(self._groups["A"])]),
            "mAP_B": _mean(per_class[list(self._groups["B"])]),
            **{key: result[key] for key in ("precision", "recall", "F1")},
        }
        logger.info(
            "Image labels of %d images: %s",
            len(probs),
            ", ".join(f"{key} {value:.2f}" for key, value in summary.items()),
        )
        names = zip(self._class_names, per_class.tolist(), strict=True)
        return {"image_labels": summary | {f"AP-{name}": ap for name, ap in names}}


def check_all_classes_known(dataset_name: str) -> None:
    """Refuse a data set whose images may have labels that its file does not tell."""
    metadata = MetadataCatalog.get(dataset_name)
    num_classes = len(metadata.thing_classes)
    known = metadata.get("thing_dataset_id_to_contiguous_id", range(num_classes))
    if len(known) < num_classes:
        raise ValueError(
            f"Data set '{dataset_name}' annotates {len(known)} of {num_classes} classes: which of "
            "the others an image has is not known, so they cannot be taken for absent. Use a data "
            "set with labels of all classes."
        )


def _mean(values: np.ndarray) -> float:
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if valid.size else float("nan")


class MaskXSemSegEvaluator(_RecordEvaluator):
    """Mean IoU on the background and all categories, on A (with masks) and on B, from one run.

    The truth is the label map of each record or, where it has none, is drawn from its objects; see
    :func:`maskx.data.label_maps.semantic_label_map`. One image is read at a time.
    """

    def __init__(self, dataset_name: str, **options: Any) -> None:
        super().__init__(dataset_name, **options)
        num_classes = len(self._class_names)
        class_index = MetadataCatalog.get(dataset_name).get(
            "thing_dataset_id_to_contiguous_id", {id_: id_ for id_ in range(num_classes)}
        )
        # Label maps count the categories of their file in the order of their ids, and where it
        # annotates only some of the classes, nothing is known to be background.
        found = [class_index[id_] for id_ in sorted(class_index)]
        if not any("label_map_file_name" in record for record in self._records.values()):
            found.sort()
        if found != list(range(num_classes)):
            raise ValueError(
                f"The annotation file of data set '{dataset_name}' has {len(class_index)} "
                f"categories, which are not its class list of {num_classes}, or not in its order. "
                "Mean IoU needs them equal: register the file without class_names."
            )

    def reset(self) -> None:
        """Forget all predictions."""
        self._counts = MeanIoU(len(self._class_names))

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in the predictions of a batch.

        Args:
            outputs: with ``sem_seg`` of the size of the original image: scores (K + 1, H, W),
                background first, or a label map (H, W) of integers from 0, the background, to K.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            image_id = sample["image_id"]
            self._check_known(image_id)
            predicted = self._label_map(output["sem_seg"], image_id)
            truth = self._truth(self._records[image_id])
            self._counts.update(predicted.cpu().numpy(), truth, image_id)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the measures from what was counted.

        Returns:
            Under "sem_seg" in percent "mIoU" (background and all categories), "mIoU_A", "mIoU_B",
            "background" (its IoU), "pixel_accuracy" and "IoU-<class>"; NaN where nothing was
            counted. Empty in processes other than the main one.
        """
        parts = _gathered(self._counts, self._distributed)
        if not parts:
            return {}
        counts = MeanIoU(len(self._class_names))
        for part in parts:
            counts.merge(part)
        return {"sem_seg": self._measures(counts.evaluate(self._groups))}

    def _measures(self, result: Mapping[str, Any]) -> dict[str, float]:
        logger.info("Evaluation on A (with masks) and B (without):\n%s", format_iou_table(result))
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
