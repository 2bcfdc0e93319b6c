import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.large_vocabularies import ade20k_150_classes, ade20k_847_classes, coco_stuff_classes
from maskx.data.prepare.coco_stuff import coco_stuff_class_of_id, coco_stuff_names
from maskx.systems.larvseg.samples import class_table, match_rows, take_rows, tied_classes

NAMES = st.sampled_from(["wall", "floor", "sky", "sea", "cat", "tv", "dog"])
LISTS = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.lists(NAMES, min_size=1, max_size=9), min_size=1
)


@given(LISTS)
def test_every_name_is_there_once_in_the_order_of_the_lists(lists):
    table = class_table(lists)
    assert len(set(table)) == len(table)
    assert set(table) == {name for names in lists.values() for name in names}
    first = next(iter(lists.values()))
    unique = sorted(set(first), key=first.index)
    assert list(table[: len(unique)]) == unique


def test_tied_classes_are_merged_and_said():
    stuff = ["wall", "sky", "wall"]
    assert class_table({"stuff": stuff, "ade": ["sea", "sky"]}) == ("wall", "sky", "sea")
    assert tied_classes(stuff) == {"wall": (0, 2)}


def test_the_tables_of_larvseg():
    stuff = [entry.renamed for entry in coco_stuff_classes()]
    ade150 = [entry.name for entry in ade20k_150_classes()]
    ade847 = [entry.name for entry in ade20k_847_classes()]
    table = class_table({"stuff": stuff, "ade": ade150})
    assert len(table) == 247
    assert {name: len(them) for name, them in tied_classes(stuff).items()} == {
        "wall": 7,
        "floor": 5,
        "ceiling": 2,
    }
    assert table[:160] == coco_stuff_names()
    indices = [table.index(name) for name in stuff]
    ids = [entry.category_id for entry in coco_stuff_classes()]
    assert dict(zip(ids, indices, strict=True)) == coco_stuff_class_of_id()
    # The names of the reference have hyphens for spaces, so four more do not match there: 913.
    assert len(class_table({"stuff": stuff, "ade": ade847})) == 909
    hyphens = [name.replace(" ", "-") for name in ade847]
    assert len(class_table({"stuff": stuff, "ade": hyphens})) == 913


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({}, "needs at least one class list"),
        ({"a": []}, "class list 'a' is empty"),
        ({"a": ["sky", " sea"]}, "class list 'a' has the name ' sea' at index 1"),
        ({"a": [""]}, "has the name '' at index 0"),
        ({"a": [3]}, "has the name 3 at index 0"),
    ],
)
def test_bad_lists_are_named(lists, message):
    with pytest.raises(ValueError, match=message):
        class_table(lists)


@given(st.lists(NAMES, min_size=1, unique=True), st.lists(NAMES, min_size=1, unique=True))
def test_rows_go_where_their_name_is(old, new):
    match = match_rows(old, new)
    filled = [f"new {name}" for name in new]
    for to, of in zip(match.new_rows, match.old_rows, strict=True):
        filled[to] = f"old {old[of]}"
    assert filled == [f"{'old' if name in old else 'new'} {name}" for name in new]
    assert match.only_new == tuple(name for name in new if name not in old)
    assert match.only_old == tuple(name for name in old if name not in new)


def test_rows_of_tied_names_are_refused():
    with pytest.raises(ValueError, match=r"old class list has 1 names .* 'wall' in the rows 0, 2"):
        match_rows(["wall", "sky", "wall"], ["sky"])
    with pytest.raises(ValueError, match="new class list has 1 names several times"):
        match_rows(["sky"], ["sky", "sky"])
    with pytest.raises(ValueError, match="The new class list is empty"):
        match_rows(["sky"], [])


def test_rows_are_taken_and_the_tensor_stays_as_it_is():
    own, found = torch.zeros(4, 2), torch.arange(6.0, dtype=torch.float64).view(3, 2)
    match = match_rows(("a", "b", "c"), ("x", "c", "y", "a"))
    rows = take_rows(own, found, match, what="rows")
    assert rows.tolist() == [[0, 0], [4, 5], [0, 0], [0, 1]]
    assert rows.dtype == torch.float32
    assert not own.any()


def test_rows_of_one_number_or_flag():
    own, match = torch.tensor([False, False, True]), match_rows(("a", "b"), ("a", "x", "b"))
    found = take_rows(own, torch.tensor([True, False]), match, what="flags")
    assert found.tolist() == [True, False, False]


def test_other_channels_are_refused():
    message = r"row of bank\.means has shape \(2, 3\) in the checkpoint, but \(4, 3\) in this model"
    match = match_rows(("a",), ("a",))
    with pytest.raises(ValueError, match=message):
        take_rows(torch.zeros(5, 4, 3), torch.zeros(5, 2, 3), match, what="bank.means")
