"""What a training gave, as one page: curves, measures, categories, best and worst predictions."""

import csv
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maskx.core.files import written_text
from maskx.core.text import listed
from maskx.data.coco import CocoData
from maskx.engine.comparison import SURE, Comparison, compare, compared, in_classes_of
from maskx.engine.predictor import Predictor
from maskx.engine.results import Prediction
from maskx.engine.training import CURVES_NAME
from maskx.evaluation.figures import COLOR_WITH_MASKS, COLOR_WITHOUT_MASKS
from maskx.evaluation.html import bars, bullets, chart, page, paragraph, picture, table

__all__ = ["REPORT_NAME", "write_training_report"]

REPORT_NAME = "report.html"
_EXAMPLES, _SIDE = 6, 320
_MOST_ROWS = 100
METRICS_NAME = "metrics.json"  # of Detectron2 lines of JSON, of the quick start its measures
# Said elsewhere, or small.
NOT_MEASURED = ("system", "losses", "split", "step_seconds", "num_images")

_WORDS = {
    "mIoU": "mean IoU in percent",
    "IoU": "IoU in percent",
    "mean_iou": "mean IoU in the true boxes",
    "tag_mAP": "mAP of image labels in percent",
    "bbox": "boxes",
    "segm": "masks",
    "AP50": "AP at IoU 0.5",
    "AP75": "AP at IoU 0.75",
    "APs": "AP, small",
    "APm": "AP, medium",
    "APl": "AP, large",
    "A": "A (with masks)",
    "B": "B (without)",
    "training_seconds": "seconds of the training",
    "seconds": "seconds in all",
}
"""What measures of several systems are called; see ``System.words``."""

Points = list[tuple[float, float]]
Say = Callable[[str], str]


def write_training_report(
    path: Path, folder: Path, predictor: Predictor, data: CocoData
) -> Comparison:
    """Write a page that needs no other file.

    Args:
        path: HTML file to write.
        folder: output folder of the training.
        predictor: of :func:`maskx.engine.predictor.open_run`.
        data: annotations to compare predictions with, such as those of the validation.

    Returns:
        What was compared.

    Raises:
        ValueError: the categories are others than those of the run.
    """
    data = in_classes_of(predictor, data)
    found = compare(predictor, data)
    parts = [_overview(predictor)]
    metrics = _measures(folder, predictor.run.results)
    own = dict(zip(predictor.class_names, predictor.class_names, strict=True))
    say = partial(_said, _WORDS | predictor.system.words | own)
    if curves := _curves(folder):
        parts += [paragraph("Losses", "h2"), *(_charts(*item, say) for item in curves.items())]
    if metrics:
        parts += [paragraph("Measured at the end of the training", "h2"), *_tables(metrics, say)]
    parts += [paragraph("Categories", "h2"), *_categories(predictor, data, found)]
    if found.images:
        parts += _examples(predictor, data, found)
    if found.failures:
        names = [f"{name}: {why}" for name, why in found.failures.items()]
        parts += [paragraph("Images that cannot be read", "h2"), bullets(names)]
    with written_text(path) as file:
        file.write(page(f"{predictor.system.title}: {folder.resolve().name}", parts))
    return found


def _said(words: Mapping[str, str], name: str) -> str:
    """Return what people read for a name: its words, or those of its parts."""
    if name in words:
        return words[name]
    return "".join(words.get(part, part) for part in re.split(r"(\W+)", name.replace("_", " ")))


def _overview(predictor: Predictor) -> str:
    run = predictor.run
    words = f"{predictor.system.title} on {run.host}, maskx {run.version}: "
    words += f"{len(run.class_names)} categories, {listed(run.class_names)}."
    if run.split is not None:
        words += f" With masks in training (A): {listed(run.split.with_masks) or 'none'};"
        words += f" without (B): {listed(run.split.without_masks) or 'none'}."
    return paragraph(words)


def _curves(folder: Path) -> dict[str, dict[str, Points]]:
    """Read the losses of all trainings in a folder: by training and loss."""
    found: dict[str, dict[str, Points]] = {}
    for path in sorted(folder.rglob(CURVES_NAME), key=os.path.getmtime):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        found[os.path.relpath(path.parent, folder)] = _by_loss(rows)
    log = _lines(folder / METRICS_NAME)
    if log:
        found["."] = _by_loss(log)
    return {name: points for name, points in found.items() if points}


