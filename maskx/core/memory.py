"""Freed memory that the allocator keeps."""

import ctypes
import functools
import sys
from collections.abc import Callable

__all__ = ["give_back_free_memory"]


def give_back_free_memory() -> None:
    """Give the system what was freed, but which malloc keeps for small objects to come.

    A large array comes from the system itself and can use nothing of it. Does nothing without
    glibc.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
