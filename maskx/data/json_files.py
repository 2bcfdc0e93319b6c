"""JSON files of any size and origin: fast where they are plain, clear errors where they are not.

A file of gigabytes is read by `msgspec`, if it is installed; whatever that refuses, or what is not
plain for it (NaN, a key that stands twice), is read again by Python's own parser, which says why.
"""

import contextlib
import functools
import gc
import itertools
import json
import operator
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import msgspec
except ImportError:  # all files are read by Python's own parser then: the same, but slower
    msgspec = None
try:
    import simdjson
except ImportError:  # numbers become Python's before they are packed
    simdjson = None

__all__ = ["MISSING", "Rows", "paused_collector", "read_json", "read_json_rows"]

MISSING: Any = object() if msgspec is None else msgspec.UNSET
"""Stands for a value that is not there."""

_OPEN = ord("[")
_MANY_OBJECTS = 1_000_000
_MAX_DIGITS = 4300  # of an integer, as Python's own limit is


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Pause the cyclic garbage collector, which visits millions of new objects again and again.

    What is made meanwhile must have no cycles.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if gc.get_count()[0] > _MANY_OBJECTS:
                # Else the first collection visits all of them, and each full one again.
                gc.freeze()
            gc.enable()


class Rows:
    """A list of JSON objects of which some keys are asked for, column by column.

    Args:
        rows: dicts; None if columns are given.
        columns: Values by key, `MISSING` where a row lacks it.
        raw_key: The key whose column holds JSON text.
        path: File that they are from, for errors in that text.
    """

    def __init__(
        self,
        rows: list[Any] | None,
        columns: dict[str, list[Any]] | None = None,
        raw_key: str | None = None,
        path: Path | None = None,
    ) -> None:
        self._rows, self._columns, self._raw_key, self._path = rows, columns or {}, raw_key, path

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())) if self._rows is None else self._rows)

    def __getitem__(self, index: int) -> Any:
        """Return a row as `json.loads` would, of columns with the keys that were asked for."""
        if self._rows is not None:
            return self._rows[index]
        values = {key: column[index] for key, column in self._columns.items()}
        found = {key: value for key, value in values.items() if value is not MISSING}
        if self._raw_key in found:
            found[self._raw_key] = _parse(self._path, found[self._raw_key])
        return found

    def take(self, start: int, stop: int) -> "Rows":
        """Return some rows, which are forgotten here so that their memory can go with them."""
        if self._rows is not None:
            return Rows(_taken(self._rows, start, stop))
        columns = {key: _taken(column, start, stop) for key, column in self._columns.items()}
        return Rows(None, columns, self._raw_key, self._path)

    def column(self, key: str) -> list[Any]:
        """Return the values of a key; `MISSING` where a row lacks it or is no object."""
        if self._rows is None:
            return self._columns[key]
        return [r.get(key, MISSING) if isinstance(r, dict) else MISSING for r in self._rows]

    def number_lists(self, key: str) -> tuple[array, np.ndarray, np.ndarray]:
        """Return the values of the raw key that are lists of lists of numbers, end to end.

        Returns:
            All numbers; the length of each list; how many lists each row has, 0 where there is none
            and -1 where the value is something else.
        """
        values = self.column(key)
        if self._rows is None:
            flat = None if simdjson is None else _flattened(values)
            if flat is not None:
                return flat
            text = b"[%b]" % b",".join([b"null" if v is MISSING else v for v in values])
            try:
                values = msgspec.json.decode(text)
            except msgspec.DecodeError:  # such as of a number that no float holds
                values = _parse(self._path, text)
        numbers, sizes, num_lists = array("d"), [], []
        for value in values:
            packed = [] if value is None or value is MISSING else _packed(value)
            num_lists.append(-1 if packed is None else len(packed))
            for part in packed or ():
                numbers.frombytes(part)
                sizes.append(len(part) // 8)
        return numbers, np.array(sizes, np.int64), np.array(num_lists)


def _flattened(texts: list[Any]) -> tuple[array, np.ndarray, np.ndarray] | None:
    """Return the numbers of JSON texts; None if a list holds something else than lists of them."""
    num_lists = np.array([-(text is not MISSING and text != b"null") for text in texts])
    where = [index for index, text in enumerate(texts) if text is not MISSING and text[0] == _OPEN]
    joined = b"[%b]" % b",".join([texts[index] for index in where])
    try:
        parsed = simdjson.Parser().parse(joined)
        sizes = [[len(part) for part in value] for value in parsed]
        numbers = array("d")
        numbers.frombytes(parsed.as_buffer(of_type="d"))
    except (TypeError, ValueError, RuntimeError):
        return None
    flat = list(itertools.chain.from_iterable(sizes))
    if _num_bytes(joined, b"[") != 1 + len(sizes) + len(flat):  # a list in one of these
        return None
    num_lists[where] = list(map(len, sizes))
    return numbers, np.array(flat, np.int64), num_lists


def _packed(value: Any) -> list[bytes] | None:
    """Pack lists of numbers; None if a value is something else."""
    try:
        return [_packer(len(part))(*part) for part in value] if type(value) is not dict else None
    except (struct.error, OverflowError, TypeError):
        return None


@functools.cache
def _packer(size: int) -> Callable[..., bytes]:
    return struct.Struct(f"{size}d").pack


def _taken(values: list[Any], start: int, stop: int) -> list[Any]:
    taken = values[start:stop]
    values[start:stop] = [None] * len(taken)
    return taken


def read_json(path: str | os.PathLike[str], *, what: str = "JSON file") -> Any:
    """Parse a JSON file.

    Args:
        path: UTF-8, with or without a byte order mark.

    Raises:
        ValueError: It is no JSON, names a key twice, or holds what is too deep or too long.
    """
    return _parse(Path(path), _read_bytes(path, what))


def read_json_rows(
    path: str | os.PathLike[str],
    section: str,
    keys: Sequence[str],
    raw_key: str,
    *,
    what: str = "JSON file",
) -> tuple[Any, Rows | None]:
    """Parse a JSON file that is an object with one long list of objects in it.

    Args:
        keys: Keys of its objects that are read.
        raw_key: One more, whose values are long.

    Returns:
        What the file holds, without that list, and the list; None where there is no such list.

    Raises:
        ValueError: As `read_json`.
    """
    content = _read_bytes(path, what)
    plain = None if msgspec is None else _read_plain(Path(path), content, section, keys, raw_key)
    if plain is not None:
        return plain
    parsed = _parse(Path(path), content)
    if not isinstance(parsed, dict) or not isinstance(parsed.get(section), list):
        return parsed, None
    return parsed, Rows(parsed.pop(section))


def _read_bytes(path: str | os.PathLike[str], what: str) -> bytes:
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{os.fspath(path)}: there is no such {what}. Check the path and the root folder of "
            "the data sets."
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{os.fspath(path)}: is a folder. Give the {what} itself.") from None


def _read_plain(
    path: Path, content: bytes, section: str, keys: Sequence[str], raw_key: str
) -> tuple[dict[str, Any], Rows] | None:
    """Read what is plain; None where it is not, and Python's parser has to say why."""
    fields = [(key, Any, MISSING) for key in keys]
    row_type = msgspec.defstruct("Row", [*fields, (raw_key, msgspec.Raw, MISSING)], gc=False)
    try:
        if not content.isascii():
            content.decode("utf-8")  # what is left raw is not looked at otherwise
        with paused_collector():
            parts = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
            if section not in parts:
                return None
            text = parts.pop(section)
            rest = {key: msgspec.json.decode(part) for key, part in parts.items()}
            rows = msgspec.json.decode(text, type=list[row_type])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    # Of a key that stands twice the last wins, unseen. But there are as many colons behind a quote
    # as there are keys, unless a string has some or a row has keys that were not asked for.
    span = _address(text) - _address(content), len(memoryview(text))
    span = span[0], sum(span)
    in_rest = _num_colons(content, 0, span[0]) + _num_colons(content, span[1])
    if in_rest != 1 + len(rest) + sum(map(_num_keys, rest.values())):
        return None
    columns = {key: list(map(operator.attrgetter(key), rows)) for key in (*keys, raw_key)}
    found = {key: len(rows) - column.count(MISSING) for key, column in columns.items()}
    num_keys = sum(found.values())
    # Copies, so that the file is not kept: what was read of it grows while these are forgotten.
    raw = [value if value is MISSING else bytes(value) for value in columns[raw_key]]
    # Objects in the rows are mostly run-length masks, of two keys each.
    others = (value for value in raw if value is not MISSING and value[0] != _OPEN)
    plain = (num_keys, num_keys + 2 * sum(value.count(b'"counts"') for value in others))
    if _num_bytes(content, b":", *span) not in plain and _num_colons(content, *span) not in plain:
        for key, number in found.items():
            if content.count(b'"%b"' % key.encode(), *span) != number:
                return None
    return rest, Rows(None, {**columns, raw_key: raw}, raw_key, path)


def _address(buffer: Any) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data


def _num_bytes(text: bytes, byte: bytes, start: int = 0, stop: int | None = None) -> int:
    values, step = np.frombuffer(text, np.uint8)[start:stop], 2**20  # fast, and without a copy
    blocks = (values[i : i + step] for i in range(0, len(values), step))
    return sum(int(np.count_nonzero(block == ord(byte))) for block in blocks)


def _num_colons(text: bytes, *span: int) -> int:
    return text.count(b'":', *span) or text.count(b'" :', *span)


def _num_keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_num_keys, value.values()))
    if isinstance(value, list):
        if all(type(item) is dict for item in value):  # as the images: at once
            number = sum(map(len, value))
            inner = [v for item in value for v in item.values() if type(v) in (dict, list)]
            return number + sum(map(_num_keys, inner))
        return sum(map(_num_keys, value))
    return 0


def _parse(path: Path, content: bytes) -> Any:
    text = ""
    try:
        text = content.decode("utf-8")
        with paused_collector():
            return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text ({error}). Give the JSON file, unpacked"
    except json.JSONDecodeError as error:
        is_whole = text.rstrip().endswith(("}", "]"))
        problem = (
            f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; the "
            f"file has {len(content)} bytes"
            f"{'' if is_whole else '''; it does not end with '}': truncated'''}. Download or "
            "write it again"
        )
    except RecursionError:
        problem = "is nested too deep to be read. No annotation format is; write it again"
    except _BadValueError as error:
        problem = f"{error}. Correct the file"
    raise ValueError(f"{path}: {problem}.")


class _BadValueError(ValueError):
    pass


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _BadValueError(
            f"repeats the key {repeated!r:.80} in one object, of which only the last would be read"
        )
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise _BadValueError(f"holds an integer of {len(text)} digits, {text[:20]}...")
    return int(text)