def _by_loss(rows: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    points: dict[str, Points] = {}
    for row in rows:
        for name, value in row.items():
            if "loss" in name or name == "total":
                points.setdefault(name, []).append((row["iteration"], value))
    return points


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the log of Detectron2, which is one object a line; nothing if it is no such file."""
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        return []
    return [row for row in rows if isinstance(row, dict) and "iteration" in row]


def _charts(name: str, losses: Mapping[str, Points], say: Say) -> str:
    title = [] if name == "." else [paragraph(say(name), "h3")]
    charts = [
        chart(points, x="iteration", y=f"{say(loss)}: {points[-1][1]:.3g}")
        for loss, points in losses.items()
    ]
    return "".join([*title, *charts])


def _measures(folder: Path, results: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the measures of a quick start, or those of an evaluation of Detectron2, by task."""
    try:
        content = json.loads((folder / METRICS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # which are lines, or none
        content = None
    if isinstance(content, dict) and "iteration" not in content:
        return {key: value for key, value in content.items() if key not in NOT_MEASURED}
    found: dict[str, Any] = {}
    for name, value in (results or {}).items():
        task, _, metric = name.partition("/")
        if not metric.startswith("AP-"):  # of a category, which the bars show
            found.setdefault("", {}).setdefault(task, {})[metric] = value
    return found


def _tables(metrics: Mapping[str, Any], say: Say) -> list[str]:
    """Lay out nested measures: two names and a number make a table, deeper ones several."""
    parts, single = [], []
    for key, value in metrics.items():
        if not isinstance(value, Mapping):
            single.append((say(key), value))
            continue
        parts += [paragraph(say(key), "h3")] if key else []
        value = {name: row for name, row in value.items() if row is not None}  # not measured
        inner = list(value.values())
        if any(isinstance(each, Mapping) for row in inner for each in _values(row)):
            for name, row in value.items():
                parts += _tables({f"{key}, {name}": row}, say)
        elif inner and all(isinstance(row, Mapping) for row in inner):
            parts.append(_matrix(value, say))
        else:
            rows = [
                (say(f"{name} {last}".strip()), _cell(number))
                for name, row in value.items()
                for last, number in (row.items() if isinstance(row, Mapping) else [("", row)])
            ]
            parts.append(_cut(("", ""), rows))
    single = [(n, _cell(v)) for n, v in single if isinstance(v, int | float | str | None)]
    return [*parts, table(("", ""), single)] if single else parts


def _values(row: Any) -> list[Any]:
    return list(row.values()) if isinstance(row, Mapping) else []


def _matrix(values: Mapping[str, Mapping[str, Any]], say: Say) -> str:
    columns = list(dict.fromkeys(name for row in values.values() for name in row))
    rows = list(values)
    if len(columns) > len(rows):
        cells = [(say(name), *(_cell(values[row].get(name)) for row in rows)) for name in columns]
        return _cut(("", *map(say, rows)), cells)
    cells = [(say(row), *(_cell(values[row].get(name)) for name in columns)) for row in rows]
    return _cut(("", *map(say, columns)), cells)


def _cut(head: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    more = len(rows) - _MOST_ROWS
    rest = paragraph(f"And {more} more in {METRICS_NAME}.") if more > 0 else ""
    return table(head, rows[:_MOST_ROWS]) + rest


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return round(value, 2 if abs(value) >= 1 else 3) if isinstance(value, float) else str(value)


def _categories(predictor: Predictor, data: CocoData, found: Comparison) -> list[str]:
    if not found.images:
        return [paragraph("The images have no annotation that predictions can be compared with.")]
    number, split = len(found.images), predictor.run.split
    text = f"{found.measure} in percent, on {number} of {len(data.records)} images."
    if split is not None:
        text += " Green: with masks in training (A). Red: without (B)."
    rows = sorted(found.categories.items(), key=lambda item: -item[1])
    if absent := [name for name in data.class_names if name not in found.categories]:
        text += f" These images have none of {listed(absent)}."
    parts = [paragraph(text)]
    if len(rows) > _MOST_ROWS:
        half = _MOST_ROWS // 2
        parts.append(paragraph(f"The best {half} and the worst {half} of {len(rows)}:"))
        rows = rows[:half] + rows[-half:]
    without = set(split.without_masks) if split is not None else set()
    colors = [
        "#" + bytes(COLOR_WITHOUT_MASKS if name in without else COLOR_WITH_MASKS).hex()
        for name, _ in rows
    ]
    return [*parts, bars([(*row, color) for row, color in zip(rows, colors, strict=True)])]


def _examples(predictor: Predictor, data: CocoData, found: Comparison) -> list[str]:
    count = min(_EXAMPLES, max(1, len(found.images) // 2))
    parts = []
    for title, images in (
        ("The best images", found.images[::-1][:count]),
        ("The worst images", found.images[:count]),
    ):
        parts.append(paragraph(title, "h2"))
        parts.append(paragraph("Left what people say, right what is predicted."))
        for record, value in images:
            caption = f"{Path(record['file_name']).name}: {found.image_measure} {value:.2f}"
            parts.append(picture(_side_by_side(predictor, data, record), caption, wide=True))
    return parts


def _side_by_side(predictor: Predictor, data: CocoData, record: Mapping[str, Any]) -> np.ndarray:
    prediction, truth = compared(predictor, data, record)
    return np.concatenate([_tile(truth), _tile(prediction.above(SURE))], axis=1)


def _tile(prediction: Prediction) -> np.ndarray:
    """Draw a prediction without the empty rows and columns of a square tile."""
    height, width = prediction.image_size
    scale = _SIDE / max(height, width)
    tile = prediction.plot(side=_SIDE)
    return tile[: max(1, round(height * scale)), : max(1, round(width * scale))]
