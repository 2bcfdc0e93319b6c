"""Generated tag lists of the size of stock photo collections, to measure the learning of vectors.

Tags follow Zipf's law overall and within topics, and those of an image are mostly of few topics.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import triu
from scipy.sparse.linalg import eigsh
from tqdm import tqdm

from maskx.data.tag_lists import read_tag_list
from maskx.systems.concept_mask.tag_vectors import co_counts, learn_word_vectors, pmi_matrix

__all__ = ["LearningCost", "measure_arpack", "measure_learning", "write_generated_tags"]

_CHUNK = 20_000


class LearningCost(NamedTuple):
    """What it takes to learn word vectors.

    Attributes:
        read_seconds: Reading the tag list.
        learn_seconds: From the tags to the table.
        cpu_seconds: Of both, what the processor worked, which other processes do not add to.
        peak_bytes: Largest resident memory of this process so far.
    """

    read_seconds: float
    learn_seconds: float
    cpu_seconds: float
    peak_bytes: int


def write_generated_tags(
    path: Path, *, num_images: int, num_words: int, tags_per_image: int, num_topics: int, seed: int
) -> None:
    """Write JSON lines of images with tags.

    Word i is of topic i modulo `num_topics`, and of two more topics at random. An image has two
    topics, which give 80 percent of its tags; the others are of any topic.

    Raises:
        ValueError: there are too few words for that.
    """
    if num_words < 4 * tags_per_image or num_words < 2 * num_topics:
        raise ValueError(
            f"{num_words} words are too few for {tags_per_image} tags per image and {num_topics} "
            "topics. Allowed: at least 4 words per tag, and 2 per topic."
        )
    rng = np.random.default_rng(seed)
    own = np.arange(num_words) % num_topics
    topics = np.concatenate([own, *rng.integers(num_topics, size=(2, num_words))])
    words = np.tile(np.arange(num_words), 3)
    members = [rng.permutation(words[topics == topic]) for topic in range(num_topics)]
    width = max(map(len, members))
    by_rank = np.stack([np.resize(words_of, width) for words_of in members])
    within, overall = _zipf(width, 3), _zipf(num_words, 10)
    popular = rng.permutation(num_words)
    quoted = np.array([json.dumps(f"word {index}") for index in range(num_words)])
    draws = 4 * tags_per_image
    with path.open("w", encoding="utf-8") as file:
        for start in tqdm(range(0, num_images, _CHUNK), desc="generated tags", disable=None):
            count = min(_CHUNK, num_images - start)
            pair = rng.integers(num_topics, size=(count, 2))
            topic = np.take_along_axis(pair, rng.integers(2, size=(count, draws)), axis=1)
            drawn = by_rank[topic, np.searchsorted(within, rng.random((count, draws)))]
            any_topic = popular[np.searchsorted(overall, rng.random((count, draws)))]
            drawn = np.sort(np.where(rng.random((count, draws)) < 0.8, drawn, any_topic), axis=1)
            order = rng.random((count, draws))
            order[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = 2  # repetitions come last
            first = np.argsort(order, axis=1)[:, :tags_per_image]
            fresh = np.take_along_axis(order, first, axis=1) < 1
            chosen = quoted[np.take_along_axis(drawn, first, axis=1)]
            for offset, (tags, kept) in enumerate(zip(chosen, fresh, strict=True)):
                text = ", ".join(tags[kept])
                file.write(f'{{"image_id": {start + offset}, "tags": [{text}]}}\n')


def measure_learning(path: Path, *, dim: int) -> LearningCost:
    """Learn word vectors from a file of :func:`write_generated_tags`."""
    started, worked = time.perf_counter(), time.process_time()
    tags = read_tag_list(path)
    read = time.perf_counter()
    learn_word_vectors(tags, dim=dim)
    learned = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return LearningCost(
        read_seconds=read - started,
        learn_seconds=learned - read,
        cpu_seconds=time.process_time() - worked,
        # Kilobytes, but for macOS.
        peak_bytes=peak if sys.platform == "darwin" else 1024 * peak,
    )


def measure_arpack(path: Path, *, dim: int) -> tuple[float, int]:
    """Find the same components with ARPACK, which takes several times as long at 18,000 words.

    Returns:
        Processor seconds of all, reading included; and the operations of the least work, one
        product of the matrix with the vectors that are found.
    """
    worked = time.process_time()
    upper = pmi_matrix(co_counts(read_tag_list(path)))
    matrix = upper + triu(upper, k=1).T
    dim = min(dim, len(upper.indptr) - 2)
    eigsh(matrix, dim, tol=1e-6)
    return time.process_time() - worked, 2 * matrix.nnz * dim


def _zipf(size: int, shift: int) -> np.ndarray:
    """Cumulative probabilities of ranks, p(rank) proportional to 1 / (rank + shift)."""
    weights = np.cumsum(1 / (np.arange(size) + shift))
    return weights / weights[-1]
