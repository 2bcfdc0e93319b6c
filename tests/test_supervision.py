import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.large_vocabularies import ade20k_150_classes, ade20k_847_classes
from maskx.data.scenes.generator import half_split_names
from maskx.data.splits import resolve_split, split_names
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES_IN_COCO
from maskx.supervision import CategorySplit, Supervision

# Class indices of the VOC classes in COCO, from the reference.
VOC_INDICES = (*range(7), 8, *range(14, 20), 39, 56, 57, 58, 60, 62)


def test_voc_split_has_the_reference_indices():
    split = resolve_split("coco_voc", COCO_THING_CLASSES)
    assert split.indices_with_masks == VOC_INDICES
    reverse = resolve_split("coco_nonvoc", COCO_THING_CLASSES)
    assert reverse.indices_with_masks == split.indices_without_masks
    assert reverse.without_masks == VOC_CLASSES_IN_COCO


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("coco_random_20_1", (61, 57, 77, 6, 45, 8)),
        ("coco_random_30_1", (49, 3, 25, 37, 15, 51)),
        ("coco_random_20_2", (39, 72, 3, 47, 62, 79)),
        ("coco_random_60_5", (55, 68, 75, 15, 42, 52)),
    ],
)
def test_random_splits_are_the_draws_of_the_reference(name, first):
    split = resolve_split(name, COCO_THING_CLASSES)
    assert set(first) <= set(split.indices_with_masks)
    assert len(split.with_masks) == int(name.split("_")[2])


def test_the_first_random_split_in_full():
    split = resolve_split("coco_random_20_1", COCO_THING_CLASSES)
    expected = (6, 8, 9, 12, 13, 27, 34, 35, 45, 47, 50, 54, 55, 57, 59, 61, 63, 66, 73, 77)
    assert split.indices_with_masks == expected


def test_random_splits_of_any_class_list():
    names = tuple(f"class {i}" for i in range(9))
    draws = {resolve_split(f"random_4_{trial}", names).with_masks for trial in (1, 2, 3)}
    assert len(draws) == 3
    assert all(len(draw) == 4 and set(draw) < set(names) for draw in draws)
    assert resolve_split("random_4_1", names).with_masks in draws
    with pytest.raises(ValueError, match=r"draws 9 categories .* has 9\. Allowed: 1 to 8"):
        resolve_split("random_9_1", names)


COCO_SPLITS = [n for n in split_names() if n != "scenes_half" and not n.startswith("ade")]


@pytest.mark.parametrize("name", COCO_SPLITS)
def test_every_named_split_is_a_partition(name):
    split = resolve_split(name, COCO_THING_CLASSES)
    assert sorted(split.indices_with_masks + split.indices_without_masks) == list(range(80))
    assert set(split.groups()["A"]) | set(split.groups()["B"]) == set(split.groups()["all"])


def test_all_and_scenes_half():
    assert resolve_split("all", ("a", "b")).without_masks == ()
    names = tuple(half_split_names(8))
    from maskx.data.scenes.generator import THING_CATEGORIES

    classes = [category.name for category in THING_CATEGORIES[:8]]
    assert resolve_split("scenes_half", classes).with_masks == names


def test_the_split_of_visual_genome_gives_masks_to_the_classes_of_coco():
    others = [f"thing_{i}.n.01" for i in range(2920)]
    split = resolve_split("vg3k_coco", [*COCO_THING_CLASSES, *others])
    assert split.indices_with_masks == tuple(range(80))
    assert split.without_masks == tuple(others)
    with pytest.raises(ValueError, match="'vg3k_coco' names 'bicycle', which is not among the 2"):
        resolve_split("vg3k_coco", ("person", "window.n.01"))


