"""Concept splits, and what of a file each level may see."""

import copy
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.data.coco import CocoData, load_coco
from maskx.data.scenes.concepts import generate_concept_scenes
from maskx.data.tag_lists import tag_list
from maskx.systems.concept_mask.concept_sets import (
    ConceptSplit,
    concept_sets,
    fully_masked,
    read_concept_split,
    scene_concept_split,
    write_concept_split,
)

VOCABULARY = ("cat", "traffic light", "grass", "green", "dog")
SPLIT = ConceptSplit(VOCABULARY, boxed=("dog", "traffic_light"), masked=("dog",), unseen=("wolf",))


def annotation(number, class_index, *, mask=True, box=(1.0, 2.0, 5.0, 9.0), iscrowd=0):
    entry = {"id": number, "bbox": list(box), "class_index": class_index, "iscrowd": iscrowd}
    return entry | ({"segmentation": [[1, 2, 5, 2, 5, 9]]} if mask else {})


def data_of(class_names, *images):
    """CocoData of images given as (image labels, annotations)."""
    records = [
        {
            "file_name": f"/images/{i}.png",
            "height": 10,
            "width": 20,
            "image_id": i,
            "image_labels": sorted({*labels, *(a["class_index"] for a in annotations)}),
            "annotations": annotations,
            "supervision": "mask",
        }
        for i, (labels, annotations) in enumerate(images)
    ]
    return CocoData(Path("data.json"), records, class_names, tuple(range(len(class_names))), {})


# --- splits ---------------------------------------------------------------------------------------


def test_levels_follow_from_the_lists():
    assert SPLIT.boxed == ("dog", "traffic light")
    assert SPLIT.boxed_indices == (1, 4)
    assert SPLIT.masked_indices == (4,)
    assert SPLIT.levels == ("image", "box", "image", "image", "mask")
    assert [SPLIT.level_of(index) for index in (4, 1, 0, -1)] == ["mask", "box", "image", "unseen"]


@given(st.data())
@settings(max_examples=30)
def test_every_concept_has_one_level_and_masked_ones_have_boxes(data):
    names = data.draw(st.lists(st.text("abc", min_size=1), min_size=1, unique=True))
    boxed = data.draw(st.lists(st.sampled_from(names), unique=True))
    masked = data.draw(st.lists(st.sampled_from(boxed), unique=True)) if boxed else []
    split = ConceptSplit(tuple(names), tuple(boxed), tuple(masked))
    assert len(split.levels) == len(names)
    for index, name in enumerate(names):
        expected = "mask" if name in masked else "box" if name in boxed else "image"
        assert split.level_of(index) == expected
    assert set(split.masked_indices) <= set(split.boxed_indices)
    assert list(split.boxed_indices) == sorted(names.index(name) for name in boxed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": ()}, "The vocabulary is empty"),
        ({"vocabulary": (*VOCABULARY, "traffic_light")}, "'vocabulary' has 'traffic light' more"),
        ({"boxed": ("dog", "dog")}, "'boxed' has 'dog' more than once"),
        (
            {"boxed": ("dog", "trafic light")},
            "1 concepts of the list 'boxed' are not in 'vocabulary': 'trafic light'. Closest to "
            "'trafic light': 'traffic light'. Add them to 'vocabulary' or take them out of 'boxed'",
        ),
        ({"masked": ("cat",)}, "'masked' are not in 'boxed': 'cat'"),
        ({"unseen": ("wolf", "cat")}, "Unseen concepts are in the vocabulary: 'cat'"),
    ],
)
def test_lists_that_do_not_fit_together_are_refused(changes, message):
    lists = {"vocabulary": VOCABULARY, "boxed": ("dog",), "masked": ("dog",), "unseen": ("wolf",)}
    with pytest.raises(ValueError, match=message):
        ConceptSplit(**{**lists, **changes})


def test_an_index_outside_the_vocabulary_has_no_level():
    for index in (5, -2):
        with pytest.raises(ValueError, match=f"index {index} is outside .* 0 to 4, or -1"):
            SPLIT.level_of(index)


# --- split files ----------------------------------------------------------------------------------


def test_a_split_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "split.json"
    write_concept_split(path, SPLIT)
    assert read_concept_split(path) == SPLIT
    assert read_concept_split(path, VOCABULARY) == SPLIT


def test_the_vocabulary_may_come_from_elsewhere(tmp_path):
    path = tmp_path / "split.json"
    path.write_text('{"boxed": ["dog"], "masked": []}')
    assert read_concept_split(path, VOCABULARY) == ConceptSplit(VOCABULARY, ("dog",), ())
    with pytest.raises(ValueError, match="lists no 'vocabulary', and none was given"):
        read_concept_split(path)


