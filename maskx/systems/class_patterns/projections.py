"""Projections on class patterns: their files, histograms and thresholds.

The network of the class patterns is asked once: it writes the projections of each image at the
resolution of its features. Proxy masks are made from these files, as often as settings are to be
compared, see `maskx.systems.class_patterns.proxy_masks`. Shapes: L labels of the image, (h, w) of
the features, (H, W) of the image, K classes.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike

from maskx.core.files import read_json, write_json, written_whole
from maskx.systems.class_patterns.pattern_moments import check_identity

_MAX_DEVIATION = 8.0  # of histograms, in standard deviations; what lies beyond counts at the ends


# --- values


def standardise(
    projections: np.ndarray, labels: Sequence[int], height: int, width: int, stds: ArrayLike
) -> np.ndarray:
    """Resize projections bilinearly and divide them by their standard deviations.

    Args:
        projections: (L, h, w), as `check_projections` returns them.
        labels: the L class indices, for errors.
        height: H.
        width: W.
        stds: (L,) standard deviations by label, or one for all.

    Returns:
        (L, H, W) float32; all NaN for a label without a pattern.
    """
    stds = np.broadcast_to(np.asarray(stds, np.float32), len(labels))
    is_bad = has_pattern(projections) & ~((stds > 0) & np.isfinite(stds))
    if is_bad.any():
        row = int(is_bad.argmax())
        raise ValueError(
            f"The standard deviation of class index {labels[row]} is {stds[row]}. Allowed: above "
            "0, finite, for each class with a pattern."
        )
    # Divided afterwards, so that signs are those of the projections themselves.
    resized = [cv2.resize(q, (width, height), interpolation=cv2.INTER_LINEAR) for q in projections]
    return np.stack(resized) / stds[:, None, None]


def has_pattern(projections: np.ndarray) -> np.ndarray:
    """Say which labels have a pattern: (L,) bool, False where all values are NaN."""
    return ~np.isnan(projections).all(axis=(1, 2))


def check_projections(projections: ArrayLike, labels: Sequence[int], where: str) -> np.ndarray:
    """Check that projections fit the labels of an image and are finite, and return them as float32.

    Args:
        projections: (L, h, w), q of Eq. 3; the row of a label without a pattern is all NaN.
        labels: the L class indices.
        where: what they are called in errors.
    """
    projections = np.asarray(projections, np.float32)
    if projections.ndim != 3 or len(projections) != len(labels):
        raise ValueError(
            f"{where} have shape {projections.shape}, for {len(labels)} labels. Allowed: (L, h, w) "
            "with a row for each label."
        )
    if len(set(labels)) < len(labels):
        raise ValueError(f"{where} have the labels {list(labels)}. Allowed: each one once.")
    if len(labels) and projections[0].size == 0:
        raise ValueError(f"{where} have shape {projections.shape}, which has no pixel.")
    is_bad = ~np.isfinite(projections) & has_pattern(projections)[:, None, None]
    if is_bad.any():
        row, y, x = np.argwhere(is_bad)[0]
        raise ValueError(
            f"{where} have {projections[row, y, x]} for class index {labels[row]} at row {y}, "
            f"column {x}, and {is_bad.sum()} such values in all. Allowed: finite numbers, or NaN "
            "everywhere for a class without a pattern. Does the network give finite features?"
        )
    return projections


# --- thresholds


class ProjectionHistograms:
    """Histograms of q / std by class, counted image by image, at the resolution of the features.

    Attributes:
        edges: (num_bins + 1,) of the bins, in standard deviations.
        counts: (K, num_bins) int64, pixels. What lies beyond the edges is counted at the ends.
    """

    def __init__(self, num_classes: int, num_bins: int = 512) -> None:
        self.edges = np.linspace(-_MAX_DEVIATION, _MAX_DEVIATION, num_bins + 1)
        self.counts = np.zeros((num_classes, num_bins), np.int64)

    def update(self, projections: ArrayLike, labels: Sequence[int], stds: ArrayLike) -> None:
        """Count the pixels of one image, see :func:`standardise`, but labels without a pattern."""
        projections = check_projections(projections, labels, "The projections")
        if len(labels) == 0:
            return
        scores = standardise(projections, labels, *projections.shape[1:], stds)
        for label, score in zip(labels, scores, strict=True):
            if not np.isnan(score[0, 0]):
                inside = score.clip(-_MAX_DEVIATION, _MAX_DEVIATION)
                self.counts[label] += np.histogram(inside, self.edges)[0]

    def thresholds(self) -> np.ndarray:
        """Return `otsu_threshold` of each class: (K,) in standard deviations."""
        return np.array([otsu_threshold(counts, self.edges) for counts in self.counts])


def otsu_threshold(counts: ArrayLike, edges: ArrayLike) -> float:
    """Split a histogram in two so that the variance between the parts is the largest.

    Otsu, "A Threshold Selection Method from Gray-Level Histograms" (1979). With the share w of
    the values in a part and the mean m of a part, values at the centres of their bins, the
    variance is w_1 w_2 (m_1 - m_2)². Of several best splits it is the lowest, in the middle of the
    empty bins if it lies among such.

    Args:
        counts: (B,) of the bins.
        edges: (B + 1,), rising.

    Returns:
        The threshold, or 0 where fewer than two bins have a value.
    """
    counts, edges = np.asarray(counts, np.float64), np.asarray(edges, np.float64)
    if np.count_nonzero(counts) < 2:
        return 0.0
    centres = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()[:-1]
    above = counts.sum() - below
    sum_below = (counts * centres).cumsum()[:-1]
    sum_above = (counts * centres).sum() - sum_below
    is_split = (below > 0) & (above > 0)
    difference = sum_below / np.where(is_split, below, 1) - sum_above / np.where(is_split, above, 1)
    first = int(np.where(is_split, below * above * difference**2, -1.0).argmax()) + 1
    last = first + int((counts[first:] > 0).argmax())
    return float((edges[first] + edges[last]) / 2)


# --- files


def start_projections(
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str],
    patterns: str,
    **details: str | int | float | bool,
) -> None:
    """Create a folder for projections, or see to it that an existing one is for the same.

    Its `projections.json` says what the projections were made with: the hash of the class patterns,
    and in ``details`` all else that changes them, such as the layer and the image size.
    """
    header = {"class_names": list(class_names), "patterns": patterns, **details}
    claim_folder(Path(folder), "projections.json", header)


def projections_path(folder: str | os.PathLike[str], image_id: int | str) -> Path:
    """Return the file of the projections of an image."""
    return Path(folder) / f"{file_stem(image_id)}.npz"


def write_projections(
    folder: str | os.PathLike[str],
    image_id: int | str,
    labels: Sequence[int],
    projections: ArrayLike,
) -> None:
    """Write the (L, h, w) projections of an image on the patterns of all its labels."""
    projections = check_projections(projections, labels, f"The projections of image {image_id!r}")
    path = projections_path(folder, image_id)
    with written_whole(path) as scratch, scratch.open("wb") as file:
        np.savez(file, labels=np.asarray(labels, np.int64), projections=projections)


def read_projections(
    folder: str | os.PathLike[str], image_id: int | str
) -> tuple[list[int], np.ndarray]:
    """Read what `write_projections` wrote: L class indices and (L, h, w) float32 projections."""
    path = projections_path(folder, image_id)
    where = f"{path} (image {image_id!r})"
    try:
        with np.load(path, allow_pickle=False) as content:
            labels, projections = content["labels"], content["projections"]
            if (labels.ndim, labels.dtype.kind, projections.dtype.kind) != (1, "i", "f"):
                raise ValueError(f"labels {labels.dtype} {labels.shape}, {projections.dtype}")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{where}: there is no such file. Let the network write the projections of all images "
            "with labels first."
        ) from None
    except Exception as error:  # numpy has no class of errors of its own for damaged files
        raise ValueError(
            f"{where} cannot be read as projections ({error}). Delete it and let the network write "
            "it again."
        ) from error
    labels = labels.tolist()
    return labels, check_projections(projections, labels, f"{where}: the projections")


def file_stem(image_id: int | str) -> str:
    """Return a file name, without its end, that is safe everywhere and differs for each id."""
    if not isinstance(image_id, str):
        return str(int(image_id))
    # The hash also tells "a/b" from "a_b", "A" from "a" where the file system does not, "1" from 1.
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", image_id)[:80]
    return f"{readable}-{hashlib.sha256(image_id.encode()).hexdigest()[:16]}"


def claim_folder(folder: Path, name: str, header: dict[str, Any]) -> None:
    """Write a header into a new folder, or see to it that an existing one has the same.

    Args:
        folder: of files that are made with the same settings.
        name: of the header's file.
        header: the settings, as JSON can hold them.
    """
    path = folder / name
    header = json.loads(json.dumps(header))  # tuples become lists, as in the file
    if not path.exists():
        others = next((f for f in folder.glob("*") if f.name != f"{name}.partial"), None)
        if others is not None:
            raise ValueError(
                f"{folder} holds files ({others.name}) but no {name}, which says what they were "
                "made with. Name an empty or a new folder."
            )
        write_json(path, header)
        return
    check_identity(f"'{path}'", read_header(path), header, "this run")


def read_header(path: Path) -> dict[str, Any]:
    """Read what `claim_folder` wrote."""
    header = read_json(path)
    if not isinstance(header, dict):
        raise ValueError(f"'{path}' holds no dict. Delete its folder and make the files again.")
    return header
