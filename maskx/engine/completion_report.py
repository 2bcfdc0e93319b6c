"""What was completed, the worst first: a page of its own, and lines for the terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from maskx.core.files import written_text
from maskx.data.images import read_rgb
from maskx.data.label_maps import read_label_map
from maskx.data.masks import decode_segmentation
from maskx.engine.completion import Completed, Completion
from maskx.engine.label_map_completion import CompletedLabelMaps, MadeLabelMap
from maskx.evaluation.calibration import MIN_MASKS, reliability_table, share_of_error
from maskx.evaluation.figures import contact_sheet, draw_instances, draw_label_map
from maskx.evaluation.html import bullets, chart, page, paragraph, picture, table

__all__ = ["summary", "worst_sheet", "write_report"]

_TILES, _COLUMNS, _TILE_SIDE = 24, 6, 220
_MARGIN = 0.3  # of the larger side of a box that a tile shows around it
_ROWS = 1000  # of the list
_FAILURES = 20  # named in the summary

_Judged = Completed | MadeLabelMap


def summary(completion: Completion) -> str:
    """Say in a few lines what was done."""
    masks, known = completion.masks, _with_truth(completion.known)
    lines = [
        f"{len(completion.objects)} objects were to get a mask, {len(masks)} have one now; "
        f"{completion.num_drawn} masks that people drew stay as they are."
    ]
    lines += [f"  {count} have none: {reason}" for reason, count in _reasons(completion)]
    lines += _about_label_maps(completion.label_maps)
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
    parts = [paragraph(summary(completion), "pre")]
    for heading, entries in (
        ("Reliability, on masks that were known", completion.known),
        ("Reliability, on masks that were withheld", masks),
    ):
        entries = _with_truth(entries)
        if entries:
            parts += [paragraph(heading, "h2"), _reliability(entries)]
    label_maps = completion.label_maps
    if label_maps.known:
        parts += [
            paragraph("Reliability, on label maps that were known", "h2"),
            _reliability(label_maps.known, "label maps"),
        ]
    if len(completion.failures) > _FAILURES:
        names = [f"{name}: {reason}" for name, reason in completion.failures.items()]
        parts += [paragraph("Images that failed", "h2"), bullets(names)]
    if masks:
        parts += [
            paragraph("The worst first", "h2"),
            paragraph("The quality is the IoU to be expected. Correct these in your tool."),
            picture(worst_sheet(masks), "The worst masks", wide=True),
            _list(masks),
        ]
    if label_maps.made:
        parts += [
            paragraph("Label maps, the worst first", "h2"),
            paragraph("The quality is the mean IoU to be expected. Correct these in your tool."),
            picture(_label_map_sheet(label_maps), "The worst label maps", wide=True),
            _label_map_list(label_maps),
        ]
    with written_text(path) as file:
        file.write(page(title, parts))


def worst_sheet(masks: Sequence[Completed], *, side: int = _TILE_SIDE) -> np.ndarray:
    """Draw the first masks, each with its box in its surroundings.

    Args:
        masks: at least one.
        side: of a tile in pixels.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    tiles = [_tile(each, side) for each in masks[:_TILES]]
    return contact_sheet(tiles, columns=min(_COLUMNS, len(tiles)), legend=())


def _tile(each: Completed, side: int) -> np.ndarray:
    image = read_rgb(each.file_name)
    mask = decode_segmentation(each.found.segmentation, *image.shape[:2])
    x1, y1, x2, y2 = each.box
    margin = _MARGIN * max(x2 - x1, y2 - y1)
    left, top = (max(0, int(low - margin)) for low in (x1, y1))
    window = slice(top, int(y2 + margin) + 1), slice(left, int(x2 + margin) + 1)
    return draw_instances(
        image[window],
        boxes=np.array([[x1 - left, y1 - top, x2 - left, y2 - top]]),
        masks=mask[None][(slice(None), *window)],
        labels=[f"{each.class_name} {each.quality:.2f}"],
        with_masks=[False],
        side=side,
    )


