"""Overlap of concepts: exact areas, sums over images, weights of negatives, files."""

import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.data.coco import load_coco
from maskx.data.scenes.concepts import generate_concept_scenes
from maskx.systems.concept_mask import overlap as module
from maskx.systems.concept_mask.concept_sets import concept_sets, scene_concept_split
from maskx.systems.concept_mask.overlap import (
    concept_overlap,
    load_overlap,
    negative_weights,
    save_overlap,
)

SIDE = 12  # of the images, in pixels
NUM_CONCEPTS = 5


def record_of(*boxes, image_id=0):
    """A record of (concept, x1, y1, x2, y2)."""
    annotations = [{"class_index": c, "bbox": list(map(float, box))} for c, *box in boxes]
    return {"image_id": image_id, "annotations": annotations}


def rasterised(records, num_concepts):
    """Eq. 3 pixel by pixel: {(i, j): (common area, area of i)} over images with both."""
    sums = {}
    for record in records:
        masks = {}
        for annotation in record["annotations"]:
            x1, y1, x2, y2 = map(int, annotation["bbox"])
            mask = masks.setdefault(annotation["class_index"], np.zeros((SIDE, SIDE), bool))
            mask[y1:y2, x1:x2] = True
        for i, first in masks.items():
            for j, second in masks.items():
                if i != j:
                    common, area = sums.get((i, j), (0, 0))
                    sums[i, j] = common + (first & second).sum(), area + first.sum()
    return sums


def as_dict(overlap):
    pairs = zip(overlap.rows.tolist(), overlap.columns.tolist(), strict=True)
    return dict(zip(pairs, zip(overlap.intersection, overlap.area, strict=True), strict=True))


intervals = st.tuples(st.integers(0, SIDE - 1), st.integers(1, SIDE)).map(
    lambda pair: (min(pair), max(pair) if pair[0] != pair[1] else pair[0] + 1)
)
boxes = st.builds(
    lambda concept, x, y: (concept, x[0], y[0], x[1], y[1]),
    st.integers(0, NUM_CONCEPTS - 1),
    intervals,
    intervals,
)
images = st.lists(st.lists(boxes, max_size=7).map(lambda b: record_of(*b)), max_size=4)


# --- Eq. 3 ----------------------------------------------------------------------------------------


@given(images)
@settings(max_examples=30)
def test_areas_are_those_of_the_pixels(records):
    overlap = concept_overlap(records, NUM_CONCEPTS)
    assert as_dict(overlap) == rasterised(records, NUM_CONCEPTS)
    keys = overlap.rows * NUM_CONCEPTS + overlap.columns
    assert (np.diff(keys) > 0).all()
    ratios = overlap.ratios()
    assert ((ratios >= 0) & (ratios <= 1)).all()


def test_a_part_lies_in_its_whole_and_not_the_other_way_round():
    face, person, hat = 0, 1, 2
    records = [
        record_of((person, 0, 0, 10, 10), (face, 2, 0, 4, 5)),
        record_of((person, 0, 0, 5, 4), (face, 4, 0, 6, 5), (hat, 8, 8, 9, 9)),
        record_of((face, 0, 0, 9, 9)),  # a face alone says nothing
    ]
    overlap = concept_overlap(records, 3)
    ratios = dict(
        zip(zip(overlap.rows, overlap.columns, strict=True), overlap.ratios(), strict=True)
    )
    assert ratios == {
        (face, person): (10 + 4) / (10 + 10),
        (person, face): (10 + 4) / (100 + 20),
        (face, hat): 0,
        (hat, face): 0,
        (person, hat): 0,
        (hat, person): 0,
    }


def test_boxes_of_one_concept_count_once_where_they_overlap():
    records = [record_of((0, 0, 0, 4, 4), (0, 2, 2, 6, 6), (1, 0, 0, 6, 6))]
    overlap = concept_overlap(records, 2)
    assert as_dict(overlap) == {(0, 1): (28, 28), (1, 0): (28, 36)}


@given(images, st.floats(0.01, 100), st.floats(-50, 50))
@settings(max_examples=20)
def test_ratios_do_not_depend_on_the_scale_and_place_of_the_boxes(records, scale, shift):
    moved = [
        record_of(
            *((a["class_index"], *(scale * v + shift for v in a["bbox"])) for a in r["annotations"])
        )
        for r in records
    ]
    ratios, others = (concept_overlap(each, NUM_CONCEPTS).ratios() for each in (records, moved))
    assert np.allclose(ratios, others, atol=1e-6)


