import numpy as np
import pytest
import torch

from maskx.systems.concept_mask.query import checked_query, concept_query

TABLE = torch.arange(12.0).reshape(4, 3)


def test_a_query_is_made_of_arrays():
    query = concept_query(np.array([2, -1]), np.ones((2, 3)))
    assert len(query) == 2
    assert (query.indices.dtype, query.vectors.dtype) == (torch.int64, torch.float32)


def test_only_unseen_words_keep_the_vectors_of_the_query():
    query = concept_query([3, -1, 0], torch.full((3, 3), 9.0))
    found = checked_query(query, TABLE)
    assert found.indices.tolist() == [3, -1, 0]
    assert found.vectors.tolist() == [[9.0, 10, 11], [9, 9, 9], [0, 1, 2]]


def test_a_query_of_nothing_has_vectors_of_the_length_of_the_table():
    assert checked_query(concept_query([], torch.zeros(0, 0)), TABLE).vectors.shape == (0, 3)


@pytest.mark.parametrize(
    ("indices", "shape", "message"),
    [
        ([4, 0, -2], (3, 3), r"concept indices \[-2, 4\]\. Allowed: 0 to 3, and -1 for an unseen"),
        ([0, 1], (2, 2), r"query of 2 concepts has vectors of shape \(2, 2\)\. Needed: \(2, 3\)"),
        ([0], (2, 3), r"query of 1 concepts has vectors of shape \(2, 3\)\. Needed: \(1, 3\)"),
    ],
)
def test_queries_that_do_not_fit_the_table(indices, shape, message):
    with pytest.raises(ValueError, match=message):
        checked_query(concept_query(indices, torch.zeros(shape)), TABLE)