@pytest.mark.parametrize(
    ("name", "num_base", "num_novel"),
    [
        ("ade150_raw", 58, 92),
        ("ade150_renamed", 63, 87),
        ("ade847_raw", 92, 755),
        ("ade847_renamed", 94, 753),
    ],
)
def test_the_splits_of_ade20k_have_the_numbers_of_larvseg(name, num_base, num_novel):
    classes = ade20k_150_classes() if name.startswith("ade150") else ade20k_847_classes()
    split = resolve_split(name, [entry.name for entry in classes])
    assert (len(split.with_masks), len(split.without_masks)) == (num_base, num_novel)
    assert {"wall", "person"} <= set(split.with_masks)
    assert {"painting", "sofa"} <= set(split.without_masks)
    with pytest.raises(ValueError, match=f"'{name}' names 'wall', which is not among the 80"):
        resolve_split(name, COCO_THING_CLASSES)


@given(st.permutations([f"c{i}" for i in range(6)]), st.integers(1, 5))
def test_splits_follow_names_whatever_the_class_order(order, size):
    chosen = tuple(f"c{i}" for i in range(size))
    split = CategorySplit("s", tuple(order), chosen, tuple(set(order) - set(chosen)))
    assert {order[i] for i in split.indices_with_masks} == set(chosen)


@pytest.mark.parametrize(
    ("file_name", "content"),
    [
        ("a.txt", "cat\n\n# a comment\nhot dog  # with a space\n"),
        ("a.json", json.dumps(["hot dog", "cat"])),
        ("b.json", json.dumps({"with_masks": ["cat", "hot dog"]})),
        ("c.json", json.dumps({"without_masks": ["dog"]})),
        ("d.json", json.dumps({"with_masks": ["hot dog", "cat"], "without_masks": ["dog"]})),
        ("e.json", json.dumps({"with_masks": ["cat", "hot dog", "cat"], "without_masks": ["dog"]})),
        ("f.txt", "\ufeffcat\nhot dog"),
    ],
)
def test_split_files(tmp_path, file_name, content):
    path = tmp_path / file_name
    path.write_text(content)
    split = resolve_split(path, ["cat", "dog", "hot dog"])
    assert split.with_masks == ("cat", "hot dog")
    assert split.indices_with_masks == (0, 2)
    assert split.without_masks == ("dog",)


@pytest.mark.parametrize(
    ("file_name", "content", "words"),
    [
        ("a.txt", "catt", r"names 'catt'.*3 categories.*Closest: 'cat'"),
        ("a.txt", "# nobody", "leaves no category with masks"),
        ("a.json", "[]", "leaves no category with masks"),
        ("a.json", '["cat"', "not valid JSON"),
        ("a.json", '{"with_masks": ["cat"], "with_masks": ["dog"]}', "'with_masks' stands twice"),
        ("a.json", '{"masks": ["cat"]}', "with_masks and/or without_masks"),
        ("a.json", "{}", "with_masks and/or without_masks"),
        ("a.json", "[1, 2]", "must be a list of names"),
        ("a.json", '{"with_masks": ["cat", "dog"], "without_masks": ["dog", "hot dog"]}', "both"),
        ("a.json", '{"with_masks": ["cat"], "without_masks": ["dog"]}', "nothing of 'hot dog'"),
    ],
)
def test_bad_split_files_are_named(tmp_path, file_name, content, words):
    path = tmp_path / file_name
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        resolve_split(path, ["cat", "dog", "hot dog"])
    assert file_name in str(error.value)


def test_a_split_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt' is not text in UTF-8"):
        resolve_split(tmp_path / "latin.txt", ["cat"])


def test_scenes_half_is_for_scenes():
    with pytest.raises(ValueError, match=r"'scenes_half' is for generated scenes.*other"):
        resolve_split("scenes_half", ("cat", "dog", "cow"))


def test_unknown_split_name_gets_the_closest_ones():
    with pytest.raises(FileNotFoundError, match="Did you mean 'coco_voc'"):
        resolve_split("coco_vox", COCO_THING_CLASSES)


def test_a_coco_split_needs_coco_categories():
    with pytest.raises(ValueError, match="'coco_voc' names 'person'"):
        resolve_split("coco_voc", ("ring", "cross"))


def test_supervision_levels_are_strings():
    assert [level.value for level in Supervision] == ["image", "box", "mask"]
    assert Supervision("box") == "box"
