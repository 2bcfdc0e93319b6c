"""Word vectors from the tags of images (ConceptMask, section 3.1; Chollet, arXiv 1607.05691).

Words that are on the same images more often than by chance get similar vectors. With the counts c_i
of images with word i, c_ij of images with both, and N images, the matrix of pointwise mutual
information (PMI) is M_ij = log(p(i, j) / (p(i) p(j))) = log(c_ij / e_ij), where e_ij = c_i c_j / N
is what chance would give. M_ii = -log p(i), as c_ii = c_i. Of its eigen-decomposition M = U S U^T
the k largest eigenvalues are kept, only positive ones, and the vectors are E = U_k sqrt(S_k): their
inner products are the best approximation of M of that rank by a positive semi-definite matrix.

V: number of words, N: images with any tag, k: length of a vector.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg.blas import ssymm
from scipy.sparse import csr_matrix, diags, triu, vstack
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from maskx.core.eigenpairs import largest_eigenpairs
from maskx.core.text import listed
from maskx.core.word_table import (
    PmiStatistics,
    WordTable,
    explained_spectrum,
    inverse_frequencies,
    spelled,
)
from maskx.data.tag_lists import TagList
from maskx.evaluation.plots import check_matplotlib

logger = logging.getLogger(__name__)

# Rows of the co-counts made at a time: 1000 x 18,000 counts are 0.2 GB if all of them are there.
_ROWS = 1000
# Entries of the PMI matrix made at a time, to hold no second copy of everything.
_ENTRIES = 10_000_000
# Up to so many words the whole decomposition takes a second.
_DENSE_WORDS = 1500
# Share of the matrix that the entries of its upper triangle are, from which products with it as
# dense float32 are made, which take 1.3 GB with 18,000 words.
_FILLED = 0.05
# Products with the matrix, per component and at least. Of 18,000 words, 512 components reach into
# a cloud of eigenvalues that are nearly alike and slow to tell apart; 98% of the ten nearest words
# are those of the exact components, with 4 products per component 97%.
_PRODUCTS, _LEAST_PRODUCTS = 5, 1024
# Relative to the largest, what may be the rounding of products in float32.
_ZERO = 1e-6


class CoCounts(NamedTuple):
    """How often words are on the same images.

    Attributes:
        pairs: (V, V) int32 c_ij for i < j, upper triangle only; c_ji = c_ij.
        counts: (V,) int64 c_i.
        num_images: N.
    """

    pairs: csr_matrix
    counts: np.ndarray
    num_images: int


def co_counts(tags: TagList) -> CoCounts:
    """Count the images with each word and with each pair of words."""
    image_word = _image_word_matrix(tags)
    word_image = image_word.T.tocsr()
    num_words, blocks = len(tags.names), []
    with tqdm(total=num_words, desc="pairs", unit="word", disable=None) as bar:
        for start in range(0, num_words, _ROWS):
            rows = word_image[start : start + _ROWS]
            # Words before the block are columns of its lower triangle.
            blocks.append(triu(rows @ image_word, k=start + 1, format="csr"))
            bar.update(rows.shape[0])
    return CoCounts(vstack(blocks, format="csr"), tags.counts(), tags.num_tagged)


def pmi_matrix(counted: CoCounts, *, positive: bool = True, smoothing: float = 1.0) -> csr_matrix:
    """Return the (V, V) float64 PMI of all pairs of words, as upper triangle with the diagonal.

    Args:
        positive: set negative entries to 0 (PPMI). Otherwise only pairs never seen are 0.
    """
    counts, total = counted.counts.astype(np.float64), counted.num_images
    matrix = counted.pairs.astype(np.float64)
    row_of = np.repeat(np.arange(len(counts), dtype=np.int32), np.diff(matrix.indptr))
    for start in range(0, matrix.nnz, _ENTRIES):
        part = slice(start, start + _ENTRIES)
        chance = counts[row_of[part]] * counts[matrix.indices[part]] / total
        matrix.data[part] = _log_ratio(matrix.data[part], chance, positive, smoothing)
    if positive:
        matrix.eliminate_zeros()
    return matrix + diags(_log_ratio(counts, counts**2 / total, positive, smoothing), format="csr")


def learn_word_vectors(
    tags: TagList, *, dim: int = 512, positive: bool = True, smoothing: float = 1.0
) -> WordTable:
    """Learn the vectors of words from the images they are on.

    Args:
        tags: at least two words, each on an image with another one.
        dim: most components; there are never more than positive eigenvalues, which is reported.
        positive: PPMI, see :func:`pmi_matrix`.
        smoothing: number s of images by which each pair is drawn to chance: the entries are
            log((c_ij + s) / (e_ij + s)), so that one image with two rare words says little. 0 for
            the plain ratio. For things of generated scenes, folded in from 8 images each, 1 lowers
            the mean number of words nearer than their own colour and shape from 6.7 to 4.9.

    Returns:
        A table in the order of `tags.names`. The same tags give the same table.

    Raises:
        ValueError: an option is out of range, or a word cannot get a vector.
    """
    if dim < 1 or not np.isfinite(smoothing) or smoothing < 0:
        raise ValueError(
            f"dim is {dim}, smoothing {smoothing}. Allowed: dim at least 1, smoothing at least 0."
        )
    if len(tags.names) < 2:
        raise ValueError(
            f"{tags.source} has {len(tags.names)} words. Word vectors need at least 2 that are on "
            "the same images."
        )
    counted = co_counts(tags)
    _check_counts(counted, tags)
    matrix = pmi_matrix(counted, positive=positive, smoothing=smoothing)
    squared_norm = 2 * np.sum(matrix.data**2) - np.sum(matrix.diagonal() ** 2)
    eigenvalues, eigenvectors = _largest_eigenpairs(matrix, dim)
    kept = eigenvalues > _ZERO * np.abs(eigenvalues).max()
    if not kept.any():
        raise ValueError(
            f"{tags.source}: the PMI matrix of its {len(tags.names)} words has no positive "
            "eigenvalue, so no vectors can be learned. Give images on which some words are "
            "together more often than others."
        )
    if kept.sum() < dim:
        logger.warning(
            "%s: vectors of length %d, not %d: its %d words give no more positive eigenvalues.",
            tags.source,
            kept.sum(),
            dim,
            len(tags.names),
        )
    eigenvalues = eigenvalues[kept]
    vectors = eigenvectors[:, kept] * np.sqrt(eigenvalues)
    norms = np.linalg.norm(vectors, axis=1)
    _refuse(
        norms < 1e-6 * norms.max(),
        tags,
        f"have no part in the {vectors.shape[1]} components that are kept",
        "They are on every image, or only among few words that no others are with. Leave them out, "
        "or keep more components (dim).",
    )
    kind = "PPMI" if positive else "PMI"
    return WordTable(
        names=tags.names,
        vectors=vectors.astype(np.float32),
        idf=inverse_frequencies(counted.counts, counted.num_images),
        eigenvalues=eigenvalues,
        source=f"{kind} of the tags of {counted.num_images} images of {tags.source}",
        pmi=PmiStatistics(
            counted.counts, counted.num_images, positive, float(smoothing), float(squared_norm)
        ),
    )


def fold_in(
    table: WordTable,
    pair_counts: np.ndarray,
    count: int,
    among: tuple[np.ndarray, int] | None = None,
) -> np.ndarray:
    """Return the (k,) vector of a new word from how often it is with known ones (Nystrom).

    w = S_k^-1/2 U_k^T m, where m is the row of PMI that the new word has with the known ones. For
    the row of a known word this is its own vector. For others, small eigenvalues amplify chance:
    where a table keeps nearly all positive ones, as of few words, cosines with a new word are
    smaller than among the words of the table. Their order still is better with these components
    than without, and than with damped ones (measured on the tags of generated scenes).

    Args:
        pair_counts: (V,) images with the new word and each known one.
        count: images with the new word.
        among: (V,) images with each known word and number of images with any tag, of those that
            were counted; None if these are the images of the table.
    """
    if table.pmi is None or table.eigenvalues is None:
        raise ValueError(
            f"The word table of {table.source} was not learned from tags, so no word can be folded "
            "in. Take the vector of the word from the same file as the others."
        )
    word_counts, num_images = among or (table.pmi.counts, table.pmi.num_images)
    pairs = np.asarray(pair_counts, dtype=np.float64)
    words = np.asarray(word_counts, dtype=np.float64)
    for what, values in (("pair_counts", pairs), ("word_counts", words)):
        if values.shape != (len(table),):
            raise ValueError(
                f"{what} has shape {values.shape}. Allowed: ({len(table)},), one per word."
            )
    possible = (pairs >= 0) & (pairs <= np.minimum(words, count))
    if not (1 <= count <= num_images and possible.all()):
        raise ValueError(
            f"The new word is on {count} of {num_images} images, and with a known word on up to "
            f"{pairs.max():g}. Allowed: no more than images with it, with the other, or in all."
        )
    row = np.zeros(len(table))
    seen = pairs > 0
    row[seen] = _log_ratio(
        pairs[seen], count * words[seen] / num_images, table.pmi.positive, table.pmi.smoothing
    )
    vector = (table.vectors.T.astype(np.float64) @ row) / table.eigenvalues
    if not vector.any():
        raise ValueError(
            "The new word is with no known word more often than by chance, so it has no vector. "
            "Give images with it and with tags of the vocabulary."
        )
    return vector.astype(np.float32)


class FoldedWords(NamedTuple):
    """A table of new words, and why others have no vector, by word."""

    table: WordTable
    left_out: dict[str, str]


def fold_in_words(table: WordTable, tags: TagList, words: Sequence[str]) -> FoldedWords:
    """Fold new words into a table from a list of images with them and with known words.

    Args:
        tags: images, read without the vocabulary of the table, so that the new words are there.
        words: new words. One that is in the table already, is not among the tags or cannot be
            folded in is left out.

    Raises:
        ValueError: none of them gets a vector; the message says why of each.
    """
    index_of = {name: index for index, name in enumerate(tags.names)}
    known, left_out = set(table.names), {}
    words = dict.fromkeys(map(spelled, words))
    for word in words:
        if word in known:
            left_out[word] = "the word table has it already"
        elif word not in index_of:
            left_out[word] = f"{tags.source} has no image with it"
    asked = [index_of[word] for word in words if word not in left_out]
    image_word = _image_word_matrix(tags)
    pairs = (image_word[:, asked].T @ image_word).toarray()
    # One column more, of zeros: for the words of the table that are on no image.
    columns = [index_of.get(name, -1) for name in table.names]
    pairs, counts = np.pad(pairs, ((0, 0), (0, 1)))[:, columns], tags.counts()
    among = (np.append(counts, 0)[columns], tags.num_tagged)
    vectors: dict[str, np.ndarray] = {}
    for index, row in zip(asked, pairs, strict=True):
        try:
            vectors[tags.names[index]] = fold_in(table, row, int(counts[index]), among)
        except ValueError as error:
            left_out[tags.names[index]] = f"{tags.source}: {error}"
    if not vectors:
        reasons = "; ".join(f"'{word}': {reason}" for word, reason in left_out.items())
        raise ValueError(f"There is no word to fold in. {reasons or 'Give at least one.'}")
    source = f"words folded into {table.source}"
    new = WordTable(
        tuple(vectors), np.stack([*vectors.values()]), np.ones(len(vectors)), None, source
    )
    return FoldedWords(new, left_out)


def _image_word_matrix(tags: TagList) -> csr_matrix:
    """(N, V) matrix of ones; int32, as counts of pairs are sums of its products."""
    values = np.ones(len(tags.indices), np.int32)
    return csr_matrix((values, tags.indices, tags.offsets), shape=(len(tags), len(tags.names)))


def _log_ratio(
    seen: np.ndarray, chance: np.ndarray, positive: bool, smoothing: float
) -> np.ndarray:
    values = np.log((seen + smoothing) / (chance + smoothing))
    return np.maximum(values, 0) if positive else values


def _largest_eigenpairs(upper: csr_matrix, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `dim` largest eigenvalues, descending, of a symmetric matrix, and their vectors."""
    size = upper.shape[0]
    if size <= _DENSE_WORDS or 2 * dim >= size:
        values, vectors = np.linalg.eigh(upper.toarray(), UPLO="U")
        order = np.argsort(-values, kind="stable")[:dim]
        values, vectors = values[order], vectors[:, order]
    else:
        multiply, dtype = _product_with(upper)
        products = max(_PRODUCTS * dim, _LEAST_PRODUCTS)
        with tqdm(desc="eigenvectors", unit=" products", total=products, disable=None) as bar:

            def counted_product(block: np.ndarray) -> np.ndarray:
                bar.update(block.shape[1])
                return multiply(block)

            values, vectors = largest_eigenpairs(
                counted_product, size, dim, products=products, dtype=dtype
            )
    # The sign of an eigenvector is arbitrary: its largest entry becomes positive.
    largest = np.abs(vectors).argmax(axis=0)
    return values, vectors * np.sign(vectors[largest, np.arange(len(values))])


