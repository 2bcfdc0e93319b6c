"""What was completed, the worst first: a page of its own, and lines for the terminal."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

from maskx.core.files import written_text
from maskx.data.images import read_rgb
from maskx.data.masks import decode_segmentation
from maskx.engine.completion import Completed, Completion
from maskx.evaluation.calibration import MIN_MASKS, reliability_table, share_of_error
from maskx.evaluation.figures import contact_sheet, draw_instances

__all__ = ["summary", "worst_sheet", "write_report"]

_TILES, _COLUMNS, _TILE_SIDE = 24, 6, 220
_MARGIN = 0.3  # of the larger side of a box that a tile shows around it
_ROWS = 1000  # of the list
_FAILURES = 20  # named in the terminal

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 84rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { text-align: left; padding: 0.15rem 0.9rem 0.15rem 0; border-bottom: 1px solid #ddd; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
"""


def summary(completion: Completion) -> str:
    """Say in a few lines what was done."""
    masks, known = completion.masks, _with_truth(completion.known)
    lines = [
        f"{len(completion.objects)} objects were to get a mask, {len(masks)} have one now; "
        f"{completion.num_drawn} masks that people drew stay as they are."
    ]
    lines += [f"  {count} have none: {reason}" for reason, count in _reasons(completion)]
    if completion.label_maps:
        lines.append(f"{len(completion.label_maps)} images with tags alone have label maps now.")
    lines += [_calibration_line(completion)] if completion.objects else []
    if known:
        lines.append(f"Known masks: {_measured(known)}")
    true = _with_truth(masks)
    if true:
        lines += ["", "Against the masks that were withheld:", _measured(true)]
        lines += [_table(true, "category", [each.class_name for each in true])]
        sources = [each.source for each in true]
        lines += [_table(true, "source", sources)] * (len(set(sources)) > 1)
    if completion.failures:
        lines += ["", f"{len(completion.failures)} images failed:"]
        shown = list(completion.failures.items())
        lines += [f"  {name}: {reason}" for name, reason in shown[:_FAILURES]]
        lines += [f"  and {len(shown) - _FAILURES} more"] * (len(shown) > _FAILURES)
    return "\n".join(lines)


