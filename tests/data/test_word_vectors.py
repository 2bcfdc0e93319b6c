import json

import numpy as np
import pytest

from maskx.data.vocabularies import COCO_THING_CLASSES
from maskx.data.word_vectors import load_class_vectors


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat 1 2\ndog 1\n", r"line 2 \('dog'\) has 1 numbers, earlier lines have 2"),
        ("cat 1 x\ndog 1 2\n", r"line 1 \('cat'\): could not convert string"),
        ("cat 1 nan\ndog 1 2\n", "class 'cat' holds NaN"),
    ],
)
def test_bad_text_files_are_named(tmp_path, text, words):
    path = tmp_path / "bad.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_class_vectors(path, ["cat", "dog"])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of word vectors"):
        load_class_vectors(tmp_path / "none.txt", ["cat"])
    np.save(tmp_path / "table.npy", np.zeros((2, 3)))
    with pytest.raises(FileNotFoundError, match=r"table\.txt .* or table\.json"):
        load_class_vectors(tmp_path / "table.npy", ["cat"])
    (tmp_path / "table.txt").write_text("cat\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"shape \(2, 3\), but .* lists 1 words"):
        load_class_vectors(tmp_path / "table.npy", ["cat"])


def test_real_vectors_cover_coco_and_put_like_beside_like(shared_data):
    path = shared_data / "vocab" / "vectors_glove300_coco_80.txt"
    vectors = load_class_vectors(path, COCO_THING_CLASSES)
    assert vectors.shape == (80, 300)
    cat, dog, toaster = (COCO_THING_CLASSES.index(n) for n in ("cat", "dog", "toaster"))
    assert vectors[cat] @ vectors[dog] > vectors[cat] @ vectors[toaster]
