"""JSON files that are there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any, *, compact: bool = False) -> None:
    """Write a JSON file whole or not at all, whenever the process is killed.

    Args:
        path: file to write; a file of this name is replaced.
        content: what to write.
        compact: without white space, for large files.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.
    """
    layout = {"separators": (",", ":")} if compact else {"indent": 1}
    text = json.dumps(content, allow_nan=False, **layout)
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(text + "\n", encoding="utf-8")
    os.replace(scratch, path)
