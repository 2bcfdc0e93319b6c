"""Proxy masks: label maps made from image labels alone, by class patterns.

Luo and Yang, "Learning Saliency-Free Model with Generic Features for Weakly-Supervised Semantic
Segmentation" (AAAI 2020). The projection q_c(u) of the feature at pixel u on the pattern of class
c (their Eq. 3) is positive where the class is seen. A pixel where no class of the image is
positive is background, one where a single class is positive has that class, any other is
undecided, that is ignored in training (their Algorithm 1). Masks of images with one class are
then refined by a dense CRF.

Shapes: L labels of the image, (h, w) of the features, (H, W) of the image, K classes.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from maskx.core.checks import check_choice
from maskx.core.files import write_json
from maskx.core.processes import run_jobs
from maskx.data.dense_crf import SEC_DSRG, CrfSettings, check_crf, refine
from maskx.data.images import read_image
from maskx.data.label_maps import ignore_label, read_label_map, write_label_map
from maskx.systems.class_patterns.pattern_moments import check_labels
from maskx.systems.class_patterns.projections import (
    ProjectionHistograms,
    check_projections,
    claim_folder,
    file_stem,
    has_pattern,
    projections_path,
    read_header,
    read_projections,
    standardise,
)

MASKS_HEADER = "proxy_masks.json"
"""File in a folder of masks that says what they were made with."""
_THRESHOLDS = ("zero", "otsu")
_RESOLVE = ("ignore", "standardised")


# --- one image


def proxy_label_map(
    projections: ArrayLike,
    labels: Sequence[int],
    height: int,
    width: int,
    *,
    num_classes: int,
    thresholds: ArrayLike = 0.0,
    stds: ArrayLike,
    resolve: str = "ignore",
) -> np.ndarray:
    """Make the label map of an image from its projections (Algorithm 1).

    The projections are resized bilinearly, with pixel centres at half-integers, then compared to
    the thresholds. Where a label has no pattern, its class may be anywhere: pixels in which no
    other class is positive are ignored, never background. An image without labels is all
    background, so labels have to be complete.

    Args:
        projections: (L, h, w), q of Eq. 3; the row of a label without a pattern is all NaN.
        labels: the L class indices.
        thresholds: (L,), or one for all, in standard deviations: a class is positive where
            q / std is above.
        stds: (L,) standard deviations of q by label.
        resolve: what becomes of pixels with several positive classes: "ignore" (the paper), or
            "standardised", the one with the largest q / std.

    Returns:
        (H, W), with types and values as of `maskx.data.label_maps.read_label_map`.
    """
    check_choice("resolve", resolve, _RESOLVE)
    projections = check_projections(projections, labels, "The projections")
    check_labels(labels, num_classes, "an image")
    ignore = ignore_label(num_classes)
    label_map = np.zeros((height, width), np.uint8 if ignore < 256 else np.int32)
    if len(labels) == 0:
        return label_map
    scores = standardise(projections, labels, height, width, stds)
    is_positive = scores > np.broadcast_to(thresholds, len(labels))[:, None, None]
    winner = np.where(is_positive, scores, -np.inf).argmax(0)
    num_positive = is_positive.sum(0)
    if not has_pattern(projections).all():
        label_map[:] = ignore
    label_map[num_positive > 0] = (np.asarray(labels) + 1)[winner[num_positive > 0]]
    if resolve == "ignore":
        label_map[num_positive > 1] = ignore
    return label_map


# --- masks of many images


@dataclass(frozen=True, kw_only=True)
class ProxyMaskSettings:
    """How proxy masks are made of projections; the defaults are the paper's.

    Attributes:
        threshold: "zero", or "otsu" for one of each class from all its projections.
        resolve: of pixels with several positive classes, see `proxy_label_map`.
        crf: whether masks of images with one label are refined by a dense CRF.
    """

    threshold: str = "zero"
    resolve: str = "ignore"
    crf: bool = True
    crf_settings: CrfSettings = SEC_DSRG

    def __post_init__(self) -> None:
        check_choice("threshold", self.threshold, _THRESHOLDS)
        check_choice("resolve", self.resolve, _RESOLVE)

    @property
    def name(self) -> str:
        """Name in files: ``zero-ignore-crf`` are the paper's."""
        return f"{self.threshold}-{self.resolve}{'-crf' if self.crf else ''}"


@dataclass(frozen=True)
class ProxyMaskSummary:
    """What :func:`make_proxy_masks` made. Numbers of images, and pixels of all their masks.

    Attributes:
        num_kept: their masks were there already.
        num_redone: their masks were there, but not readable or of other image labels, and were made
            again.
        num_refined: they have one label, with a pattern, so their masks are refined by the CRF.
        num_without_labels: their masks are all background.
        num_without_pattern: a label of theirs has no pattern, so no pixel is background.
        thresholds: by class index, in standard deviations.
    """

    thresholds: tuple[float, ...]
    num_images: int = 0
    num_kept: int = 0
    num_redone: int = 0
    num_refined: int = 0
    num_without_labels: int = 0
    num_without_pattern: int = 0
    pixels: int = 0
    background_pixels: int = 0
    undecided_pixels: int = 0


