"""How well maps and masks of ConceptMask fit the truth, and the values that are fitted for it.

Wang et al., "ConceptMask: Large-Scale Segmentation from Semantic Concepts" (ECCV 2018), sections
4.4 and 5. Measures, in [0, 1], are taken per concept and image of which the concept is known to be,
averaged over the images of a concept, and then over the concepts of a level, so that rare concepts
count as much as frequent ones. Records are those of :func:`maskx.data.coco.load_coco`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from maskx.core.sample_models import Sample
from maskx.core.word_table import WordTable, spelled
from maskx.data.label_maps import read_label_map
from maskx.systems.concept_mask.concept_sets import ConceptSplit, fully_masked
from maskx.systems.concept_mask.model import EmbeddingModel
from maskx.systems.concept_mask.network import normalise_maps, resize_maps
from maskx.systems.concept_mask.query import UNSEEN, ConceptQuery
from maskx.systems.concept_mask.samples import read_sample, union_mask

logger = logging.getLogger(__name__)

LEVELS = ("mask", "box", "image", "unseen", "unseen_blended")
"""What a concept was learned from, at most; unseen ones are not in the vocabulary, and are found by
Eq. 1 alone, or with maps that are blended with those of the nearest concept with boxes."""

_MEASURES = ("pointing", "soft_iou", "precision", "recall", "iou", "chance")
NOT_ASKED = -2
"""Index of a concept that is neither in the word table nor has a vector."""
BLENDED = "{} (blended)"
"""Name under which an unseen word is asked for, and measured, a second time."""

_CHUNK = 1024  # concepts whose maps are made at a time

Record = Mapping[str, Any]
Read = Callable[[Record], Sample]


def pointing_hit(attention: np.ndarray, truth: np.ndarray) -> bool:
    """Tell whether the largest value of an (H, W) map lies on the (H, W) bool truth.

    Of several largest ones the first, row by row, counts; a constant map points nowhere.
    """
    flat = attention.ravel()
    best = int(flat.argmax())
    return bool(truth.ravel()[best] and flat[best] > flat.min())


def soft_iou(attention: np.ndarray, truth: np.ndarray) -> float:
    """Compute the IoU of a map without a threshold (Eq. 5): sum(a G) / sum(max(a, G)).

    The map is (H, W) in [0, 1], the truth bool. NaN if both are zero everywhere.
    """
    inside = float(attention[truth].sum(dtype=np.float64))
    union = float(attention.sum(dtype=np.float64)) - inside + np.count_nonzero(truth)
    return inside / union if union > 0 else math.nan


class ConceptScores:
    """Sums of the measures per concept. Those of several processes are added with `merge`.

    The measures are pointing, soft IoU, precision, recall, IoU and chance, the share of the image
    that is the concept, which is what pointing at a random pixel reaches.

    Args:
        names: of all concepts that may be measured.
        levels: of `LEVELS`, one per concept.
    """

    def __init__(self, names: Sequence[str], levels: Sequence[str]) -> None:
        if len(names) != len(levels):
            raise ValueError(f"There are {len(names)} concepts, but {len(levels)} levels.")
        for name, level in zip(names, levels, strict=True):
            if level not in LEVELS:
                raise ValueError(
                    f"Concept {name!r} has the level {level!r}. Allowed: {', '.join(LEVELS)}."
                )
        self._row = {name: row for row, name in enumerate(names)}
        if len(self._row) < len(names):
            twice = next(name for row, name in enumerate(names) if self._row[name] != row)
            raise ValueError(f"Concept {twice!r} stands twice among the names. Name each once.")
        self.names, self.levels = tuple(names), tuple(levels)
        self.sums = np.zeros((len(names), len(_MEASURES)))
        self.counts = np.zeros(len(names), np.int64)

    def update(
        self,
        concept: str,
        *,
        attention: np.ndarray,
        mask: np.ndarray,
        truth: np.ndarray,
        image_id: int | str,
    ) -> None:
        """Measure one concept in one image that shows it; the precision of an empty mask is 0.

        Args:
            attention: (H, W) in [0, 1].
            mask: (H, W) bool.
            truth: (H, W) bool, not empty.
        """
        if concept not in self._row:
            raise ValueError(
                f"Concept {concept!r} is not among the {len(self.names)} that are measured."
            )
        where = f"concept {concept!r} in image {image_id!r}"
        for name, array in (("attention", attention), ("mask", mask), ("truth", truth)):
            if array.ndim != 2 or array.shape != truth.shape:
                raise ValueError(
                    f"The {name} of {where} has shape {array.shape}, the truth {truth.shape}. "
                    "Allowed: (H, W), all equal."
                )
            if (array.dtype == bool) == (name == "attention"):
                allowed = "float" if name == "attention" else "bool"
                raise ValueError(
                    f"The {name} of {where} has dtype {array.dtype}. Allowed: {allowed}."
                )
        # Written so that NaN is refused too; float32 may exceed 1 by its rounding.
        if not (attention.min() >= 0 and attention.max() <= 1 + 1e-5):
            raise ValueError(
                f"The attention of {where} is from {attention.min():g} to {attention.max():g}. "
                "Allowed: [0, 1]. Normalise it first."
            )
        area = np.count_nonzero(truth)
        if area == 0:
            raise ValueError(
                f"The truth of {where} is empty. Measure concepts in images that show them."
            )
        hit = np.count_nonzero(mask & truth)
        predicted = np.count_nonzero(mask)
        row = self._row[concept]
        self.sums[row] += (
            pointing_hit(attention, truth),
            soft_iou(attention, truth),
            hit / predicted if predicted else 0.0,
            hit / area,
            hit / (predicted + area - hit),
            area / truth.size,
        )
        self.counts[row] += 1

    def merge(self, other: "ConceptScores") -> None:
        """Add the measures of other images, such as those of another process."""
        if (self.names, self.levels) != (other.names, other.levels):
            raise ValueError(
                f"Measures of {len(other.names)} concepts cannot be added to those of "
                f"{len(self.names)}: names and levels must be the same, in one order."
            )
        self.sums += other.sums
        self.counts += other.counts

    def evaluate(self) -> dict[str, Any]:
        """Compute the means.

        Returns:
            ``levels``: by level the means over its concepts and ``num_concepts``, how many were
            measured; None for a level of which none was. ``concepts``: by name, of those measured,
            the means over images, ``level`` and ``num_images``.
        """
        measured = self.counts > 0
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        levels: dict[str, Any] = {}
        for level in LEVELS:
            rows = measured & (np.array(self.levels, dtype=object) == level)
            levels[level] = None
            if rows.any():
                levels[level] = _by_measure(means[rows].mean(axis=0))
                levels[level]["num_concepts"] = int(rows.sum())
        concepts = {
            self.names[row]: {
                "level": self.levels[row],
                **_by_measure(means[row]),
                "num_images": int(self.counts[row]),
            }
            for row in np.flatnonzero(measured)
        }
        return {"levels": levels, "concepts": concepts}


def format_concept_table(result: Mapping[str, Any]) -> str:
    """Lay out what `ConceptScores.evaluate` returns as a Markdown table, a row per level."""
    titles = ("pointing", "soft IoU", "precision", "recall", "IoU", "chance")
    lines = [f"| level | concepts | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for level, found in result["levels"].items():
        cells, count = ["-"] * len(titles), 0
        if found is not None:
            cells, count = [f"{found[name]:.3f}" for name in _MEASURES], found["num_concepts"]
        lines.append(f"| {level} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


class ThetaFit(NamedTuple):
    """The best share of a concept's own map in a blend, and the mean soft IoU by share."""

    theta: float
    scores: dict[float, float]


