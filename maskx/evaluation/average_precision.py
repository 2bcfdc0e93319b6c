"""COCO average precision apart for groups of classes, such as those with and without masks.

One official COCOeval run serves all groups: its precision array holds every class on its own.
Legend of that array: (T, R, K, A, M) = IoU thresholds, recall steps, classes, object sizes, limits
on detections an image.
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import Params

from maskx.data.coco import AnnotationProblem, check_coco_structure, read_coco_json, read_mask
from maskx.data.json_files import paused_collector
from maskx.data.masks import run_lengths
from maskx.evaluation.coco_matching import run_cocoeval

__all__ = [
    "METRICS",
    "class_average_precision",
    "evaluate_detections",
    "format_class_table",
    "format_table",
    "scored_annotations",
    "split_average_precision",
]

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""Over all IoU thresholds, at IoU 0.50 and 0.75, and over objects small, medium and large."""

_PARAMS = Params(iouType="bbox")  # thresholds and size labels, the same for boxes and masks
_PER_CLASS = "per_class"
_NUM_IGNORED = "num_ignored_without_mask"
_NEGATIVE, _NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"  # of LVIS
_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


def split_average_precision(
    precision: np.ndarray, class_indices: Iterable[int]
) -> dict[str, float]:
    """Average precision of some classes, equal to COCOeval with `params.catIds` set to them.

    Args:
        precision: `COCOeval.eval["precision"]`, (T, R, K, A, M); -1 where a class has no ground
            truth. The highest limit on detections is used.
        class_indices: Positions on axis K.

    Returns:
        The `METRICS` in percent, [0, 100]; NaN where none of the classes has ground truth.
    """
    iou_thresholds, sizes = _PARAMS.iouThrs, _PARAMS.areaRngLbl
    if (
        precision.ndim != 5
        or precision.shape[0] != len(iou_thresholds)
        or precision.shape[3] != len(sizes)
    ):
        raise ValueError(
            f"precision has shape {precision.shape}; allowed: (T, R, K, A, M) of COCOeval with "
            f"its {len(iou_thresholds)} IoU thresholds and {len(sizes)} object sizes."
        )
    chosen = precision[..., -1][:, :, list(class_indices)]
    of_size = {label: chosen[..., index] for index, label in enumerate(sizes)}
    return {
        "AP": _mean_percent(of_size["all"]),
        "AP50": _mean_percent(of_size["all"][np.isclose(iou_thresholds, 0.50)]),
        "AP75": _mean_percent(of_size["all"][np.isclose(iou_thresholds, 0.75)]),
        "APs": _mean_percent(of_size["small"]),
        "APm": _mean_percent(of_size["medium"]),
        "APl": _mean_percent(of_size["large"]),
    }


def class_average_precision(precision: np.ndarray) -> list[float]:
    """AP of every class in percent, NaN without ground truth."""
    all_sizes = precision[:, :, :, _PARAMS.areaRngLbl.index("all"), -1]
    return [_mean_percent(all_sizes[:, :, k]) for k in range(precision.shape[2])]


