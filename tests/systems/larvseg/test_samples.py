import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.data.coco import load_coco
from maskx.data.label_maps import ignore_label, things_and_stuff_label_map, write_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.systems.larvseg.samples import (
    JointDataSet,
    JointMapper,
    classes_to_predict,
    joint_batches,
    joint_sets,
    labelled_images,
    random_crop,
    sets_of_one_file,
    true_label_map,
)

K, SIZE = 12, 32
NUM_CLASSES = K + 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    json_file = generate_scenes(folder, count=16, size=64, seed=3, num_categories=K, style="sparse")
    return load_coco(json_file, folder)


@pytest.fixture(scope="module")
def split(data):
    return resolve_split("scenes_half", data.class_names)


@pytest.fixture(scope="module")
def sets(data, split):
    return sets_of_one_file(data, split, image_size=SIZE)


def batches_of(sets, mapper=None, **changes):
    options = {"batch_size": 2, "seed": 1, "start": 0, "stop": 4, "num_workers": 0}
    return list(joint_batches(sets, mapper or JointMapper(sets), **options | changes))


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    min_crop=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_a_crop_is_a_part_of_the_image_with_its_aspect_ratio(size, min_crop, seed):
    crop = random_crop(size, min_crop, np.random.RandomState(seed))
    shares = []
    for part, side in zip(crop, size, strict=True):
        length = part.stop - part.start
        assert 0 <= part.start < part.stop <= side
        assert length >= min_crop * side - 0.5
        # A side is rounded, and not below one pixel.
        shares.append(((length - 0.5) / side if length > 1 else 0, (length + 0.5) / side))
    assert max(low for low, _ in shares) <= min(high for _, high in shares)


