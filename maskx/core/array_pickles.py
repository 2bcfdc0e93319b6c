"""Pickles of arrays, as Detectron, Caffe2 and Detectron2's model zoo write them, read as data."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_array_pickle"]


def read_array_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of arrays of numbers and plain containers, without running code from it.

    Args:
        path: a pickle of any protocol up to 4, written by Python 2 or 3.

    Returns:
        What it holds: keys of dictionaries are text, arrays are read-only.

    Raises:
        ValueError: the file is no pickle, is damaged, or holds more than that.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such weights file. Check the path.")
    with path.open("rb") as file:
        # As bytes, the strings of Python 2 that hold the arrays need not be copied.
        unpickler = _ArrayUnpickler(file, encoding="bytes")
        try:
            return _plain(unpickler.load(), {})
        except Exception as error:
            if unpickler.refused is not None:
                raise ValueError(
                    f"{path} holds code: {unpickler.refused} would be called by reading it. Only "
                    "arrays of numbers and plain containers are read, and nothing was run. Get "
                    "the file from its authors again."
                ) from error
            raise ValueError(
                f"{path} is no weights file (a Python pickle of arrays), or is damaged: "
                f"{type(error).__name__}: {error}. Get the file again."
            ) from error


def _plain(value: Any, made: dict[int, Any]) -> Any:
    """Keys of Python 2 are bytes, and so is its text; bytes that are no text stay as they are.

    Args:
        value: of the pickle.
        made: what was made of containers, by identity. One that is named many times is made once:
            forty lists, each twice the one before, are a small file with 10^12 values.
    """
    if isinstance(value, _PickledArray):
        return value.array
    if not isinstance(value, dict | list | tuple):
        return value.decode("latin1") if isinstance(value, bytes) else value
    if id(value) not in made:
        if isinstance(value, dict):
            plain = {_text(k): _plain(v, made) for k, v in value.items() if _is_text(k)}
        else:
            plain = [_plain(item, made) for item in value]
        made[id(value)] = plain
    return made[id(value)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes)


class _ArrayUnpickler(pickle._Unpickler):
    """Unpickler of arrays of numbers and containers that calls nothing of the file's choice."""

    # Even numpy's own functions are not called: they build object arrays and trust the state that
    # they are given. It is the unpickler in Python: the one in C calls what the process knows by
    # an extension code (`copyreg.add_extension`) without asking `find_class`.

    refused: str | None = None

    def get_extension(self, code: int) -> None:
        self.refused = f"extension code {code}"
        raise pickle.UnpicklingError(f"{self.refused} is not data")

    def find_class(self, module: str, name: str) -> "_Global":
        # numpy 2 writes numpy._core where numpy 1 wrote numpy.core.
        found = _GLOBALS.get((module.replace("numpy._core.", "numpy.core."), name))
        if found is None:
            self.refused = f"{module}.{name}"
            raise pickle.UnpicklingError(f"{self.refused} is not data")
        return found


class _Global:
    """What a name in the file stands for. It cannot be changed by the file, only called."""

    def __init__(self, make: Callable | None) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        if self._make is None:
            raise pickle.UnpicklingError("an array is made in an unknown way")
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        # Without this, a pickle could set attributes of a function: a change that lasts.
        raise pickle.UnpicklingError("the file changes a function")


class _PickledType:
    """Stands for ``numpy.dtype``: plain numbers only."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        code = _text(code)
        if not re.fullmatch(r"[fiub][1248]", code):
            raise pickle.UnpicklingError(
                f"an array has the type {code!r}; only numbers and booleans are weights"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _version, byte_order, *structure = state
        if any(part is not None for part in structure[:3]):
            raise pickle.UnpicklingError("an array has records; only numbers are weights")
        self.dtype = self.dtype.newbyteorder(_text(byte_order))


class _PickledArray:
    """Stands for ``numpy.ndarray`` and for numpy's scalars."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, pickled_type, is_fortran, data = state
        array = np.frombuffer(_data(data), pickled_type.dtype)
        self.array = array.reshape(shape, order="F" if is_fortran else "C")


def _scalar(pickled_type: _PickledType, data: str | bytes) -> _PickledArray:
    scalar = _PickledArray()
    scalar.__setstate__((1, (), pickled_type, False, data))
    return scalar


def _encode(text: str, encoding: str) -> bytes:
    """Undo how Python 3 writes bytes in protocol 2; no other codec is looked up."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes are encoded as {encoding!r}, only latin1 is read")
    return text.encode("latin1")


_GLOBALS = {
    ("numpy", "ndarray"): _Global(None),  # named by _reconstruct as the type to make
    ("numpy", "dtype"): _Global(_PickledType),
    ("numpy.core.multiarray", "_reconstruct"): _Global(lambda *_: _PickledArray()),
    ("numpy.core.multiarray", "scalar"): _Global(_scalar),
    ("_codecs", "encode"): _Global(_encode),
    ("__builtin__", "bytes"): _Global(lambda: b""),  # empty bytes in protocol 2
    ("collections", "OrderedDict"): _Global(dict),  # which has no attributes that could be set
}


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _data(value: str | bytes) -> bytes:
    return value.encode("latin1") if isinstance(value, str) else value
