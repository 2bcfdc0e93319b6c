import copy
import logging

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.coco import load_coco
from maskx.data.label_maps import semantic_label_map, write_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES, VOC_CLASSES_IN_COCO
from maskx.supervision import CategorySplit
from maskx.systems.transfernet.samples import (
    SOURCE_FRACTIONS,
    labelled_records,
    labels_of_record,
    records_in_union,
    source_subset,
    transfer_label_map,
    transfer_sets,
    union_of_class_lists,
    visible_labels,
)

NAMES = ("a", "b", "c", "d")
SPLIT = CategorySplit("odd", NAMES, with_masks=("a", "c"), without_masks=("b", "d"))
SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]


def make_record(image_id, labels, **keys):
    annotations = [
        {"id": n, "bbox": [1, 1, 5, 5], "class_index": label, "iscrowd": 0, "segmentation": SQUARE}
        for n, label in enumerate(labels)
    ]
    return {
        "file_name": f"{image_id}.png",
        "height": 8,
        "width": 9,
        "image_id": image_id,
        "image_labels": sorted(set(labels)),
        "annotations": annotations,
        "supervision": "mask",
        **keys,
    }


def image_ids(records):
    return [record["image_id"] for record in records]


def test_images_are_divided_by_whether_they_show_a_target_category(caplog):
    labels = {1: [0], 2: [0, 1], 3: [2, 0], 4: [3, 1], 5: []}
    records = [make_record(image_id, found) for image_id, found in labels.items()]
    before = copy.deepcopy(records)
    with caplog.at_level(logging.WARNING):
        sets = transfer_sets(records, SPLIT)
    assert image_ids(sets.source) == [1, 3]
    assert image_ids(sets.target) == [2, 4]
    assert [record["image_labels"] for record in sets.target] == [[1], [1, 3]]
    assert [record["image_labels"] for record in sets.source] == [[0], [0, 2]]
    assert sets.num_unlabelled == 1
    assert [r.getMessage() for r in caplog.records] == [
        "1 of 5 images have no label, so there is nothing to learn from them: left out."
    ]
    assert records == before


def test_of_target_images_nothing_but_tags_is_left():
    target = make_record(2, [0, 1], label_map_file_name="2.png", sem_seg_file_name="3.png")
    sets = transfer_sets([make_record(1, [0]), target], SPLIT)
    (found,) = sets.target
    assert found == {
        "file_name": "2.png",
        "height": 8,
        "width": 9,
        "image_id": 2,
        "image_labels": [1],
        "annotations": [],
        "supervision": "image",
    }
    assert sets.source[0]["annotations"][0]["segmentation"] == SQUARE


def test_target_masks_are_kept_only_where_asked_for():
    records = [make_record(1, [0]), make_record(2, [0, 1])]
    (found,) = transfer_sets(records, SPLIT, use_target_masks=True).target
    assert found == records[1] | {"image_labels": [1]}


def test_a_side_without_images_or_categories_is_named():
    source, target = make_record(1, [0]), make_record(2, [1])
    with pytest.raises(
        ValueError, match=r"no source image: none of the 2 images .*only categories"
    ):
        transfer_sets([target, make_record(3, [])], SPLIT)
    with pytest.raises(ValueError, match=r"no target image.*\(0 of them without a label\) shows a"):
        transfer_sets([source], SPLIT)
    with pytest.raises(ValueError, match="'all' leaves no target category: all 4 have masks"):
        transfer_sets([source, target], resolve_split("all", NAMES))


def test_a_source_without_any_mask_is_refused():
    boxes = make_record(1, [0], supervision="box")
    with pytest.raises(ValueError, match=r"None of the 1 source images of .*'odd' has a mask"):
        transfer_sets([boxes, make_record(2, [1])], SPLIT)
    sets = transfer_sets([boxes, make_record(3, [0]), make_record(2, [1])], SPLIT)
    assert image_ids(sets.source) == [1, 3]


def test_a_label_outside_the_class_list_is_named():
    wrong = make_record(7, [0]) | {"image_labels": [0, 4]}
    with pytest.raises(ValueError, match=r"Image 7 \(7.png\) has the labels \[4\].*indices 0 to 3"):
        transfer_sets([wrong], SPLIT)
    with pytest.raises(ValueError, match=r"Image 8 .* has the labels \[3\].*indices 0 to 1"):
        records_in_union([make_record(8, [3])], ("a", "b"), NAMES)


@given(st.integers(1, 200), st.integers(0, 5))
def test_smaller_subsets_lie_in_larger_ones(count, seed):
    records = [{"image_id": i} for i in range(count)]
    larger = records
    for fraction in SOURCE_FRACTIONS:
        subset = source_subset(records, fraction, seed)
        assert len(subset) == max(1, int(fraction * count + 0.5))
        ids = image_ids(subset)
        assert ids == sorted(ids)
        assert set(ids) <= set(image_ids(larger))
        larger = subset
    assert source_subset(records, 1.0, seed) == records


def test_subsets_depend_on_the_seed():
    records = [{"image_id": i} for i in range(100)]
    found = {tuple(image_ids(source_subset(records, 0.1, seed))) for seed in range(3)}
    assert len(found) == 3


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=f"source fraction is {fraction}. Allowed: above 0"):
        source_subset([{}], fraction, 0)


