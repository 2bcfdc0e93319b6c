"""What a trained system says of an image, in the forms that people and tools expect."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as mask_api

from maskx.data.coco_shapes import QUALITY_KEY, SOURCE_KEY
from maskx.data.label_maps import ignore_label
from maskx.data.masks import decode_segmentation, encode_each, encode_masks
from maskx.evaluation.figures import draw_instances, draw_label_map, save_png
from maskx.supervision import CategorySplit

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 800  # of a drawing


@dataclass(frozen=True, eq=False)
class Prediction:
    """The instances of an image, or the label of each pixel, or both.

    Attributes:
        boxes: (N, 4) XYXY in pixels; None where there are no instances, as for the next three.
        segmentations: mask of each instance, as a compressed run-length encoding of COCO.
        scores: (N,), from 0 to 1.
        class_indices: (N,) integers.
        remarks: what else is to be known of each instance, such as of which other concept a part of
            its map is; None where there is nothing.
        label_map: (H, W) integers: 0 is the background, c + 1 the class of index c, and
            ``ignore_label(K)`` of :mod:`maskx.data.label_maps` what is not known; or None.
        label_scores: (H, W), from 0 to 1, how sure the label of each pixel is; None where that is
            not said.
        image: (H, W, 3) uint8 RGB, to draw on.
        split: which classes had masks in training: those of A are drawn in green, of B in red.
    """

    class_names: tuple[str, ...]
    boxes: np.ndarray | None = None
    segmentations: Sequence[dict[str, Any]] | None = None
    scores: np.ndarray | None = None
    class_indices: np.ndarray | None = None
    remarks: Sequence[str | None] | None = None
    label_map: np.ndarray | None = None
    label_scores: np.ndarray | None = field(default=None, repr=False)
    image: np.ndarray | None = field(default=None, repr=False)
    split: CategorySplit | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = ("boxes", "segmentations", "scores", "class_indices", "remarks")
        lengths = {p: len(getattr(self, p)) for p in parts if getattr(self, p) is not None}
        if len(set(lengths.values())) > 1 or (lengths and "class_indices" not in lengths):
            raise ValueError(f"Instances need a class index each, and one of each part: {lengths}.")
        if self.class_indices is None and self.label_map is None:
            raise ValueError("A prediction needs class_indices of instances, or a label_map.")
        sizes = {tuple(s["size"]) for s in self.segmentations or ()}
        sizes |= {a.shape[:2] for a in (self.label_map, self.image) if a is not None}
        if len(sizes) > 1:
            raise ValueError(f"The parts are of images of different sizes: {sorted(sizes)}.")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        for array in (self.image, self.label_map):
            if array is not None:
                return array.shape[:2]
        if not self.segmentations:
            raise ValueError("Nothing says how large the image is. Give it as image.")
        return tuple(self.segmentations[0]["size"])

    @property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool, decoded; None without masks of instances."""
        if self.segmentations is None:
            return None
        found = [decode_segmentation(each, *self.image_size) for each in self.segmentations]
        return np.array(found, dtype=bool).reshape(-1, *self.image_size)

    @property
    def names(self) -> list[str]:
        """Class name of each instance or, of a label map, of each class that is there."""
        if self.class_indices is not None:
            return [self.class_names[index] for index in np.asarray(self.class_indices).tolist()]
        return [self.class_names[index] for index in self._labelled()]

    def plot(self, path: str | os.PathLike[str] | None = None, *, side: int = _SIDE) -> np.ndarray:
        """Draw instances and label map over the image, one beside the other where it has both.

        Returns:
            (side, side, 3) uint8 RGB, or twice as wide.
        """
        image = self.image
        if image is None:
            image = np.full((*self.image_size, 3), 255, np.uint8)
        tiles = []
        if self.class_indices is not None:
            count = len(self.class_indices)
            scores = [""] * count if self.scores is None else [f" {s:.2f}" for s in self.scores]
            boxes = self._mask_boxes() if self.boxes is None else self.boxes
            masks = (decode_segmentation(s, *self.image_size) for s in self.segmentations or ())
            remarks = [f", {each}" if each else "" for each in self.remarks or [None] * count]
            labels = map("".join, zip(self.names, scores, remarks, strict=True))
            none = (np.zeros((1, 1), bool) for _ in range(count))
            tile = draw_instances(
                image,
                boxes=boxes,
                masks=none if self.segmentations is None else masks,
                labels=list(labels),
                with_masks=[self.split is None or n in self.split.with_masks for n in self.names],
                side=side,
            )
            tiles.append(tile)
        if self.label_map is not None:
            tile = draw_label_map(
                image,
                self.label_map,
                num_classes=len(self.class_names),
                names=self.class_names,
                side=side,
            )
            tiles.append(tile)
        picture = np.concatenate(tiles, axis=1)
        if path is not None:
            save_png(Path(path), picture)
        return picture

    def above(self, threshold: float) -> "Prediction":
        """Keep the instances whose score is at least a threshold; a label map stays as it is."""
        if self.scores is None:
            return self
        return self._chosen(np.flatnonzero(np.asarray(self.scores) >= threshold))

    def to_coco(
        self, image_id: int | str, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Say it as results of COCO: one entry per instance or, of a label map, per class there.

        Instances without boxes get those around their masks; one whose mask is empty is left out,
        as it is nowhere. An instance with a box of its own stays, whatever its mask.

        Args:
            category_ids: by class index, as in the annotation file; None counts from 1.
        """
        if self.class_indices is None:
            return self._class_instances().to_coco(image_id, category_ids)
        if category_ids is None:
            category_ids = range(1, len(self.class_names) + 1)
        found = self._somewhere()
        boxes = found.boxes
        if boxes is None and found.segmentations is not None:
            boxes = found._mask_boxes()
        entries = []
        for row, index in enumerate(np.asarray(found.class_indices).tolist()):
            entry = {"image_id": image_id, "category_id": category_ids[index]}
            if boxes is not None:
                x0, y0, x1, y1 = (float(value) for value in boxes[row])
                entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            if found.segmentations is not None:
                entry["segmentation"] = found.segmentations[row]
            if found.scores is not None:
                entry["score"] = float(found.scores[row])
            if found.remarks is not None and found.remarks[row]:
                entry["remark"] = found.remarks[row]
            entries.append(entry)
        return entries

    def to_annotations(
        self,
        image_id: int | str,
        category_ids: Sequence[int] | None = None,
        *,
        source: str,
        first_id: int = 1,
    ) -> list[dict[str, Any]]:
        """Say it as annotations of a COCO file: the results of COCO, with an id and an area.

        Of an instance with an empty mask and a box of its own the box is said alone. A mask says
        what made it, so that it never counts as one that a person drew; its quality is the score.

        Args:
            category_ids: as of :meth:`to_coco`.
            source: what made the masks, see :func:`maskx.engine.mask_sources.source_name`.
            first_id: id of the first annotation, from which the others count on.
        """
        annotations = []
        for id_, entry in enumerate(self.to_coco(image_id, category_ids), start=first_id):
            entry |= {"id": id_, "iscrowd": 0}
            if "segmentation" in entry:
                entry["area"] = int(mask_api.area(entry["segmentation"]))
                if entry["area"]:
                    entry |= {SOURCE_KEY: source, QUALITY_KEY: round(entry["score"], 4)}
                else:
                    del entry["segmentation"], entry["area"]
            annotations.append(entry)
        return annotations

    def to_supervision(self) -> Any:
        """Turn it into ``supervision.Detections``; of a label map one for each class there.

        Instances that are nowhere are left out as by :meth:`to_coco`.
        """
        try:
            from supervision import Detections
        except ImportError as error:
            raise ImportError(
                "This needs the package supervision. Install it with: pip install supervision"
            ) from error
        if self.class_indices is None:
            return self._class_instances().to_supervision()
        found = self._somewhere()
        if len(found.class_indices) == 0:
            return Detections.empty()
        scores = None if found.scores is None else np.asarray(found.scores, dtype=np.float32)
        data = {"class_name": np.array(found.names)}
        if found.remarks is not None:
            data["remark"] = np.array([remark or "" for remark in found.remarks])
        boxes = found._mask_boxes() if found.boxes is None else found.boxes
        return Detections(
            xyxy=np.asarray(boxes, dtype=np.float32),
            mask=found.masks,
            confidence=scores,
            class_id=np.asarray(found.class_indices, dtype=int),
            data=data,
        )

    def _chosen(self, rows: np.ndarray) -> "Prediction":
        """Keep instances, by their rows."""
        parts = {key: getattr(self, key) for key in ("boxes", "scores", "class_indices")}
        parts = {k: part if part is None else np.asarray(part)[rows] for k, part in parts.items()}
        lists = {key: getattr(self, key) for key in ("segmentations", "remarks")}
        lists = {k: part if part is None else [part[i] for i in rows] for k, part in lists.items()}
        return replace(self, **parts, **lists)

    def _somewhere(self) -> "Prediction":
        """Leave out instances that have neither a box nor a pixel."""
        if self.boxes is not None or not self.segmentations:
            return self
        return self._chosen(np.flatnonzero(mask_api.area(list(self.segmentations))))

    def _labelled(self) -> list[int]:
        """Class indices that a label map has."""
        labels = np.unique(self.label_map)
        unknown = ignore_label(len(self.class_names))
        return [int(label) - 1 for label in labels if label not in (0, unknown)]

    def _class_instances(self) -> "Prediction":
        """Make an instance of each class that a label map has."""
        found = self._labelled()
        masks = np.array([self.label_map == index + 1 for index in found], dtype=bool)
        return Prediction(
            self.class_names,
            segmentations=encode_masks(masks.reshape(-1, *self.image_size)),
            class_indices=np.array(found, dtype=int),
            image=self.image,
        )

    def _mask_boxes(self) -> np.ndarray:
        """(N, 4) XYXY around the masks; empty where a mask is."""
        boxes = np.zeros((len(self.class_indices), 4))
        if self.segmentations:
            boxes[:] = mask_api.toBbox(self.segmentations)
            boxes[:, 2:] += boxes[:, :2]
        return boxes


def label_map_prediction(
    result: Mapping[str, Any], class_names: Sequence[str], *, scores: "Tensor | None" = None
) -> Prediction:
    """Take over the ``sem_seg`` of a result, an (H, W) label map.

    Args:
        scores: (H, W), from 0 to 1, how sure the label of each pixel is.
    """
    return Prediction(
        tuple(class_names),
        label_map=result["sem_seg"].cpu().numpy(),
        label_scores=None if scores is None else scores.float().cpu().numpy(),
    )


def instances_prediction(result: Mapping[str, Any], class_names: Sequence[str]) -> Prediction:
    """Take over the ``instances`` of a result, as a dictionary or as Detectron2 has them.

    Their names are Detectron2's: ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks``.
    """
    found = result["instances"]
    found = found if isinstance(found, Mapping) else found.get_fields()
    boxes = found["pred_boxes"]
    masks = found.get("pred_masks")
    return Prediction(
        tuple(class_names),
        boxes=getattr(boxes, "tensor", boxes).float().cpu().numpy(),
        segmentations=None if masks is None else encode_each(masks),
        scores=found["scores"].float().cpu().numpy(),
        class_indices=found["pred_classes"].cpu().numpy(),
    )
