"""A trained run as one file to pass on, with a model card beside it."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskx.core.files import read_json, written_text
from maskx.core.tensor_files import write_tensors
from maskx.engine.runs import MODEL_FILE_KIND, Run, flat_settings, read_run
from maskx.engine.system import find_system
from maskx.engine.training import read_checkpoint
from maskx.engine.training_report import METRICS_NAME, NOT_MEASURED

_LIMITS = (
    "It was trained on the data above alone: other kinds of images, and things of other categories "
    "that look alike, were not tried.",
    "The numbers are of one training, on the validation images of that data.",
)
_LIMIT_OF_B = (
    "No mask taught it the categories without masks (B): their outlines are less exact, and less "
    "sure to be right, than those of A."
)


def write_model_file(
    run_folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    licence: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the weights of a run, and what it says of itself, into one safetensors file.

    :func:`maskx.open_run` opens it. Of the files that the run started from the names and digests
    are kept, not where they lie.

    Args:
        run_folder: of a training on pip alone.
        path: a ``.safetensors`` file.
        licence: of the data that it learned from, for the card.
        overwrite: replace the file and its card.

    Returns:
        The path of the model card, a page of Markdown.

    Raises:
        FileExistsError: the file or its card exists.
        FileNotFoundError: the run has no weights.
        ValueError: the run is of another host, or its weights are damaged.
    """
    run = read_run(run_folder)
    if run.host != "pip":
        raise ValueError(
            f"'{run.folder}' holds a run trained with {run.host}, whose model is built from a "
            "configuration. Pass on its folder."
        )
    path = Path(path)
    card = path.with_suffix(".md")
    for each in (path, card):
        if each.exists() and not overwrite:
            raise FileExistsError(
                f"{each} exists already. Add --overwrite to replace it, or name another file."
            )
    origins = {
        name: dataclasses.replace(origin, path=Path(origin.path).name)
        for name, origin in run.started_from.items()
    }
    shown = dataclasses.replace(run, started_from=origins, weights=path.name)
    tensors = read_checkpoint(run.weights_file, "cpu")["model"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, MODEL_FILE_KIND, {"run": shown.as_json()})
    with written_text(card) as file:
        file.write(model_card(shown, path.name, _numbers(Path(run_folder)), licence))
    return card


def _numbers(folder: Path) -> dict[str, float]:
    """Read what the evaluation at the end of a training measured, by dotted name."""
    path = folder / METRICS_NAME
    found = flat_settings(read_json(path)) if path.is_file() else {}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, int | float) and key.partition(".")[0] not in NOT_MEASURED
    }


def model_card(run: Run, name: str, numbers: Mapping[str, float], licence: str | None) -> str:
    """Say in Markdown what a model is, what it learned from, how good it is, and its limits.

    Args:
        name: of its file.
        numbers: what was measured, by name.
        licence: of its data; None where nobody said.
    """
    title = find_system(run.system).title
    with_masks = run.split.with_masks if run.split else ()
    without_masks = run.split.without_masks if run.split else ()
    knows = f"{len(run.class_names)} categories: {', '.join(run.class_names)}."
    if run.split:
        knows += f" With masks in training (A): {', '.join(with_masks) or 'none'}."
        knows += f" Without (B): {', '.join(without_masks) or 'none'}."
    origins = run.started_from.items()
    data = [f"- {name}: {each.path or 'no file'}, sha256 {each.sha256}" for name, each in origins]
    limits = [*_LIMITS, *([_LIMIT_OF_B] if with_masks and without_masks else [])]
    return "\n\n".join(
        [
            f"# {Path(name).stem}",
            f"{title}, trained by maskx {run.version}. `maskx.open_run({name!r})` opens it.",
            "## What it knows",
            knows,
            "## What it learned from",
            "\n".join(data) or "Not said.",
            f"Licence of the data: {licence or 'not said; ask who gave you this file'}.",
            "## Numbers",
            _table("measure", {key: f"{value:.4g}" for key, value in numbers.items()}),
            "## Settings",
            _table("setting", flat_settings(run.settings)),
            "## Limits",
            "\n".join(f"- {each}" for each in limits) + "\n",
        ]
    )


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in values.items()]
    return "\n".join([f"| {title} | |", "|---|---|", *rows]) if rows else "None."