@dataclass(frozen=True)
class _Job:
    """An image and what its mask takes; thresholds and standard deviations are those of labels."""

    record: Mapping[str, Any]
    thresholds: tuple[float, ...]
    stds: tuple[float, ...]
    num_classes: int
    projections_folder: Path
    mask: Path
    settings: ProxyMaskSettings


def mask_path(folder: str | os.PathLike[str], image_id: int | str) -> Path:
    """Return the file of the proxy mask of an image."""
    return Path(folder) / f"{file_stem(image_id)}.png"


def make_proxy_masks(
    records: Sequence[Mapping[str, Any]],
    projections_folder: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str],
    stds: ArrayLike,
    settings: ProxyMaskSettings | None = None,
    workers: int = 1,
    progress: bool = False,
) -> ProxyMaskSummary:
    """Write the proxy mask of each image, as label map `mask_path(output_folder, image_id)`.

    An image without labels becomes all background, so labels have to be complete; it needs no
    projections. The CRF gets p = sigmoid(q / std - threshold) for the class of an image with one
    label and 1 - p for the background, so that without it the same pixels are positive.

    The same call goes on after an interruption: masks that are there, complete and not older than
    the projections of their image are kept. The folder's `proxy_masks.json` says what they were
    made with; other settings, patterns or, with Otsu's method, other images (thus thresholds) need
    another folder.

    Args:
        records: as `maskx.data.coco.load_coco` makes them.
        projections_folder: of `start_projections`, with the projections of all images with labels.
        output_folder: for the masks; it is created.
        stds: (K,) standard deviations of q by class; NaN for a class without a pattern.
        settings: how masks are made; None for the paper's.
    """
    settings = settings or ProxyMaskSettings()
    projections_folder, output_folder = Path(projections_folder), Path(output_folder)
    stds = np.asarray(stds, np.float64)
    num_classes = len(class_names)
    if stds.shape != (num_classes,):
        raise ValueError(
            f"stds has shape {stds.shape}. Allowed: one standard deviation for each of the "
            f"{num_classes} classes."
        )
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if settings.crf:
        check_crf()
    made_with = read_header(projections_folder / "projections.json")
    if made_with.get("class_names") != list(class_names):
        raise ValueError(
            f"{projections_folder} holds projections for the classes "
            f"{made_with.get('class_names')!r:.200}, not for {list(class_names)!r:.200}. Give the "
            "annotation file that they were made of."
        )
    for record in records:
        image_id, labels = record["image_id"], record["image_labels"]
        check_labels(labels, num_classes, f"image {image_id!r}")
        if labels and not projections_path(projections_folder, image_id).is_file():
            read_projections(projections_folder, image_id)  # says what to do

    thresholds = np.zeros(num_classes)
    if settings.threshold == "otsu":
        thresholds = _find_thresholds(records, projections_folder, stds, progress)
    header = {
        "settings": asdict(settings),
        "thresholds": thresholds.tolist(),
        "projections": made_with,
    }
    claim_folder(output_folder, MASKS_HEADER, header)

    jobs = [
        _Job(
            record={k: v for k, v in record.items() if k != "annotations"},
            thresholds=tuple(thresholds[record["image_labels"]].tolist()),
            stds=tuple(stds[record["image_labels"]].tolist()),
            num_classes=num_classes,
            projections_folder=projections_folder,
            mask=mask_path(output_folder, record["image_id"]),
            settings=settings,
        )
        for record in records
    ]
    made: Counter[str] = Counter()
    masks = run_jobs(_make_mask, jobs, workers)
    for counts in tqdm(masks, "proxy masks", len(jobs), unit="img", disable=not progress):
        made.update(counts)
    return ProxyMaskSummary(tuple(thresholds.tolist()), **made)


def _find_thresholds(
    records: Sequence[Mapping[str, Any]], folder: Path, stds: np.ndarray, progress: bool
) -> np.ndarray:
    histograms = ProjectionHistograms(len(stds))
    labelled = [record for record in records if record["image_labels"]]
    for record in tqdm(labelled, "thresholds", disable=not progress, unit="img"):
        labels, projections = _read_for(record["image_id"], record["image_labels"], folder)
        histograms.update(projections, labels, stds[labels])
    return histograms.thresholds()


def _read_for(
    image_id: int | str, image_labels: Sequence[int], folder: Path
) -> tuple[list[int], np.ndarray]:
    """Read the projections of an image, with rows in the order of its labels."""
    labels, projections = read_projections(folder, image_id)
    if sorted(labels) != sorted(image_labels):
        raise ValueError(
            f"{projections_path(folder, image_id)} holds projections for the class indices "
            f"{sorted(labels)}, but image {image_id!r} has the labels {sorted(image_labels)}. Let "
            "the network write it again."
        )
    return list(image_labels), projections[[labels.index(label) for label in image_labels]]


