from collections import Counter
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.data.coco import load_coco
from maskx.data.label_maps import things_and_stuff_label_map, write_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.data.things_and_stuff import things_and_stuff
from maskx.systems.larvseg.samples import JointBatches, JointDataSet, JointSchedule, joint_sets

NAMES = ("cat", "dog", "wall", "tree")


def tagged(image_id, labels):
    return {
        "file_name": f"{image_id}.png",
        "height": 4,
        "width": 6,
        "image_id": image_id,
        "image_labels": labels,
        "annotations": [],
        "supervision": "image",
    }


def with_map(folder, image_id, label_map, num_classes=4):
    path = folder / f"{image_id}_map.png"
    write_label_map(path, np.asarray(label_map), num_classes=num_classes)
    labels = [int(v) - 1 for v in np.unique(label_map) if 0 < v <= num_classes]
    record = tagged(image_id, labels) | {
        "label_map_file_name": str(path),
        "supervision": "mask",
    }
    return record | {"height": len(label_map), "width": len(label_map[0])}


def image_set(records, **changes):
    values = {"name": "tags", "class_names": NAMES, "supervision": "image", "image_size": 32}
    return JointDataSet(records=records, **values | changes)


def mask_set(records, **changes):
    values = {"name": "masks", "class_names": NAMES, "supervision": "mask", "image_size": 32}
    return JointDataSet(records=records, **values | changes)


# --- whose turn it is


@pytest.mark.parametrize(
    ("ratios", "turns"),
    [
        ((4, 4), (0, 1, 0, 1, 0, 1, 0, 1)),
        ((3, 3, 2), (0, 1, 2, 0, 1, 2, 0, 1)),
        ((3, 1), (0, 0, 1, 0)),
        ((1,), (0,)),
    ],
)
def test_turns_are_well_mixed(ratios, turns):
    assert JointSchedule(ratios).turns == turns


@settings(deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 40))
def test_each_data_set_has_its_share_and_is_never_far_from_it(ratios, number):
    schedule = JointSchedule(ratios)
    period = sum(ratios)
    found = [schedule.turn(n)[0] for n in range(number, number + period)]
    assert Counter(found) == dict(enumerate(ratios))
    for end in range(1, period + 1):
        for which, ratio in enumerate(ratios):
            had = schedule.turns[:end].count(which)
            assert abs(had - ratio * end / period) < len(ratios)
    which, before = schedule.turn(number)
    assert before == [schedule.turn(n)[0] for n in range(number)].count(which)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 2**16)
)
@settings(max_examples=40, deadline=None)
def test_all_workers_together_follow_the_ratios(ratios, workers, seed):
    period = sum(ratios)
    steps = period // gcd(period, workers)
    counts = Counter()
    for rank in range(workers):
        batches = JointBatches(
            [5] * len(ratios),
            ratios,
            batch_size=2,
            seed=seed,
            start=0,
            stop=steps,
            rank=rank,
            num_processes=workers,
        )
        assert len(list(batches)) == len(batches) == steps
        for batch in batches:
            (which,) = {which for which, _, _ in batch}
            counts[which] += 1
    rounds = steps * workers // period
    assert counts == {which: ratio * rounds for which, ratio in enumerate(ratios)}


def batches(lengths=(7, 5), ratios=(1, 1), **changes):
    values = {"batch_size": 3, "seed": 4, "start": 0, "stop": 12}
    return list(JointBatches(lengths, ratios, **values | changes))


@pytest.mark.parametrize(("ratios", "expected"), [((4, 4), (0, 1) * 4), ((3, 3, 2), (0, 1, 2) * 2)])
def test_eight_workers_keep_their_data_set(ratios, expected):
    for rank, which in enumerate((*expected, 0, 1)[:8]):
        found = batches([6] * len(ratios), ratios, rank=rank, num_processes=8)
        assert {key[0] for batch in found for key in batch} == {which}