def fit_theta(
    maps: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    *,
    thetas: Sequence[float] = tuple(round(0.05 * step, 2) for step in range(1, 21)),
) -> ThetaFit:
    """Choose the theta of ``theta a_q + (1 - theta) a_p`` on images with true masks.

    The measure is the soft IoU of the blended maps, each brought to [0, 1] as the segmentation
    network gets them, and averaged over the A attention sizes; mean over the images of a concept,
    then over concepts. Of equal thetas the largest is taken.

    Args:
        maps: concept, its own maps a_q (A, H, W), those of the nearest concept with boxes a_p
            (A, H, W), and the truth (H, W) bool; read once.
        thetas: values to try, in [0, 1]. 0 is none of them by default: a concept would have no
            map of its own, and all with one nearest concept the same.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for concept, own, nearest, truth in maps:
        blends = (torch.from_numpy(theta * own + (1 - theta) * nearest) for theta in thetas)
        scores = [soft_iou(normalise_maps(each).mean(dim=0).numpy(), truth) for each in blends]
        sums[concept] = sums.get(concept, 0) + np.array(scores)
        counts[concept] = counts.get(concept, 0) + 1
    if not sums:
        raise ValueError("There is no image with a true mask to fit theta on. Give at least one.")
    means = np.mean([sums[concept] / counts[concept] for concept in sums], axis=0)
    best = max(range(len(thetas)), key=lambda i: (means[i], thetas[i]))
    by_theta = {theta: float(mean) for theta, mean in zip(thetas, means, strict=True)}
    return ThetaFit(float(thetas[best]), by_theta)


def fit_existence_threshold(scores: np.ndarray, present: np.ndarray) -> float:
    """Choose above which score a concept is said to be in an image: that of the best F1.

    Args:
        scores: (N,) of images.
        present: (N,) bool, whether they show the concept.

    Returns:
        Halfway between two scores, or just below the lowest, of equally good ones the largest; NaN
        where no image or every image shows the concept: nothing can be told from them.
    """
    scores, present = np.asarray(scores, np.float64), np.asarray(present, bool)
    if scores.ndim != 1 or scores.shape != present.shape or not np.isfinite(scores).all():
        raise ValueError(
            f"There are scores of shape {scores.shape} for {present.shape} images. Allowed: one "
            "finite number for each."
        )
    if not present.any() or present.all():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(present[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + present.sum())
    # Equal scores are on one side: only the last of them can be the lowest above the threshold.
    is_last = np.append(ordered[1:] < ordered[:-1], True)
    best = int(np.argmax(np.where(is_last, f1, -1.0)))
    if best + 1 < len(ordered):
        return float((ordered[best] + ordered[best + 1]) / 2)
    # In the precision of the scores and of what the threshold is kept in.
    return float(np.nextafter(np.float32(ordered[best]), np.float32(-np.inf)))


def _by_measure(means: np.ndarray) -> dict[str, float]:
    return dict(zip(_MEASURES, means.tolist(), strict=True))


def concept_truths(record: Record, num_classes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield index and (H, W) bool true mask of each class of an image.

    It is the label in the label map, if there is one, else the union of the annotations. A class of
    which an annotation has no mask is left out, since part of a mask is no truth, and so is one of
    which nothing is visible.
    """
    if "label_map_file_name" in record:
        label_map, labels = _label_map(record, num_classes)
        yield from ((label - 1, label_map == label) for label in labels)
        return
    for index in fully_masked(record["annotations"]):
        truth = union_mask(record, index)
        if truth.any():
            yield index, truth


