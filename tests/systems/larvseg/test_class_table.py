import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.large_vocabularies import ade20k_150_classes, ade20k_847_classes, coco_stuff_classes
from maskx.data.prepare.coco_stuff import coco_stuff_class_of_id, coco_stuff_names
from maskx.systems.larvseg.class_table import class_table, match_rows

NAMES = st.sampled_from(["wall", "floor", "sky", "sea", "cat", "tv", "dog"])
LISTS = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.lists(NAMES, min_size=1, max_size=9), min_size=1
)


@given(LISTS)
def test_every_index_leads_to_its_name_and_every_name_is_there_once(lists):
    table = class_table(lists)
    assert len(set(table.names)) == len(table.names)
    assert set(table.names) == {name for names in lists.values() for name in names}
    for data_set, names in lists.items():
        assert [table.names[index] for index in table.indices[data_set]] == names
        assert [table.names[i] for i in table.classes_of(data_set)] == sorted(
            set(names), key=table.names.index
        )
        labels = table.aligned_labels(data_set)
        for index, name in enumerate(names):
            assert table.names[labels[index + 1] - 1] == name
        assert labels[255] == 255


def test_tied_classes_are_merged_and_said():
    table = class_table({"stuff": ["wall", "sky", "wall"], "ade": ["sea", "sky"]})
    assert table.names == ("wall", "sky", "sea")
    assert table.indices == {"stuff": (0, 1, 0), "ade": (2, 1)}
    assert table.tied == {"stuff": {"wall": (0, 2)}, "ade": {}}
    np.testing.assert_array_equal(
        table.aligned_labels("stuff")[np.array([[1, 2], [3, 255]])], [[1, 2], [1, 255]]
    )
    assert table.describe().splitlines() == [
        "3 classes by name, of 2 class lists.",
        "stuff: 3 classes, 2 names; merged: wall x2.",
        "ade: 2 classes, 2 names; merged: none.",
    ]


def test_the_tables_of_larvseg():
    stuff = [entry.renamed for entry in coco_stuff_classes()]
    ade150 = [entry.name for entry in ade20k_150_classes()]
    ade847 = [entry.name for entry in ade20k_847_classes()]
    table = class_table({"stuff": stuff, "ade": ade150})
    assert len(table.names) == 247
    assert {name: len(them) for name, them in table.tied["stuff"].items()} == {
        "wall": 7,
        "floor": 5,
        "ceiling": 2,
    }
    assert table.names[:160] == coco_stuff_names()
    ids = [entry.category_id for entry in coco_stuff_classes()]
    assert dict(zip(ids, table.indices["stuff"], strict=True)) == coco_stuff_class_of_id()
    # The names of the reference have hyphens for spaces, so four more do not match there: 913.
    assert len(class_table({"stuff": stuff, "ade": ade847}).names) == 909
    hyphens = [name.replace(" ", "-") for name in ade847]
    assert len(class_table({"stuff": stuff, "ade": hyphens}).names) == 913


def test_synsets_of_one_name_must_agree():
    lists = {"a": ["crane", "tv"], "b": ["crane", "television"]}
    same = {"a": {"crane": "n02012849"}, "b": {"crane": "n02012849"}}
    assert class_table(lists, synsets=same).shared_synsets == {}
    with pytest.raises(
        ValueError,
        match=r"'crane' is n02012849 in 'a' but n03126707 in 'b'\. .*'crane \(n03126707\)'",
    ):
        class_table(lists, synsets={**same, "b": {"crane": "n03126707"}})
    with pytest.raises(ValueError, match="1 names that class list 'b' does not have, such as 'tv'"):
        class_table(lists, synsets={"b": {"tv": "n04405907"}})


def test_several_names_of_one_synset_are_said():
    lists = {"a": ["tv"], "b": ["television"]}
    synsets = {"a": {"tv": "n04405907"}, "b": {"television": "n04405907"}}
    table = class_table(lists, synsets=synsets)
    assert table.names == ("tv", "television")
    assert table.shared_synsets == {"n04405907": ("tv", "television")}
    assert "n04405907 is kept as 2 classes: tv, television." in table.describe()


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


def test_an_unknown_data_set_is_an_error():
    table = class_table({"a": ["sky"]})
    for ask in (table.classes_of, table.aligned_labels):
        with pytest.raises(ValueError, match=r"no data set 'b'\. Allowed: a"):
            ask("b")


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
