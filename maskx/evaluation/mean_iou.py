"""Mean intersection over union of label maps, apart for groups of classes.

The measure of PASCAL VOC's segmentation challenge (comp6): with TP, FP and FN counted in pixels
over the whole data set, never per image,

    IoU = TP / (TP + FP + FN),

averaged over the classes and the background. Pixels that the truth ignores count nowhere, also
not as FP. A class that is in the truth nowhere but was predicted has IoU 0, by the same formula,
and counts in the mean. For one that is in neither it has no value (0 / 0; in VOC every class
occurs): it is left out. Some evaluators also leave out classes that the truth lacks but that were
predicted, Detectron2's own among them; their mean is never lower.

TP, TP + FP and TP + FN per class are all it takes. At 21,841 classes these are 0.5 MB, a confusion
matrix would be 3.8 GB.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from maskx.data.label_maps import ignore_label

__all__ = ["MeanIoU", "format_table"]


class MeanIoU:
    """Counts pixels image by image. Counts of several processes are added with `merge`.

    Labels are those of `maskx.data.label_maps`: 0 is the background, c + 1 is class index c.

    Args:
        num_classes: number of classes K, without the background.

    Attributes:
        num_classes: as given.
        intersections: (K + 1,) int64, by label: pixels with this label in prediction and truth.
        predicted: (K + 1,) int64, by label: pixels predicted so.
        true: (K + 1,) int64, by label: pixels that are so.
    """

    def __init__(self, num_classes: int) -> None:
        self._ignore = ignore_label(num_classes)
        self.num_classes = num_classes
        counts = np.zeros((3, num_classes + 1), np.int64)
        self.intersections, self.predicted, self.true = counts

    def update(
        self,
        predicted: ArrayLike,
        truth: ArrayLike,
        image_id: int | str,
        *,
        allow_undecided: bool = False,
    ) -> None:
        """Count the pixels of one image.

        Args:
            predicted: (H, W) integers from 0 to K.
            truth: (H, W) integers from 0 to K, and `ignore_label(K)` where it is not known.
            image_id: id of the image, for errors.
            allow_undecided: whether the prediction may be `ignore_label(K)` too. Such a pixel is
                FN of its true label and FP of none.

        Raises:
            ValueError: the arrays are of different shapes, or a value is none of the allowed.
        """
        predicted, truth = np.asarray(predicted), np.asarray(truth)
        for name, labels in (("prediction", predicted), ("truth", truth)):
            if labels.ndim != 2 or labels.dtype.kind not in "iu":
                raise ValueError(
                    f"The {name} for image {image_id!r} has shape {labels.shape} and dtype "
                    f"{labels.dtype}. Allowed: (H, W) integers."
                )
        if predicted.shape != truth.shape:
            raise ValueError(
                f"The prediction for image {image_id!r} has shape {predicted.shape}, its truth "
                f"{truth.shape}. Resize the prediction (scores, before the argmax) to the image."
            )
        hint = f", {self._ignore} (ignore)"
        decided = predicted[predicted != self._ignore] if allow_undecided else predicted
        where = f"The prediction for image {image_id!r}"
        self._check_range(decided, where, hint if allow_undecided else "")
        is_known = truth != self._ignore
        predicted, truth = predicted[is_known], truth[is_known]
        self._check_range(truth, f"The truth of image {image_id!r}", hint)
        self.predicted += self._count(predicted[predicted != self._ignore])
        self.true += self._count(truth)
        self.intersections += self._count(truth[predicted == truth])

    def merge(self, other: "MeanIoU") -> None:
        """Add the counts of other images, such as those of another process.

        Raises:
            ValueError: the other counts are of another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"Counts of {other.num_classes} classes cannot be added to counts of "
                f"{self.num_classes} classes. Count both with one class list."
            )
        self.intersections += other.intersections
        self.predicted += other.predicted
        self.true += other.true

    def evaluate(self, groups: Mapping[str, Iterable[int]] | None = None) -> dict[str, Any]:
        """Compute the measures, all in percent, [0, 100].

        Args:
            groups: class indices by name, as `CategorySplit.groups` gives them. The group "all" is
                always there and always has every class and the background; the others are without
                the background.

        Returns:
            "mIoU": the mean IoU by group, "background": the IoU of the background, "per_class": a
            list of the IoU by class index, "pixel_accuracy": how many of the known pixels are
            right. NaN is what nothing was counted for; means leave it out.

        Raises:
            ValueError: a group holds something that is no class index.
        """
        union = self.predicted + self.true - self.intersections
        iou = np.full(self.num_classes + 1, math.nan)
        np.divide(100 * self.intersections, union, out=iou, where=union > 0)
        means = {"all": _mean(iou)}
        for name, indices in (groups or {}).items():
            if name == "all":
                continue
            labels = np.array([index + 1 for index in indices], dtype=np.int64)
            wrong = labels[(labels < 1) | (labels > self.num_classes)]
            if wrong.size:
                raise ValueError(
                    f"Group {name!r} holds class index {wrong[0] - 1}. Allowed: 0 to "
                    f"{self.num_classes - 1}."
                )
            means[name] = _mean(iou[labels])
        num_known = int(self.true.sum())
        num_right = int(self.intersections.sum())
        return {
            "mIoU": means,
            "background": float(iou[0]),
            "per_class": iou[1:].tolist(),
            "pixel_accuracy": 100 * num_right / num_known if num_known else math.nan,
        }

    def _check_range(self, labels: np.ndarray, where: str, hint: str) -> None:
        if labels.size == 0:
            return
        for value in (labels.min(), labels.max()):
            if not 0 <= value <= self.num_classes:
                raise ValueError(
                    f"{where} has the value {value}. Allowed: 0 (background), 1 to "
                    f"{self.num_classes} (class index + 1){hint}."
                )

    def _count(self, labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels.astype(np.intp), minlength=self.num_classes + 1)


def format_table(result: Mapping[str, Any]) -> str:
    """Lay out what `MeanIoU.evaluate` returns, without single classes; NaN as "-".

    Where no pixel was background, neither in a prediction nor in truth, there is no row of it.
    """
    rows = {f"mIoU {name}": value for name, value in result["mIoU"].items()}
    if not math.isnan(result["background"]):
        rows["IoU background"] = result["background"]
    rows["pixel accuracy"] = result["pixel_accuracy"]
    width = max(map(len, rows))
    cells = {name: "-" if math.isnan(value) else f"{value:.2f}" for name, value in rows.items()}
    return "\n".join(f"{name:<{width}}{cell:>8}" for name, cell in cells.items())


def _mean(iou: np.ndarray) -> float:
    valid = iou[~np.isnan(iou)]
    return float(valid.mean()) if valid.size else math.nan