def write_report(path: Path, completion: Completion, title: str) -> None:
    """Write a page that needs no other file.

    Args:
        path: HTML file to write.
        completion: what was done.
        title: of the page.
    """
    masks = completion.masks
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(summary(completion))}</pre>"]
    for heading, entries in (
        ("Reliability, on masks that were known", completion.known),
        ("Reliability, on masks that were withheld", masks),
    ):
        entries = _with_truth(entries)
        if entries:
            parts += [f"<h2>{heading}</h2>", _reliability(entries)]
    if masks:
        parts += [
            "<h2>The worst first</h2>",
            "<p>The quality is the IoU to be expected. Correct these in your labelling tool.</p>",
            _picture(worst_sheet(masks)),
            _list(masks),
        ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    with written_text(path) as file:
        file.write(page)


def worst_sheet(masks: Sequence[Completed], *, side: int = _TILE_SIDE) -> np.ndarray:
    """Draw the first masks, each with its box in its surroundings.

    Args:
        masks: at least one.
        side: of a tile in pixels.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    tiles = []
    for each in masks[:_TILES]:
        image = read_rgb(each.file_name)
        mask = decode_segmentation(each.found.segmentation, *image.shape[:2])
        x1, y1, x2, y2 = each.box
        margin = _MARGIN * max(x2 - x1, y2 - y1)
        left, top = (max(0, int(low - margin)) for low in (x1, y1))
        window = slice(top, int(y2 + margin) + 1), slice(left, int(x2 + margin) + 1)
        tiles.append(
            draw_instances(
                image[window],
                boxes=np.array([[x1 - left, y1 - top, x2 - left, y2 - top]]),
                masks=mask[None][(slice(None), *window)],
                labels=[f"{each.class_name} {each.quality:.2f}"],
                with_masks=[False],
                side=side,
            )
        )
    return contact_sheet(tiles, columns=min(_COLUMNS, len(tiles)), legend=())


def _with_truth(entries: Iterable[Completed]) -> list[Completed]:
    return [each for each in entries if each.iou is not None]


def _reasons(completion: Completion) -> list[tuple[str, int]]:
    return completion.reasons.most_common(8)


def _calibration_line(completion: Completion) -> str:
    sources = {each.source for each in completion.masks}
    if not sources:
        return "There is no mask to rate."
    rough = sorted(sources - set(completion.calibrated))
    if not rough:
        return f"The qualities are calibrated on {len(completion.known)} masks that were known."
    return (
        f"The qualities of {', '.join(rough)} are the scores of the source itself, not calibrated: "
        f"that takes {MIN_MASKS} masks that it was not trained on. Name a file that has some with "
        "--calibrate."
    )


def _measured(entries: Sequence[Completed]) -> str:
    qualities, ious = _columns(entries)
    share = share_of_error(qualities, ious)
    return (
        f"{len(entries)} masks, mean IoU {ious.mean():.3f}; the worst 20 % by quality hold "
        f"{share:.0%} of the error."
    )


def _columns(entries: Sequence[Completed]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([e.quality for e in entries]), np.array([e.iou for e in entries])


def _table(entries: Sequence[Completed], what: str, names: Sequence[str]) -> str:
    lines = [f"| {what} | masks | mean IoU |", "|---|---|---|"]
    for name in sorted(set(names)):
        ious = [each.iou for each, own in zip(entries, names, strict=True) if own == name]
        lines.append(f"| {name} | {len(ious)} | {np.mean(ious):.3f} |")
    return "\n".join(lines)


def _reliability(entries: Sequence[Completed]) -> str:
    """A table of ranges of quality, and the curve beside the line where both are equal."""
    table = reliability_table(*_columns(entries))
    cells = "".join(
        f"<tr><td>{row.low:.1f} to {row.high:.1f}</td><td class=n>{row.count}</td>"
        f"<td class=n>{row.quality:.3f}</td><td class=n>{row.iou:.3f}</td></tr>"
        for row in table
    )
    side = 240
    points = [(row.quality * side, (1 - row.iou) * side) for row in table]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#0b3c6f"/>' for x, y in points)
    return (
        f'<svg width="{side + 60}" height="{side + 40}" viewBox="-40 -8 {side + 60} {side + 40}" '
        'font-size="12">'
        f'<rect width="{side}" height="{side}" fill="none" stroke="#999"/>'
        f'<line x1="0" y1="{side}" x2="{side}" y2="0" stroke="#bbb" stroke-dasharray="4"/>'
        f'<polyline points="{line}" fill="none" stroke="#0b3c6f" stroke-width="2"/>{dots}'
        f'<text x="{side / 2}" y="{side + 22}" text-anchor="middle">quality</text>'
        f'<text x="-22" y="{side / 2}" text-anchor="middle" '
        f'transform="rotate(-90 -22 {side / 2})">mean IoU</text>'
        f'<text x="-6" y="{side}" text-anchor="end">0</text><text x="-6" y="10" '
        'text-anchor="end">1</text></svg>'
        "<table><tr><th>quality</th><th class=n>masks</th><th class=n>mean quality</th>"
        f"<th class=n>mean IoU</th></tr>{cells}</table>"
    )


def _picture(image: np.ndarray) -> str:
    encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]))[1]
    content = base64.b64encode(encoded.tobytes()).decode("ascii")
    return f'<img alt="The worst masks" src="data:image/jpeg;base64,{content}">'


def _list(masks: Sequence[Completed]) -> str:
    rows = "".join(
        f"<tr><td class=n>{each.quality:.3f}</td><td>{html.escape(each.class_name)}</td>"
        f"<td>{html.escape(Path(each.file_name).name)}</td>"
        f"<td>{html.escape(str(each.annotation_id))}</td><td>{html.escape(each.source)}</td></tr>"
        for each in masks[:_ROWS]
    )
    more = len(masks) - _ROWS
    rest = f"<p>{more} better ones are not listed.</p>" if more > 0 else ""
    return (
        "<table><tr><th class=n>quality</th><th>category</th><th>image</th><th>annotation</th>"
        f"<th>source</th></tr>{rows}</table>{rest}"
    )
