"""Tables of word vectors: what a concept is to the networks of ConceptMask.

A concept index is a row of the table. V: number of words, k: length of a vector. In names,
underscores and spaces are the same.
"""

import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from maskx.core.tensor_files import read_content, read_tensors, write_tensors
from maskx.core.text import listed
from maskx.core.word_vectors import load_class_vectors

__all__ = [
    "PmiStatistics",
    "WordTable",
    "explained_spectrum",
    "inverse_frequencies",
    "load_word_table",
    "save_word_table",
    "spelled",
    "word_table_from_file",
]

_KIND = "word table"
# What the tensors of a file hold; those of a table from tags are in its file alone.
_DTYPES = {"vectors": torch.float32, "idf": torch.float32}
_PMI_DTYPES = {"eigenvalues": torch.float64, "counts": torch.int64}
_PMI_TYPES = {"num_images": int, "positive": bool, "smoothing": float, "squared_norm": float}


@dataclass(frozen=True, eq=False)
class PmiStatistics:
    """How the PMI matrix of a table was made; new words are folded in alike.

    Attributes:
        counts: (V,) int64, images with each word.
        num_images: Images with any word.
        positive: Whether negative entries were set to 0.
        smoothing: See `maskx.systems.concept_mask.tag_vectors.learn_word_vectors`.
        squared_norm: Sum of the squared entries, which is that of all squared eigenvalues.
    """

    counts: np.ndarray
    num_images: int
    positive: bool
    smoothing: float
    squared_norm: float