@dataclass(frozen=True, eq=False)
class ConceptTest:
    """Images with true masks of concepts, and what these are to a model.

    Attributes:
        names: concepts by class index of the records.
        indices: (K,) row of each in the word table; -1 for an unseen one, -2 for one that is
            neither in the table nor has a vector, which is not measured.
        vectors: (K, k) float32.
        levels: of each; "unseen" too where it is not measured.
    """

    records: Sequence[Record]
    names: tuple[str, ...]
    indices: np.ndarray
    vectors: np.ndarray
    levels: tuple[str, ...]

    def query(self, classes: Sequence[int]) -> ConceptQuery:
        """Ask for some class indices; for unseen words by Eq. 1, and once more blended."""
        again = [c for c in classes if self.indices[c] == UNSEEN]
        rows = [*classes, *again]
        names = [self.names[c] for c in classes] + [BLENDED.format(self.names[c]) for c in again]
        blended = np.arange(len(rows)) >= len(classes)
        return ConceptQuery(self.indices[rows], self.vectors[rows], blended=blended, names=names)

    def asked(self, record: Record) -> list[int]:
        """List the class indices that can be asked for and may have a true mask in an image."""
        if "label_map_file_name" in record:
            found = [label - 1 for label in _label_map(record, len(self.names))[1]]
        else:
            found = fully_masked(record["annotations"])
        return [c for c in found if self.indices[c] >= UNSEEN]

    def sample(self, record: Record) -> Sample:
        """Read an image, RGB, with the query for what has a true mask in it."""
        return read_sample(record) | {"query": self.query(self.asked(record))}

    def truths(self, record: Record) -> dict[int, np.ndarray]:
        """Draw the true masks of an image by class index, of what can be asked for."""
        truths = concept_truths(record, len(self.names))
        return {c: truth for c, truth in truths if self.indices[c] >= UNSEEN}

    @property
    def has_truth(self) -> bool:
        """Whether any image has a true mask, in a label map or of an annotation."""
        return any(
            "label_map_file_name" in record
            or any("segmentation" in annotation for annotation in record["annotations"])
            for record in self.records
        )

    def new_scores(self) -> ConceptScores:
        """Make the sums of :meth:`measure`, of which unseen words are measured twice."""
        unseen = [BLENDED.format(self.names[c]) for c in np.flatnonzero(self.indices == UNSEEN)]
        levels = [*self.levels, *["unseen_blended"] * len(unseen)]
        return ConceptScores([*self.names, *unseen], levels)

    def measure(self, scores: ConceptScores, record: Record, result: Mapping[str, Any]) -> None:
        """Add the measures of what was predicted for an image to the sums of :meth:`new_scores`.

        `result` is of :meth:`EmbeddingModel.predict`, asked by :meth:`query`.
        """
        truths = {self.names[c]: truth for c, truth in self.truths(record).items()}
        truths |= {BLENDED.format(name): truth for name, truth in truths.items()}
        concepts, masks = result["concepts"], result["masks"].cpu().numpy()
        if not set(concepts) <= set(scores.names) or len(concepts) != len(masks):
            raise ValueError(
                f"Of image {record['image_id']!r} the concepts {concepts} were predicted, with "
                f"{len(masks)} masks. Ask with the query of the test."
            )
        maps = zip(concepts, result["attention"].cpu().numpy(), masks, strict=True)
        for name, attention, mask in maps:
            if name in truths:
                scores.update(
                    name,
                    attention=attention,
                    mask=mask,
                    truth=truths[name],
                    image_id=record["image_id"],
                )


