"""Predictions of a trained run of any system beside the truth: by image and by category."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskx.core.text import listed
from maskx.data.coco import CocoData, read_coco_json
from maskx.data.images import read_record_image
from maskx.data.label_maps import has_pixels, ignore_label, semantic_label_map
from maskx.data.masks import decode_segmentation, encode_masks, run_lengths
from maskx.engine.predictor import Predictor
from maskx.engine.results import Prediction
from maskx.evaluation.average_precision import evaluate_detections
from maskx.evaluation.mean_iou import MeanIoU

__all__ = ["Comparison", "compare", "compared", "in_classes_of", "panoptic_quality"]

SURE = 0.5  # least score of an instance that is looked at in an image
_SAME = 0.5  # IoU above which two instances are one, as panoptic quality has it

Record = Mapping[str, Any]


@dataclass
class Comparison:
    """How good predictions are.

    Attributes:
        measure: by category, such as "mask AP".
        image_measure: by image, such as "panoptic quality".
        images: records and their value from 0 to 1, the worst first.
        categories: values in percent by name; of those that the images have alone.
        failures: images that cannot be read, and why.
    """

    measure: str = ""
    image_measure: str = ""
    images: list[tuple[Record, float]] = field(default_factory=list)
    categories: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def in_classes_of(predictor: Predictor, data: CocoData) -> CocoData:
    """Return annotations in the class list of a model, by name; as they are for concepts.

    Classes of the model that the file does not have get None as their category id.

    Raises:
        ValueError: the file has categories that the model does not know; or the order differs, and
            there are label maps.
    """
    names, own = predictor.class_names, data.class_names
    if predictor.system.takes_concepts or own == names:
        return data
    index_of = {name: index for index, name in enumerate(names)}
    unknown = [name for name in own if name not in index_of]
    if unknown:
        raise ValueError(
            f"'{data.json_file}' has categories that the run in '{predictor.run.folder}' does not "
            f"know: {listed(unknown)}. It knows {listed(names)}. Rename them, or leave them out."
        )
    mapped = next((r for r in data.records if "label_map_file_name" in r), None)
    if mapped is not None and names[: len(own)] != own:
        raise ValueError(
            f"'{data.json_file}' has its categories in another order than the run in "
            f"'{predictor.run.folder}', but image {mapped['image_id']!r} has a label map, whose "
            "labels count the categories of its own file. Number them as the training did."
        )
    new_index = [index_of[name] for name in own]
    records = [
        {
            **record,
            "image_labels": sorted(new_index[label] for label in record["image_labels"]),
            "annotations": [
                {**each, "class_index": new_index[each["class_index"]]}
                for each in record["annotations"]
            ],
        }
        for record in data.records
    ]
    ids = dict(zip(own, data.category_ids, strict=True))
    return replace(
        data,
        records=records,
        class_names=names,
        category_ids=tuple(ids.get(name) for name in names),
    )


def compare(predictor: Predictor, data: CocoData, *, most: int = 200) -> Comparison:
    """Predict images and compare them with their annotations.

    Instances are compared by AP and, in an image, by panoptic quality; label maps by IoU; of a
    model that is asked for concepts the masks of those that an image has, by IoU.

    Args:
        data: of :func:`in_classes_of`.
        most: images that are looked at; of more of them some, evenly chosen.
    """
    records = data.records[:: -(-len(data.records) // most) or 1]
    done = Comparison(failures=dict(data.lost_images))
    table = _Table(predictor, data)
    for record in records:
        try:
            found, truth = compared(predictor, data, record)
        except (ValueError, OSError) as error:
            done.failures[record["file_name"]] = str(error)
            continue
        if truth is not None:
            done.images.append((record, table.add(record, found, truth)))
        del found, truth  # with the image, before the next one is read
    done.images = [(r, value) for r, value in done.images if not math.isnan(value)]
    done.images.sort(key=lambda item: item[1])
    if done.images:
        done.measure, done.image_measure = table.measures()
        values = table.values()
        done.categories = {name: value for name, value in values.items() if not math.isnan(value)}
    return done


def compared(
    predictor: Predictor, data: CocoData, record: Record
) -> tuple[Prediction, Prediction | None]:
    """Predict an image, and say its annotations in the form of the prediction.

    Returns:
        The prediction, with all instances; the truth, None where there is nothing to compare with.

    Raises:
        ValueError: the image cannot be read; or OSError.
    """
    image = read_record_image(record, image_format="RGB")
    names = data.class_names
    objects = [o for o in record["annotations"] if not o["iscrowd"]]
    if predictor.system.takes_concepts:
        return _concepts(predictor, image, [(names[o["class_index"]], o) for o in objects])
    found = predictor(image)
    if found.label_map is not None:
        if not has_pixels(record):
            return found, None
        labels = semantic_label_map(record, len(names)).astype(np.int64)
        if not predictor.system.has_background:
            labels[labels == 0] = ignore_label(len(names))
        return found, Prediction(names, label_map=labels, image=image)
    masks = [run_lengths(o.get("segmentation", []), *image.shape[:2]) for o in objects]
    truth = Prediction(
        names,
        boxes=np.array([o["bbox"] for o in objects], float).reshape(-1, 4),
        segmentations=masks,
        class_indices=np.array([o["class_index"] for o in objects], int),
        image=image,
        split=found.split,
    )
    return found, truth


def panoptic_quality(found: Prediction, truth: Prediction) -> float:
    """Compute the panoptic quality of the instances of an image, from 0 to 1.

    It is the sum of the IoUs of those that were found, those with an IoU above 0.5, divided by
    their number and half of that of the others, missed and made up. NaN where there are none.
    Objects without a mask are compared by their boxes.
    """
    quality, matched = 0.0, 0
    for index in set(np.asarray(truth.class_indices).tolist()):
        rows, true = (np.flatnonzero(p.class_indices == index) for p in (found, truth))
        ious = _ious(found, truth, rows, true)
        while ious.size and ious.max() > _SAME:
            row, column = np.unravel_index(ious.argmax(), ious.shape)
            quality, matched = quality + ious[row, column], matched + 1
            ious[row], ious[:, column] = 0, 0
    total = len(found.class_indices) + len(truth.class_indices)
    return float(2 * quality / total) if total else math.nan


def _ious(found: Prediction, truth: Prediction, rows: np.ndarray, true: np.ndarray) -> np.ndarray:
    if not len(rows) or not len(true):
        return np.zeros((len(rows), len(true)))
    none = [0] * len(true)
    boxes = [
        np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1).astype(float)
        for b in (found.boxes[rows], truth.boxes[true])
    ]
    ious = np.array(mask_api.iou(*boxes, none))
    if found.segmentations is None:
        return ious
    masks = [[p.segmentations[i] for i in own] for p, own in ((found, rows), (truth, true))]
    drawn = mask_api.area(masks[1]) > 0
    return np.where(drawn, mask_api.iou(*masks, none), ious)


def _concepts(
    predictor: Predictor, image: np.ndarray, objects: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[Prediction, Prediction | None]:
    """Ask for the concepts that an image has masks of; all objects of one are one mask."""
    masks: dict[str, np.ndarray] = {}
    for name, each in objects:
        if "segmentation" in each and name in predictor.class_names:
            mask = decode_segmentation(each["segmentation"], *image.shape[:2])
            masks[name] = masks.get(name, False) | mask
    if not masks:
        return Prediction((), class_indices=np.zeros(0, int), image=image), None
    truth = Prediction(
        tuple(masks),
        segmentations=encode_masks(np.array(list(masks.values()))),
        class_indices=np.arange(len(masks)),
        image=image,
    )
    return predictor(image, concepts=list(masks)), truth


class _Table:
    """Counts of what the categories are measured by."""

    def __init__(self, predictor: Predictor, data: CocoData) -> None:
        self.data, self.of_concepts = data, predictor.system.takes_concepts
        self.pixels: MeanIoU | None = None
        self.ious: dict[str, list[float]] = {}
        self.detections: list[dict[str, Any]] = []
        self.image_ids: list[Any] = []
        self.has_masks = False

    def add(self, record: Record, found: Prediction, truth: Prediction) -> float:
        """Count an image, and return its own value."""
        if self.of_concepts:
            ious = [
                float(mask_api.iou([one], [other], [0])[0, 0])
                for one, other in zip(found.segmentations, truth.segmentations, strict=True)
            ]
            for name, iou in zip(truth.names, ious, strict=True):
                self.ious.setdefault(name, []).append(iou)
            return float(np.mean(ious))
        if truth.label_map is not None:
            own = MeanIoU(len(self.data.class_names))
            own.update(found.label_map, truth.label_map, record["image_id"])
            self.pixels = self.pixels or MeanIoU(own.num_classes)
            self.pixels.merge(own)
            measures = own.evaluate()
            present = [value for value in measures["per_class"] if not math.isnan(value)]
            return (float(np.mean(present)) if present else measures["background"]) / 100
        results = found.to_coco(record["image_id"], self.data.category_ids)
        self.detections += [each for each in results if each["category_id"] is not None]
        self.image_ids.append(record["image_id"])
        with_masks = any("segmentation" in o for o in record["annotations"])
        self.has_masks |= with_masks and found.segmentations is not None
        return panoptic_quality(found.above(SURE), truth)

    def measures(self) -> tuple[str, str]:
        """Name what categories and images are measured by."""
        if self.of_concepts:
            return "mean IoU", "mean IoU"
        if self.pixels is not None:
            return "IoU", "mean IoU of its categories"
        return ("mask AP" if self.has_masks else "box AP"), "panoptic quality"

    def values(self) -> dict[str, float]:
        """Return the values in percent by category."""
        names, ids = self.data.class_names, self.data.category_ids
        if self.of_concepts:
            return {name: 100 * float(np.mean(ious)) for name, ious in self.ious.items()}
        if self.pixels is not None:
            return dict(zip(names, self.pixels.evaluate()["per_class"], strict=True))
        kind = "segm" if self.has_masks else "bbox"
        wanted, content = set(self.image_ids), read_coco_json(self.data.json_file, strict=False)
        images = [image for image in content["images"] if image["id"] in wanted]
        rows = [row for row in content["annotations"] if row["image_id"] in wanted]
        classes = [(name, id_) for name, id_ in zip(names, ids, strict=True) if id_ is not None]
        results = evaluate_detections(
            {**content, "images": images, "annotations": rows},
            self.detections,
            category_ids=[id_ for _, id_ in classes],
            groups={"all": range(len(classes))},
            iou_types=(kind,),
            # All that the run gives, which is as many per image as its configuration says.
            max_detections=max(Counter(d["image_id"] for d in self.detections).values(), default=1),
        )
        return dict(zip([name for name, _ in classes], results[kind]["per_class"], strict=True))
