"""Pages of HTML that hold all they need, pictures too, in one file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

__all__ = ["bullets", "page", "paragraph", "picture", "table"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1260px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; overflow-wrap: anywhere; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: .25em .9em .25em 0; text-align: left;
  border-bottom: 1px solid #ddd; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f4f4f4; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0 .6em 1em 0; width: 400px; vertical-align: top; }
figure img { width: 100%; } figcaption { font-size: .8em; color: #555; overflow-wrap: anywhere; }
"""
_JPEG_QUALITY = 85


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: In plain text.
        parts: Of HTML, such as of the functions below.
    """
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def paragraph(text: str, tag: str = "p") -> str:
    """Return plain text in an element, such as `h2` or `pre`."""
    return f"<{tag}>{escape(text)}</{tag}>"


def bullets(items: Iterable[str]) -> str:
    """Return a list of plain texts."""
    return f"<ul>{''.join(paragraph(item, 'li') for item in items)}</ul>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table of plain texts and numbers; numbers stand at the right."""
    rows = list(rows)
    is_number = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]

    def line(cells: Sequence[Any], tag: str) -> str:
        kinds = [' class="number"' if number else "" for number in is_number]
        inner = (
            f"<{tag}{kind}>{escape(str(cell))}</{tag}>"
            for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def picture(image: np.ndarray, caption: str) -> str:
    """Return a picture that lies in the page itself.

    Args:
        image: (H, W, 3) uint8 RGB.
        caption: In plain text.
    """
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    _, content = cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]), quality)
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{escape(caption)}">'
        f"{paragraph(caption, 'figcaption')}</figure>"
    )
