"""Files that are there whole or not at all, whenever a process is killed."""

import contextlib
import functools
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

__all__ = [
    "parse_json",
    "parse_yaml",
    "read_json",
    "remove_leftovers",
    "write_json",
    "written_text",
    "written_whole",
]

_SUFFIX = ".partial"
# A file of another machine, whose processes cannot be asked for, is in use no longer than this.
_SECONDS_IN_USE = 24 * 3600


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Give a path beside a file; what is written to it takes the file's name at the end.

    An error inside leaves the file as it was and nothing beside it, so what was written can be
    checked before it replaces anything. What killed processes left in the folder goes when a
    process first writes into it. The file gets the mode that the umask gives, whoever writes it.

    Args:
        path: file to write; its folder is made, and a file of this name is replaced.
        durable: wait until the disk has it, so that a loss of power leaves one file or the other.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_once(os.path.abspath(path.parent))
    scratch = path.with_name(f".{path.name}.{_this_process()}{_SUFFIX}")
    try:
        scratch.unlink(missing_ok=True)
        scratch.touch()
        mode = scratch.stat().st_mode
        yield scratch
        scratch.chmod(mode)  # some libraries write files that only their owner can read
        if durable:
            _sync(scratch)
        os.replace(scratch, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error inside says more
            scratch.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(scratch):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def written_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Open a text file that takes its name when all of it is written; see `written_whole`."""
    with written_whole(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        yield file


def write_json(path: str | os.PathLike[str], content: Any, *, compact: bool = False) -> None:
    """Write a JSON file whole or not at all.

    Args:
        path: file to write; a file of this name is replaced.
        compact: without white space, for large files.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.
    """
    layout = {"separators": (",", ":")} if compact else {"indent": 1}
    text = json.dumps(content, allow_nan=False, **layout)
    with written_text(path) as file:
        file.write(text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file that maskx wrote.

    Raises:
        ValueError: it is damaged, or names a key twice, of which one value would be lost.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"'{path}': there is no such file.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is damaged: {error}. Restore it, or remove it to make it anew."
        ) from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r:.80} stands twice")
    return content


parse_json = json.JSONDecoder(object_pairs_hook=_without_repetition).decode
"""Parse JSON text; a key that stands twice in an object is an error like any other."""


class _PlainLoader(yaml.SafeLoader):
    """Loads plain values and runs no code; a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [key for key, _ in node.value if key.id == "scalar"]:
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r:.80} stands twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse YAML text of plain values.

    Raises:
        yaml.YAMLError: it is none, names a key twice in one place, or asks for code to be run.
    """
    return yaml.load(text, _PlainLoader)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of `written_whole` in a folder, not below it."""
    for scratch in Path(folder).glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # gone, or of another user
            if not _is_in_use(scratch):
                scratch.unlink()


@functools.cache
def _remove_leftovers_once(folder: str) -> None:
    """Clean a folder of many files once, not once for each of them."""
    remove_leftovers(folder)


def _this_process() -> str:
    return f"{socket.gethostname().replace('.', '-')}.{os.getpid()}"


def _is_in_use(scratch: Path) -> bool:
    host, _, process = scratch.name.removesuffix(_SUFFIX).rpartition(".")
    ours = host.endswith("." + socket.gethostname().replace(".", "-"))
    # On Windows a signal of 0 would end the process.
    if ours and os.name == "posix" and process.isdecimal():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it runs, as another user
        return True
    return time.time() - scratch.stat().st_mtime < _SECONDS_IN_USE


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