def test_crops_reach_every_size_and_every_border():
    state = np.random.RandomState(0)
    crops = [random_crop((20, 40), 0.5, state) for _ in range(500)]
    lengths = {(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in crops}
    assert {rows for rows, _ in lengths} == set(range(10, 21))
    assert all(abs(columns - 2 * rows) <= 1 for rows, columns in lengths)
    for axis, side in enumerate((20, 40)):
        assert min(crop[axis].start for crop in crops) == 0
        assert max(crop[axis].stop for crop in crops if crop[axis].start) == side
    before = state.get_state()[1].copy()
    assert random_crop((20, 40), 1, state) == (slice(0, 20), slice(0, 40))
    assert np.array_equal(state.get_state()[1], before)


def test_batches_alternate_between_masks_and_image_labels(sets):
    found = batches_of(sets)
    assert [{sample["data_set"] for sample in batch} for batch in found] == [
        {"masks"},
        {"image labels"},
    ] * 2
    for batch in found:
        for sample in batch:
            assert sample["image"].shape == (3, SIZE, SIZE)
            assert ("sem_seg" in sample) != ("image_labels" in sample)
    again = batches_of(sets, start=2, num_workers=1)
    for expected, sample in zip(found[2], again[0], strict=True):
        assert expected["image_id"] == sample["image_id"]
        assert torch.equal(expected["image"], sample["image"])


def test_no_novel_mask_and_no_image_label_of_a_masked_image_is_trained_on(sets, data, split):
    mapper = JointMapper(sets, flip=False)
    scored = [sets.class_names[index] for index in sets.scored["masks"]]
    assert not set(scored) & set(split.without_masks)
    assert len(scored) == len(split.with_masks) + 5
    images = labelled_images(data)
    truth_of = {r["image_id"]: things_and_stuff_label_map(r, NUM_CLASSES) for r in images.records}
    novel = [label + 1 for label in split.indices_without_masks]
    for record in sets.data_sets[0].records:
        known = sets.label_map(record)
        assert (
            (known == ignore_label(NUM_CLASSES)) == np.isin(truth_of[record["image_id"]], novel)
        ).all()
        assert "image_labels" not in mapper(record, np.random.RandomState(0))
    ids = [{r["image_id"] for r in each.records} for each in sets.data_sets]
    assert not ids[0] & ids[1]


def test_each_data_set_has_its_own_image_size(data, split):
    images = labelled_images(data)
    shared = {"records": images.records, "class_names": images.class_names}
    sets = joint_sets(
        [
            JointDataSet("a", supervision="mask", image_size=32, ratio=2, **shared),
            JointDataSet("b", supervision="image", image_size=48, **shared),
        ]
    )
    sides = [batch[0]["image"].shape[-1] for batch in batches_of(sets, stop=6)]
    assert sides == [32, 48, 32] * 2


def test_the_ground_is_among_the_image_labels(sets, data):
    """Without it nothing holds novel classes off the ground, and attention has no background."""
    ground = set(sets.class_names[K:])
    things_of = {
        r["image_id"]: {data.class_names[i] for i in r["image_labels"]} for r in data.records
    }
    mapper = JointMapper(sets)
    assert len(sets.scored["image labels"]) == sets.num_classes
    for record in sets.data_sets[1].records:
        labels = mapper(record, np.random.RandomState(0))["image_labels"]
        shown = {sets.class_names[label] for label in labels}
        assert shown & ground
        assert shown - ground == things_of[record["image_id"]]


def test_no_background_is_invented(data, split, tmp_path):
    """What no class of a file covers is unknown: it is no class, as in Detectron2."""
    content = json.loads(data.json_file.read_text())
    for image in content["images"]:
        del image["stuff_file_name"]
    json_file = tmp_path / "things.json"
    json_file.write_text(json.dumps(content))
    things = load_coco(json_file, data.json_file.parent)
    sets = sets_of_one_file(things, split, image_size=SIZE)
    assert sets.class_names == tuple(things.class_names)
    test = labelled_images(things)
    for record in sets.data_sets[0].records:
        found = set(np.unique(sets.label_map(record)).tolist())
        shown = {index + 1 for index in record["image_labels"]}
        assert found <= shown | {255}
        assert 255 in found
    for record in test.records:
        truth = np.unique(true_label_map(record, test.class_names)).tolist()
        assert set(truth) == {255, *(index + 1 for index in record["image_labels"])}


def test_crops_cut_image_and_label_map_alike_and_labels_come_from_the_whole_image(tmp_path):
    rows, columns = np.indices((40, 40))
    label_map = 1 + (rows // 20) * 2 + columns // 20
    cv2.imwrite(str(tmp_path / "image.png"), np.repeat(label_map[:, :, None] * 40, 3, axis=2))
    write_label_map(tmp_path / "map.png", label_map, num_classes=4)
    record = {
        "file_name": str(tmp_path / "image.png"),
        "height": 40,
        "width": 40,
        "image_id": 1,
        "image_labels": [0, 1, 2, 3],
        "annotations": [],
        "supervision": "mask",
        "label_map_file_name": str(tmp_path / "map.png"),
    }
    shared = {"records": [record], "class_names": tuple("abcd"), "image_size": 40}
    found = set()
    for changes in ({"supervision": "mask"}, {"supervision": "image", "crop_level_labels": True}):
        sets = joint_sets([JointDataSet("it", **shared | changes)])
        for seed in range(12):
            mapper = JointMapper(sets, min_crop=0.2)
            sample = mapper(sets.data_sets[0].records[0], np.random.RandomState(seed))
            # Pixels between two quarters are mixed by the resize.
            shown = {v // 40 - 1 for v in sample["image"].unique().tolist() if v % 40 == 0}
            if "sem_seg" in sample:
                inner = sample["image"][0] % 40 == 0
                expected = sample["image"][0].long() // 40
                assert (sample["sem_seg"] == expected)[inner].float().mean() > 0.98
            else:
                assert shown <= set(sample["image_labels"])
                found.add(tuple(sample["image_labels"]))
    assert len(found) > 1  # labels of the crop differ from crop to crop
    sets = joint_sets([JointDataSet("it", supervision="image", **shared)])
    for seed in range(4):
        mapper = JointMapper(sets, min_crop=0.2)
        sample = mapper(sets.data_sets[0].records[0], np.random.RandomState(seed))
        assert sample["image_labels"] == [0, 1, 2, 3]
        # Mirrored from left to right, never upside down.
        whole = JointMapper(sets)(sets.data_sets[0].records[0], np.random.RandomState(seed))
        assert whole["image"][0, 0].unique().tolist() == [40, 80]
    with pytest.raises(ValueError, match=r"min_crop .* is 1\.5\. Allowed: above 0 and at most"):
        JointMapper(sets, min_crop=1.5)


def test_samples_say_what_their_data_set_is(sets):
    mapper = JointMapper(sets)
    for number, each in enumerate(sets.data_sets):
        sample = mapper(each.records[0], np.random.RandomState(0))
        own = "image_labels" if number else "sem_seg"
        assert sample.keys() == {
            "image",
            "height",
            "width",
            "image_id",
            "file_name",
            own,
            "data_set",
            "single_label",
            "attention",
        }
        assert (sample["data_set"], sample["single_label"]) == (each.name, False)


def test_of_labels_with_one_name_the_first_is_true(tmp_path):
    write_label_map(tmp_path / "map.png", np.array([[0, 1, 2, 3, 255]]), num_classes=3)
    record = {"image_id": 1, "height": 1, "width": 5}
    record["label_map_file_name"] = str(tmp_path / "map.png")
    assert true_label_map(record, ("wall", "sky", "wall")).tolist() == [[255, 1, 2, 1, 255]]


def test_classes_to_predict_are_found_by_name():
    assert classes_to_predict(("b", "a", "b"), ("a", "x", "b")) == (2, 0, 2)
    with pytest.raises(ValueError, match=r"1 of the classes .* among the 2 of the model: 'c'"):
        classes_to_predict(("a", "c"), ("a", "b"))
