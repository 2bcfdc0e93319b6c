import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from maskx.core.tensor_files import write_tensors
from maskx.core.word_table import (
    PmiStatistics,
    WordTable,
    explained_spectrum,
    inverse_frequencies,
    load_word_table,
    save_word_table,
    word_table_from_file,
)

NAMES = ("cat", "fire truck", "dog", "sky")
VECTORS = np.array([[1, 0, 0], [0, 2, 0], [3, 1, 0], [0, -1, 1]], np.float32)
PMI = {"num_images": 9, "positive": True, "smoothing": 1.0, "squared_norm": 2.0}


def make_table(names=NAMES, vectors=VECTORS, **fields):
    idf = fields.pop("idf", np.arange(len(names)))
    return WordTable(names, vectors, idf, **fields)


@pytest.fixture
def table():
    return make_table(source="hand")


def test_underscores_and_spaces_are_the_same(table):
    assert table.index_of("fire_truck") == table.index_of("fire truck") == 1
    assert make_table(("a_b", "c", "d", "e")).names[0] == "a b"


def test_an_unknown_word_is_named_with_the_closest_ones(table):
    message = r"'fire_trucks' is not among the 4 concepts.*Closest: 'fire truck'\..*--fold-in"
    with pytest.raises(ValueError, match=message):
        table.index_of("fire_trucks")
    with pytest.raises(ValueError, match=r"'xyzzy' is not among.*word table\. Give one"):
        table.index_of("xyzzy")


