"""Checkpoints that are whole or not there, on both hosts, and the lock of a run folder."""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from maskx.core.archives import find_damage
from maskx.core.files import remove_leftovers, written_whole
from maskx.core.text import listed

_LOCK_NAME = ".lock"


def write_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint whole, and read it back, before it replaces the one of that name.

    Raises:
        OSError: it cannot be written; the file of that name is as it was.
    """
    try:
        with written_whole(path, durable=True) as scratch:
            with scratch.open("wb") as file:
                torch.save(dict(content), file)
            damage = find_damage(scratch)
            if damage:
                raise OSError(f"what was written reads otherwise: {damage}")
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise OSError(
            f"'{path}' could not be written ({cause}). Nothing is lost: what was saved before is "
            "as it was. Make room or make the folder writable, and go on with --resume."
        ) from error


def newest_whole(paths: Iterable[str | os.PathLike[str]]) -> Path | None:
    """Return the checkpoint written last of those that are whole."""
    found = sorted((Path(path) for path in paths), key=lambda p: p.stat().st_mtime_ns)
    return next((path for path in reversed(found) if find_damage(path) is None), None)


def check_finite(weights: Mapping[str, Any], *, when: str, images: Iterable[Any] = ()) -> None:
    """Refuse weights that are not finite, before they replace good ones.

    Args:
        weights: tensors by name; anything else among them is passed over.
    """
    tensors = {
        name: value
        for name, value in weights.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }
    finite = [value.detach().isfinite().all().cpu() for value in tensors.values()]
    wrong = [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]
    if wrong:
        shown = listed([str(image) for image in images])
        learned = f" The last images were {shown}." if shown else ""
        raise FloatingPointError(
            f"{len(wrong)} of {len(tensors)} weights are not finite {when}, such as "
            f"{listed(wrong, 3)}. They were not saved; the checkpoint before is as it was."
            f"{learned} Lower the learning rate, or look at these images, then go on with --resume."
        )


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a run folder, so that no other process writes into it; what killed ones left goes.

    A process may hold a folder several times over. The lock is free when the process ends.
    """
    folder = Path(folder)
    lock = _lock(str(folder.resolve() / _LOCK_NAME), os.getpid())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"Another process is at work in '{folder}'. Wait until it ends, or choose another "
            "output folder."
        ) from error
    except OSError as error:
        raise OSError(
            f"'{folder}' cannot be written to ({error.strerror or error}). Make it writable, or "
            "choose another output folder."
        ) from error
    try:
        remove_leftovers(folder)
        yield
    finally:
        lock.release()


@functools.cache
def _lock(path: str, process: int) -> FileLock:
    """The lock of a file, one in each process: it counts how often it is held."""
    return FileLock(path)


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system that another one hides."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
