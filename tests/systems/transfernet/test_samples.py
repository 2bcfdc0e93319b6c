import copy
from types import SimpleNamespace

import numpy as np
import pytest

from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.systems.transfernet.samples import (
    AlternatingBatches,
    TransferMapper,
    alternating_batches,
    transfer_sets,
)

K, SIZE = 12, 32


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
    return transfer_sets(data.records, split)


def with_unreadable_masks(record):
    record = copy.deepcopy(record)
    for annotation in record["annotations"]:
        annotation["segmentation"] = "decoding this would fail"
    return record


def test_masks_of_target_images_are_decoded_only_where_asked_for(data, split):
    target = set(split.indices_without_masks)
    records = [
        with_unreadable_masks(record) if target & set(record["image_labels"]) else record
        for record in data.records
    ]
    mapper = TransferMapper(K, size=SIZE)
    sets = transfer_sets(records, split)
    for record in sets.target:
        sample = mapper(record, np.random.RandomState(0))
        assert "sem_seg" not in sample
        assert set(sample["image_labels"]) <= target
    for record in sets.source:
        assert mapper(record, np.random.RandomState(0))["sem_seg"].shape == (SIZE, SIZE)
    with_masks = transfer_sets(records, split, use_target_masks=True)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        mapper(with_masks.target[0], np.random.RandomState(0))
    readable = transfer_sets(data.records, split, use_target_masks=True).target[0]
    assert "sem_seg" in mapper(readable, np.random.RandomState(0))


def test_labels_without_a_pixel_make_no_pair(sets):
    record = copy.deepcopy(next(r for r in sets.source if len(r["image_labels"]) == 1))
    crowd = record["annotations"][0] | {"class_index": 4, "iscrowd": 1, "id": 99}
    record["annotations"].append(crowd)
    record["image_labels"] = sorted({*record["image_labels"], 4})
    sample = TransferMapper(K, size=SIZE)(record, np.random.RandomState(0))
    assert 4 not in sample["image_labels"]


def ids_of(batches):
    return [[(s["image_id"], int(s["image"].sum())) for s in batch] for batch in batches]


def make_batches(sets, start, stop, **options):
    options = {"batch_size": 4, "seed": 5} | options
    mapper = TransferMapper(K, size=SIZE)
    return alternating_batches(sets.source, sets.target, mapper, start=start, stop=stop, **options)


def test_half_of_each_batch_are_source_images(sets):
    source, target = ({r["image_id"] for r in side} for side in (sets.source, sets.target))
    batches = ids_of(make_batches(sets, 0, 20))
    assert len(batches) == 20
    seen = [[], []]
    for batch in batches:
        ids = [image_id for image_id, _ in batch]
        assert set(ids[:2]) <= source
        assert set(ids[2:]) <= target
        seen[0] += ids[:2]
        seen[1] += ids[2:]
    # Each side is shuffled on its own: all of it comes before anything comes again.
    assert set(seen[0][: len(source)]) == source
    assert set(seen[1][: len(target)]) == target


def test_a_resumed_run_sees_what_the_interrupted_one_would_have_seen(sets):
    whole = ids_of(make_batches(sets, 0, 8))
    assert whole == ids_of(make_batches(sets, 0, 3)) + ids_of(make_batches(sets, 3, 8))
    assert whole == ids_of(make_batches(sets, 0, 8, num_workers=1))
    assert whole != ids_of(make_batches(sets, 0, 8, seed=6))


def test_the_halves_are_drawn_independently(sets):
    same = SimpleNamespace(source=sets.source, target=sets.source)
    batches = ids_of(make_batches(same, 0, 10))
    assert [batch[:2] for batch in batches] != [batch[2:] for batch in batches]


def test_a_source_of_one_image_is_enough(sets):
    one = SimpleNamespace(source=sets.source[:1], target=sets.target)
    for batch in make_batches(one, 0, 3):
        assert [s["image_id"] for s in batch[:2]] == [sets.source[0]["image_id"]] * 2


def test_an_odd_batch_size_is_refused(sets):
    with pytest.raises(ValueError, match=r"batch size is 5\. Allowed: even numbers"):
        make_batches(sets, 0, 1, batch_size=5)


def test_processes_share_a_batch_and_keep_both_halves():
    whole = list(AlternatingBatches(4, 6, 4, 1, 0, 9))
    parts = [
        list(AlternatingBatches(4, 6, 4, 1, 0, 9, rank=rank, num_processes=2)) for rank in (0, 1)
    ]
    for together, first, second in zip(whole, *parts, strict=True):
        assert together == [first[0], second[0], first[1], second[1]]
        assert [index < 4 for index, _ in together] == [True, True, False, False]
