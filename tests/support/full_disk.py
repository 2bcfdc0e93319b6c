"""A disk on which no file can grow beyond a size, of POSIX."""

import contextlib
import signal

import pytest


@contextlib.contextmanager
def full_disk(size):
    """Let no file grow beyond so many bytes."""
    resource = pytest.importorskip("resource", reason="limits of file sizes are of POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