def concept_test(
    records: Sequence[Record],
    class_names: Sequence[str],
    split: ConceptSplit,
    table: WordTable,
    unseen: WordTable | None = None,
    *,
    source: str,
) -> ConceptTest:
    """Match the classes of a data set with the concepts of a model by name.

    Args:
        class_names: by class index of the records.
        unseen: vectors of concepts that training knew nothing of.
        source: name of the data set, for messages.
    """
    known = {name: index for index, name in enumerate(table.names)}
    extra = {} if unseen is None else dict(zip(unseen.names, unseen.vectors, strict=True))
    indices = np.full(len(class_names), NOT_ASKED, np.int64)
    vectors = np.ones((len(class_names), table.dim), np.float32)
    for row, name in enumerate(map(spelled, class_names)):
        if name in known:
            indices[row], vectors[row] = known[name], table.vectors[known[name]]
        elif name in extra:
            indices[row], vectors[row] = UNSEEN, extra[name]
    missing = [class_names[row] for row in np.flatnonzero(indices == NOT_ASKED)]
    if len(missing) == len(indices):
        raise ValueError(
            f"None of the {len(indices)} classes of '{source}' is in the word table, such as "
            f"'{missing[0]}'. Give images of its concepts."
        )
    if missing and records:
        logger.warning(
            "%s: %d of %d classes have no vector and are not measured, such as '%s'.",
            source,
            len(missing),
            len(indices),
            missing[0],
        )
    levels = tuple(split.level_of(max(index, UNSEEN)) for index in indices.tolist())
    return ConceptTest(records, tuple(class_names), indices, vectors, levels)


def evaluate_concepts(
    model: EmbeddingModel,
    test: ConceptTest,
    *,
    kind: str | None = None,
    segment: bool = True,
    description: str = "evaluation",
) -> dict[str, Any]:
    """Measure maps and masks of all concepts that images show; one image is held at a time.

    Args:
        model: of any stage, of RGB images.
        kind: of attention, see :meth:`EmbeddingModel.attention`; None for that of the model.
        segment: make masks with the segmentation network, not of the attention.

    Returns:
        What :meth:`ConceptScores.evaluate` returns.
    """
    model.eval()
    scores = test.new_scores()
    for record in tqdm(test.records, desc=description, unit="img"):
        sample = test.sample(record)
        if len(sample["query"]):
            test.measure(scores, record, model.predict(sample, kind=kind, segment=segment))
    return scores.evaluate()


def evaluate_existence(model: EmbeddingModel, test: ConceptTest) -> dict[str, float]:
    """Measure which concepts of the vocabulary are said to be in images whose tags are complete.

    Returns:
        ``precision`` and ``recall`` over all pairs of an image and a concept; NaN where nothing is
        said or there.
    """
    hits = num_said = num_present = 0
    thresholds = model.eval().existence_thresholds.cpu().numpy()
    for scores, present in _existence(model, test, read_sample, "existence"):
        said = scores > thresholds
        hits += np.count_nonzero(said & present)
        num_said += np.count_nonzero(said)
        num_present += np.count_nonzero(present)
    return {
        "precision": hits / num_said if num_said else math.nan,
        "recall": hits / num_present if num_present else math.nan,
    }


