import logging
import math

import numpy as np
import pytest
from benchmarks.tag_vectors import measure_learning, write_generated_tags
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.core.word_table import explained_spectrum, load_word_table, save_word_table
from maskx.data.tag_lists import tag_list
from maskx.systems.concept_mask import tag_vectors
from maskx.systems.concept_mask.tag_vectors import (
    co_counts,
    fold_in,
    fold_in_words,
    learn_word_vectors,
    pmi_matrix,
)

NUM_TOPICS = 4


def words(count):
    return [f"word {index}" for index in range(count)]


def topic_tags(num_words=24, images=400, seed=0, leave_out=()):
    """Images of one topic each; word i is of topic i modulo NUM_TOPICS. A fifth are any words."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(images):
        topic = int(rng.integers(NUM_TOPICS))
        own = rng.choice(np.arange(topic, num_words, NUM_TOPICS), 4, replace=False)
        row = {*own.tolist(), int(rng.integers(num_words))} - set(leave_out)
        rows.append(sorted(row))
    return rows


def loop_counts(rows, num_words):
    """The definition, one pair at a time."""
    pairs = np.zeros((num_words, num_words), int)
    for row in rows:
        for i in set(row):
            for j in set(row):
                pairs[i, j] += 1
    return pairs


def loop_pmi(rows, num_words, *, positive, smoothing):
    pairs, total = loop_counts(rows, num_words), sum(bool(row) for row in rows)
    matrix = np.zeros(pairs.shape)
    for i in range(num_words):
        for j in range(num_words):
            if pairs[i, j]:
                chance = pairs[i, i] * pairs[j, j] / total
                value = math.log((pairs[i, j] + smoothing) / (chance + smoothing))
                matrix[i, j] = max(value, 0) if positive else value
    return matrix


def symmetric(upper):
    dense = upper.toarray()
    assert not np.tril(dense, -1).any()
    return dense + np.triu(dense, 1).T


ROWS = st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=12).filter(any)


@settings(deadline=None, max_examples=40)
@given(
    rows=ROWS, block=st.integers(1, 8), positive=st.booleans(), smoothing=st.sampled_from([0, 2])
)
def test_counts_and_pmi_follow_their_definition(rows, block, positive, smoothing):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tag_vectors, "_ROWS", block)
        patch.setattr(tag_vectors, "_ENTRIES", block)
        counted = co_counts(tag_list(rows, words(7)))
        seen = counted._replace(counts=np.maximum(counted.counts, 1))  # on no image: no log of 0
        matrix = symmetric(pmi_matrix(seen, positive=positive, smoothing=smoothing))
    expected = loop_counts(rows, 7)
    found = symmetric(counted.pairs)
    np.testing.assert_array_equal(found + np.diag(counted.counts), expected)
    present = np.flatnonzero(expected.diagonal())
    reference = loop_pmi(rows, 7, positive=positive, smoothing=smoothing)
    inner = np.ix_(present, present)
    np.testing.assert_allclose(matrix[inner], reference[inner], atol=1e-12)


def test_pmi_by_hand():
    """Words 0 and 1 are on 3 and 2 of 4 images, on 2 together: log(2 * 4 / (3 * 2))."""
    counted = co_counts(tag_list([[0, 1], [0, 1], [0, 2], [2]], words(3)))
    plain = symmetric(pmi_matrix(counted, positive=False, smoothing=0))
    expected = np.log([[4 / 3, 8 / 6, 4 / 6], [8 / 6, 2, 1], [4 / 6, 1, 2]])
    np.testing.assert_allclose(plain, expected, atol=1e-12)
    np.testing.assert_allclose(
        symmetric(pmi_matrix(counted, smoothing=0)), np.maximum(expected, 0), atol=1e-12
    )
    smoothed = symmetric(pmi_matrix(counted, positive=False, smoothing=1.0))
    assert smoothed[0, 1] == pytest.approx(math.log((2 + 1) / (3 * 2 / 4 + 1)))
    assert smoothed[1, 2] == 0  # never seen together


@pytest.mark.parametrize("positive", [True, False])
def test_inner_products_are_the_positive_part_of_the_matrix(positive):
    rows = topic_tags()
    table = learn_word_vectors(tag_list(rows, words(24)), positive=positive)
    values, vectors = np.linalg.eigh(loop_pmi(rows, 24, positive=positive, smoothing=1))
    part = (vectors * np.maximum(values, 0)) @ vectors.T
    np.testing.assert_allclose(table.vectors @ table.vectors.T, part, atol=1e-5)
    kept = values[values > 1e-9][::-1]
    np.testing.assert_allclose(table.eigenvalues, kept, rtol=1e-9)
    assert table.dim == len(kept)
    _, shares = explained_spectrum(table)
    np.testing.assert_allclose(shares, np.cumsum(kept**2) / np.sum(values**2), rtol=1e-9)
    counts = np.diag(loop_counts(rows, 24))
    np.testing.assert_allclose(table.idf, -np.log(counts / 400), rtol=1e-5)


def test_fewer_components_are_the_first_ones():
    tags = tag_list(topic_tags(), words(24))
    every, few = learn_word_vectors(tags), learn_word_vectors(tags, dim=5)
    np.testing.assert_array_equal(few.vectors, every.vectors[:, :5])
    np.testing.assert_array_equal(few.eigenvalues, every.eigenvalues[:5])


def large_tags(images, per_image, topics):
    """Tags of 1600 words of one topic each, more than are decomposed as a whole."""
    rng, own = np.random.default_rng(0), 1600 // topics
    rows = [
        (rng.choice(own, per_image, replace=False) * topics + rng.integers(topics)).tolist()
        for _ in range(images)
    ]
    rows += [[word, (word + topics) % 1600] for word in range(1600)]
    return tag_list(rows, words(1600))


@pytest.mark.parametrize(
    ("images", "per_image", "topics", "filled"), [(9000, 12, 8, True), (1500, 5, 40, False)]
)
def test_large_vocabularies_are_decomposed_alike(images, per_image, topics, filled):
    """Whether products are sparse or, for matrices with many entries, dense in float32."""
    tags = large_tags(images, per_image, topics)
    matrix = pmi_matrix(co_counts(tags))
    assert (matrix.nnz > 0.05 * 1600**2) == filled
    values, vectors = np.linalg.eigh(matrix.toarray(), UPLO="U")
    table = learn_word_vectors(tags, dim=topics)
    np.testing.assert_allclose(table.eigenvalues, values[::-1][:topics], rtol=1e-5)
    best = (vectors[:, -topics:] * values[-topics:]) @ vectors[:, -topics:].T
    np.testing.assert_allclose(table.vectors @ table.vectors.T, best, atol=2e-3)
    np.testing.assert_array_equal(table.vectors, learn_word_vectors(tags, dim=topics).vectors)


def test_rounding_is_no_component():
    """Of 1800 words in 600 groups that are always together, 1200 eigenvalues are 0."""
    rng = np.random.default_rng(0)
    rows = [
        [3 * group + word for group in rng.choice(600, 3, replace=False) for word in range(3)]
        for _ in range(3000)
    ]
    assert learn_word_vectors(tag_list(rows, words(1800)), dim=700).dim <= 600


def test_words_of_one_topic_are_nearest():
    table = learn_word_vectors(tag_list(topic_tags(), words(24)), dim=8)
    for word in range(24):
        nearest = [index for index, _ in table.nearest(table.vectors[word], count=6)]
        assert {index % NUM_TOPICS for index in nearest} == {word % NUM_TOPICS}


@pytest.mark.parametrize(("positive", "smoothing"), [(True, 1.0), (False, 1.0), (False, 5.0)])
def test_a_word_of_the_table_folds_in_to_its_own_vector(tmp_path, positive, smoothing):
    rows = topic_tags()
    learned = learn_word_vectors(
        tag_list(rows, words(24)), dim=10, positive=positive, smoothing=smoothing
    )
    save_word_table(tmp_path / "table.safetensors", learned)
    table = load_word_table(tmp_path / "table.safetensors")
    pairs = loop_counts(rows, 24)
    for word in (0, 5, 23):
        vector = fold_in(table, pairs[word], pairs[word, word])
        np.testing.assert_allclose(vector, table.vectors[word], atol=1e-5)


def test_a_new_word_folds_in_near_its_topic():
    """From a list of other images, with words the table does not have and in another order."""
    names = words(24)
    known = [name for name in names if name != "word 7"]
    place = {index: known.index(name) for index, name in enumerate(names) if name in known}
    rows = [[place[i] for i in row] for row in topic_tags(leave_out=[7])]
    table = learn_word_vectors(tag_list(rows, known), dim=8)

    more = topic_tags(seed=1)
    backwards = tag_list([[23 - i for i in row] for row in more], names[::-1])
    (vector,) = fold_in_words(table, backwards, ["word_7", "word 7"]).table.vectors
    nearest = [table.names[index] for index, _ in table.nearest(vector, count=5)]
    assert set(nearest) == {"word 3", "word 11", "word 15", "word 19", "word 23"}
    padded = tag_list([[23 - i for i in row] for row in [*more, *[[]] * 50]], names[::-1])
    again = fold_in_words(table, padded, ["word 7"])
    assert (again.table.names, again.left_out) == (("word 7",), {})
    np.testing.assert_array_equal(again.table.vectors, [vector])

    counted = loop_counts(more, 24)
    others = [i for i in range(24) if i != 7]
    among = (counted.diagonal()[others], len(more))
    expected = fold_in(table, counted[7, others], counted[7, 7], among)
    np.testing.assert_array_equal(vector, expected)


def test_words_of_the_table_without_images_count_nothing_when_folding_in():
    table = learn_word_vectors(tag_list(topic_tags(), words(24)), dim=8)
    rows = [*[[0, 1]] * 3, [0], [1], *[[2]] * 9]
    tags = tag_list(rows, ["word 5", "new", "not in the table"])
    (vector,) = fold_in_words(table, tags, ["new"]).table.vectors
    pairs, counts = np.zeros((2, 24), int)
    pairs[5], counts[5] = 3, 4
    np.testing.assert_array_equal(vector, fold_in(table, pairs, 4, (counts, 14)))


def test_a_word_without_a_vector_does_not_end_folding_in_for_the_others():
    tags = tag_list([*topic_tags(), [24], [24, 25], [0, 4, 25]], [*words(24), "alone", "new"])
    table = learn_word_vectors(tag_list(topic_tags(), words(24)), dim=8)
    found = fold_in_words(table, tags, ["alone", "new", "word 3", "gone"])
    assert found.table.names == ("new",)
    alone = fold_in_words(table, tags, ["new"]).table
    np.testing.assert_array_equal(found.table.vectors, alone.vectors)
    assert list(found.left_out) == ["word 3", "gone", "alone"]
    assert "more often than by chance" in found.left_out["alone"]


def test_folding_in_says_what_is_wrong():
    tags = tag_list([*topic_tags(), [24], [24]], [*words(24), "new"])
    table = learn_word_vectors(tag_list(topic_tags(), words(24)), dim=8)
    for word, reason in (
        ("word 3", "the word table has it already"),
        ("newer", "the given tags has no image with it"),
        ("new", "the given tags: The new word is with no known"),
    ):
        with pytest.raises(ValueError, match=rf"no word to fold in\. '{word}': {reason}"):
            fold_in_words(table, tags, [word])
    with pytest.raises(ValueError, match=r"no word to fold in\. Give at least one"):
        fold_in_words(table, tags, [])
    with pytest.raises(ValueError, match=r"pair_counts has shape \(3,\).*\(24,\)"):
        fold_in(table, np.ones(3), 1)
    for pairs, count in ((np.ones(24), 0), (np.full(24, 2), 1), (-np.ones(24), 1)):
        with pytest.raises(
            ValueError, match=rf"on {count} of 400 images.*no more than images with"
        ):
            fold_in(table, pairs, count)
    plain = type(table)(table.names, table.vectors, table.idf, source="glove.txt")
    with pytest.raises(ValueError, match=r"of glove\.txt was not learned from tags"):
        fold_in(plain, np.ones(24), 1)


def test_fewer_positive_eigenvalues_than_asked_for_are_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="maskx"):
        table = learn_word_vectors(tag_list(topic_tags(), words(24)), positive=False)
    (record,) = caplog.records
    assert f"vectors of length {table.dim}, not 512: its 24 words" in record.getMessage()


def test_groups_that_share_no_image_are_said_once(caplog):
    rows = [*topic_tags(), *[[24, 25], [24, 25, 26], [26, 25]] * 4, *[[27, 28]] * 3]
    with caplog.at_level(logging.INFO, logger="maskx"):
        table = learn_word_vectors(tag_list(rows, words(29)), dim=20)
    (message,) = [r.getMessage() for r in caplog.records if "groups" in r.getMessage()]
    assert "fall into 3 groups that share no image" in message
    named = ", ".join(f"'word {i}'" for i in (24, 25, 26, 27, 28))
    assert message.endswith(f"Outside the largest group: {named}.")
    assert abs(table.vectors[24] @ table.vectors[0]) < 1e-6


def test_a_group_without_a_component_is_refused():
    rows = [*topic_tags(), *[[24, 25]] * 60, *[[24]] * 100, *[[25]] * 100]
    with pytest.raises(ValueError, match=r"2 of 26 words have no part in the 4 comp.*'word 24', '"):
        learn_word_vectors(tag_list(rows, words(26)), dim=4)
    assert learn_word_vectors(tag_list(rows, words(26)), dim=6).dim == 6


@pytest.mark.parametrize(
    ("rows", "num_words", "options", "message"),
    [
        ([[0]], 1, {}, "has 1 words. Word vectors need at least 2"),
        ([[0, 1]], 3, {}, r"1 of 3 words are on no image: 'word 2'\. Remove them"),
        ([[0, 1], [1], [2]], 3, {}, r"1 of 3 words are never on an image with another.*'word 2'"),
        ([[0], [1]], 2, {}, "2 of 2 words are never on an image with another.*larger min_count"),
        ([[0, 1]] * 5, 2, {}, "matrix of its 2 words has no positive eigenvalue"),
        ([[0, 1, 3], [0, 2], [0, 1]], 4, {}, "1 of 4 words have no part.*'word 0'.*on every image"),
        ([[0, 1]], 2, {"dim": 0}, "dim is 0"),
        ([[0, 1]], 2, {"smoothing": -1.0}, "smoothing -1.0. Allowed"),
    ],
)
def test_tags_that_give_no_vectors_are_refused(rows, num_words, options, message):
    with pytest.raises(ValueError, match=message):
        learn_word_vectors(tag_list(rows, words(num_words)), **options)


def test_generated_tags_have_the_size_asked_for(tmp_path):
    path = tmp_path / "tags.jsonl"
    sizes = {"num_images": 300, "num_words": 60, "tags_per_image": 6, "num_topics": 5}
    write_generated_tags(path, **sizes, seed=0)
    lines = path.read_text().splitlines()
    assert len(lines) == 300
    cost = measure_learning(path, dim=8)
    assert cost.read_seconds > 0
    assert cost.learn_seconds > 0
    assert cost.peak_bytes > 1e7
    with pytest.raises(ValueError, match="20 words are too few for 6 tags per image"):
        write_generated_tags(path, **{**sizes, "num_words": 20}, seed=0)
