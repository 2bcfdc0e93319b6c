"""Changes to a JSON text that leave every other character of it as it was.

A parsed and rewritten file is not the same file: numbers lose digits or gain them, and layout goes.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Member", "edited", "members", "rows", "with_members"]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


class Member(NamedTuple):
    """Where the value of a key of an object is.

    Attributes:
        key: the key.
        start: of the value.
        end: behind the value.
    """

    key: str
    start: int
    end: int


def members(text: str, start: int = 0) -> Iterator[Member]:
    """Find the members of an object.

    Args:
        text: valid JSON.
        start: where its brace is, or white space before it.
    """
    position = _skip(text, start) + 1
    while text[position := _skip(text, position)] != "}":
        if text[position] == ",":
            position = _skip(text, position + 1)
        key, position = _DECODER.raw_decode(text, position)
        begin = _skip(text, _skip(text, position) + 1)  # behind the colon
        position = _DECODER.raw_decode(text, begin)[1]
        yield Member(key, begin, position)


def rows(text: str) -> Iterator[tuple[str, Any, int, int]]:
    """Go through a file that is an object with long lists, without holding what is in them.

    Args:
        text: valid JSON, perhaps behind a byte order mark.

    Yields:
        The key of a member, an element of the list that it is, or its value where it is none, and
        where that starts and ends.
    """
    position = text.index("{") + 1
    while text[position := _skip(text, position)] != "}":
        if text[position] == ",":
            position = _skip(text, position + 1)
        key, position = _DECODER.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)  # behind the colon
        if text[position] != "[":
            value, end = _DECODER.raw_decode(text, position)
            yield key, value, position, end
            position = end
            continue
        position += 1
        while text[position := _skip(text, position)] != "]":
            if text[position] == ",":
                position = _skip(text, position + 1)
            value, end = _DECODER.raw_decode(text, position)
            yield key, value, position, end
            position = end
        position += 1


def with_members(text: str, changes: Mapping[str, Any]) -> str:
    """Return the text of an object in which some keys have new values.

    Args:
        text: of the object.
        changes: keys it has are changed where they are, others stand at its end.
    """
    found = list(members(text))
    known = {member.key for member in found}
    edits = [(m.start, m.end, _dumped(changes[m.key])) for m in found if m.key in changes]
    added = [f"{json.dumps(k)}: {_dumped(v)}" for k, v in changes.items() if k not in known]
    if added:
        end = found[-1].end if found else text.index("{") + 1
        edits.append((end, end, (", " if found else "") + ", ".join(added)))
    return edited(text, edits)


def edited(text: str, edits: Sequence[tuple[int, int, str]]) -> str:
    """Replace parts of a text.

    Args:
        text: the text.
        edits: start and end of each part, in their order and apart, and what is there instead.
    """
    parts, position = [], 0
    for start, end, new in edits:
        parts += [text[position:start], new]
        position = end
    return "".join([*parts, text[position:]])


def _skip(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()


def _dumped(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