def _product_with(
    upper: csr_matrix,
) -> tuple[Callable[[np.ndarray], np.ndarray], type[np.floating]]:
    """The product of a symmetric matrix, given as upper triangle, with vectors; and its type."""
    if upper.nnz > _FILLED * upper.shape[0] ** 2:
        filled = upper.astype(np.float32).toarray(order="F")  # as BLAS takes it without a copy
        return lambda block: ssymm(1.0, filled, block), np.float32
    strict, diagonal = triu(upper, k=1, format="csr"), upper.diagonal()[:, None]
    transposed = strict.T  # a view
    return lambda block: strict @ block + transposed @ block + diagonal * block, np.float64


def _refuse(refused: np.ndarray, tags: TagList, what: str, remedy: str) -> None:
    if refused.any():
        names = [tags.names[i] for i in np.flatnonzero(refused)]
        raise ValueError(
            f"{tags.source}: {len(names)} of {len(tags.names)} words {what}: {listed(names)}. "
            f"{remedy}"
        )


def _check_counts(counted: CoCounts, tags: TagList) -> None:
    """Refuse words without images or pairs; say if the others fall into groups."""
    remedy = "Remove them from the vocabulary, or add images with them."
    _refuse(counted.counts == 0, tags, "are on no image", remedy)
    num_groups, group_of = connected_components(counted.pairs, directed=False)
    sizes = np.bincount(group_of)
    _refuse(
        sizes[group_of] == 1,
        tags,
        "are never on an image with another word",
        "What they are similar to cannot be learned. Leave them out (a larger min_count, or a "
        "vocabulary without them), or add images that have them among other tags.",
    )
    if num_groups > 1:
        small = np.flatnonzero(group_of != sizes.argmax())
        logger.warning(
            "%s: the words fall into %d groups that share no image; all words of different groups "
            "are equally unlike. Outside the largest group: %s.",
            tags.source,
            num_groups,
            listed([tags.names[i] for i in small], most=10),
        )