def _about_label_maps(label_maps: CompletedLabelMaps) -> list[str]:
    made, known = label_maps.made, label_maps.known
    lines = [f"{len(made)} images with tags alone have label maps now."] if made else []
    for reason, count in label_maps.passed_over.items():
        lines.append(f"{count} images with tags alone have no label map: {reason}.")
    if made and label_maps.is_calibrated:
        lines.append(f"Their qualities are calibrated on {len(known)} label maps that were known.")
    elif made:
        lines.append(
            "Their qualities are the scores of the run itself, not calibrated: that takes "
            f"{MIN_MASKS} images with label maps or masks that it was not trained on. Name a file "
            "that has some with --calibrate."
        )
    if known:
        lines.append(f"Known label maps: {_measured(known, 'label maps')}")
    return lines


def _label_map_sheet(label_maps: CompletedLabelMaps) -> np.ndarray:
    names, tiles = label_maps.class_names, []
    for each in label_maps.worst_first[:_TILES]:
        image = read_rgb(each.file_name)
        labels = read_label_map(
            each.path, *image.shape[:2], num_classes=len(names), image_id=each.file_name
        )
        tiles.append(
            draw_label_map(image, labels, num_classes=len(names), names=names, side=_TILE_SIDE)
        )
    return contact_sheet(tiles, columns=min(_COLUMNS, len(tiles)), legend=())


def _label_map_list(label_maps: CompletedLabelMaps) -> str:
    rows = [
        (round(each.quality, 3), Path(each.file_name).name, each.path.name)
        for each in label_maps.worst_first[:_ROWS]
    ]
    return table(("quality", "image", "label map"), rows) + _not_listed(len(label_maps.made))


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


def _measured(entries: Sequence[_Judged], what: str = "masks") -> str:
    qualities, ious = _columns(entries)
    share = share_of_error(qualities, ious)
    return (
        f"{len(entries)} {what}, mean IoU {ious.mean():.3f}; the worst 20 % by quality hold "
        f"{100 * share:.0f} % of the error."
    )


def _columns(entries: Sequence[_Judged]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([e.quality for e in entries]), np.array([e.iou for e in entries])


def _table(entries: Sequence[Completed], what: str, names: Sequence[str]) -> str:
    lines = [f"| {what} | masks | mean IoU |", "|---|---|---|"]
    for name in sorted(set(names)):
        ious = [each.iou for each, own in zip(entries, names, strict=True) if own == name]
        lines.append(f"| {name} | {len(ious)} | {np.mean(ious):.3f} |")
    return "\n".join(lines)


def _reliability(entries: Sequence[_Judged], what: str = "masks") -> str:
    """A table of ranges of quality, and the curve beside the line where both are equal."""
    ranges = reliability_table(*_columns(entries))
    curve = chart(
        [(row.quality, row.iou) for row in ranges],
        x="quality",
        y="mean IoU",
        size=(240, 240),
        span=(0, 1),
        dots=True,
        diagonal=True,
    )
    rows = [
        (f"{row.low:.1f} to {row.high:.1f}", row.count, round(row.quality, 3), round(row.iou, 3))
        for row in ranges
    ]
    return curve + table(("quality", what, "mean quality", "mean IoU"), rows)


def _list(masks: Sequence[Completed]) -> str:
    rows = [
        (
            round(each.quality, 3),
            each.class_name,
            Path(each.file_name).name,
            str(each.annotation_id),
            each.source,
        )
        for each in masks[:_ROWS]
    ]
    return table(("quality", "category", "image", "annotation", "source"), rows) + _not_listed(
        len(masks)
    )


def _not_listed(count: int) -> str:
    return paragraph(f"{count - _ROWS} better ones are not listed.") if count > _ROWS else ""