def test_coco60_and_voc_make_the_list_of_the_paper():
    coco60 = [name for name in COCO_THING_CLASSES if name not in VOC_CLASSES_IN_COCO]
    split = union_of_class_lists(coco60, VOC_CLASSES)
    assert len(split.class_names) == 80
    assert set(split.class_names) == set(COCO_THING_CLASSES)
    assert split.indices_without_masks == tuple(range(20))
    assert split.class_names[:4] == ("airplane", "bicycle", "bird", "boat")
    assert split.with_masks == tuple(coco60)


def test_categories_of_both_sides_are_named():
    with pytest.raises(ValueError, match=r"1 categories are source and target: airplane\. Target"):
        union_of_class_lists(["zebra", "airplane"], VOC_CLASSES)


def test_records_get_the_class_indices_of_the_union():
    split = union_of_class_lists(["zebra", "bear"], ["sofa", "bird"])
    assert split.class_names == ("couch", "bird", "zebra", "bear")
    records = [make_record(1, [1, 0, 1])]
    before = copy.deepcopy(records)
    (found,) = records_in_union(records, ["zebra", "bear"], split.class_names)
    assert found["image_labels"] == [2, 3]
    assert [a["class_index"] for a in found["annotations"]] == [3, 2, 3]
    assert records == before
    (found,) = records_in_union([make_record(1, [0])], ["sofa", "bird"], split.class_names)
    assert found["image_labels"] == [0]


def test_label_maps_get_the_labels_of_the_union(tmp_path):
    label_map = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    write_label_map(tmp_path / "map.png", label_map, num_classes=2)
    record = make_record(1, [0, 1], height=2, width=3, annotations=[])
    record["label_map_file_name"] = str(tmp_path / "map.png")
    (found,) = records_in_union([record], ["b", "c"], NAMES)
    expected = np.array([[0, 2, 3], [255, 3, 0]])
    np.testing.assert_array_equal(transfer_label_map(found, 4), expected)
    many = [f"class {i}" for i in range(300)] + ["b", "c"]
    (found,) = records_in_union([record], ["b", "c"], many)
    expected = np.array([[0, 301, 302], [65535, 302, 0]])
    np.testing.assert_array_equal(transfer_label_map(found, len(many)), expected)
    # Records that are in their own class list are read as everywhere.
    np.testing.assert_array_equal(transfer_label_map(record, 2), label_map)
    drawn = make_record(2, [3])
    np.testing.assert_array_equal(transfer_label_map(drawn, 4), semantic_label_map(drawn, 4))


def test_a_file_whose_class_is_not_in_the_union_is_refused():
    with pytest.raises(ValueError, match=r"1 of the 2 classes .* not among the 4 .*: zebra"):
        records_in_union([], ["a", "zebra"], NAMES)


def test_labels_without_a_pixel_are_not_visible():
    label_map = np.array([[0, 3], [255, 1]])
    assert visible_labels([0, 1, 2], label_map) == [0, 2]
    assert visible_labels([254], np.array([[65535]])) == []


def test_scenes_have_images_on_both_sides(tmp_path):
    json_file = generate_scenes(
        tmp_path, count=30, size=64, seed=0, num_categories=12, style="sparse"
    )
    data = load_coco(json_file, tmp_path)
    sets = transfer_sets(data.records, resolve_split("scenes_half", data.class_names))
    assert len(sets.source) + len(sets.target) == 30
    for record in sets.source:
        label_map = transfer_label_map(record, 12)
        assert visible_labels(record["image_labels"], label_map) == record["image_labels"]
        assert cv2.imread(record["file_name"]) is not None


def test_union_of_real_files(shared_data):
    """COCO as two files: 60 categories with masks, 20 with tags, under the names of VOC."""
    coco = shared_data / "coco_mini"
    data = load_coco(coco / "annotations" / "instances_train2017.json", coco / "train2017")
    whole = transfer_sets(data.records, resolve_split("coco_nonvoc", data.class_names))
    split = union_of_class_lists(
        [n for n in data.class_names if n not in VOC_CLASSES_IN_COCO], VOC_CLASSES
    )
    aligned = records_in_union(data.records, data.class_names, split.class_names)
    sets = transfer_sets(aligned, split)
    assert image_ids(sets.source) == image_ids(whole.source)
    for old, new in zip(whole.target, sets.target, strict=True):
        names = ({data.class_names[i] for i in old["image_labels"]},)
        assert names == ({split.class_names[i] for i in new["image_labels"]},)
    assert sets.num_unlabelled == whole.num_unlabelled == 1


def test_labels_are_those_of_the_label_map_where_a_record_says_nothing(tmp_path):
    label_map = np.array([[0, 3, 255], [1, 1, 0]])
    write_label_map(tmp_path / "map.png", label_map, num_classes=3)
    record = {"image_id": 7, "height": 2, "width": 3, "image_labels": [], "annotations": []}
    with_map = record | {"label_map_file_name": str(tmp_path / "map.png")}
    found = labelled_records([record, with_map, with_map | {"image_labels": [1]}], 3)
    assert [r["image_labels"] for r in found] == [[], [0, 2], [1]]
    assert with_map["image_labels"] == []
    (united,) = records_in_union(found[1:2], ("a", "b", "c"), ("c", "b", "x", "a"))
    assert united["image_labels"] == [0, 3]
    assert labels_of_record(united | {"image_labels": []}, 4) == [0, 3]