def format_neighbours(table: WordTable, words: Sequence[str], *, count: int) -> str:
    """Say of each word which others are nearest to it by cosine."""
    if count < 1:
        raise ValueError(f"{count} neighbours were asked for. Allowed: at least 1.")
    lines = []
    for word in words:
        index = table.index_of(word)
        others = [i for i in range(len(table)) if i != index]
        nearest = table.nearest(table.vectors[index], among=others, count=count) if others else []
        found = ", ".join(f"{table.names[i]} {cosine:.3f}" for i, cosine in nearest)
        lines.append(f"{table.names[index]}: {found or 'no other word'}")
    return "\n".join(lines)


def format_spectrum(table: WordTable) -> str:
    """List eigenvalues 1, 2, 4, 8 ... of a table and the share of its squared spectrum so far."""
    values, shares = explained_spectrum(table)
    last = len(values)
    components = [*(2**power for power in range(last.bit_length()) if 2**power < last), last]
    rows = [f"{'component':>9}  {'eigenvalue':>12}  {'explained':>9}"]
    rows += [f"{c:>9}  {values[c - 1]:>12.4g}  {shares[c - 1]:>9.1%}" for c in components]
    return "\n".join(rows)


def plot_spectrum(path: str | os.PathLike[str], table: WordTable) -> None:
    """Draw the eigenvalues of a table, and the share of its squared spectrum they explain."""
    check_matplotlib()
    from matplotlib.figure import Figure

    values, shares = explained_spectrum(table)
    components = np.arange(1, len(values) + 1)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.loglog(components, values, color="#0b3c6f", label="eigenvalue (left)")
    axes.set_xlabel("Component")
    axes.set_ylabel("Eigenvalue")
    explained = axes.twinx()
    explained.plot(components, 100 * shares, color="#d4572a", label="explained (right)")
    explained.set_ylim(0, 100)
    explained.set_ylabel("Share of the squared spectrum (%), cumulative")
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines["top"].set_visible(False)
    explained.spines["top"].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150, format="png")