# --- streaming ------------------------------------------------------------------------------------


@given(images, images)
@settings(max_examples=20)
def test_the_order_of_the_images_is_no_matter(first, second):
    whole = concept_overlap(first + second, NUM_CONCEPTS)
    assert as_dict(concept_overlap(iter([*second, *first]), NUM_CONCEPTS)) == as_dict(whole)


@given(records=images)
@settings(max_examples=20)
def test_sums_do_not_depend_on_how_many_pairs_are_held(records):
    expected = as_dict(concept_overlap(records, NUM_CONCEPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAX_PENDING", 3)
        assert as_dict(concept_overlap(records, NUM_CONCEPTS)) == expected


def test_large_vocabularies_cost_nothing():
    overlap = concept_overlap([record_of((17_999, 0, 0, 2, 2), (3, 0, 0, 4, 4))], 18_000)
    assert as_dict(overlap) == {(3, 17_999): (4, 16), (17_999, 3): (4, 4)}


@pytest.mark.parametrize("concept", [-1, 3])
def test_a_concept_outside_the_vocabulary_is_refused_with_its_image(concept):
    with pytest.raises(ValueError, match=rf"Image 'a7' .* \[{concept}\]\. Allowed: 0 to 2"):
        concept_overlap([record_of((concept, 0, 0, 1, 1), image_id="a7")], 3)


# --- Eq. 4 ----------------------------------------------------------------------------------------


def dense(indptr, indices, weights):
    matrix = np.zeros((len(indptr) - 1,) * 2)
    for row in range(len(indptr) - 1):
        columns = indices[indptr[row] : indptr[row + 1]]
        assert (np.diff(columns) > 0).all()
        matrix[row, columns] = weights[indptr[row] : indptr[row + 1]]
    return matrix


@given(images)
@settings(max_examples=30)
def test_weights_are_those_of_the_equation(records):
    expected = np.zeros((NUM_CONCEPTS, NUM_CONCEPTS))
    for (i, j), (common, area) in rasterised(records, NUM_CONCEPTS).items():
        expected[i, j] = 1 - common / area if common / area < 0.5 else 0
    indptr, indices, weights = negative_weights(concept_overlap(records, NUM_CONCEPTS))
    assert (indptr.dtype, indices.dtype, weights.dtype) == (np.int64, np.int64, np.float32)
    assert indptr[-1] == len(indices) == len(weights) == np.count_nonzero(expected)
    assert np.allclose(dense(indptr, indices, weights), expected, atol=1e-6)


def test_half_overlap_is_no_negative():
    overlap = concept_overlap([record_of((0, 0, 0, 4, 4), (1, 2, 0, 12, 4))], 2)
    matrix = dense(*negative_weights(overlap))
    assert matrix[0, 1] == 0
    assert matrix[1, 0] == pytest.approx(0.8)


def test_parts_and_wholes_of_generated_scenes_are_no_negatives_but_parts_of_each_other_are(
    tmp_path,
):
    path = generate_concept_scenes(tmp_path, count=60, size=64, seed=0)
    split = scene_concept_split()
    sets = concept_sets(split, boxes=load_coco(path, tmp_path))
    gamma = dense(*negative_weights(concept_overlap(sets.boxed, len(split.vocabulary))))
    index = split.vocabulary.index
    for color in ("red", "yellow"):
        assert gamma[index(f"{color} lamp shade"), index("lamp shade")] == 0
    assert gamma[index("red lamp shade"), index("green lamp stand")] > 0.5
    # Cross and field of a flag have nearly one box, so boxes cannot tell them apart.
    assert gamma[index("yellow flag cross"), index("blue flag field")] == 0


# --- files ----------------------------------------------------------------------------------------

NAMES = ["cat", "traffic light", "grass"]
RECORDS = [record_of((0, 0, 0, 4, 4), (1, 2, 0, 12, 4), (2, 0, 0, 1, 1))]


def test_an_overlap_is_read_as_it_was_written(tmp_path):
    overlap = concept_overlap(RECORDS, 3)
    path = tmp_path / "folder" / "overlap.npz"
    save_overlap(path, overlap, ["cat", "traffic_light", "grass"])
    assert [file.name for file in path.parent.iterdir()] == ["overlap.npz"]
    loaded = load_overlap(path, NAMES)
    assert loaded.num_concepts == 3
    assert as_dict(loaded) == as_dict(overlap)
    assert loaded.rows.dtype == overlap.rows.dtype


def test_an_overlap_of_another_vocabulary_is_refused(tmp_path):
    path = tmp_path / "overlap.npz"
    overlap = concept_overlap(RECORDS, 3)
    save_overlap(path, overlap, NAMES)
    with pytest.raises(ValueError, match="another vocabulary: concept 0 is 'cat', not 'grass'"):
        load_overlap(path, NAMES[::-1])
    with pytest.raises(ValueError, match=r"it has 3 concepts, not 2\. Make it again"):
        load_overlap(path, NAMES[:2])
    with pytest.raises(ValueError, match="overlap is of 3 concepts, but 2 names"):
        save_overlap(path, overlap, NAMES[:2])


def test_other_files_are_refused_and_no_code_of_them_runs(tmp_path):
    path = tmp_path / "overlap.npz"
    with pytest.raises(FileNotFoundError, match="there is no such overlap file"):
        load_overlap(path, NAMES)
    np.savez(path, names=np.array(NAMES, object))
    with pytest.raises(ValueError, match=r"is no overlap file .*allow_pickle"):
        load_overlap(path, NAMES)
    np.savez(path, names=np.array(NAMES))
    with pytest.raises(ValueError, match=r"is no overlap file .*rows"):
        load_overlap(path, NAMES)
    for content in (b"", b"PK\x03\x04broken", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no overlap file"):
            load_overlap(path, NAMES)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="is no overlap file"):
        load_overlap(path, NAMES)


WHOLE = {
    "names": np.array(["a", "b"]),
    "rows": np.array([0, 1]),
    "columns": np.array([1, 0]),
    "intersection": np.array([1.0, 1.0]),
    "area": np.array([2.0, 4.0]),
}


@pytest.mark.parametrize(
    ("key", "values", "allowed"),
    [
        ("names", np.zeros(2), "one name for each concept"),
        ("names", np.array([["a", "b"]]), "one name for each concept"),
        ("rows", np.zeros(2), "one index for each pair"),
        ("rows", np.array([0, 7]), "concept indices from 0 to 1"),
        ("rows", np.array([-1, 1]), "concept indices from 0 to 1"),
        ("rows", np.array([1, 0]), "another concept than in 'rows'"),
        ("columns", np.array([1, 9]), "concept indices from 0 to 1"),
        ("columns", np.array([1]), "one index for each pair"),
        ("intersection", np.array(["1", "1"]), "one number for each pair"),
        ("intersection", np.array([[1.0], [1.0]]), "one number for each pair"),
        ("intersection", np.array([-1.0, 1.0]), "from 0 to 'area'"),
        ("intersection", np.array([3.0, 1.0]), "from 0 to 'area'"),
        ("intersection", np.array([np.nan, 1.0]), "from 0 to 'area'"),
        ("area", np.array([0.0, 4.0]), "finite numbers above 0"),
        ("area", np.array([np.inf, 4.0]), "finite numbers above 0"),
    ],
)
def test_arrays_that_are_no_overlaps_are_named(tmp_path, key, values, allowed):
    path = tmp_path / "overlap.npz"
    np.savez(path, **WHOLE)
    assert len(load_overlap(path, ["a", "b"]).rows) == 2
    np.savez(path, **{**WHOLE, key: values})
    name = "columns" if "another concept" in allowed else key
    with pytest.raises(ValueError, match=rf"overlap\.npz: its '{name}' is .*Allowed: {allowed}"):
        load_overlap(path, ["a", "b"])


def test_pairs_are_in_order_and_each_is_there_once(tmp_path):
    path = tmp_path / "overlap.npz"
    np.savez(path, **WHOLE | {"rows": np.array([1, 0]), "columns": np.array([0, 1])})
    with pytest.raises(ValueError, match=r"its 'rows' is .*Allowed: ascending pairs, each once"):
        load_overlap(path, ["a", "b"])


@pytest.mark.parametrize(
    "content",
    [
        b"junk",
        b"\x93NUMPY\x01\x00\x3b\x00{'descr': '<f8', 'fortran_order': False, 'shape': (2, ",
        # Claims 7 EiB.
        b"\x93NUMPY\x01\x00\x4c\x00{'descr': '<f8', 'fortran_order': False, 'shape': "
        b"(1000000000, 1000000000), }",
    ],
)
def test_headers_that_lie_are_refused(tmp_path, content):
    path = tmp_path / "overlap.npz"
    np.savez(path, **{key: values for key, values in WHOLE.items() if key != "area"})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("area.npy", content)
    with pytest.raises(ValueError, match=r"overlap\.npz(: its 'area'| is no overlap file)"):
        load_overlap(path, ["a", "b"])
