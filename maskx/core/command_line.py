"""How a command ends: with one line where something is wrong, and the details in a file."""

import argparse
import contextlib
import errno
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["add_chain_arguments", "ended_in_one_line"]

_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.")
# Errors that the package raises itself, with a message that says all.
_OWN = (ValueError, FileNotFoundError, FileExistsError, FloatingPointError, ImportError)


def add_chain_arguments(
    parser: argparse.ArgumentParser, stages: Sequence[str], *, output: str
) -> None:
    """Add what the tools that train a chain of stages on Detectron2 have in common.

    Args:
        parser: has all other positional arguments already.
        stages: names, each of which gets KEY VALUE pairs of its own.
        output: folder if none is given.
    """
    add = parser.add_argument
    add("--output", type=Path, default=Path(output), help=f"folder (default: {output})")
    add("--num-gpus", type=int, default=1, help="processes, one per GPU; 1 on a CPU")
    add("--resume", action="store_true", help="go on with an interrupted stage")
    for stage in stages:
        add(
            f"--{stage}-opts",
            nargs=2,
            action="extend",
            default=[],
            metavar=("KEY", "VALUE"),
            help=f"a pair for {stage} alone; may be repeated",
        )
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="pairs for all stages")


@contextlib.contextmanager
def ended_in_one_line(goes_on: str = "nothing is lost: give the command again") -> Iterator[None]:
    """End a command with one line and exit status 1, whatever is raised inside.

    What the package refuses is said as it is. What a library raises is said with its cause and a
    remedy, and its traceback goes into a file that the line names.

    Args:
        goes_on: what to say of an interrupted command, such as "--resume goes on".
    """
    # A log file on a full disk would print a traceback for each of its lines.
    logging.raiseExceptions, before = False, logging.raiseExceptions
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {goes_on}")
    except Exception as error:  # the last one to see it
        _close_log_files()
        is_own = isinstance(error, _OWN) and getattr(error, "errno", None) is None
        if is_own and not _of_worker(error):
            sys.exit(f"error: {error}")
        sys.exit(f"error: {_one_line(error)}{_traceback_file(error)}")
    finally:
        logging.raiseExceptions = before


def _of_worker(error: BaseException) -> bool:
    return bool(_WORKER.match(str(error)))


def _one_line(error: Exception) -> str:
    """Say what happened and what to do, for errors that libraries raise."""
    if _of_worker(error):
        # The message holds the traceback of the other process; its last line is the error itself.
        last = [line for line in str(error).splitlines() if line and not line.startswith(" ")][-1]
        return f"A process that reads images failed: {_ended(last)}"
    if isinstance(error, OSError):
        where = f" '{error.filename}'" if error.filename else ""
        remedies = {
            errno.ENOSPC: f"The disk is full{where}. Make room; the last checkpoint is whole.",
            errno.EDQUOT: f"The quota of the disk is used up{where}. Make room.",
            errno.EROFS: f"The file system of{where or ' the output'} is read-only. Choose another "
            "output folder.",
            errno.ENOENT: f"There is no file or folder{where}. Correct the path.",
            errno.ENOTDIR: f"A part of the path{where} is a file, not a folder. Correct the path.",
            errno.EISDIR: f"The path{where} is a folder, where a file is needed. Name a file.",
            errno.EACCES: f"No permission to use{where or ' a file'}. Choose another folder, or "
            "change its permissions.",
        }
        if error.errno in remedies:
            return remedies[error.errno]
        if type(error).__name__ in ("URLError", "HTTPError", "ConnectionError", "SSLError"):
            return (
                f"The network could not be used: {_ended(error)} Download the file elsewhere, and "
                "name it as a local file (for weights: --weights FILE, MODEL.WEIGHTS FILE)."
            )
    text = _first_line(error)
    if isinstance(error, OSError) and error.errno is None:
        return _ended(text)  # of the package itself
    if re.search("out of memory|allocate memory", text) or isinstance(error, MemoryError):
        return f"There is not enough memory: {_ended(text)} Lower the batch or the image size."
    kind = type(error).__name__
    return f"{kind}: {_ended(text)}" if text else f"{kind}, without a message."


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _ended(text: object) -> str:
    line = _first_line(text)
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _traceback_file(error: Exception) -> str:
    """Write the traceback into a file, unless that disk is full too, and say which."""
    with contextlib.suppress(OSError):
        number, name = tempfile.mkstemp(prefix="maskx-", suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(" ".join(sys.argv) + "\n\n")
            file.writelines(traceback.format_exception(error))
        return f" The traceback is in {name}."
    return ""


def _close_log_files() -> None:
    """Close those that a full disk does not take, which would say so again at the very end."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in [h for each in loggers for h in getattr(each, "handlers", ())]:
        try:
            handler.flush()
        except OSError:
            with contextlib.suppress(OSError):
                handler.stream.close()
