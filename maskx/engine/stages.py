"""Stages of a chain, on both hosts: each in a folder of its own, made from what, made once.

A stage is a :class:`maskx.engine.runs.Run`: its ``run.json`` says what it is and, by digest, what
it started from. It is finished when it has results and the file that it makes is whole; until then
it can be killed at any point and goes on.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from maskx.core.archives import find_damage
from maskx.core.files import read_json
from maskx.engine.checkpoints import locked
from maskx.engine.runs import RUN_NAME, Run, check_same_run, read_run, write_run

logger = logging.getLogger(__name__)


class StageState(Enum):
    """How far the folder of a stage is."""

    NEW = "new"
    STARTED = "started"
    FINISHED = "finished"


def stage_state(folder: Path, run: Run, *, free: Collection[str] = ()) -> StageState:
    """Say how far a stage is, and refuse a folder of another run.

    Args:
        run: what the stage is; ``weights`` is the file that it makes.
        free: settings that may differ, see :func:`maskx.engine.runs.check_same_run`.

    Raises:
        ValueError: the folder holds another run, or weights that no ``run.json`` speaks for.
    """
    folder = Path(folder)
    if not (folder / RUN_NAME).is_file():
        if any(folder.glob("*.pth")):
            raise ValueError(
                f"'{folder}' holds checkpoints without {RUN_NAME}, so something else made them. "
                "Choose another output folder."
            )
        return StageState.NEW
    found = read_run(folder)
    if found.results is None and not _has_content(folder, run):
        return StageState.NEW
    check_same_run(found, run, source=folder, free=free)
    if found.results is None:
        return StageState.STARTED
    damage = _damage(folder / run.weights)
    if damage is not None:
        logger.warning("'%s' is made again: %s.", folder / run.weights, damage)
        return StageState.STARTED
    return StageState.FINISHED


def begin_stage(folder: Path, run: Run, *, resume: bool, free: Collection[str] = ()) -> Run | None:
    """Claim the folder of a stage, unless it is finished.

    Returns:
        None where it is finished; else the run with the seconds that were spent on it so far.
    """
    state = stage_state(folder, run, free=free)
    if state is StageState.FINISHED:
        return None
    if state is StageState.STARTED:
        if not resume:
            raise ValueError(
                f"'{folder}' holds an interrupted run. Add --resume to go on with it, or choose "
                "another output folder."
            )
        run = dataclasses.replace(run, seconds=read_run(folder).seconds)
    write_run(folder, run)
    return run


@contextlib.contextmanager
def timed_stage(folder: Path, run: Run) -> Iterator[dict[str, Any]]:
    """Write into ``run.json`` how long the work inside took, and what it fills in as results.

    Yields:
        A dictionary to put the results into. It counts when the work ends without an error.
    """
    started, results, finished = time.perf_counter(), {}, False
    try:
        yield results
        finished = True
    finally:
        seconds = run.seconds + time.perf_counter() - started
        done = {"results": results} if finished else {}
        with contextlib.suppress(OSError) if not finished else contextlib.nullcontext():
            write_run(folder, dataclasses.replace(run, seconds=seconds, **done))


def run_stage(
    folder: Path,
    run: Run,
    work: Callable[[], Mapping[str, Any]],
    *,
    resume: bool,
    report: Callable[[str], None],
) -> Mapping[str, Any]:
    """Do a stage in this process, unless it is finished.

    Args:
        run: what the stage is; ``weights`` is the file that it makes.
        work: makes the file and returns results as JSON has them. What an interrupted call left in
            the folder is there.
        resume: whether an interrupted stage may go on; otherwise it is an error.

    Returns:
        The results.
    """
    with locked(folder):
        begun = begin_stage(folder, run, resume=resume)
        if begun is None:
            report(f"{folder}: finished before, not run again")
            return read_run(folder).results
        with timed_stage(folder, begun) as results:
            results.update(work())
    return results


def _has_content(folder: Path, run: Run) -> bool:
    """Whether there is something that could be mixed or lost: a checkpoint, or part of a file."""
    if Path(run.weights).suffix == ".pth":
        return any(folder.glob("*.pth"))
    return any(not p.name.startswith(".") and p.name != RUN_NAME for p in folder.iterdir())


def _damage(path: Path) -> str | None:
    if not path.is_file():
        return "it is gone"
    if path.suffix == ".json":
        try:
            read_json(path)
        except ValueError as error:
            return str(error)
        return None
    return find_damage(path) if path.suffix == ".pth" else None
