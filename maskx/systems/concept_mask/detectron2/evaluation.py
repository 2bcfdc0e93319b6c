"""Evaluation of ConceptMask: maps and masks of concepts by level of supervision."""

import logging
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from maskx.systems.concept_mask.scores import ConceptScores, format_concept_table
from maskx.systems.concept_mask.steps import ConceptTest

__all__ = ["MaskXConceptEvaluator"]

logger = logging.getLogger(__name__)


class MaskXConceptEvaluator(DatasetEvaluator):
    """Pointing game, soft IoU, precision, recall and IoU, by what concepts were learned from.

    Maps are measured as :func:`maskx.systems.concept_mask.segmenter.mean_maps` makes them.
    The measures are means over the images of a concept, then over the concepts of a level.

    Args:
        dataset_name: of the data set.
        test: of :func:`maskx.systems.concept_mask.detectron2.data.concept_test_data`.
        distributed: add up the measures of all processes; otherwise each evaluates its own images.

    Raises:
        ValueError: the data set has no image with a true mask.
    """

    def __init__(self, dataset_name: str, *, test: ConceptTest, distributed: bool = True) -> None:
        if not any("segmentation" in a for r in test.records for a in r["annotations"]):
            raise ValueError(
                f"Data set '{dataset_name}' (DATASETS.TEST) has no image with a true mask, which "
                "concepts are measured on. Name another data set, or none: ()."
            )
        self._dataset_name = dataset_name
        self._test = test
        self._records = {record["image_id"]: record for record in test.records}
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._scores = ConceptScores(self._test.names, self._test.levels)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take in the predictions of a batch.

        Args:
            inputs: with ``image_id`` and ``class_indices``, those that were asked for.
            outputs: with ``attention``, in [0, 1], and ``masks`` of them, of the size of the
                original image.

        Raises:
            ValueError: an image is not in the data set, or other concepts were predicted.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            image_id = sample["image_id"]
            if image_id not in self._records:
                raise ValueError(
                    f"Image {image_id!r} is not among the {len(self._records)} of data set "
                    f"'{self._dataset_name}'. Was another data set given to the model?"
                )
            asked = sample["class_indices"]
            if len(output["masks"]) != len(asked):
                raise ValueError(
                    f"{len(output['masks'])} concepts were predicted in image {image_id!r}, but "
                    f"{len(asked)} asked for. Make the samples with Trainer.build_test_loader."
                )
            truths = self._test.truths(self._records[image_id])
            attention = output["attention"].cpu().numpy()
            masks = output["masks"].cpu().numpy()
            for row, concept in enumerate(asked):
                if concept in truths:
                    self._scores.update(
                        self._test.names[concept],
                        attention=attention[row],
                        mask=masks[row],
                        truth=truths[concept],
                        image_id=image_id,
                    )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the measures.

        Returns:
            Under "concepts", in [0, 1], "<measure>_<level>" for the levels that were measured, such
            as "pointing_box", "soft_iou_image" and "iou_unseen"; see
            :class:`maskx.systems.concept_mask.scores.ConceptScores`. Empty in processes other than
            the main one.
        """
        scores = self._scores
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(scores, dst=0)
            if not comm.is_main_process():
                return {}
            scores = ConceptScores(scores.names, scores.levels)
            for part in gathered:
                scores.merge(part)
        result = scores.evaluate()
        logger.info(
            "Concepts of '%s' by level of supervision:\n%s",
            *(self._dataset_name, format_concept_table(result)),
        )
        measures = {
            f"{measure}_{level}": value
            for level, found in result["levels"].items()
            for measure, value in (found or {}).items()
        }
        return {"concepts": measures}
