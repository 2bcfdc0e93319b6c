"""Writing of tag lists, see `maskx.data.tag_lists`."""

import json
import os
from collections.abc import Iterable, Sequence

from maskx.core.files import written_text

__all__ = ["write_tag_lines"]


def write_tag_lines(
    path: str | os.PathLike[str],
    images: Iterable[tuple[str, Sequence[int]]],
    names: Sequence[str],
) -> int:
    """Write JSON lines ``{"file_name": ..., "tags": [...]}``, whole or not at all.

    Args:
        images: File names and the tags of each, as places in `names`.

    Returns:
        Number of images.
    """
    words = [json.dumps(name, ensure_ascii=False) for name in names]
    number = 0
    with written_text(path) as file:
        for file_name, tags in images:
            tags = ", ".join(words[tag] for tag in tags)
            file.write(
                f'{{"file_name": {json.dumps(file_name, ensure_ascii=False)}, "tags": [{tags}]}}\n'
            )
            number += 1
    return number
