"""How much of one concept lies within another: Eq. 3 and 4 of ConceptMask.

"ConceptMask: Large-Scale Segmentation from Semantic Concepts" (Wang et al., ECCV 2018), section
4.2. Where a concept i is, a concept j that hardly ever lies there is negative; how much so, the
boxes of the training data say. Only pairs of the V concepts that are in one image are stored.
"""

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskx.core.files import written_whole
from maskx.systems.concept_mask.concept_sets import vocabulary_difference

_MAX_PENDING = 2**20  # pairs of images that are held before they are summed up, 24 MB
_MAX_RATIO = 0.5  # Eq. 4: pairs that overlap as much or more are no negatives
_ARRAYS = ("rows", "columns", "intersection", "area")
# What is in a file: kind of number in NumPy's letters, and in words.
_KINDS = {"names": ("U", "name"), "rows": ("i", "index"), "columns": ("i", "index")}
_KINDS |= dict.fromkeys(("intersection", "area"), ("f", "number"))


@dataclass(frozen=True, eq=False)
class Overlap:
    """Sums of Eq. 3 over the images that have both concepts of a pair.

    Attributes:
        num_concepts: V.
        rows: (K,) int64, concept i of each pair; pairs are sorted by i, then by j, and i != j.
        columns: (K,) int64, concept j.
        intersection: (K,) float64, square pixels in both i and j.
        area: (K,) float64, square pixels in i.
    """

    num_concepts: int
    rows: np.ndarray
    columns: np.ndarray
    intersection: np.ndarray
    area: np.ndarray

    def ratios(self) -> np.ndarray:
        """Return O(i, j) of each pair, Eq. 3: (K,) float64 in [0, 1]. It is not symmetric."""
        return np.minimum(self.intersection / self.area, 1.0)


def concept_overlap(
    records: Iterable[Mapping[str, Any]], num_concepts: int, *, progress: bool = False
) -> Overlap:
    """Sum up Eq. 3 in one pass over the images; the mask of a concept is the union of its boxes.

    The records are boxed images of `maskx.systems.concept_mask.concept_sets`, in any order.
    """
    total = _summed(num_concepts, [])
    pending: list[np.ndarray] = []
    num_pending = 0
    for record in tqdm(records, desc="overlap", disable=not progress):
        pairs = _pairs_of_image(record, num_concepts)
        pending.append(pairs)
        num_pending += pairs.shape[1]
        if num_pending > _MAX_PENDING:
            total, pending, num_pending = _summed(num_concepts, [_columns(total), *pending]), [], 0
    return _summed(num_concepts, [_columns(total), *pending])


def negative_weights(overlap: Overlap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gamma of Eq. 4 as a sparse matrix: 1 - O(i, j) where that is above 0.5, else 0.

    The diagonal is 0, and so are pairs that are in no image together, of which Eq. 3 says nothing.

    Returns:
        The CSR arrays of the (V, V) matrix, row i, column j: ``indptr`` (V + 1,) int64,
        ``indices`` (M,) int64 ascending in each row, ``weights`` (M,) float32 in (0.5, 1].
    """
    ratios = overlap.ratios()
    negative = ratios < _MAX_RATIO
    counts = np.bincount(overlap.rows[negative], minlength=overlap.num_concepts)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return indptr, overlap.columns[negative], (1 - ratios[negative]).astype(np.float32)


def save_overlap(path: str | os.PathLike[str], overlap: Overlap, names: Sequence[str]) -> None:
    """Write an overlap with its vocabulary as an `.npz` file, whole or not at all."""
    if len(names) != overlap.num_concepts:
        raise ValueError(
            f"The overlap is of {overlap.num_concepts} concepts, but {len(names)} names were "
            "given. Give the vocabulary that its concept indices count."
        )
    arrays = {key: getattr(overlap, key) for key in _ARRAYS}
    # A path would get another suffix.
    with written_whole(path) as scratch, scratch.open("wb") as file:
        np.savez(file, names=np.array(names, dtype=np.str_), **arrays)


def load_overlap(path: str | os.PathLike[str], names: Sequence[str]) -> Overlap:
    """Read an overlap, which must be of the vocabulary `names`; no code of the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, or of another vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such overlap file. Make one with tools/concept_overlap.py."
        )
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive")
        with np.load(path, allow_pickle=False) as file:
            found = {key: np.asarray(file[key]) for key in _KINDS}  # bytes where it is no array
    except Exception as error:  # NumPy lets through whatever the parsers of its parts raise
        raise ValueError(
            f"{path} is no overlap file ({error or type(error).__name__}). Make one with "
            "tools/concept_overlap.py."
        ) from None

    def check(key: str, is_right: Any, allowed: str) -> None:
        if not np.all(is_right):
            values = " ".join(str(found[key]).split())
            raise ValueError(
                f"{path}: its '{key}' is {found[key].dtype} {values:.60}. Allowed: {allowed}. Make "
                "the file again with tools/concept_overlap.py."
            )

    for key, (kind, what) in _KINDS.items():
        shape = found["names" if key == "names" else "rows"].shape
        is_right = found[key].dtype.kind == kind and len(shape) == 1 and found[key].shape == shape
        check(key, is_right, f"one {what} for each {'concept' if key == 'names' else 'pair'}")
    difference = vocabulary_difference(found["names"].tolist(), names)
    if difference is not None:
        raise ValueError(
            f"{path} is of another vocabulary: {difference}. Make it again for this one with "
            "tools/concept_overlap.py."
        )
    count, (rows, columns, intersection, area) = len(names), (found[key] for key in _ARRAYS)
    for key in ("rows", "columns"):
        inside = (found[key] >= 0) & (found[key] < count)
        check(key, inside, f"concept indices from 0 to {count - 1}")
    check("columns", rows != columns, "another concept than in 'rows'")
    check("rows", np.diff(rows * count + columns) > 0, "ascending pairs, each once")
    check("area", (area > 0) & np.isfinite(area), "finite numbers above 0")
    check("intersection", (intersection >= 0) & (intersection <= area * 1.001), "from 0 to 'area'")
    return Overlap(count, rows, columns, intersection, area)