def test_another_vocabulary_than_that_of_the_word_table_is_refused(tmp_path):
    path = tmp_path / "split.json"
    write_concept_split(path, SPLIT)
    with pytest.raises(
        ValueError, match=r"split\.json is of another vocabulary: it has 5 .* not 4"
    ):
        read_concept_split(path, VOCABULARY[:4])
    with pytest.raises(ValueError, match="concept 0 is 'cat', not 'dog'"):
        read_concept_split(path, VOCABULARY[::-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"boxed": ["cat"], "boxed": [], "masked": []}', "the key 'boxed' stands twice"),
        ('{"boxed": ' + "[" * 100_000, "is not valid JSON: maximum recursion depth"),
        ('{"boxed": [' + "9" * 5000 + '], "masked": []}', "is not valid JSON: Exceeds the limit"),
        ("[]", "holds list. Allowed is a JSON object"),
        ('{"boxed": []}', r"holds \['boxed'\]"),
        ('{"boxed": [], "masked": [], "masks": []}', "holds .*'masks'"),
        ('{"boxed": [], "masked": "dog"}', "masked must be a list of names, got 'dog'"),
        ('{"boxed": [1], "masked": []}', r"boxed must be a list of names, got \[1\]"),
        ('{"vocabulary": [], "boxed": [], "masked": []}', "The vocabulary is empty"),
    ],
)
def test_files_that_are_no_split_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_concept_split(path)
    assert str(path) in str(error.value)


def test_a_missing_split_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such concept split"):
        read_concept_split(tmp_path / "nothing.json")


# --- sets -----------------------------------------------------------------------------------------

# Another order and spelling than the vocabulary.
CLASSES = ("dog", "wolf", "traffic_light", "cat")


def test_each_level_gets_what_it_may_see_and_nothing_else(caplog):
    data = data_of(
        CLASSES,
        ([3], [annotation(1, 0), annotation(2, 1), annotation(3, 2)]),  # dog wolf light, cat tagged
        ([], [annotation(4, 3)]),  # a cat with a mask
        ([1], []),  # a wolf
        ([], [annotation(5, 0), annotation(6, 0, mask=False)]),  # two dogs, one mask
    )
    before = copy.deepcopy(data.records)
    with caplog.at_level(logging.INFO, logger="maskx"):
        sets = concept_sets(SPLIT, tags=data, boxes=data, masks=data)
    assert data.records == before

    assert [(r["image_id"], r["image_labels"]) for r in sets.tagged] == [
        (0, [0, 1, 4]),
        (1, [0]),
        (3, [4]),
    ]
    assert all(r["annotations"] == [] and r["supervision"] == "image" for r in sets.tagged)

    assert [r["image_id"] for r in sets.boxed] == [0, 3]
    boxes = [[(a["id"], a["class_index"]) for a in r["annotations"]] for r in sets.boxed]
    assert boxes == [[(1, 4), (3, 1)], [(5, 4), (6, 4)]]
    assert all("segmentation" not in a for r in sets.boxed for a in r["annotations"])
    assert sets.boxed[0]["annotations"][0]["bbox"] == [1.0, 2.0, 5.0, 9.0]
    assert {r["supervision"] for r in sets.boxed} == {"box"}

    assert [r["image_id"] for r in sets.masked] == [0]
    assert [a["class_index"] for a in sets.masked[0]["annotations"]] == [4]
    assert sets.masked[0]["annotations"][0]["segmentation"] == [[1, 2, 5, 2, 5, 9]]
    assert sets.masked[0]["supervision"] == "mask"
    for record in (sets.tagged[0], sets.boxed[0], sets.masked[0]):
        assert (record["file_name"], record["height"], record["width"]) == ("/images/0.png", 10, 20)
        assert record["image_labels"] == [0, 1, 4]

    assert sets.withheld == {
        "tags of unseen concepts": 2,
        "images without tags": 1,
        "boxes of concepts that are not to have any": 2,
        "images without usable boxes": 2,
        "masks of concepts that are not to have any": 3,
        "images without usable masks": 3,
    }
    said = [r.getMessage() for r in caplog.records if "Not in the training sets" in r.getMessage()]
    assert len(said) == 1
    assert "2 boxes of concepts that are not to have any" in said[0]


