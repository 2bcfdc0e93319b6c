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


# Most classes for which all pairs of labels are counted, in a table of 8 MB.
_MOST_PAIRED = 1000


class MeanIoU:
    """Counts pixels image by image. Counts of several processes are added with `merge`.

    Labels are those of `maskx.data.label_maps`: 0 is the background, c + 1 is class index c.

    Attributes:
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
        self._check_range(predicted, f"The prediction for image {image_id!r}", allow_undecided)
        self._check_range(truth, f"The truth of image {image_id!r}", True)
        is_few = self.num_classes <= _MOST_PAIRED
        counts = (self._count_pairs if is_few else self._count_apart)(predicted, truth)
        for total, of_image in zip(
            (self.intersections, self.predicted, self.true), counts, strict=True
        ):
            total += of_image

    def _count_pairs(self, predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, ...]:
        """Count from a table of all pairs of labels, which one pass over the pixels fills."""
        unknown = self.num_classes + 1
        if self._ignore == 255:
            side = 256  # both labels of a pixel are the bytes of one number
            pairs = predicted.astype(np.uint16) << 8
            pairs |= truth.astype(np.uint8, copy=False)
        else:
            side = unknown + 1  # whose square is far below 2^31
            pairs = self._with_unknown(predicted).astype(np.int32)
            pairs *= side
            np.add(pairs, self._with_unknown(truth), out=pairs, casting="unsafe")
        table = np.bincount(pairs.ravel(), minlength=side * side).reshape(side, side)
        table = table[:, :unknown]
        return table.diagonal()[:unknown], table[:unknown].sum(axis=1), table.sum(axis=0)

    def _count_apart(self, predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, ...]:
        """Count without a table, in memory that grows with the number of classes alone."""
        unknown = self.num_classes + 1
        truth = self._with_unknown(truth.ravel()).astype(np.intp)
        predicted = self._with_unknown(predicted.ravel()).astype(np.intp)
        return tuple(
            np.bincount(labels, minlength=unknown + 1)[:unknown]
            for labels in (
                np.where(predicted == truth, truth, unknown),
                np.where(truth == unknown, unknown, predicted),
                truth,
            )
        )

    def _with_unknown(self, labels: np.ndarray) -> np.ndarray:
        """Return labels with K + 1 for pixels that are ignored."""
        if labels.size and labels.max() > self.num_classes:
            return np.minimum(labels, self.num_classes + 1)
        return labels

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

    def _check_range(self, labels: np.ndarray, where: str, may_be_ignored: bool) -> None:
        if labels.size == 0:
            return
        low, high = labels.min(), labels.max()
        num_wrong = int(high > self.num_classes)
        if may_be_ignored and high == self._ignore:
            num_ignored = np.count_nonzero(labels == self._ignore)
            num_wrong = np.count_nonzero(labels > self.num_classes) - num_ignored
        if low < 0 or num_wrong:
            wrong = labels[(labels < 0) | (labels > self.num_classes)]
            value = wrong[wrong != self._ignore].max() if may_be_ignored else wrong.max()
            hint = f", {self._ignore} (ignore)" if may_be_ignored else ""
            raise ValueError(
                f"{where} has the value {value}. Allowed: 0 (background), 1 to "
                f"{self.num_classes} (class index + 1){hint}."
            )


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