def fit_concepts(
    model: EmbeddingModel, test: ConceptTest, read: Read = read_sample
) -> dict[str, Any]:
    """Fit theta and the existence thresholds on validation images and set them in the model.

    Both thetas are fitted on image-level concepts: that of unseen ones with concepts that are asked
    for by nothing but their vector, so that no unseen concept is needed. A concept that no image
    shows, or every one, gets the threshold of all together.

    Args:
        model: of stage 2 or 3.
        test: images whose tags are complete, with true masks of image-level concepts.
        read: reads an image in the order of channels of the model.

    Returns:
        ``theta_image`` and ``theta_unseen``, None if no image-level concept has a mask;
        ``existence_threshold_unseen``; and ``own_thresholds``, for how many concepts there is one
        of their own.
    """
    if model.stage == 1:
        raise ValueError(
            "Stage 1 of ConceptMask blends no maps, so there is nothing to fit. Give a model of "
            "stage 2 or 3."
        )
    if not test.records:
        raise ValueError("There is no image to fit theta and thresholds on. Give at least one.")
    model.eval()
    fitted: dict[str, Any] = {"theta_image": None, "theta_unseen": None}
    of_images = {c for c, level in enumerate(test.levels) if level == "image"}
    if any(of_images & test.truths(record).keys() for record in test.records):
        for name, by_vector in (("theta_image", False), ("theta_unseen", True)):
            maps = _own_and_nearest(model, test, of_images, read, by_vector=by_vector)
            fitted[name] = fit_theta(maps).theta
    else:
        logger.warning(
            "None of the %d images has a mask of a concept with tags only: theta stays as it is.",
            len(test.records),
        )
    found = zip(*_existence(model, test, read, "fitting existence"), strict=True)
    scores, present = map(np.stack, found)
    of_all = fit_existence_threshold(scores.ravel(), present.ravel())
    thresholds = np.array(
        [fit_existence_threshold(*each) for each in zip(scores.T, present.T, strict=True)]
    )
    own = np.isfinite(thresholds)
    found = _existence(model, test, read, "fitting unseen", by_vector=True)
    cosines = np.stack([scores for scores, _ in found])
    unseen = fit_existence_threshold(cosines.ravel(), present.ravel())
    thresholds = torch.from_numpy(np.where(own, thresholds, of_all))
    model.set_fitted(**fitted, existence_thresholds=thresholds, existence_threshold_unseen=unseen)
    return fitted | {
        "existence_threshold_unseen": None if math.isnan(unseen) else unseen,
        "own_thresholds": int(own.sum()),
    }


@torch.inference_mode()
def _own_and_nearest(
    model: EmbeddingModel, test: ConceptTest, classes: set[int], read: Read, *, by_vector: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield what `fit_theta` reads, of some classes."""
    for record in tqdm(test.records, desc="fitting theta", unit="img"):
        truths = {c: truth for c, truth in test.truths(record).items() if c in classes}
        if not truths:
            continue
        query = test.query(list(truths))
        if by_vector:
            query = ConceptQuery([UNSEEN] * len(truths), query.vectors)
        maps = model.embedding_maps(model.normalise(read(record))[None])
        size = (record["height"], record["width"])
        own, nearest = (
            torch.stack([resize_maps(each, size)[0] for each in attention]).cpu().numpy()
            for attention in (model.attention(maps, query, kind=k) for k in ("own", "nearest"))
        )
        for row, (concept, truth) in enumerate(truths.items()):
            yield test.names[concept], own[:, row], nearest[:, row], truth


@torch.inference_mode()
def _existence(
    model: EmbeddingModel,
    test: ConceptTest,
    read: Read,
    description: str,
    *,
    by_vector: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield of each image (V,) scores, perhaps as if all were unseen, and what it shows, bool."""
    queries = [ConceptQuery([UNSEEN] * len(chunk), chunk) for chunk in model.vectors.split(_CHUNK)]
    for record in tqdm(test.records, desc=description, unit="img"):
        maps = model.embedding_maps(model.normalise(read(record))[None])
        if by_vector:
            scores = torch.cat([model.existence(maps, query) for query in queries], dim=1)
        else:
            scores = model.vocabulary_existence(maps)
        present = np.zeros(len(model.vectors), bool)
        shown = test.indices[list(record["image_labels"])]
        present[shown[shown >= 0]] = True
        yield scores[0].float().cpu().numpy(), present


def _label_map(record: Record, num_classes: int) -> tuple[np.ndarray, list[int]]:
    """Read a label map, and list its labels without background and what is unknown."""
    size = (record["height"], record["width"])
    file, image_id = record["label_map_file_name"], record["image_id"]
    label_map = read_label_map(file, *size, num_classes=num_classes, image_id=image_id)
    return label_map, [
        label for label in np.unique(label_map).tolist() if 1 <= label <= num_classes
    ]
