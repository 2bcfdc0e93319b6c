import numpy as np
import pytest
import torch

from maskx.core.word_table import WordTable, save_word_table
from maskx.systems.concept_mask.query import (
    ConceptQuery,
    named_query,
    read_unseen_words,
)

VECTORS = torch.arange(12.0).reshape(4, 3)
NAMES = ("cat", "dog", "fire truck", "green")
RNG = np.random.default_rng(0)
TABLE = WordTable(NAMES, RNG.standard_normal((4, 6)), np.ones(4), source="a test")
UNSEEN = WordTable(("owl",), RNG.standard_normal((1, 6)), np.ones(1))


def test_a_query_is_made_of_arrays():
    query = ConceptQuery(np.array([2, -1]), np.ones((2, 3)))
    assert len(query) == 2
    assert (query.indices.dtype, query.vectors.dtype) == (torch.int64, torch.float32)


def test_only_unseen_words_keep_the_vectors_of_the_query():
    query = ConceptQuery([3, -1, 0], torch.full((3, 3), 9.0))
    found = query.checked(VECTORS)
    assert found.indices.tolist() == [3, -1, 0]
    assert found.vectors.tolist() == [[9.0, 10, 11], [9, 9, 9], [0, 1, 2]]


def test_a_query_of_nothing_has_vectors_of_the_length_of_the_table():
    assert ConceptQuery([], torch.zeros(0, 0)).checked(VECTORS).vectors.shape == (0, 3)


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
        ConceptQuery(indices, torch.zeros(shape)).checked(VECTORS)


def test_names_and_blending_go_along():
    query = ConceptQuery([2, -1], np.ones((2, 3)), blended=[False, True], names=["a", "b"])
    found = query.checked(VECTORS)
    assert (found.names, found.blended.tolist()) == (("a", "b"), [False, True])
    assert ConceptQuery([2, -1], np.ones((2, 3)), blended=True).blended.tolist() == [True, True]


def test_names_numbers_and_vectors_are_asked_for_by_name():
    vector = TABLE.vectors[0]
    query = named_query(TABLE, UNSEEN, ["fire_truck", 1, vector, "owl"])
    assert list(query.names) == ["fire truck", "dog", "vector 2", "owl"]
    assert query.indices.tolist() == [2, 1, -1, -1]
    expected = np.stack([TABLE.vectors[2], TABLE.vectors[1], vector, UNSEEN.vectors[0]])
    assert np.array_equal(query.vectors.numpy(), expected)


@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        ([], "list of concepts is empty"),
        ("cat", "the text 'cat'"),
        (["dgo"], "'dgo' is not among the 4 .*Closest: 'dog'"),
        (["cat", 0], "'cat' is asked for twice"),
        (["fire_truck", "fire truck"], "'fire truck' is asked for twice"),
    ],
)
def test_questions_without_an_answer_are_refused(concepts, words):
    with pytest.raises(ValueError, match=words):
        named_query(TABLE, UNSEEN, concepts)


def test_an_unseen_word_that_the_table_has_is_refused():
    with pytest.raises(ValueError, match="'cat' is among the unseen words, but the word table"):
        named_query(TABLE, WordTable(("cat",), UNSEEN.vectors, np.ones(1)), ["dog"])


def test_unseen_words_come_from_an_array_with_its_words_or_from_a_table(tmp_path):
    vectors = RNG.standard_normal((2, 6)).astype(np.float32)
    np.save(tmp_path / "new.npy", vectors)
    with pytest.raises(FileNotFoundError, match=r"need their names .*new\.txt'.*new\.json'"):
        read_unseen_words(tmp_path / "new.npy", TABLE)
    (tmp_path / "new.json").write_text('["owl", "sea_horse"]')
    from_json = read_unseen_words(tmp_path / "new.npy", TABLE)
    (tmp_path / "new.txt").write_text("sea horse\nowl\n")  # the one that the vectors are read by
    from_text = read_unseen_words(tmp_path / "new.npy", TABLE)
    assert from_json.names == ("owl", "sea horse")
    assert from_text.names == ("sea horse", "owl")
    assert np.array_equal(from_json.vectors, vectors)
    assert np.array_equal(from_text.vectors, vectors)
    save_word_table(tmp_path / "owl.safetensors", UNSEEN)
    assert read_unseen_words(tmp_path / "owl.safetensors", TABLE).hash == UNSEEN.hash
    np.save(tmp_path / "new.npy", vectors[:, :5])
    with pytest.raises(ValueError, match=r"new\.npy' have vectors of length 5, .* 6\. Fold"):
        read_unseen_words(tmp_path / "new.npy", TABLE)
    with pytest.raises(FileNotFoundError, match=r"no word table '.*gone\.npy'"):
        read_unseen_words(tmp_path / "gone.npy", TABLE)
