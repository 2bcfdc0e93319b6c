import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from maskx.core.memory import give_back_free_memory


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc"
)
def test_memory_that_was_freed_below_what_is_in_use_goes_back_to_the_system():
    arrays = [np.ones(2**16, np.uint8) for _ in range(2000)]
    del arrays[:-1]
    before = resident_bytes()
    give_back_free_memory()
    assert before - resident_bytes() > 64e6
    assert arrays[0].all()


def test_without_it_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    give_back_free_memory()
