"""Evaluation of models of source and target categories on data sets with a class list of their own.

A model of 80 classes is scored on the 20 of VOC: predictions are translated by name, and of the two
groups of an evaluation A are the source and B the target categories among those 20.
"""

from typing import Any

import torch

from maskx.detectron2.image_label_evaluation import MaskXImageLabelEvaluator
from maskx.detectron2.sem_seg_evaluation import MaskXSemSegEvaluator
from maskx.supervision import CategorySplit
from maskx.systems.transfernet.detectron2.data import labels_of_dataset

__all__ = ["MaskXTransferLabelEvaluator", "MaskXTransferSemSegEvaluator"]


class MaskXTransferSemSegEvaluator(MaskXSemSegEvaluator):
    """Mean IoU on the classes of a data set of label maps in the class list of the model.

    The model is asked for the classes of the data set alone (``candidate_labels`` of its samples);
    any other label in a prediction is an error.

    Args:
        dataset_name: a registered data set.
        split: of :func:`maskx.systems.transfernet.detectron2.data.transfer_split`.
        distributed: see :class:`MaskXSemSegEvaluator`.

    Raises:
        ValueError: as of :class:`MaskXSemSegEvaluator`, or the model does not know a class.
    """

    def __init__(
        self, dataset_name: str, *, split: CategorySplit, distributed: bool = True
    ) -> None:
        super().__init__(dataset_name, distributed=distributed)
        labels = labels_of_dataset(dataset_name, split)
        self._groups = _groups(labels, split)
        self._split = split
        self._own_labels = torch.full((len(split.class_names) + 1,), -1)
        self._own_labels[0] = 0
        self._own_labels[torch.tensor(labels) + 1] = torch.arange(1, len(labels) + 1)

    def _label_map(self, sem_seg: torch.Tensor, image_id: int | str) -> torch.Tensor:
        if sem_seg.is_floating_point() or sem_seg.ndim != 2:
            raise ValueError(
                f"sem_seg of image {image_id!r} has shape {tuple(sem_seg.shape)} and dtype "
                f"{sem_seg.dtype}. Allowed: a label map (H, W) of integers, in the class list of "
                "the model."
            )
        own = self._own_labels[sem_seg.cpu()]
        if (own < 0).any():
            foreign = sem_seg.cpu()[own < 0].unique().tolist()
            names = ", ".join(self._split.class_names[label - 1] for label in foreign)
            raise ValueError(
                f"sem_seg of image {image_id!r} has {names}, which data set "
                f"'{self._dataset_name}' does not have. Make its samples with "
                "Trainer.build_test_loader, which name the classes that may be predicted."
            )
        return own


class MaskXTransferLabelEvaluator(MaskXImageLabelEvaluator):
    """Average precision of the classes of a data set, of probabilities for those of the model.

    Args:
        dataset_name: a registered data set.
        split: of :func:`maskx.systems.transfernet.detectron2.data.transfer_split`.
        distributed: see :class:`MaskXImageLabelEvaluator`.

    Raises:
        ValueError: as of :class:`MaskXImageLabelEvaluator`, or the model does not know a class.
    """

    def __init__(
        self, dataset_name: str, *, split: CategorySplit, distributed: bool = True
    ) -> None:
        super().__init__(dataset_name, distributed=distributed)
        self._own_classes = labels_of_dataset(dataset_name, split)
        self._groups = _groups(self._own_classes, split)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take in the predictions of a batch: ``image_labels_prob`` (K,), K of the model."""
        own = [{"image_labels_prob": o["image_labels_prob"][self._own_classes]} for o in outputs]
        super().process(inputs, own)


def _groups(labels: list[int], split: CategorySplit) -> dict[str, tuple[int, ...]]:
    """Class indices of a data set by group, as `CategorySplit.groups` has them of its own list."""
    sides = {"A": set(split.indices_with_masks), "B": set(split.indices_without_masks)}
    of_side = {
        name: tuple(index for index, label in enumerate(labels) if label in side)
        for name, side in sides.items()
    }
    return {"all": tuple(range(len(labels))), **of_side}