def _make_mask(job: _Job) -> dict[str, int]:
    """Make the mask of an image unless it is there; return its share in the summary."""
    record = job.record
    labels, size = list(record["image_labels"]), (record["height"], record["width"])
    projections = np.zeros((0, 1, 1), np.float32)
    if labels:
        _, projections = _read_for(record["image_id"], labels, job.projections_folder)
    lacks_pattern = not has_pattern(projections).all()
    is_refined = job.settings.crf and len(labels) == 1 and not lacks_pattern

    existing = _read_existing(job)
    was_there = job.mask.exists()
    label_map = existing
    if label_map is None:
        if is_refined:
            label_map = _refined_map(job, projections)
        else:
            label_map = proxy_label_map(
                projections,
                labels,
                *size,
                num_classes=job.num_classes,
                thresholds=job.thresholds,
                stds=job.stds,
                resolve=job.settings.resolve,
            )
        write_label_map(job.mask, label_map, num_classes=job.num_classes)
    return {
        "num_images": 1,
        "num_kept": existing is not None,
        "num_redone": existing is None and was_there,
        "num_refined": is_refined,
        "num_without_labels": not labels,
        "num_without_pattern": lacks_pattern,
        "pixels": label_map.size,
        "background_pixels": np.count_nonzero(label_map == 0),
        "undecided_pixels": np.count_nonzero(label_map == ignore_label(job.num_classes)),
    }


def read_label_map_if_good(
    path: Path, record: Mapping[str, Any], num_classes: int
) -> np.ndarray | None:
    """Read a label map of an image, of an earlier run; None if it is missing or damaged."""
    try:
        return read_label_map(
            path,
            record["height"],
            record["width"],
            num_classes=num_classes,
            image_id=record["image_id"],
        )
    except (FileNotFoundError, ValueError):
        return None


def _read_existing(job: _Job) -> np.ndarray | None:
    """Read the mask of an earlier run; None if there is none of these image labels."""
    record = job.record
    label_map = read_label_map_if_good(job.mask, record, job.num_classes)
    if label_map is None:
        return None
    if not record["image_labels"]:
        return None if label_map.any() else label_map
    # Projections are written again when the labels of their image have changed.
    projections = projections_path(job.projections_folder, record["image_id"])
    is_outdated = job.mask.stat().st_mtime_ns < projections.stat().st_mtime_ns
    return None if is_outdated else label_map


def _refined_map(job: _Job, projections: np.ndarray) -> np.ndarray:
    record, (label,) = job.record, job.record["image_labels"]
    size = record["height"], record["width"]
    (score,) = standardise(projections, [label], *size, job.stds)
    prob = 0.5 + 0.5 * np.tanh((score - job.thresholds[0]) / 2)  # sigmoid, without overflow
    image = read_image(record["file_name"], *size, record["image_id"])
    background, foreground = refine(image, np.stack([1 - prob, prob]), job.settings.crf_settings)
    return (foreground > background) * np.int32(label + 1)


def write_proxy_json(
    output: str | os.PathLike[str],
    records: Sequence[Mapping[str, Any]],
    masks_folder: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str],
    class_names: Sequence[str],
    category_ids: Sequence[int] | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> None:
    """Write a COCO-format file with proxy masks as label maps, to train a segmentation network.

    Args:
        output: file to write.
        records: as `maskx.data.coco.load_coco` makes them.
        masks_folder: of `make_proxy_masks`, with the masks of all images.
        image_root: folder of the images, the same as for `load_coco`.
        category_ids: rising ids by class index, as `maskx.data.coco.CocoData` has them; None: 1
            to K.
        made_with: plain values that say how the masks were made, for the ``info`` of the file.
    """
    output, masks_folder = Path(output), Path(masks_folder)
    if category_ids is None:
        category_ids = range(1, len(class_names) + 1)
    if any(b <= a for a, b in pairwise(category_ids)):
        raise ValueError(
            f"category_ids are {list(category_ids)!r:.200}. Allowed: rising ids, as class indices "
            "follow their order."
        )
    # Without symbolic links, through which ".." leads elsewhere.
    from_json = os.path.relpath(masks_folder.resolve(), output.parent.resolve())
    images = []
    for record in records:
        mask = mask_path(masks_folder, record["image_id"])
        if not mask.is_file():
            raise FileNotFoundError(
                f"{mask} (image {record['image_id']!r}): there is no such proxy mask. Make the "
                "masks of all images first."
            )
        images.append(
            {
                "id": record["image_id"],
                "file_name": Path(os.path.relpath(record["file_name"], image_root)).as_posix(),
                "height": record["height"],
                "width": record["width"],
                "image_labels": [category_ids[label] for label in record["image_labels"]],
                "label_map_file_name": (Path(from_json) / mask.name).as_posix(),
            }
        )
    categories = [
        {"id": number, "name": name} for number, name in zip(category_ids, class_names, strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": [], "categories": categories}
    write_json(output, {"info": {"label_maps": "predicted", **(made_with or {})}, **content})