def test_workers_share_the_images_of_a_data_set_out():
    both = [batches((12,), (1,), stop=2, rank=rank, num_processes=2) for rank in (0, 1)]
    seen = [index for worker in both for batch in worker for _, index, _ in batch]
    assert sorted(seen) == list(range(12))
    alone = batches((12,), (1,), stop=4)
    assert [both[n % 2][n // 2] for n in range(4)] == alone


def test_a_resumed_run_sees_the_same_batches():
    assert batches()[5:] == batches(start=5)
    assert batches() != batches(seed=5)
    # Every epoch of a data set has each image once, and another order and other augmentation.
    first = [key for batch in batches(stop=40) for key in batch if key[0] == 1]
    epochs = [[index for _, index, _ in first[i : i + 5]] for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len({seed for _, _, seed in first}) == len(first)


def test_schedules_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"must be at least 1, got \[2, 0\]"):
        JointSchedule((2, 0))
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        batches(rank=2, num_processes=2)


# --- class table and supervision


def test_classes_of_all_data_sets_make_one_table(tmp_path, caplog):
    label_map = [[0, 1, 2, 2, 255, 3]] * 4
    masks = mask_set([with_map(tmp_path, 1, label_map)], with_masks=("cat", "wall"))
    tags = image_set(
        [tagged(2, [2, 0]), tagged(3, [1])], class_names=("bird", "dog", "cat"), image_size=64
    )
    sets = joint_sets([masks, tags])
    assert sets.class_names == (*NAMES, "bird")
    assert sets.scored == {"masks": (0, 2), "tags": (0, 1, 4)}
    (record,) = sets.data_sets[0].records
    # cat and wall, class indices 0 and 2, are scored; dog is withheld, 0 is no class.
    assert sets.label_map(record).tolist() == [[255, 1, 255, 255, 255, 3]] * 4
    assert [sets.image_labels(record) for record in sets.data_sets[1].records] == [[0, 4], [1]]
    # tree is in no image, as dog and wall are in one.
    assert sets.trained == (0, 1, 2, 4)
    assert caplog.text.count("1 of 5 classes are in no image") == 1
    assert "tree" in caplog.text


def test_the_class_table_may_be_given(tmp_path):
    tags = image_set([tagged(2, [2, 0])], class_names=("bird", "dog", "cat"))
    names = ("cat", "wall", "dog", "bird")
    sets = joint_sets([tags], class_names=names)
    assert sets.class_names == names
    assert sets.scored == {"tags": (0, 2, 3)}
    assert sets.image_labels(sets.data_sets[0].records[0]) == [0, 3]
    with pytest.raises(ValueError, match=r"'tags' has 1 classes that are not among the 2 .*'dog'"):
        joint_sets([tags], class_names=("cat", "bird"))


def test_labels_of_one_name_are_one_class(tmp_path, caplog):
    names = ("wall", "cat", "wall")
    masks = mask_set([with_map(tmp_path, 1, [[1, 2, 3]], 3)], class_names=names)
    tags = image_set([tagged(2, [2, 0])], class_names=names)
    sets = joint_sets([masks, tags])
    assert sets.class_names == ("wall", "cat")
    assert sets.label_map(sets.data_sets[0].records[0]).tolist() == [[1, 2, 1]]
    assert sets.image_labels(sets.data_sets[1].records[0]) == [0]
    assert "wall x2" in caplog.text


def test_image_level_data_keep_nothing_but_their_labels(tmp_path):
    record = with_map(tmp_path, 1, [[1, 2, 3]])
    record["annotations"] = [{"class_index": 1, "bbox": [0, 0, 2, 1], "segmentation": "secret"}]
    record["sem_seg_file_name"] = "stuff.png"
    sets = joint_sets([image_set([record])])
    (kept,) = sets.data_sets[0].records
    assert set(kept) == {
        "file_name",
        "height",
        "width",
        "image_id",
        "image_labels",
        "annotations",
        "supervision",
        "data_set",
    }
    assert kept["annotations"] == []
    assert sets.image_labels(kept) == [0, 1, 2]
    # Only the switch that is called so reads pixels of image-level data.
    sets = joint_sets([image_set([record], crop_level_labels=True)])
    assert sets.label_map(sets.data_sets[0].records[0]).tolist() == [[1, 2, 3]]


def test_withheld_masks_are_out_of_reach_of_every_reader():
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    annotations = [
        {"id": 1, "class_index": 0, "bbox": [0, 0, 2, 2], "iscrowd": 0, "segmentation": square},
        {"id": 2, "class_index": 1, "bbox": [3, 0, 5, 2], "iscrowd": 0, "segmentation": "secret"},
    ]
    record = tagged(1, [0, 1]) | {"annotations": annotations, "supervision": "mask"}
    sets = joint_sets([mask_set([record], with_masks=["cat"])])
    (kept,) = sets.data_sets[0].records
    assert "segmentation" not in kept["annotations"][1]
    assert annotations[1]["segmentation"] == "secret"  # the record given is as it was
    # The box of the object without a mask is unknown, and so is what is of no class.
    assert sets.label_map(kept).tolist() == [[1, 1, *[255] * 4]] * 2 + [[255] * 6] * 2
    # Nor is it a label, or a class that masks alone could teach.
    assert [sets.class_names[i] for i in sets.scored["masks"]] == ["cat"]
    assert sets.image_labels(kept) == [0]
    assert sets.trained == sets.scored["masks"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: joint_sets([]), "no data set to train on"),
        (lambda: joint_sets([image_set([tagged(1, [0])])] * 2), "several.* are called 'tags'"),
        (lambda: joint_sets([image_set([tagged(1, [])])]), "none of its 1 images has image labels"),
        (lambda: joint_sets([mask_set([tagged(1, [0])])]), "none of its 1 images has pixel labels"),
        (
            lambda: joint_sets([image_set([tagged(7, [1, 4])])]),
            r"image 7 \(7.png\) has the labels \[4\]. Allowed: class indices 0 to 3",
        ),
        (lambda: image_set([], supervision="box"), "supervision 'box'. Allowed: mask, image"),
        (lambda: image_set([], ratio=0), "ratio must be at least 1, got 0"),
        (lambda: image_set([], image_size=0), "image_size must be at least 1, got 0"),
        (lambda: image_set([], with_masks=["cat"]), "leave with_masks out"),
        (lambda: mask_set([], crop_level_labels=True), "leave crop_level_labels out"),
        (lambda: mask_set([], with_masks=["cow"]), "with_masks names 'cow', not among its 4"),
        (lambda: joint_sets([image_set([], class_names=())]), "'tags' is empty"),
    ],
)
def test_what_cannot_be_trained_on_is_named(make, words):
    with pytest.raises(ValueError, match=f"(?i){words}"):
        make()


