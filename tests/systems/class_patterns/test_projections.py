import io
import math
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskx.systems.class_patterns.projections import (
    ProjectionHistograms,
    file_stem,
    otsu_threshold,
    projections_path,
    read_projections,
    standardise,
    start_projections,
    write_projections,
)


def draw(num_labels, height, width, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(0, 3, (num_labels, height, width)).astype(np.float32)


# --- values


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_resizing_is_that_of_torch_without_aligned_corners(height, width, to_height, to_width):
    maps = draw(2, height, width)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(maps)[None], (to_height, to_width), mode="bilinear", align_corners=False
    )[0]
    found = standardise(maps, [0, 1], to_height, to_width, 1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_each_row_is_divided_by_its_standard_deviation():
    maps = draw(3, 4, 5)
    maps[1] = np.nan
    found = standardise(maps, [4, 2, 7], 4, 5, [2, np.nan, 0.5])
    np.testing.assert_allclose(found[0], maps[0] / 2, rtol=1e-6)
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[2], maps[2] * 2, rtol=1e-6)


@pytest.mark.parametrize("std", [0, -1, np.nan, np.inf])
def test_a_standard_deviation_that_cannot_be_is_named(std):
    with pytest.raises(ValueError, match=rf"deviation of class index 7 is {float(std)}\. Allowed"):
        standardise(draw(2, 4, 5), [2, 7], 4, 5, [1, std])


# --- thresholds


def variance_between(values, threshold):
    low, high = values[values < threshold], values[values >= threshold]
    if not len(low) or not len(high):
        return -1.0
    return len(low) * len(high) / len(values) ** 2 * (low.mean() - high.mean()) ** 2


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12))
def test_otsu_finds_the_best_of_all_splits(counts):
    edges = np.linspace(-3, 3, len(counts) + 1)
    values = np.repeat((edges[1:] + edges[:-1]) / 2, counts)
    threshold = otsu_threshold(counts, edges)
    if np.count_nonzero(counts) < 2:
        assert threshold == 0
        return
    best = max(variance_between(values, edge) for edge in edges[1:-1])
    assert variance_between(values, threshold) == pytest.approx(best)


def test_otsu_by_hand():
    # Centres 0.5 to 5.5. Splits: 1 | 1, 4, 4 gives 3/16 * (0.5 - 4.17)^2 = 2.52 for one value at
    # 0.5, one at 1.5, two at 5.5; 0.5, 1.5 | 5.5, 5.5 gives 4/16 * (1 - 5.5)^2 = 5.06: best, and
    # anywhere among the empty bins from 2 to 5.
    assert otsu_threshold([1, 1, 0, 0, 0, 2], range(7)) == 3.5
    assert otsu_threshold([5, 5], [0, 1, 2]) == 1
    # Splits at 1 and at 2 are equal by symmetry: the lower.
    assert otsu_threshold([3, 3, 3], [0, 1, 2, 3]) == 1
    assert otsu_threshold([0, 9, 0], [1, 2, 3, 4]) == 0
    assert otsu_threshold([0, 0], [1, 2, 3]) == 0


def test_histograms_count_standard_deviations_by_class():
    histograms = ProjectionHistograms(3, num_bins=16)  # of width 1
    assert histograms.edges.tolist() == list(range(-8, 9))
    maps = np.array([[[0.5, -1.5, 3.0]], [[100, -100, 8]]], np.float32)
    histograms.update(maps, [2, 0], [0.5, 1])
    expected = np.zeros((3, 16), int)
    expected[2, [8 + 1, 8 - 3, 8 + 6]] = 1
    expected[0, [15, 0]] = 2, 1  # what lies beyond is at the ends
    np.testing.assert_array_equal(histograms.counts, expected)
    thresholds = histograms.thresholds()
    assert thresholds.tolist() == [otsu_threshold(c, histograms.edges) for c in expected]
    assert thresholds[1] == 0  # without pixels


def test_a_threshold_splits_two_clusters_that_0_does_not():
    random = np.random.default_rng(0)
    maps = np.concatenate([random.normal(-3, 0.3, 900), random.normal(-1, 0.3, 300)])
    histograms = ProjectionHistograms(1)
    histograms.update(maps.reshape(1, 30, 40), [0], 1)
    assert -2.3 < histograms.thresholds()[0] < -1.7


def test_labels_without_a_pattern_are_not_counted():
    histograms = ProjectionHistograms(2)
    maps = draw(2, 4, 5)
    maps[0] = np.nan
    histograms.update(maps, [0, 1], [np.nan, 1])
    histograms.update(np.zeros((0, 4, 5)), [], [])
    assert histograms.counts.sum(1).tolist() == [0, 20]


# --- files


def test_what_is_written_is_read(tmp_path):
    start_projections(tmp_path / "new" / "folder", class_names=("cat", "dog"), patterns="ab12")
    folder = tmp_path / "new" / "folder"
    maps = draw(2, 4, 5)
    maps[1] = np.nan
    for image_id in (7, "7", "a/b", "a_b", ""):
        write_projections(folder, image_id, [5, 3], maps + len(str(image_id)))
    for image_id in (7, "7", "a/b", "a_b", ""):
        labels, found = read_projections(folder, image_id)
        assert labels == [5, 3]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, maps + len(str(image_id)))
    assert sorted(f.suffix for f in folder.iterdir()) == [".json", *[".npz"] * 5]