def test_nothing_of_an_unseen_concept_reaches_training(tmp_path):
    path = generate_concept_scenes(tmp_path, count=40, size=64, seed=0)
    data, split = load_coco(path, tmp_path), scene_concept_split()
    sets = concept_sets(split, tags=data, boxes=data, masks=data)
    assert len(sets.tagged) == 40
    assert any(data.class_names[i] in split.unseen for r in data.records for i in r["image_labels"])
    for records, indices in (
        (sets.boxed, split.boxed_indices),
        (sets.masked, split.masked_indices),
    ):
        assert {a["class_index"] for r in records for a in r["annotations"]} <= set(indices)
    for ours in sets.tagged:
        theirs = data.records[ours["image_id"]]["image_labels"]
        names = {data.class_names[index] for index in theirs} - set(split.unseen)
        assert {split.vocabulary[index] for index in ours["image_labels"]} == names


def test_concepts_that_no_image_shows_are_named(caplog):
    data = data_of(CLASSES, ([], [annotation(1, 0)]))
    concept_sets(SPLIT, tags=data, boxes=data, masks=data)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "data.json: 4 of 5 concepts have no usable tag in it: 'cat', 'traffic light', 'grass', "
        "'green'.",
        "data.json: 1 of 2 concepts have no usable box in it: 'traffic light'.",
    ]


def test_a_tag_list_gives_images_by_name():
    tags = tag_list(
        [[0, 1], [], [2]], ["dog", "wolf", "cat"], image_ids=["a.jpg", "b.jpg", "c.jpg"]
    )
    sets = concept_sets(SPLIT, tags=tags, tag_images="images")
    assert [(r["file_name"], r["image_labels"]) for r in sets.tagged] == [
        (str(Path("images") / "a.jpg"), [4]),
        (str(Path("images") / "c.jpg"), [0]),
    ]
    assert (sets.boxed, sets.masked) == ([], [])
    assert sets.withheld == {"tags of unseen concepts": 1, "images without tags": 1}


def test_images_of_a_tag_list_without_file_names_cannot_be_trained_on():
    with pytest.raises(ValueError, match=r"given tags: image 0 .* no file name.*'file_name'"):
        concept_sets(SPLIT, tags=tag_list([[0]], ["dog"]))


@pytest.mark.parametrize("kind", ["tags", "boxes", "masks"])
def test_a_concept_outside_the_vocabulary_is_refused_by_name(kind):
    data = data_of(("dog", "trafic light"), ([], [annotation(1, 0), annotation(2, 1)]))
    with pytest.raises(ValueError, match=r"data\.json: image 0 is labelled") as error:
        concept_sets(SPLIT, **{kind: data})
    for part in (
        "data.json",
        "image 0",
        "'trafic light'",
        "5 concepts",
        "'traffic light'",
        "unseen",
    ):
        assert part in str(error.value)


def test_classes_that_label_nothing_may_be_outside_the_vocabulary():
    data = data_of(("dog", "zebra"), ([], [annotation(1, 0)]))
    sets = concept_sets(SPLIT, tags=data, boxes=data, masks=data)
    assert len(sets.tagged) == len(sets.boxed) == len(sets.masked) == 1


@pytest.mark.parametrize(
    ("kind", "image", "message"),
    [
        ("tags", ([1], []), "data.json: no image has a tag of the vocabulary"),
        (
            "boxes",
            ([], [annotation(1, 3)]),
            "no image has usable boxes of the 2 concepts .*'boxed'",
        ),
        ("masks", ([], [annotation(1, 0, mask=False)]), "usable masks of the 1 concepts .*'dog'"),
    ],
)
def test_a_file_of_which_nothing_is_left_is_refused(kind, image, message):
    with pytest.raises(ValueError, match=message):
        concept_sets(SPLIT, **{kind: data_of(CLASSES, image)})


def test_what_has_no_mask_is_no_withheld_mask():
    data = data_of(CLASSES, ([], [annotation(1, 0), annotation(2, 3, mask=False)]))
    assert concept_sets(SPLIT, masks=data).withheld == {}


def test_fully_masked_classes():
    annotations = [annotation(1, 3), annotation(2, 1), annotation(3, 3, mask=False)]
    assert fully_masked(annotations) == [1]
    assert fully_masked([]) == []


def test_records_are_plain_json(tmp_path):
    path = generate_concept_scenes(tmp_path, count=3, size=64, seed=0)
    data = load_coco(path, tmp_path)
    sets = concept_sets(scene_concept_split(), tags=data, boxes=data, masks=data)
    json.dumps([sets.tagged, sets.boxed, sets.masked])
