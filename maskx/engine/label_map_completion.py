"""Label maps for the images of an annotation file that have tags alone."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskx.data.coco import CocoData
from maskx.data.images import read_rgb
from maskx.data.label_maps import ignore_label, semantic_label_map, write_label_map
from maskx.engine.predictor import Predictor
from maskx.engine.results import Prediction
from maskx.evaluation.calibration import MIN_MASKS, cross_validated, fit_calibration
from maskx.evaluation.mean_iou import MeanIoU
from maskx.supervision import Supervision

__all__ = [
    "CompletedLabelMaps",
    "MadeLabelMap",
    "complete_label_maps",
    "images_with_tags",
    "label_map_folder",
]


@dataclass(frozen=True)
class MadeLabelMap:
    """A label map that a run made.

    Attributes:
        file_name: of the image, whole path.
        score: from 0 to 1, how sure the run is.
        quality: from 0 to 1, the mean IoU of its classes that is to be expected; of one whose
            truth is known by a calibration that did not see it.
        path: of its file; None where the truth is known.
        iou: with the truth, mean of the labels that either has, where that is known.
    """

    file_name: str
    score: float
    quality: float
    path: Path | None = None
    iou: float | None = None


@dataclass(frozen=True)
class CompletedLabelMaps:
    """What was made, and how good it is where the truth is known.

    Attributes:
        made: by image id.
        class_names: of their labels, by class index.
        known: of images that the run was not trained on.
        is_calibrated: whether the qualities are, on the known ones; else they are scores of the
            run itself.
        failures: what could not be read, by file name.
        passed_over: numbers of images without a label map, by the reason.
    """

    made: Mapping[int | str, MadeLabelMap] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    known: Sequence[MadeLabelMap] = ()
    is_calibrated: bool = False
    failures: Mapping[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)

    @property
    def worst_first(self) -> list[MadeLabelMap]:
        """Those that were made; of one quality, by their scores."""
        return sorted(self.made.values(), key=lambda each: (each.quality, each.score))


def label_map_folder(output: Path) -> Path:
    """Folder of the label maps of a completed file, beside it."""
    return output.with_name(f"{output.stem}_label_maps")


def images_with_tags(data: CocoData) -> list[dict[str, Any]]:
    """Return the records that have tags alone."""
    return [
        record
        for record in data.records
        if record["supervision"] == Supervision.IMAGE.value and record["image_labels"]
    ]


def complete_label_maps(
    predictor: Predictor,
    data: CocoData,
    folder: Path,
    *,
    known: Iterable[tuple[Mapping[str, Any], Sequence[str]]] = (),
    min_quality: float = 0.0,
) -> CompletedLabelMaps:
    """Write a label map for each image with tags alone.

    Tags say what is in an image: pixels of any other class are unknown, as are those of an image
    that the model finds no class for.

    Args:
        predictor: of a system that makes label maps, or finds concepts.
        data: with images of the level "image".
        folder: to write to; it is made when the first is written.
        known: records with pixels that the run was not trained on, each with its class list; the
            qualities are calibrated on them.
        min_quality: label maps of a lower quality are not written.
    """
    failures: dict[str, str] = {}
    passed_over: Counter[str] = Counter()
    tested = []
    for record, names in tqdm(list(known), desc="known label maps", unit="img"):
        found = _ask(predictor, record, names, failures)
        if found is not None:
            label_map, score = found
            iou = _mean_iou(label_map, record, len(names))
            tested.append(MadeLabelMap(record["file_name"], score, quality=score, iou=iou))
    calibrate = None
    if len(tested) >= MIN_MASKS:
        scores, ious = [each.score for each in tested], [each.iou for each in tested]
        calibrate = fit_calibration(scores, ious)
        qualities = cross_validated(scores, ious, [each.file_name for each in tested]).tolist()
        tested = [replace(e, quality=q) for e, q in zip(tested, qualities, strict=True)]
    made: dict[int | str, MadeLabelMap] = {}
    for number, record in enumerate(tqdm(images_with_tags(data), desc="label maps", unit="img")):
        found = _ask(predictor, record, data.class_names, failures)
        if found is None:
            if record["file_name"] not in failures:
                passed_over["the run knows none of their tags"] += 1
            continue
        label_map, score = found
        quality = score if calibrate is None else float(calibrate([score])[0])
        if quality < min_quality:
            passed_over[f"the quality is below {min_quality:g}"] += 1
            continue
        path = folder / f"{number:06d}_{Path(record['file_name']).stem}.png"
        folder.mkdir(parents=True, exist_ok=True)
        write_label_map(path, label_map, num_classes=len(data.class_names))
        made[record["image_id"]] = MadeLabelMap(record["file_name"], score, quality, path)
    return CompletedLabelMaps(
        made, data.class_names, tested, calibrate is not None, failures, passed_over
    )


def _ask(
    predictor: Predictor,
    record: Mapping[str, Any],
    class_names: Sequence[str],
    failures: dict[str, str],
) -> tuple[np.ndarray, float] | None:
    """Return the label map of an image with tags and its score; None where there is none."""
    tags = [class_names[index] for index in record["image_labels"]]
    known = [name for name in tags if name in predictor.class_names]
    if not known:
        return None
    try:
        image = read_rgb(record["file_name"])
    except (ValueError, OSError) as error:
        failures[record["file_name"]] = str(error)
        return None
    indices = [predictor.class_names.index(name) for name in known]
    found = predictor(image, image_labels=indices, concepts=known)
    label_map = _in_classes_of_the_file(found, tags, class_names)
    return label_map, _score(found, label_map, ignore_label(len(class_names)))


def _score(found: Prediction, label_map: np.ndarray, unknown: int) -> float:
    """Return how sure the known pixels are, on average; 0 where there are none."""
    # Of the class patterns of 160 scenes, on 80 others, the rank correlation with the mean IoU was
    # 0.24; that of the mean over the labels 0.14, of the mean IoU that the probabilities expect
    # 0.17.
    sure = found.label_scores
    if sure is None:
        sure = np.ones(label_map.shape)
        if found.segmentations is not None and found.scores is not None:
            masks = found.masks
            for index in np.argsort(found.scores, kind="stable"):  # the surest on top
                sure[masks[index]] = found.scores[index]
    is_known = label_map != unknown
    return float(np.clip(sure[is_known].mean(), 0, 1)) if is_known.any() else 0.0


def _mean_iou(label_map: np.ndarray, record: Mapping[str, Any], num_classes: int) -> float:
    """Compare with the truth of an image; 0 where nothing can be compared."""
    counts = MeanIoU(num_classes)
    truth = semantic_label_map(record, num_classes)
    counts.update(label_map, truth, record["image_id"], allow_undecided=True)
    union = counts.predicted + counts.true - counts.intersections
    there = union > 0
    return float((counts.intersections[there] / union[there]).mean()) if there.any() else 0.0


def _in_classes_of_the_file(
    found: Prediction, tags: Sequence[str], class_names: Sequence[str]
) -> np.ndarray:
    """Bring a prediction into the class list of a file; what has no tag is unknown."""
    unknown = ignore_label(len(class_names))
    # An object that the model does not know may lie in what it takes for background.
    background = 0 if set(tags) <= set(found.class_names) else unknown
    if found.label_map is not None:
        table = np.full(ignore_label(len(found.class_names)) + 1, unknown)
        table[0] = background
        for index, name in enumerate(found.class_names):
            if name in tags:
                table[index + 1] = class_names.index(name) + 1
        return table[found.label_map]
    labels = np.full(found.image_size, background)
    masks = found.masks
    for index in np.argsort(found.scores, kind="stable"):  # the surest on top
        labels[masks[index]] = class_names.index(found.names[index]) + 1
    return labels
