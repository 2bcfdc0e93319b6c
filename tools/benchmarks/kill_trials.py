"""Whether a training that is killed and resumed ends with the bits of one that was not.

A command is run once as it is. Then it is run again and again in other folders, killed (SIGKILL)
at random moments, also while a file is written, and started anew until it ends by itself. Every
checkpoint of every step must hold the same bits then. Processes are forked from this one: what it
has loaded they need not load. Not for Windows.
"""

import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["PLACE", "Trial", "kill_trials"]

PLACE = "{folder}"
"""Stands in the arguments of a command for the folder that it writes to."""
_MAX_KILLS = 3  # of a trial
_POLL = 0.002  # seconds between two looks at the files
_SUFFIXES = (".pth", ".safetensors")


@dataclass(frozen=True)
class Trial:
    """What became of a training that was killed.

    Attributes:
        kills: times that it was killed, at least 1 if it did not fail.
        in_writes: kills that left a file half written.
        differences: checkpoints that do not hold the bits of the uninterrupted training.
        failure: what it ended with, if not by itself; "" else.
        seconds: of all its processes.
    """

    kills: int
    in_writes: int
    differences: tuple[str, ...]
    failure: str
    seconds: float

    @property
    def is_equal(self) -> bool:
        """Whether it ended as if it had not been killed."""
        return not (self.failure or self.differences)


def kill_trials(
    command: Sequence[str], folder: Path, *, count: int, seed: int = 0
) -> Iterator[Trial]:
    """Run a Python tool uninterrupted, then kill it in so many trials.

    Args:
        command: the tool's file and its arguments, of which one or more hold ``{folder}``. It must
            go on with what it finds there.
        folder: for the trials, and the logs of their processes.

    Raises:
        RuntimeError: the command fails already when nothing kills it.
    """
    if not any(PLACE in part for part in command):
        raise ValueError(f"The command must have {PLACE} where it names the folder that it writes.")
    draw, started = random.Random(seed), time.monotonic()
    reference = folder / "uninterrupted"
    if _run(command, reference).code:
        raise RuntimeError(f"{command[0]} fails uninterrupted. {_last_words(reference)}")
    duration = time.monotonic() - started
    number = 0
    while number < count:
        trial = _try(command, folder / f"trial_{number}", reference, draw, duration)
        if trial.kills or not trial.is_equal:
            yield trial
            number += 1
        else:  # it ended before its first moment: the uninterrupted run was a slow one
            duration = min(duration, trial.seconds)
            shutil.rmtree(folder / f"trial_{number}")


def _try(
    command: Sequence[str], folder: Path, reference: Path, draw: random.Random, duration: float
) -> Trial:
    started, kills, in_writes = time.monotonic(), 0, 0
    for _ in range(draw.randint(1, _MAX_KILLS)):
        after, later = draw.uniform(0, 0.9 * duration), draw.uniform(0, 0.02)
        moment = _Moment(after, draw.random() < 0.5, later)
        end = _run(command, folder, moment)
        if not end.is_killed:
            break
        kills += 1
        in_writes += end.in_write
    else:
        end = _run(command, folder)
    seconds = time.monotonic() - started
    if end.code:
        return Trial(kills, in_writes, (), _last_words(folder), seconds)
    return Trial(kills, in_writes, tuple(_differences(reference, folder)), "", seconds)


class _Moment(NamedTuple):
    """When to kill: after so many seconds, or so soon after the file that is begun then."""

    after: float
    in_write: bool
    later: float


class _End(NamedTuple):
    """How a process ended; ``in_write``: a file that it had begun is left."""

    code: int
    is_killed: bool
    in_write: bool


def _run(command: Sequence[str], folder: Path, kill_at: _Moment | None = None) -> _End:
    """Run the command in a process of its own, which prints to ``<folder>.log``."""
    log, left_before = folder.with_name(f"{folder.name}.log"), _begun_files(folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    process, started = os.fork(), time.monotonic()
    if process == 0:
        _be_the_command([part.replace(PLACE, str(folder)) for part in command], log)
    ended = (0, 0)
    while kill_at is not None and ended == (0, 0):
        ended = os.waitpid(process, os.WNOHANG)
        is_time = time.monotonic() - started >= kill_at.after
        if is_time and kill_at.in_write:
            is_time = bool(_begun_files(folder) - left_before)
        if is_time and ended == (0, 0):
            time.sleep(kill_at.later)
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(_POLL)
    if ended == (0, 0):
        ended = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(ended[1])
    return _End(code, code == -signal.SIGKILL, bool(_begun_files(folder) - left_before))


def _be_the_command(arguments: list[str], log: Path) -> None:
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
        for descriptor in (1, 2):  # of libraries in C
            os.dup2(sys.stdout.fileno(), descriptor)
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)  # nothing of the process that it was forked from may run


def _begun_files(folder: Path) -> set[str]:
    files = (os.path.join(root, f) for root, _, names in os.walk(folder) for f in names)
    return {path for path in files if path.endswith(".partial")}


def _last_words(folder: Path) -> str:
    log = folder.with_name(f"{folder.name}.log")
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{log}: {lines[-1] if lines else 'nothing'}"


def _differences(reference: Path, folder: Path) -> Iterator[str]:
    paths = sorted(p for p in reference.rglob("*") if p.suffix in _SUFFIXES)
    if not paths:
        yield "there is no checkpoint"
    for path in paths:
        name = path.relative_to(reference)
        if not (folder / name).is_file() or _bits(path) != _bits(folder / name):
            yield str(name)


def _bits(path: Path) -> list[Any]:
    """All tensors of a file, in order: weights, and what an optimiser keeps."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        content: Any = load_file(path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
    found = []

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append((name, value.dtype, value.shape, value.contiguous().numpy().tobytes()))
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                collect(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for index, part in enumerate(value):
                collect(f"{name}.{index}", part)

    collect("", content)
    return found
