"""What the quick starts of all systems share: data, and the file of their results."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from maskx.core.files import write_json
from maskx.data.coco import CocoData, in_class_list, load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import DRAWN, check_masks, drawn_split, resolve_split
from maskx.engine.options import QuickstartOptions
from maskx.engine.predictor import open_run
from maskx.engine.training_report import METRICS_NAME, REPORT_NAME, write_training_report
from maskx.supervision import CategorySplit

TRAIN_SCENES, VAL_SCENES = 3000, 200
SCENE_SIZE = 128
# Few classes on quiet ground, for learning from image labels; of whatever style but "crowded".
SPARSE_SCENES, SPARSE_STYLE = 1500, {"style": "sparse", "num_categories": 12}
_COCO_SIZE = 256
_SMALLEST_SIZE, _LARGEST_SIZE = 8, 2**14


def choose_image_size(options: QuickstartOptions) -> int:
    """Return the size that is asked for, or the default of scenes and of COCO files."""
    if options.image_size is None:
        return _COCO_SIZE if options.coco_train else SCENE_SIZE
    if not _SMALLEST_SIZE <= options.image_size <= _LARGEST_SIZE:
        raise ValueError(
            f"image_size is {options.image_size}. Allowed: {_SMALLEST_SIZE} to {_LARGEST_SIZE} "
            "pixels."
        )
    return options.image_size


def load_data(options: QuickstartOptions, *, style: str = "crowded") -> tuple[CocoData, CocoData]:
    """Read the training and the validation data, or generate the scenes of the seed.

    Args:
        style: of generated scenes, see :data:`maskx.data.scenes.generator.STYLES`; those of
            another style than "crowded" are fewer, with few classes.
    """
    check_held_out(options)
    if options.held_out:
        data = load_coco(*options.coco_train, strict=not options.skip_bad)
        return hold_out(data, options.held_out, options.seed)
    if (options.coco_train is None) != (options.coco_val is None):
        raise ValueError("COCO files are needed for training and for validation, got only one.")
    if options.coco_train is None:
        num_train, kind = TRAIN_SCENES, {}
        if style != "crowded":
            num_train, kind = SPARSE_SCENES, SPARSE_STYLE | {"style": style}
        sources = []
        for name, count, seed in (
            ("train", num_train, 2 * options.seed),
            ("val", VAL_SCENES, 2 * options.seed + 1),
        ):
            folder = options.output / "scenes" / name
            json_file = generate_scenes(
                folder, count=count, size=SCENE_SIZE, seed=seed, progress=True, **kind
            )
            sources.append((json_file, folder))
    else:
        sources = [options.coco_train, options.coco_val]
    train_data, val_data = (
        load_coco(json_file, images, strict=not options.skip_bad) for json_file, images in sources
    )
    return train_data, in_class_list(val_data, train_data)


def check_held_out(options: QuickstartOptions) -> None:
    """Refuse a share of images to evaluate on that cannot be."""
    if not 0 <= options.held_out < 1:
        raise ValueError(
            f"held_out is {options.held_out}. Allowed: a share of the training images, from 0 to "
            "below 1."
        )
    if options.held_out and (options.coco_train is None or options.coco_val is not None):
        raise ValueError(
            "held_out takes images to evaluate on from coco_train, where there is no coco_val. "
            "Correct the options."
        )


def hold_out(data: CocoData, share: float, seed: int) -> tuple[CocoData, CocoData]:
    """Divide images into those to train on and a share to evaluate on, chosen by a seed.

    Raises:
        ValueError: there are fewer than two images.
    """
    count = len(data.records)
    if count < 2:
        raise ValueError(
            f"'{data.json_file}' has {count} image, of which none can be held out. Give a file to "
            "evaluate on."
        )
    order = np.random.RandomState(seed).permutation(count)
    held = set(order[: min(count - 1, max(1, round(share * count)))].tolist())
    return tuple(
        replace(data, records=[r for i, r in enumerate(data.records) if (i in held) == is_held])
        for is_held in (False, True)
    )


def load_split_data(
    options: QuickstartOptions,
    default_split: str = "scenes_half",
    *,
    style: str = "crowded",
    label_maps: bool = True,
) -> tuple[CocoData, CocoData, CategorySplit]:
    """Read the data and the split ``masks_for``, whose categories A must have masks in them.

    Args:
        style: see :func:`load_data`.
        label_maps: see :func:`maskx.data.splits.check_masks`.
    """
    train_data, val_data = load_data(options, style=style)
    try:
        spec, names = options.masks_for or default_split, train_data.class_names
        if spec == DRAWN:
            split = drawn_split(train_data.records, names, label_maps=label_maps)
        else:
            split = resolve_split(spec, names)
        check_masks(train_data.records, split, label_maps=label_maps)
    except ValueError as error:
        if options.masks_for or "--masks-for" in str(error):
            raise
        raise ValueError(
            f"{error} '{default_split}' is the default: name the categories with masks by "
            "--masks-for (masks_for in Python), a file or a named split."
        ) from error
    return train_data, val_data, split


def write_metrics(
    options: QuickstartOptions,
    metrics: Mapping[str, Any],
    *,
    started: float,
    data: CocoData | None = None,
    split: CategorySplit | None = None,
    pictures: Sequence[str] = ("predictions.png",),
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Write ``metrics.json`` and ``report.html``, and say what the run has written.

    Args:
        data: of the validation; None where there is no run to report on.

    Returns:
        The metrics with ``split``, and ``seconds`` since ``started``.
    """
    metrics = dict(metrics)
    if split is not None:
        metrics["split"] = {"name": split.name, "A": split.with_masks, "B": split.without_masks}
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    write_json(options.output / METRICS_NAME, nan_to_null(metrics))
    names = [METRICS_NAME, *pictures]
    if data is not None:
        predictor = open_run(options.output, options.device)
        write_training_report(options.output / REPORT_NAME, options.output, predictor, data)
        names.append(REPORT_NAME)
    written = [str(options.output / name) for name in names]
    report(f"\nWrote {', '.join(written)}")
    return metrics


def nan_to_null(value: Any) -> Any:
    """Make metrics fit for JSON: None for NaN, numbers rounded to four decimals."""
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