def _pairs_of_image(record: Mapping[str, Any], num_concepts: int) -> np.ndarray:
    """(3, pairs) float64: key i * V + j, common area, area of i; for each two concepts here."""
    annotations = record["annotations"]
    classes = np.array([annotation["class_index"] for annotation in annotations], np.int64)
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_concepts:
        raise ValueError(
            f"Image {record['image_id']!r} has boxes of the concept indices "
            f"{np.unique(classes).tolist()}. Allowed: 0 to {num_concepts - 1}. Are the records of "
            "another split?"
        )
    concepts, rows = np.unique(classes, return_inverse=True)
    if len(concepts) < 2:
        return np.empty((3, 0))
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64)
    common = _common_areas(boxes, rows, len(concepts))
    first, second = np.nonzero(~np.eye(len(concepts), dtype=bool))
    keys = concepts[first] * num_concepts + concepts[second]
    return np.stack([keys, common[first, second], common[first, first]])


def _common_areas(boxes: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
    """(P, P) areas common to the unions of boxes of two concepts, exactly.

    The edges of all boxes cut the image into cells that are wholly inside or outside of each box.
    """
    xs, ys = np.unique(boxes[:, 0::2]), np.unique(boxes[:, 1::2])
    left, right = np.searchsorted(xs, boxes[:, 0]), np.searchsorted(xs, boxes[:, 2])
    top, bottom = np.searchsorted(ys, boxes[:, 1]), np.searchsorted(ys, boxes[:, 3])
    inside = np.zeros((len(ys) - 1, num_rows, len(xs) - 1), bool)
    for row, y1, y2, x1, x2 in zip(rows, top, bottom, left, right, strict=True):
        inside[y1:y2, row, x1:x2] = True
    # Strip by strip: as numbers, all cells of 300 boxes of 250 concepts would be 0.7 GB.
    areas = np.zeros((num_rows, num_rows))
    for strip, height in zip(inside, np.diff(ys), strict=True):
        areas += height * ((strip * np.diff(xs)) @ strip.T)
    return areas


def _columns(overlap: Overlap) -> np.ndarray:
    """The form of `_pairs_of_image`."""
    keys = overlap.rows * overlap.num_concepts + overlap.columns
    return np.stack([keys, overlap.intersection, overlap.area])


def _summed(num_concepts: int, parts: Sequence[np.ndarray]) -> Overlap:
    # A float holds keys exactly up to 2^53, a vocabulary of 94 million.
    keys, intersection, area = np.concatenate([np.empty((3, 0)), *parts], axis=1)
    unique, places = np.unique(keys.astype(np.int64), return_inverse=True)
    rows, columns = np.divmod(unique, num_concepts)
    sums = [np.bincount(places, weights, len(unique)) for weights in (intersection, area)]
    return Overlap(num_concepts, rows, columns, *sums)