@paused_collector()  # millions of new objects, none in a cycle
def evaluate_detections(
    ground_truth: Mapping[str, Any] | str | os.PathLike[str],
    detections: Sequence[Mapping[str, Any]],
    *,
    category_ids: Sequence[int],
    groups: Mapping[str, Iterable[int]],
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_detections: int = 100,
    image_ids: Iterable[int | str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score detections as COCOeval does, once for each kind of IoU.

    Ground truth without a usable mask (none, or one that `read_mask` refuses) cannot be scored as
    a mask. For "segm" it becomes a crowd region that fills its box: a detection of its category
    that lies within, up to the IoU threshold, counts neither as right nor as wrong.

    A file whose images have `neg_category_ids` is scored by the rule of LVIS: a category counts in
    the images that have it or are known not to (negative), and where not all of its objects are
    annotated (`not_exhaustive_category_ids`), a detection that hits none counts for nothing.
    Groups more are the `frequency` of its categories: rare, common and frequent.

    Args:
        ground_truth: COCO dict or file. Missing `iscrowd` is 0; missing `area` is that of the
            mask, or of the box where there is no mask. It is not changed.
        detections: COCO results: `image_id`, `category_id` as in the file, `score`, `bbox`
            ([x, y, width, height], absolute pixels) for "bbox" and `segmentation` (compressed RLE
            of the size of the image) for "segm".
        category_ids: Ids as in the file, by class index.
        groups: Class indices by name, e.g. {"all": ..., "A": ..., "B": ...}.
        iou_types: Of "bbox" and "segm".
        max_detections: Detections scored for each image and category.
        image_ids: Images that were looked at; others, such as those that the reader left out, count
            for nothing. None for all of the file.

    Returns:
        For each IoU type: for each group the `METRICS` in percent (0 without detections, NaN
        without ground truth), under "per_class" the AP by class index, and for "segm" under
        "num_ignored_without_mask" how many annotations had no usable mask.

    Raises:
        FileNotFoundError: If the ground truth file is missing.
        ValueError: If ground truth, detections, category ids or groups do not fit together.
    """
    if isinstance(ground_truth, Mapping):
        ground_truth = check_coco_structure(ground_truth, "ground truth")
    else:
        # As the reader of a training mends and leaves out, which has said so.
        ground_truth = read_coco_json(ground_truth, strict=False)
    if image_ids is not None:
        ground_truth = _of_images(ground_truth, set(image_ids))
    groups = {name: list(indices) for name, indices in groups.items()}
    is_federated = any(_NEGATIVE in image for image in ground_truth["images"])
    if is_federated:
        groups |= _frequency_groups(ground_truth, category_ids)
    _check_request(ground_truth, category_ids, groups, iou_types)
    _check_detections(detections, ground_truth, category_ids, iou_types)

    results = {}
    for iou_type in iou_types:
        annotations, num_without_mask = scored_annotations(ground_truth, category_ids, iou_type)
        if is_federated:
            annotations += _whole_image_crowds(ground_truth, category_ids, len(annotations))
        precision = run_cocoeval(
            {**ground_truth, "annotations": annotations},
            _judged(detections, ground_truth, iou_type) if is_federated else detections,
            category_ids=category_ids,
            iou_type=iou_type,
            max_detections=max_detections,
        )
        result: dict[str, Any] = {
            name: split_average_precision(precision, indices) for name, indices in groups.items()
        }
        result[_PER_CLASS] = class_average_precision(precision)
        if iou_type == "segm":
            result[_NUM_IGNORED] = num_without_mask
        results[iou_type] = result
    return results


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out what `evaluate_detections` returns: IoU types and groups by `METRICS`, NaN as "-"."""
    rows = [("IoU", "group", METRICS)]
    for iou_type, result in results.items():
        for name, metrics in result.items():
            if isinstance(metrics, Mapping):
                values = (metrics[metric] for metric in METRICS)
                cells = ("-" if math.isnan(value) else f"{value:.2f}" for value in values)
                rows.append((iou_type, name, tuple(cells)))
    width = max(len(name) for _, name, _ in rows)
    return "\n".join(
        f"{iou_type:<4}  {name:<{width}}" + "".join(f"{cell:>8}" for cell in cells)
        for iou_type, name, cells in rows
    )


def format_class_table(results: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """Lay out the AP by class of what `evaluate_detections` returns: classes by IoU type."""
    width = max(map(len, names))
    rows = [("category", list(results))]
    for index, name in enumerate(names):
        values = (result[_PER_CLASS][index] for result in results.values())
        rows.append((name, ["-" if math.isnan(value) else f"{value:.2f}" for value in values]))
    return "\n".join(
        f"{name:<{max(width, 8)}}" + "".join(f"{cell:>8}" for cell in cells) for name, cells in rows
    )


def _of_images(ground_truth: Mapping[str, Any], image_ids: set[int | str]) -> dict[str, Any]:
    """Ground truth of some images; how many others the file has is said."""
    images = [image for image in ground_truth["images"] if image["id"] in image_ids]
    left_out = len(ground_truth["images"]) - len(images)
    if left_out:
        logger.warning(
            "%d of the %d images of the ground truth were not predicted: they are not scored.",
            left_out,
            len(ground_truth["images"]),
        )
    annotations = [a for a in ground_truth["annotations"] if a["image_id"] in image_ids]
    return {**ground_truth, "images": images, "annotations": annotations}


def _frequency_groups(
    ground_truth: Mapping[str, Any], category_ids: Sequence[int]
) -> dict[str, list[int]]:
    frequency = {
        category["id"]: category.get("frequency") for category in ground_truth["categories"]
    }
    found = [frequency.get(category_id) for category_id in category_ids]
    return {
        name: [index for index, letter in enumerate(found) if letter == key]
        for key, name in _FREQUENCIES.items()
        if key in found
    }


def _judged(
    detections: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any], iou_type: str
) -> list[Mapping[str, Any]]:
    """Detections of categories of which it is known whether their image has them.

    As in lvis-api, an empty mask is none.
    """
    known = {image["id"]: set(image.get(_NEGATIVE, ())) for image in ground_truth["images"]}
    for annotation in ground_truth["annotations"]:
        known[annotation["image_id"]].add(annotation["category_id"])
    return [
        d
        for d in detections
        if d["category_id"] in known[d["image_id"]]
        and (iou_type == "bbox" or mask_utils.area(d["segmentation"]) > 0)
    ]


def _whole_image_crowds(
    ground_truth: Mapping[str, Any], category_ids: Sequence[int], num_before: int
) -> list[dict[str, Any]]:
    """Crowds that take the detections of a category that hit none of its objects in an image."""
    evaluated, crowds = set(category_ids), []
    for image in ground_truth["images"]:
        height, width = int(image["height"]), int(image["width"])
        # A box may reach out of the image, so that of the crowd does so everywhere.
        box = [-width, -height, 3 * width, 3 * height]
        for category_id in evaluated.intersection(image.get(_NOT_EXHAUSTIVE, ())):
            crowds.append(
                {
                    "id": num_before + len(crowds) + 1,
                    "image_id": image["id"],
                    "category_id": category_id,
                    "bbox": box,
                    "area": height * width,
                    "segmentation": _box_rle([0, 0, width, height], height, width),
                    "iscrowd": 1,
                }
            )
    return crowds


def _mean_percent(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return 100 * float(np.mean(valid)) if valid.size else math.nan


def scored_annotations(
    ground_truth: Mapping[str, Any], category_ids: Sequence[int], iou_type: str
) -> tuple[list[dict[str, Any]], int]:
    """Copy the annotations of some categories, complete for COCOeval.

    Args:
        iou_type: for "bbox" masks are left as they are.

    Returns:
        The copies, and how many have no usable mask, counted for "segm".
    """
    sizes = {
        image["id"]: (int(image["height"]), int(image["width"])) for image in ground_truth["images"]
    }
    evaluated = set(category_ids)
    copies = []
    num_bad_boxes = num_without_mask = 0
    for annotation in ground_truth["annotations"]:
        if annotation["category_id"] not in evaluated:
            continue
        if not _is_box(annotation["bbox"]):
            num_bad_boxes += 1
            continue
        # Numbered from 1: COCOeval takes id 0 for "not matched".
        copy = {"iscrowd": 0, **annotation, "id": len(copies) + 1}
        height, width = sizes[annotation["image_id"]]
        if iou_type == "segm" or "area" not in annotation:
            rle = _mask_rle(annotation.get("segmentation"), height, width)
            _, _, box_width, box_height = annotation["bbox"]
            if "area" not in annotation:
                copy["area"] = int(mask_utils.area(rle)) if rle else box_width * box_height
            if iou_type == "segm":
                copy["segmentation"] = rle or _box_rle(annotation["bbox"], height, width)
                if rle is None:
                    copy["iscrowd"] = 1
                    num_without_mask += 1
        copies.append(copy)
    if num_bad_boxes:
        logger.warning(
            "%d annotations of the ground truth have a bbox that is not 4 finite numbers [x, y, "
            "width, height]: they are left out, and detections there count as wrong.",
            num_bad_boxes,
        )
    if num_without_mask:
        logger.warning(
            "%d of %d annotations have no usable mask: their boxes are left out of the mask AP, "
            "detections there count neither as right nor as wrong.",
            num_without_mask,
            len(copies),
        )
    return copies, num_without_mask


def _mask_rle(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Return the mask as compressed RLE, or None if there is none or it cannot be used."""
    try:
        return run_lengths(read_mask(segmentation, height, width), height, width)
    except AnnotationProblem:
        return None


def _box_rle(bbox: Sequence[float], height: int, width: int) -> dict[str, Any]:
    """Return all pixels that a box [x, y, width, height] touches as compressed RLE."""
    x1, y1 = math.floor(bbox[0]), math.floor(bbox[1])
    x2, y2 = math.ceil(bbox[0] + bbox[2]), math.ceil(bbox[1] + bbox[3])
    box = np.array([[x1, y1, x2 - x1, y2 - y1]], dtype=np.float64)
    return mask_utils.frPyObjects(box, height, width)[0]


def _check_request(
    ground_truth: Mapping[str, Any],
    category_ids: Sequence[int],
    groups: Mapping[str, Sequence[int]],
    iou_types: Sequence[str],
) -> None:
    known = {category["id"] for category in ground_truth["categories"]}
    unknown = [category_id for category_id in category_ids if category_id not in known]
    if unknown or len(set(category_ids)) < len(category_ids):
        found = f"{unknown[0]!r}, which the ground truth lacks" if unknown else "repeated ids"
        raise ValueError(
            f"category_ids has {found}; allowed: some of the {len(known)} category ids of the "
            "ground truth file, each once, in the order of the class indices."
        )
    for name, indices in groups.items():
        wrong = [index for index in indices if not 0 <= index < len(category_ids)]
        if wrong or name in (_PER_CLASS, _NUM_IGNORED):
            found = f"holds class index {wrong[0]!r}" if wrong else "has the name of a result"
            raise ValueError(
                f"Group {name!r} {found}; allowed: class indices 0 to {len(category_ids) - 1} "
                f"under a name other than {_PER_CLASS!r} and {_NUM_IGNORED!r}."
            )
    for iou_type in iou_types:
        if iou_type not in ("bbox", "segm"):
            raise ValueError(f"iou_types has {iou_type!r}; allowed: 'bbox' and 'segm'.")


def _check_detections(
    detections: Sequence[Mapping[str, Any]],
    ground_truth: Mapping[str, Any],
    category_ids: Sequence[int],
    iou_types: Sequence[str],
) -> None:
    sizes = {image["id"]: [image["height"], image["width"]] for image in ground_truth["images"]}
    evaluated = set(category_ids)
    keys = ["image_id", "category_id", "score"]
    keys += ["bbox"] * ("bbox" in iou_types) + ["segmentation"] * ("segm" in iou_types)
    for index, detection in enumerate(detections):
        problem = None
        if missing := [key for key in keys if key not in detection]:
            problem = f"lacks {missing}; required: {keys}"
        elif detection["image_id"] not in sizes:
            problem = (
                f"has image_id {detection['image_id']!r}; allowed: the ids of the {len(sizes)} "
                "images of the ground truth. Was another data set evaluated?"
            )
        elif detection["category_id"] not in evaluated:
            problem = (
                f"has category_id {detection['category_id']!r}; allowed: the {len(evaluated)} ids "
                "in category_ids. Was a class index given instead of an id of the file?"
            )
        elif not math.isfinite(detection["score"]):
            problem = f"has score {detection['score']}; allowed: a finite number"
        elif "bbox" in keys and not _is_box(detection["bbox"]):
            problem = (
                f"has bbox {detection['bbox']!r}; allowed: 4 finite numbers [x, y, width, height]"
            )
        elif "segmentation" in keys:
            problem = _rle_problem(detection["segmentation"], sizes[detection["image_id"]])
        if problem:
            raise ValueError(f"Detection {index} {problem}.")


def _is_box(bbox: Any) -> bool:
    try:
        return len(bbox) == 4 and math.isfinite(sum(bbox))
    except TypeError:
        return False


def _rle_problem(rle: Any, size: list[int]) -> str | None:
    # Without this pycocotools gives masks of another size the IoU -1, and a silent AP of 0.
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str | bytes):
        return "has a segmentation that is no RLE dict; allowed: {'size': ..., 'counts': str}"
    if list(rle["size"]) != size:
        return (
            f"has a mask of size {list(rle['size'])}; allowed: the size [height, width] of its "
            f"image, {size}. Paste the mask into the image before encoding it"
        )
    return None