def test_concepts_are_names_indices_or_vectors(table):
    indices, vectors = table.resolve(["dog", 1, np.array([5, 5, 5]), np.int64(0), torch.ones(3)])
    assert indices.dtype == np.int64
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(indices, [2, 1, -1, 0, -1])
    np.testing.assert_array_equal(vectors, [[3, 1, 0], [0, 2, 0], [5, 5, 5], [1, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([], "list of concepts is empty"),
        ("cat", r"Allowed: a list, such as \['cat'\]"),
        (["ca"], "'ca' is not among the 4 concepts"),
        ([4], "4 is no concept index.*from 0 to 3"),
        ([-1], "-1 is no concept index"),
        ([True], "True is no concept index"),
        ([1.0], "1.0 is no concept index"),
        ([None], "None is no concept index"),
        ([0, np.ones(2)], r"vector of concept 1 has shape \(2,\).*\(3,\) numbers"),
        ([np.array([1, np.nan, 0])], "vector of concept 0 is all zeros, or holds NaN"),
        ([np.zeros(3)], "vector of concept 0 is all zeros"),
    ],
)
def test_what_is_no_concept_is_refused(table, concepts, message):
    with pytest.raises(ValueError, match=message):
        table.resolve(concepts)


def test_the_nearest_words_have_the_largest_cosine(table):
    found = table.nearest(np.array([2, 0, 0]), count=2)
    assert [index for index, _ in found] == [0, 2]
    assert [cosine for _, cosine in found] == pytest.approx([1, 3 / np.sqrt(10)])
    assert table.nearest(np.array([2, 0, 0]), among=[3, 1])[0] == (3, 0)
    assert [index for index, _ in table.nearest(np.ones(3), count=9)] == [2, 0, 1, 3]


def test_of_equally_near_words_the_first_asked_for_comes_first():
    names = tuple(f"word {index}" for index in range(100))
    directions = np.eye(3)[np.arange(100) % 3]
    among = list(range(99, -1, -1))
    found = make_table(names, directions).nearest(np.array([3, 2, 1]), among=among, count=100)
    assert [index for index, _ in found] == sorted(among, key=lambda index: index % 3)


def test_nearest_refuses_what_cannot_be_compared(table):
    with pytest.raises(ValueError, match="1 words of 0 were asked for"):
        table.nearest(np.ones(3), among=[])
    with pytest.raises(ValueError, match="0 words of 4"):
        table.nearest(np.ones(3), count=0)
    with pytest.raises(ValueError, match=r"7\)? is no concept index"):
        table.nearest(np.ones(3), among=[0, 7])
    with pytest.raises(ValueError, match="vector to compare with"):
        table.nearest(np.ones(4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": (), "vectors": np.zeros((0, 3))}, "has no word"),
        ({"vectors": VECTORS[:2]}, r"4 words, but vectors of shape \(2, 3\)"),
        ({"idf": np.ones(3)}, r"4 words, but an idf of shape \(3,\)"),
        ({"names": ("a b", "cat", "a_b", "dog")}, r"come twice.*: 'a b'\. Give each once"),
        ({"vectors": VECTORS * [[1], [0], [1], [1]]}, "1 vectors that are all zeros.*'fire truck'"),
        ({"vectors": np.full((4, 3), np.nan)}, "4 vectors that are all zeros or hold NaN"),
        ({"eigenvalues": np.ones(2)}, r"length 3, but eigenvalues of shape \(2,\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_table(**fields)


def test_the_hash_knows_names_and_vectors(table):
    assert table.hash == make_table(idf=np.ones(4), source="other").hash
    assert table.hash != make_table(names=("cat", "fire truck", "dog", "sea")).hash
    assert table.hash != make_table(vectors=VECTORS + 1e-6).hash
    assert table.hash != make_table(names=NAMES[::-1]).hash


def test_idf_clamps_words_without_images():
    values = inverse_frequencies(np.array([10, 5, 1, 0]), 10)
    np.testing.assert_allclose(values, [0, np.log(2), np.log(10), np.log(10)], rtol=1e-6)


def test_a_table_comes_back_as_it_was_written(tmp_path, table):
    path = tmp_path / "folder" / "table.safetensors"
    save_word_table(path, table)
    back = load_word_table(path)
    assert (back.names, back.source, back.hash) == (NAMES, "hand", table.hash)
    assert back.eigenvalues is back.pmi is None
    np.testing.assert_array_equal(back.vectors, VECTORS)
    np.testing.assert_array_equal(back.idf, table.idf)

    pmi = PmiStatistics(np.array([4, 3, 2, 1]), 9, False, 0.5, 12.5)
    save_word_table(path, make_table(eigenvalues=np.array([3, 2, 1]), pmi=pmi))
    back = load_word_table(path)
    np.testing.assert_array_equal(back.eigenvalues, [3, 2, 1])
    np.testing.assert_array_equal(back.pmi.counts, [4, 3, 2, 1])
    assert (back.pmi.num_images, back.pmi.positive, back.pmi.smoothing) == (9, False, 0.5)
    assert back.pmi.squared_norm == 12.5
    assert [file.name for file in path.parent.iterdir()] == ["table.safetensors"]


def test_a_file_that_is_no_word_table_is_refused(tmp_path, table):
    path = tmp_path / "table.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no word table.*learn_word_vectors\.py"):
        load_word_table(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="is no word table, or is damaged"):
        load_word_table(path)
    save_file({"weight": VECTORS}, str(path))
    with pytest.raises(ValueError, match="safetensors file, but not one with word table"):
        load_word_table(path)
    content = {"names": NAMES, "source": "", "hash": table.hash}
    tensors = {"vectors": torch.tensor(VECTORS + 1), "idf": torch.tensor(table.idf)}
    write_tensors(path, {"idf": tensors["idf"]}, "word table", content)
    with pytest.raises(ValueError, match="damaged: its vectors are not there"):
        load_word_table(path)
    write_tensors(path, tensors, "word table", content)
    with pytest.raises(ValueError, match="do not have the hash it states"):
        load_word_table(path)
    save_word_table(path, table)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is no word table, or is damaged"):
        load_word_table(path)


@pytest.mark.parametrize(
    ("content", "tensors", "message"),
    [
        ({"names": [1, 2, 3, 4]}, {}, r"its names are \[1, 2, 3, 4\]\. Allowed: words\."),
        ({"names": "abcd"}, {}, r"its names is 'abcd'\. Allowed: a list"),
        ({"names": ["cat"]}, {}, r"1 words, but vectors of shape \(4, 3\)"),
        ({"source": 3}, {}, r"its source is 3\. Allowed: a str"),
        ({"hash": None}, {}, r"its hash is None\. Allowed: a str"),
        ({}, {"vectors": None}, r"its vectors are not there\. Allowed: torch\.float32"),
        ({}, {"vectors": torch.ones(4, 3, dtype=torch.bool)}, r"vectors are torch\.bool\."),
        ({}, {"vectors": torch.ones(4, 3, dtype=torch.bfloat16)}, r"vectors are torch\.bfloat16"),
        ({}, {"vectors": torch.ones(12)}, r"vectors of shape \(12,\)"),
        ({}, {"idf": torch.ones(4, 1)}, r"an idf of shape \(4, 1\)"),
        ({}, {"eigenvalues": -torch.ones(3, dtype=torch.float64)}, "or not above 0"),
        ({}, {"counts": None}, r"its counts are not there\. Allowed: torch\.int64"),
        ({}, {"counts": torch.ones(2, 2, dtype=torch.int64)}, r"counts of shape \(2, 2\)"),
        ({"pmi": [1]}, {}, r"its pmi is \[1\]\. Allowed: num_images, positive, smoothing"),
        ({"pmi": {"num_images": 3}}, {}, r"its pmi is \{'num_images': 3\}\. Allowed"),
        ({"pmi": PMI | {"num_images": "x"}}, {}, r"its pmi is \{'num_images': 'x'"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, content, tensors, message):
    """Whole files, of which the digests are right: what is in them is not what belongs there."""
    path = tmp_path / "table.safetensors"
    whole = {"names": NAMES, "source": "", "hash": make_table().hash, "pmi": PMI}
    parts = {
        "vectors": torch.tensor(VECTORS),
        "idf": torch.ones(4),
        "eigenvalues": torch.ones(3, dtype=torch.float64),
        "counts": torch.ones(4, dtype=torch.int64),
    }
    write_tensors(path, parts, "word table", whole)
    assert load_word_table(path).names == NAMES
    parts = {name: values for name, values in (parts | tensors).items() if values is not None}
    write_tensors(path, parts, "word table", whole | content)
    with pytest.raises(ValueError, match=rf"table\.safetensors' is no word table.*{message}"):
        load_word_table(path)


def test_published_vectors_make_a_table(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("cat 1 2\nfire 3 4\ntruck 5 6\n")
    table = word_table_from_file(path, ["fire_truck", "cat"])
    assert (table.names, table.dim, table.source) == (("fire truck", "cat"), 2, str(path))
    np.testing.assert_array_equal(table.vectors, [[4, 5], [1, 2]])
    np.testing.assert_array_equal(table.idf, [1, 1])
    counted = word_table_from_file(path, ["cat", "fire"], counts=np.array([1, 0]), num_images=4)
    np.testing.assert_allclose(counted.idf, np.log([4, 4]), rtol=1e-6)
    np.save(tmp_path / "clip.npy", VECTORS)
    (tmp_path / "clip.json").write_text(json.dumps(NAMES))
    clip = word_table_from_file(tmp_path / "clip.npy", ["sky", "cat"])
    np.testing.assert_array_equal(clip.vectors, VECTORS[[3, 0]])


def test_published_vectors_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("cat 1 2\ndog 3 4\n")
    with pytest.raises(ValueError, match=r"no vector for 'dogs'.*'dog'"):
        word_table_from_file(path, ["dogs"])
    with pytest.raises(ValueError, match=r"vocabulary for '.*' is empty"):
        word_table_from_file(path, [])
    with pytest.raises(ValueError, match="belong together"):
        word_table_from_file(path, ["cat"], counts=np.ones(1))
    with pytest.raises(ValueError, match=r"counts of shape \(2,\) for 1 words"):
        word_table_from_file(path, ["cat"], counts=np.ones(2), num_images=3)


def test_the_spectrum_of_any_table(table):
    values, shares = explained_spectrum(table)
    expected = np.sort(np.linalg.eigvalsh(VECTORS @ VECTORS.T))[::-1][:3]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(shares, np.cumsum(expected**2) / np.sum(expected**2), rtol=1e-5)
    pmi = PmiStatistics(np.ones(4), 9, True, 1.0, 28.0)
    values, shares = explained_spectrum(make_table(eigenvalues=np.array([3, 2, 1]), pmi=pmi))
    np.testing.assert_allclose(shares, [9 / 28, 13 / 28, 14 / 28])
