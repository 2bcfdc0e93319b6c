"""One picture of a study: a row of validation images for each setting that trained a model."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch import nn

from maskx.data.images import read_record_image, read_rgb
from maskx.data.label_maps import semantic_label_map
from maskx.engine.predictor import Predictor, rgb_sample
from maskx.engine.results import Prediction
from maskx.engine.runs import Run
from maskx.engine.system import find_system
from maskx.evaluation.figures import contact_sheet, save_png, varied_records
from maskx.supervision import CategorySplit

__all__ = ["Shown", "draw_row", "write_sheet"]

PICTURE_NAME = "contact_sheet.png"
_ROW_NAME, _TRUTH = "row.png", "truth"
_IMAGES, _MOST_ROWS, _SIDE, _SCORE = 5, 6, 256, 0.5

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Shown:
    """What a setting has trained last, and the validation images to show it on.

    Attributes:
        class_names: of the model.
        split: instances of categories with masks are drawn in another colour.
        truth: returns the label map of a record; None: that of its masks.
        group: of settings that are shown on these images; their names begin with it and a slash.
    """

    model: nn.Module
    records: Sequence[Record]
    class_names: Sequence[str]
    split: CategorySplit | None = None
    truth: Callable[[Record], np.ndarray] | None = None
    group: str = ""


def draw_row(shown: Shown, system: str, seed_folder: Path, setting: str) -> None:
    """Draw the predictions of a setting into its folder, and the truth where it is not there."""
    records = varied_records(shown.records, num_labels=2.5)[:_IMAGES]
    if not records:  # none shows anything that is labelled
        return
    images = [read_record_image(record, image_format="RGB") for record in records]
    names, found = tuple(shown.class_names), find_system(system)
    run = Run(system, "pip", names, {}, split=shown.split)
    model = shown.model.eval()
    predictor = Predictor(run, found, model, getattr(model, "prepare", rgb_sample))
    predicted = (predictor.many([image], threshold=_SCORE)[0] for image in images)
    _save_row(seed_folder / setting, predicted)
    truth_folder = seed_folder / shown.group / _TRUTH
    if not (truth_folder / _ROW_NAME).is_file():
        truth = shown.truth or functools.partial(semantic_label_map, num_classes=len(names))
        pairs = zip(map(truth, records), images, strict=True)
        _save_row(truth_folder, (Prediction(names, label_map=m, image=i) for m, i in pairs))


def write_sheet(seed_folder: Path, settings: Sequence[str], path: Path) -> None:
    """Lay the rows of the first settings out in one picture, under the truth of their images.

    Nothing is written where there is no row.
    """

    def is_there(name: str) -> bool:
        return (seed_folder / name / _ROW_NAME).is_file()

    settings_of: dict[str, list[str]] = {}
    for setting in list(filter(is_there, settings))[:_MOST_ROWS]:
        of_group = (PurePosixPath(setting).parent / _TRUTH).as_posix()
        settings_of.setdefault(of_group if is_there(of_group) else _TRUTH, []).append(setting)
    names = [name for truth, group in settings_of.items() for name in (truth, *group)]
    if names:
        tiles = [read_rgb(seed_folder / name / _ROW_NAME) for name in names]
        save_png(path, contact_sheet(tiles, columns=1, row_titles=names, legend=()))


def _save_row(folder: Path, predictions: Iterable[Prediction]) -> None:
    tiles = [prediction.plot(side=_SIDE) for prediction in predictions]
    save_png(folder / _ROW_NAME, np.hstack(tiles))
