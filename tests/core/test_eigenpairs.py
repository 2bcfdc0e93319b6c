import numpy as np
import pytest

from maskx.core.eigenpairs import largest_eigenpairs


def make_matrix(size, values, seed=0):
    """A symmetric matrix with given eigenvalues."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return (vectors * values) @ vectors.T


def find(matrix, count, **options):
    asked = []

    def multiply(block):
        asked.append(block.shape[1])
        return matrix.astype(block.dtype) @ block

    found = largest_eigenpairs(multiply, len(matrix), count, **options)
    return *found, asked


def check(matrix, values, vectors, atol):
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), atol=atol)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=atol * values[0])


@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-10), (np.float32, 1e-5)])
def test_eigenvalues_that_stand_apart_are_found_with_few_products(dtype, atol):
    """30 of 400, the largest first, above a cloud of others of both signs."""
    rng = np.random.default_rng(1)
    expected = np.concatenate([np.linspace(100, 20, 30), rng.uniform(-2, 2, 370)])
    matrix = make_matrix(400, expected)
    values, vectors, asked = find(matrix, 30, products=200, width=20, dtype=dtype)
    np.testing.assert_allclose(values, expected[:30], rtol=atol)
    check(matrix, values, vectors, atol)
    assert vectors.dtype == dtype
    assert asked == [20] * 10


@pytest.mark.parametrize("width", [7, 16, 64])
def test_with_as_many_products_as_rows_all_are_exact(width):
    matrix = make_matrix(60, np.linspace(-3, 3, 60))
    values, vectors, asked = find(matrix, 25, products=999, width=width, dtype=np.float64)
    np.testing.assert_allclose(values, np.linspace(3, -3, 60)[:25], atol=1e-10)
    check(matrix, values, vectors, 1e-10)
    assert sum(asked) == 60


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_matrix_of_low_rank_uses_its_space_up(dtype):
    """Equal eigenvalues, and most of them 0: a block soon brings nothing new."""
    matrix = make_matrix(60, np.repeat([5.0, 0], [20, 40]))
    values, vectors, _ = find(matrix, 25, products=56, width=16, dtype=dtype)
    np.testing.assert_allclose(values, np.repeat([5.0, 0], [20, 5]), atol=1e-5)
    check(matrix, values, vectors, 1e-5)


def test_the_same_matrix_gives_the_same_pairs():
    matrix = make_matrix(50, np.linspace(0, 9, 50))
    first, second = (find(matrix, 5, products=20, width=8)[:2] for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