def test_images_that_teach_nothing_are_counted_once(caplog):
    sets = joint_sets([image_set([tagged(1, [0]), tagged(2, []), tagged(3, [])])])
    assert len(sets.data_sets[0].records) == 1
    assert caplog.text.count("2 of 3 images have no image labels") == 1


def test_label_maps_without_image_labels_teach_all_their_classes(tmp_path, caplog):
    record = with_map(tmp_path, 1, [[1, 2]]) | {"image_labels": []}
    assert joint_sets([mask_set([record])]).trained == (0, 1, 2, 3)
    assert "are in no image" not in caplog.text


# --- things and stuff


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    json_file = generate_scenes(folder, count=6, size=64, num_categories=8, seed=2, style="sparse")
    return load_coco(json_file, folder)


def test_pixels_of_withheld_things_are_unknown(scenes):
    records, names = things_and_stuff(scenes)
    seen = {
        scenes.class_names[label] for record in scenes.records for label in record["image_labels"]
    }
    withheld = sorted(seen)[0]
    with_masks = [name for name in names if name != withheld]
    sets = joint_sets([mask_set(records, class_names=names, with_masks=with_masks)])
    label = names.index(withheld) + 1
    for record, original in zip(sets.data_sets[0].records, records, strict=True):
        truth = things_and_stuff_label_map(original, len(names))
        known = sets.label_map(record)
        assert ((known == 255) == (truth == label)).all()
        found = {sets.class_names[v - 1] for v in np.unique(known) if v != 255}
        assert found == {names[v - 1] for v in np.unique(truth) if v != label}
