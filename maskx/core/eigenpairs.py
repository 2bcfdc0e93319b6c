"""The largest eigenvalues of a large symmetric matrix, and their vectors."""

from collections.abc import Callable

import numpy as np
from scipy.linalg import eigh

__all__ = ["largest_eigenpairs"]

# Vectors that are multiplied at a time: the matrix is read once for all of them.
_WIDTH = 64
# Below it, relative to its norm before, what is left of a vector is rounding.
_LOST = 1e-5


def largest_eigenpairs(
    multiply: Callable[[np.ndarray], np.ndarray],
    size: int,
    count: int,
    *,
    products: int,
    dtype: type[np.floating] = np.float32,
    width: int = _WIDTH,
) -> tuple[np.ndarray, np.ndarray]:
    """Find eigenpairs by the block Lanczos method, with a basis that is kept orthogonal.

    The more products, the more of the pairs are exact. Large eigenvalues that stand apart are
    found first; of those close together at the end of the list, the span is.

    Args:
        multiply: the product of the matrix with (size, width) vectors.
        products: vectors to multiply in all, at least `count`; of `size` the result is exact.
        dtype: of the basis, which is as exact as the products need to be.
        width: vectors multiplied at a time.

    Returns:
        (count,) float64 eigenvalues, descending, and (size, count) vectors of `dtype`.
    """
    limit = min(size, max(products, count))
    basis = np.empty((size, limit), dtype, order="F")
    small = np.zeros((limit, limit))
    rng = np.random.default_rng(0)
    done, block = 0, _orthonormal(rng.standard_normal((size, min(width, limit))).astype(dtype))[0]
    while True:
        first, done = done, done + block.shape[1]
        basis[:, first:done] = block
        image = np.asarray(multiply(block), dtype)
        part = basis[:, :done].T @ image
        small[:done, first:done] = part
        small[first:done, :done] = part.T
        if done == limit:
            break
        # Twice, for the rounding of the first time.
        left = image - basis[:, :done] @ part
        left -= basis[:, :done] @ (basis[:, :done].T @ left)
        kept = np.linalg.norm(left, axis=0) > _LOST * np.linalg.norm(image, axis=0)
        block, is_sure = _orthonormal(left[:, kept][:, : limit - done])
        if not is_sure.all() or block.shape[1] == 0:
            block = _completed(block[:, is_sure], basis[:, :done], min(width, limit - done), rng)
    values, weights = eigh(small, subset_by_index=[limit - count, limit - 1])
    return values[::-1], basis @ weights[:, ::-1].astype(dtype)


def _orthonormal(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make vectors orthonormal, and say which of them are more than the rounding of others."""
    factor, triangle = np.linalg.qr(vectors)
    size = np.abs(triangle.diagonal())
    return factor, size > _LOST * size.max(initial=0)


def _completed(
    vectors: np.ndarray, basis: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Add random vectors where the space of a start is used up; orthonormal, to a basis too."""
    fresh = rng.standard_normal((len(basis), max(count - vectors.shape[1], 0)))
    vectors = np.hstack([vectors, fresh.astype(basis.dtype)])
    for _ in range(2):
        vectors = np.linalg.qr(vectors - basis @ (basis.T @ vectors))[0]
    return vectors
