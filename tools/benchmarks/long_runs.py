"""Whether memory and open files stay flat in long runs of a command.

A command runs in a process of its own, which notes its resident memory and its open files every
so many steps of each optimizer. Memory that grows by less than a few percent after the first few
hundred steps is that of the allocator; what leaks grows with every step.
"""

import json
import os
import runpy
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LongRun", "watch"]

_MARK = "long-run note: "
_EVERY = 50  # steps between two notes
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class LongRun:
    """What one training of a command took.

    Attributes:
        steps: number of the last note, counted from 1.
        start_bytes: resident memory after the steps that warm up.
        end_bytes: largest of the last three notes.
        start_files: open files after the steps that warm up.
        end_files: at the end.
    """

    steps: int
    start_bytes: int
    end_bytes: int
    start_files: int
    end_files: int

    @property
    def growth(self) -> float:
        """Growth of the memory, as a share of what it was."""
        return self.end_bytes / self.start_bytes - 1


def watch(command: Sequence[str], *, warm_up: int = 200) -> list[LongRun]:
    """Run a Python tool and say what each of its trainings took. Linux only.

    Args:
        command: the tool's file and its arguments.
        warm_up: steps after which memory must be flat; a training must be longer.

    Returns:
        One for each optimizer that made more steps than ``warm_up``.

    Raises:
        RuntimeError: the command failed, or none of its trainings was long enough.
    """
    done = subprocess.run(
        [sys.executable, __file__, *map(str, command)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    trainings: dict[int, list[tuple[int, int, int]]] = {}
    for line in done.stderr.splitlines():
        if line.startswith(_MARK):
            training, *note = json.loads(line.removeprefix(_MARK))
            trainings.setdefault(training, []).append(tuple(note))
    runs = []
    for notes in trainings.values():
        later = [note for note in notes if note[0] >= warm_up]
        if len(later) > 1:
            end = max(memory for _, memory, _ in later[-3:])
            runs.append(LongRun(later[-1][0], later[0][1], end, later[0][2], later[-1][2]))
    if not runs:
        raise RuntimeError(f"No training of {command[0]} made more than {warm_up} steps.")
    return runs


def _run_noting(arguments: list[str]) -> None:
    """Run a tool in this process; note steps, memory and files of each optimizer on stderr."""
    from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

    steps: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
    started = 0

    def note(optimizer: Optimizer, *_: object) -> None:
        nonlocal started
        if optimizer not in steps:
            steps[optimizer] = [started, 0]
            started += 1
        entry = steps[optimizer]
        entry[1] += 1
        if entry[1] % _EVERY == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
            files = len(os.listdir("/proc/self/fd"))
            print(f"\n{_MARK}{json.dumps([*entry, resident, files])}", file=sys.stderr, flush=True)

    register_optimizer_step_post_hook(note)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _run_noting(sys.argv[1:])
