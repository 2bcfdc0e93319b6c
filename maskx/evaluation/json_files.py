"""Result files."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all, whenever the process is killed.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.
    """
    scratch = path.with_suffix(".tmp")
    text = json.dumps(content, indent=1, allow_nan=False)
    scratch.write_text(text + "\n", encoding="utf-8")
    os.replace(scratch, path)