@dataclass(frozen=True, eq=False)
class WordTable:
    """Words and their vectors.

    Attributes:
        names: Words by concept index, with spaces.
        vectors: (V, k) float32, none of them all zeros. Not normalised.
        idf: (V,) float32, -log p(w), see :func:`inverse_frequencies`; ones where it is unknown.
        eigenvalues: (k,) positive and descending, of a table from tags. Column c of `vectors` is
            eigenvector c times the square root of eigenvalue c. None for other tables.
        source: What the table was made from, for people.
        pmi: How the matrix of a table from tags was made.

    Raises:
        ValueError: The parts do not fit together, a name comes twice, or a vector is unusable.
    """

    names: tuple[str, ...]
    vectors: np.ndarray
    idf: np.ndarray
    eigenvalues: np.ndarray | None = None
    source: str = ""
    pmi: PmiStatistics | None = None

    def __post_init__(self) -> None:
        names = tuple(spelled(name) for name in self.names)
        vectors = np.ascontiguousarray(self.vectors, dtype=np.float32)
        idf = np.ascontiguousarray(self.idf, dtype=np.float32)
        what = f"The word table of {self.source or 'no stated source'}"
        if not names:
            raise ValueError(f"{what} has no word. Give at least one.")
        if vectors.ndim != 2 or len(vectors) != len(names) or vectors.shape[1] == 0:
            raise ValueError(
                f"{what} has {len(names)} words, but vectors of shape {vectors.shape}. Allowed: "
                f"({len(names)}, k)."
            )
        if idf.shape != (len(names),) or not np.isfinite(idf).all():
            raise ValueError(
                f"{what} has {len(names)} words, but an idf of shape {idf.shape} or with NaN or "
                "infinity. Allowed: one number per word."
            )
        if len(set(names)) != len(names):
            twice = [name for name, times in Counter(names).items() if times > 1]
            raise ValueError(
                f"{what} has words that come twice ('_' and ' ' are the same): "
                f"{listed(twice)}. Give each once."
            )
        unusable = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
        if unusable.any():
            raise ValueError(
                f"{what} has {unusable.sum()} vectors that are all zeros or hold NaN or infinity: "
                f"{listed([names[i] for i in np.flatnonzero(unusable)])}. Remove these words."
            )
        values = self.eigenvalues
        if values is not None and not (
            np.shape(values) == vectors.shape[1:] and (np.asarray(values) > 0).all()
        ):
            raise ValueError(
                f"{what} has vectors of length {vectors.shape[1]}, but eigenvalues of shape "
                f"{np.shape(values)} or not above 0. Allowed: one per column."
            )
        if self.pmi is not None and np.shape(self.pmi.counts) != (len(names),):
            raise ValueError(
                f"{what} has {len(names)} words, but counts of shape {np.shape(self.pmi.counts)}. "
                "Allowed: one per word."
            )
        for field, value in (("names", names), ("vectors", vectors), ("idf", idf)):
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def dim(self) -> int:
        """Length k of the vectors."""
        return self.vectors.shape[1]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of names and vectors, by which a checkpoint knows its table again."""
        digest = hashlib.sha256(json.dumps([self.names, self.vectors.shape]).encode())
        digest.update(self.vectors.astype("<f4").tobytes())
        return digest.hexdigest()

    def index_of(self, name: str) -> int:
        """Return the concept index of a word.

        Raises:
            ValueError: the table has no such word; the message names the closest ones.
        """
        index = self._index.get(spelled(name))
        if index is None:
            raise ValueError(
                f"'{name}' is not among the {len(self)} concepts of the word table."
                f"{self._hint(name)} Give one of its names, or the vector of the word (a new word "
                "can be folded in, see tools/learn_word_vectors.py --fold-in)."
            )
        return index

    def resolve(self, concepts: Sequence[str | int | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return index and vector of each concept asked for.

        Args:
            concepts: names, concept indices, or vectors of length k.

        Returns:
            (C,) int64 concept indices, -1 for a concept that was given as a vector, and (C, k)
            float32 vectors.

        Raises:
            ValueError: there is no concept, or one of them is none of the above.
        """
        if isinstance(concepts, str):
            raise ValueError(
                f"The concepts are the text '{concepts}'. Allowed: a list, such as ['{concepts}']."
            )
        if len(concepts) == 0:
            raise ValueError("The list of concepts is empty. Give at least one concept.")
        indices = np.full(len(concepts), -1, np.int64)
        vectors = np.empty((len(concepts), self.dim), np.float32)
        for position, concept in enumerate(concepts):
            if isinstance(concept, str):
                indices[position] = self.index_of(concept)
            elif np.ndim(concept) == 0:
                indices[position] = self._checked_index(concept)
            else:
                vectors[position] = self._checked_vector(concept, f"concept {position}")
        known = indices >= 0
        vectors[known] = self.vectors[indices[known]]
        return indices, vectors

    def nearest(
        self, vector: np.ndarray, *, among: Sequence[int] | None = None, count: int = 1
    ) -> list[tuple[int, float]]:
        """Return the words with the largest cosine to a vector.

        Args:
            vector: (k,).
            among: concept indices to choose from; all if None.
            count: how many; fewer if there are not so many.

        Returns:
            Concept index and cosine, largest cosine first; of equal ones the first in `among`.

        Raises:
            ValueError: the vector is unusable, `among` is empty, or `count` is below 1.
        """
        vector = self._checked_vector(vector, "the vector to compare with")
        candidates = np.arange(len(self)) if among is None else np.asarray(among, dtype=np.int64)
        if candidates.size == 0 or count < 1:
            raise ValueError(
                f"{count} words of {candidates.size} were asked for. Allowed: at least 1 of 1."
            )
        for index in candidates[(candidates < 0) | (candidates >= len(self))][:1]:
            self._checked_index(index)
        cosines = self._unit_vectors[candidates] @ (vector / np.linalg.norm(vector))
        order = np.argsort(-cosines, kind="stable")[:count]
        return [(int(candidates[i]), float(cosines[i])) for i in order]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def _unit_vectors(self) -> np.ndarray:
        return self.vectors / np.linalg.norm(self.vectors, axis=1, keepdims=True)

    def _hint(self, name: str) -> str:
        close = difflib.get_close_matches(spelled(name), self.names, n=3, cutoff=0.5)
        return f" Closest: {', '.join(map(repr, close))}." if close else ""

    def _checked_index(self, concept: object) -> int:
        index = np.asarray(concept)
        if index.dtype.kind not in "iu" or not 0 <= index < len(self):
            raise ValueError(
                f"{concept!r} is no concept index. Allowed: a name, a whole number from 0 to "
                f"{len(self) - 1}, or a vector of length {self.dim}."
            )
        return int(index)

    def _checked_vector(self, values: np.ndarray, what: str) -> np.ndarray:
        vector = np.asarray(values)
        if vector.shape != (self.dim,) or vector.dtype.kind not in "fiu":
            raise ValueError(
                f"The vector of {what} has shape {vector.shape} and dtype {vector.dtype}. Allowed: "
                f"({self.dim},) numbers, the length of the vectors of the word table."
            )
        vector = vector.astype(np.float32)
        if not np.isfinite(vector).all() or not vector.any():
            raise ValueError(
                f"The vector of {what} is all zeros, or holds NaN or infinity. Allowed: finite "
                "numbers that are not all 0."
            )
        return vector


def spelled(name: str) -> str:
    """Return a word as tables hold it: one space for underscores and white space."""
    return " ".join(name.replace("_", " ").split())


def inverse_frequencies(counts: np.ndarray, num_images: int) -> np.ndarray:
    """Return a_i = -log p(w_i), the weights of words in a soft topic.

    Args:
        counts: (V,) images with each word; 0 counts as 1, or the weight were infinite.
        num_images: images with any word.

    Returns:
        (V,) float32, at least 0.
    """
    counts = np.clip(np.asarray(counts, dtype=np.float64), 1, max(num_images, 1))
    return np.log(max(num_images, 1) / counts).astype(np.float32)