@given(st.lists(st.one_of(st.integers(), st.text(max_size=300)), unique_by=lambda i: (type(i), i)))
def test_names_of_files_are_safe_and_unique(image_ids):
    stems = [file_stem(image_id) for image_id in image_ids]
    assert len({stem.lower() for stem in stems}) == len(stems)
    for stem, image_id in zip(stems, image_ids, strict=True):
        assert stem.replace("-", "").replace("_", "").isalnum()
        assert stem.isascii()
        assert len(stem) < 100 or isinstance(image_id, int)


def test_numpy_ids_are_integers():
    assert file_stem(np.int64(20070032)) == file_stem(20070032) == "20070032"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    maps = draw(1, 4, 5)
    write_projections(tmp_path, 3, [0], maps)

    def save(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", save)
    with pytest.raises(KeyboardInterrupt):
        write_projections(tmp_path, 3, [0], maps + 1)
    np.testing.assert_array_equal(read_projections(tmp_path, 3)[1], maps)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"3\.npz \(image 3\): there is no such file\. Let"):
        read_projections(tmp_path, 3)
    write_projections(tmp_path, 3, [0], draw(1, 4, 5))
    path = projections_path(tmp_path, 3)
    content = path.read_bytes()
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    for broken in (b"", b"text", content[:100], content[:-40], array.read_bytes()):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"3\.npz \(image 3\) cannot be read as projections"):
            read_projections(tmp_path, 3)
    middle = content.index(b"projections.npy") + 200
    path.write_bytes(content[:middle] + b"\xff" * 8 + content[middle + 8 :])
    with pytest.raises(ValueError, match=r"cannot be read as projections \(Bad CRC"):
        read_projections(tmp_path, 3)
    maps = np.zeros((1, 2, 2), np.float32)
    for labels, projections in (
        (None, maps),
        ([[1]], maps),
        ([1.0], maps),
        (["1"], maps),
        (1, maps),
        ([1], maps.astype(np.int64)),
        ([1], np.array([[["a"]]])),
    ):
        arrays = {"projections": projections} | ({} if labels is None else {"labels": labels})
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=r"3\.npz \(image 3\) cannot be read as projections"):
            read_projections(tmp_path, 3)


@pytest.mark.parametrize(
    "shape", ["(1000000000, 1000000000, 1)", "(1, 2)", "(-1,)", "(10,", "None"]
)
def test_headers_that_claim_what_is_not_there_are_refused(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    lie = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16)
    labels = io.BytesIO()
    np.save(labels, np.array([1]))
    with zipfile.ZipFile(projections_path(tmp_path, 3), "w") as archive:
        archive.writestr("labels.npy", labels.getvalue())
        archive.writestr("projections.npy", lie)
    with pytest.raises(ValueError, match=r"3\.npz \(image 3\)"):
        read_projections(tmp_path, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_single_values_that_are_not_finite_name_the_image(tmp_path, value):
    maps = draw(2, 4, 5)
    maps[0] = np.nan  # no pattern, which is allowed
    maps[1, 2, 3:] = value
    message = rf"image 'x/y' have {value} for class index 9 at row 2, column 3, and 2 such values"
    with pytest.raises(ValueError, match=message):
        write_projections(tmp_path, "x/y", [4, 9], maps)
    assert not list(tmp_path.iterdir())
    np.savez(projections_path(tmp_path, "x/y"), labels=[4, 9], projections=maps)
    with pytest.raises(ValueError, match=message.replace(" have", r".*: the projections have")):
        read_projections(tmp_path, "x/y")


@pytest.mark.parametrize(
    ("labels", "shape", "message"),
    [
        ([1], (2, 4, 5), r"image 3 have shape \(2, 4, 5\), for 1 labels\. Allowed: \(L, h, w\)"),
        ([1, 2], (2, 4), r"image 3 have shape \(2, 4\)"),
        ([1, 1], (2, 4, 5), r"image 3 have the labels \[1, 1\]\. Allowed: each one once"),
        ([1, 2], (2, 0, 5), r"image 3 have shape \(2, 0, 5\), which has no pixel"),
    ],
)
def test_projections_that_do_not_fit_their_labels_are_named(tmp_path, labels, shape, message):
    with pytest.raises(ValueError, match=message):
        write_projections(tmp_path, 3, labels, np.zeros(shape))


def test_a_folder_is_for_one_kind_of_projections(tmp_path):
    folder = tmp_path / "projections"
    same = {"class_names": ("cat", "dog"), "patterns": "ab12", "layer": "C41", "size": 328}
    start_projections(folder, **same)
    start_projections(folder, **same)
    message = (
        r"projections\.json' was made with layer C41, but this run has layer C43\. Use files of"
    )
    with pytest.raises(ValueError, match=message):
        start_projections(folder, **same | {"patterns": "cd", "layer": "C43"})
    with pytest.raises(ValueError, match="size 328, but this run has size None"):
        start_projections(folder, class_names=("cat", "dog"), patterns="ab12", layer="C41")
    for text in ("{", "[]", "\x00\ud800".encode("utf-8", "surrogatepass")):
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "projections.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"projections\.json' (is damaged|holds no dict)"):
            start_projections(folder, **same)
    (folder / "projections.json").rename(folder / "other.json")
    with pytest.raises(ValueError, match=r"holds files \(other\.json\) but no projections\.json"):
        start_projections(folder, **same)
