"""Pages of HTML that hold all they need, pictures too, in one file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

__all__ = ["bars", "bullets", "chart", "page", "paragraph", "picture", "table"]

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
figure.wide { width: auto; } figure img { max-width: 100%; } svg { font-size: 12px; }
svg text { fill: #222; } figcaption { font-size: .8em; color: #555; overflow-wrap: anywhere; }
"""
_JPEG_QUALITY = 85
_LINE, _LINE_2 = "#0b3c6f", "#bbb"


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


def picture(image: np.ndarray, caption: str, *, wide: bool = False) -> str:
    """Return a picture that lies in the page itself.

    Args:
        image: (H, W, 3) uint8 RGB.
        caption: In plain text.
        wide: As wide as it is, and not in a column of several.
    """
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    _, content = cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]), quality)
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<figure{" class=wide" * wide}><img src="data:image/jpeg;base64,{data}" '
        f'alt="{escape(caption)}">{paragraph(caption, "figcaption")}</figure>'
    )


def chart(
    points: Sequence[tuple[float, float]],
    *,
    x: str,
    y: str,
    size: tuple[int, int] = (270, 150),
    span: Sequence[float] | None = None,
    dots: bool = False,
    diagonal: bool = False,
) -> str:
    """Return a drawing of a line.

    Args:
        points: Of the line, at least one.
        x: What the horizontal axis says.
        y: Likewise.
        size: (width, height) of the axes in pixels.
        span: Least and largest value of both axes; None for those of the points, and y from 0.
        dots: Mark each point; one alone always is.
        diagonal: Draw where x and y are equal, too.
    """
    width, height = size
    (left, right), (low, high) = span or (points[0][0], points[-1][0]), span or _span(points)

    def place(point: tuple[float, float]) -> tuple[str, str]:
        across, up = (point[0] - left) / ((right - left) or 1), (point[1] - low) / (high - low)
        return f"{across * width:.1f}", f"{(1 - up) * height:.1f}"

    line = " ".join(",".join(place(point)) for point in points)
    parts = [f'<rect width="{width}" height="{height}" fill="none" stroke="#999"/>']
    if diagonal:
        ends = f'x1="0" y1="{height}" x2="{width}" y2="0"'
        parts.append(f'<line {ends} stroke="{_LINE_2}" stroke-dasharray="4"/>')
    parts.append(f'<polyline points="{line}" fill="none" stroke="{_LINE}" stroke-width="1.5"/>')
    if dots or len(points) == 1:
        places = map(place, points)
        parts += [f'<circle cx="{a}" cy="{b}" r="3" fill="{_LINE}"/>' for a, b in places]
    parts += [
        _text(width / 2, height + 30, x, "middle"),
        _text(-4, 11, f"{high:.3g}", "end"),
        _text(-4, height, f"{low:.3g}", "end"),
        _text(0, height + 15, f"{left:.6g}"),
        _text(width, height + 15, f"{right:.6g}", "end"),
        _text(4, -6, y),
    ]
    whole = width + 76, height + 60
    return (
        f'<svg width="{whole[0]}" height="{whole[1]}" viewBox="-56 -22 {whole[0]} {whole[1]}" '
        f'role="img" aria-label="{escape(y)} over {escape(x)}">{"".join(parts)}</svg>'
    )


def bars(rows: Sequence[tuple[str, float, str]], *, most: float = 100) -> str:
    """Return bars one below the other.

    Args:
        rows: Name, value from 0 on, and colour.
        most: The value of a bar of full length.
    """
    parts = []
    left, length, step = 7.2 * max((len(row[0]) for row in rows), default=0) + 10, 400, 20
    for index, (name, value, color) in enumerate(rows):
        top, wide = index * step, length * min(1, value / most)
        parts += [
            _text(left - 8, top + 14, name, "end"),
            f'<rect x="{left:.0f}" y="{top + 3}" width="{wide:.1f}" height="14" fill="{color}"/>',
            _text(left + wide + 6, top + 14, f"{value:.1f}"),
        ]
    return (
        f'<svg width="{left + length + 60:.0f}" height="{len(rows) * step}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'


def _span(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least and largest y, with 0 among them, so that a small change does not look large."""
    values = [0.0, *(point[1] for point in points)]
    return min(values), max(values) if max(values) > min(values) else min(values) + 1
