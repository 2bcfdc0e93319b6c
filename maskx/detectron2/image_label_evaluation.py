"""Average precision of predicted image labels, apart for categories with and without masks."""

import itertools
import logging
import os

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from maskx.data.splits import resolve_split
from maskx.detectron2.datasets import class_names_of, records_of
from maskx.evaluation.image_labels import evaluate_image_labels

__all__ = ["MaskXImageLabelEvaluator"]

logger = logging.getLogger(__name__)


class MaskXImageLabelEvaluator(DatasetEvaluator):
    """Mean average precision of image labels on all categories, on A (with masks) and on B.

    The truth is the image labels of each record, given or of its annotations; see
    :func:`maskx.evaluation.image_labels.evaluate_image_labels` for the measures.

    Args:
        dataset_name: a registered data set.
        split: the category split, a name or a file; see :func:`maskx.data.splits.resolve_split`.
        distributed: gather the predictions of all processes; otherwise each evaluates its own.

    Raises:
        FileNotFoundError: the split is neither a known name nor a file.
        ValueError: the data set is not registered, its records have no ids or no labels, the split
            does not fit it, or its annotation file has only some of its classes.
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
        records = records_of(dataset_name)
        check_all_classes_known(dataset_name)
        for record in records:
            if "image_id" not in record or "image_labels" not in record:
                raise ValueError(
                    f"Data set '{dataset_name}' has a record ({record['file_name']}) without "
                    "image_id, or with neither image_labels nor annotations. This evaluator needs "
                    "an id and the labels of each image."
                )
        self._labels = {record["image_id"]: record["image_labels"] for record in records}
        self._dataset_name = dataset_name
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._probs: list[tuple[int | str, np.ndarray]] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in the predictions of a batch.

        Args:
            inputs: with ``image_id``.
            outputs: with ``image_labels_prob`` (K,), probabilities.

        Raises:
            ValueError: an image is not in the data set, or a prediction is of another form.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            image_id, prob = sample["image_id"], output["image_labels_prob"]
            if image_id not in self._labels:
                raise ValueError(
                    f"Image {image_id!r} is not among the {len(self._labels)} of data set "
                    f"'{self._dataset_name}'. Was another data set given to the model?"
                )
            if prob.shape != (len(self._class_names),):
                raise ValueError(
                    f"image_labels_prob of image {image_id!r} has shape {tuple(prob.shape)}. "
                    f"Allowed: ({len(self._class_names)},), one probability per class."
                )
            self._probs.append((image_id, prob.float().cpu().numpy()))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the measures of all images predicted.

        Returns:
            Under "image_labels" in percent "mAP" (mean average precision over all categories that
            some image has), "mAP_A" and "mAP_B" (over those with and without masks), "precision",
            "recall" and "F1" (means over the classes, at a probability of 0.5) and "AP-<class>";
            NaN where there is nothing to average. Empty in processes other than the main one.
        """
        probs = self._probs
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(probs, dst=0)
            if not comm.is_main_process():
                return {}
            probs = list(itertools.chain.from_iterable(gathered))
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
    """Refuse a data set whose images may have labels that its file does not tell.

    Raises:
        ValueError: the file annotates only some of the classes.
    """
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
