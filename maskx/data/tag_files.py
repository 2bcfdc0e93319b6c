"""Writing of tag lists, see `maskx.data.tag_lists`, and of other files line by line."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

__all__ = ["whole_file", "write_tag_lines"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Open a text file that takes its name when all of it is written; its folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.partial")
    try:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            yield file
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    os.replace(scratch, path)


def write_tag_lines(
    path: str | os.PathLike[str],
    images: Iterable[tuple[str, Sequence[int]]],
    names: Sequence[str],
) -> int:
    """Write JSON lines ``{"file_name": ..., "tags": [...]}``, whole or not at all.

    Args:
        path: File to write.
        images: File names and the tags of each, as places in `names`.
        names: Words.

    Returns:
        Number of images.
    """
    words = [json.dumps(name, ensure_ascii=False) for name in names]
    number = 0
    with whole_file(path) as file:
        for file_name, tags in images:
            tags = ", ".join(words[tag] for tag in tags)
            file.write(
                f'{{"file_name": {json.dumps(file_name, ensure_ascii=False)}, "tags": [{tags}]}}\n'
            )
            number += 1
    return number