def explained_spectrum(table: WordTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the spectrum of a table and the share of it up to each component.

    Returns:
        (r,) eigenvalues of `vectors @ vectors.T`, descending, r = min(V, k); and (r,) cumulative
        share of the squared eigenvalues, 0 to 1: for a table from tags of those of its whole PMI
        matrix, for any other table of its own.
    """
    values = table.eigenvalues
    if values is None:
        values = np.linalg.svd(table.vectors.astype(np.float64), compute_uv=False) ** 2
    values = np.asarray(values, dtype=np.float64)
    squares = np.cumsum(values**2)
    return values, squares / (table.pmi.squared_norm if table.pmi else squares[-1])


def word_table_from_file(
    path: str | os.PathLike[str],
    names: Sequence[str],
    *,
    counts: np.ndarray | None = None,
    num_images: int | None = None,
) -> WordTable:
    """Make a table of published vectors: GloVe, word2vec or fastText text, or CLIP as `.npy`.

    Args:
        path: file, as :func:`maskx.core.word_vectors.load_class_vectors` reads it.
        names: vocabulary, by concept index.
        counts: (V,) images with each word, for the idf; without them it is 1.
        num_images: images with any word, beside `counts`.

    Raises:
        ValueError: the file cannot be used or lacks a word, or `counts` do not fit.
    """
    names = [spelled(name) for name in names]
    idf = np.ones(len(names), np.float32)
    if not names:
        raise ValueError(f"The vocabulary for '{path}' is empty. Give at least one word.")
    if (counts is None) != (num_images is None):
        raise ValueError("counts and num_images belong together. Give both or none.")
    if counts is not None:
        if np.shape(counts) != (len(names),):
            raise ValueError(
                f"There are counts of shape {np.shape(counts)} for {len(names)} words. Allowed: "
                "one count per word."
            )
        idf = inverse_frequencies(counts, num_images)
    return WordTable(tuple(names), load_class_vectors(path, names), idf, source=str(path))


def save_word_table(path: str | os.PathLike[str], table: WordTable) -> None:
    """Write a table as one safetensors file, whole or not at all.

    Args:
        path: file to write; a file of this name is replaced.
    """
    tensors = {"vectors": table.vectors, "idf": table.idf}
    content = {"names": table.names, "source": table.source, "hash": table.hash}
    if table.eigenvalues is not None:
        tensors["eigenvalues"] = np.asarray(table.eigenvalues, dtype=np.float64)
    if table.pmi is not None:
        tensors["counts"] = np.asarray(table.pmi.counts, dtype=np.int64)
        content["pmi"] = {
            "num_images": int(table.pmi.num_images),
            "positive": table.pmi.positive,
            "smoothing": table.pmi.smoothing,
            "squared_norm": float(table.pmi.squared_norm),
        }
    arrays = {name: torch.from_numpy(np.array(values)) for name, values in tensors.items()}
    write_tensors(path, arrays, _KIND, content)


def load_word_table(path: str | os.PathLike[str]) -> WordTable:
    """Read a table that :func:`save_word_table` wrote.

    Raises:
        ValueError: the file is damaged, or is no word table.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no word table '{path}'. Correct the path, or make it with "
            "tools/learn_word_vectors.py."
        )
    try:
        content = read_content(path, _KIND, {"names": list, "source": str, "hash": str})
        tensors, pmi = read_tensors(path), content.get("pmi")
        if not all(isinstance(name, str) for name in content["names"]):
            raise ValueError(f"its names are {content['names']!r:.100}. Allowed: words.")
        dtypes = _DTYPES if pmi is None else _DTYPES | _PMI_DTYPES
        for name, needed in dtypes.items():
            found = tensors[name].dtype if name in tensors else "not there"
            if found != needed:
                raise ValueError(f"its {name} are {found}. Allowed: {needed}.")
        arrays = {name: values.numpy() for name, values in tensors.items()}
        if pmi is not None:
            is_whole = isinstance(pmi, dict) and pmi.keys() == _PMI_TYPES.keys()
            if not is_whole or not all(isinstance(pmi[k], t) for k, t in _PMI_TYPES.items()):
                raise ValueError(f"its pmi is {pmi!r:.100}. Allowed: {', '.join(_PMI_TYPES)}.")
            pmi = PmiStatistics(counts=arrays["counts"], **pmi)
        table = WordTable(
            names=tuple(content["names"]),
            vectors=arrays["vectors"],
            idf=arrays["idf"],
            eigenvalues=arrays.get("eigenvalues"),
            source=content["source"],
            pmi=pmi,
        )
        if table.hash != content["hash"]:
            raise ValueError("names and vectors do not have the hash it states.")
    except ValueError as error:
        raise ValueError(
            f"'{path}' is no word table, or is damaged: {error} Make it with "
            "tools/learn_word_vectors.py."
        ) from error
    return table
