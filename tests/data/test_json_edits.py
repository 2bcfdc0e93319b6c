import json

from hypothesis import given
from hypothesis import strategies as st

from maskx.data.json_edits import edited, members, rows, with_members

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)
INDENTS = st.sampled_from([None, 0, 3])


def test_everything_else_stays_to_the_letter():
    text = '{ "a" : 1.50,\n\t"b":[1e2 , {"c":"\\u00e9}"}],"d":null\n}'
    changed = with_members(text, {"d": [1], "e": "new"})
    assert changed == '{ "a" : 1.50,\n\t"b":[1e2 , {"c":"\\u00e9}"}],"d":[1], "e": "new"\n}'


@given(content=OBJECTS, changes=OBJECTS, indent=INDENTS)
def test_only_what_is_asked_for_changes(content, changes, indent):
    text = json.dumps(content, indent=indent)
    assert json.loads(with_members(text, changes)) == content | changes
    assert with_members(text, {}) == text


@given(content=OBJECTS, indent=INDENTS, before=st.sampled_from(["", "\ufeff", "\n  "]))
def test_members_are_where_their_values_are(content, indent, before):
    text = before + json.dumps(content, indent=indent)
    found = list(members(text, len(before)))
    assert [member.key for member in found] == list(content)
    assert [json.loads(text[m.start : m.end]) for m in found] == list(content.values())


@given(content=OBJECTS, indent=INDENTS, before=st.sampled_from(["", "\ufeff", "\n  "]))
def test_rows_are_what_lists_hold_and_other_values_whole(content, indent, before):
    text = before + json.dumps(content, indent=indent)
    expected = [
        (key, each)
        for key, value in content.items()
        for each in (value if isinstance(value, list) else [value])
    ]
    found = list(rows(text))
    assert [(key, value) for key, value, _, _ in found] == expected
    assert [json.loads(text[start:end]) for *_, start, end in found] == [v for _, v in expected]


def test_parts_are_replaced_in_their_order():
    assert edited("abcdef", [(0, 1, "X"), (2, 2, "-"), (4, 6, "")]) == "Xb-cd"
