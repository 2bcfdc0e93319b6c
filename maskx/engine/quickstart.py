"""What the quick starts of all systems share: options, data, and the file of their results.

The systems are listed in :mod:`maskx.systems.quickstarts`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from maskx.core.files import write_json
from maskx.data.coco import CocoData, load_coco
from maskx.data.scenes.generator import generate_scenes

__all__ = [
    "SCENE_SIZE",
    "SPARSE_SCENES",
    "SPARSE_STYLE",
    "TRAIN_SCENES",
    "VAL_SCENES",
    "QuickstartOptions",
    "check_options",
    "choose_image_size",
    "load_data",
    "nan_to_null",
    "write_metrics",
]

TRAIN_SCENES, VAL_SCENES = 3000, 200
SCENE_SIZE = 128
# Few classes on quiet ground, for learning from image labels.
SPARSE_SCENES, SPARSE_STYLE = 1500, {"style": "sparse", "num_categories": 12}
_COCO_SIZE = 256

# Options that have no meaning for all systems, and those that they have one for.
_OWN_OPTIONS = {
    "compare": ("maskx", "transfernet"),
    "masks_for": ("maskx", "transfernet", "larvseg", "concept_mask"),
    "threshold": ("class_patterns",),
    "resolve": ("class_patterns",),
    "crf": ("class_patterns", "transfernet"),
    "multi_scale": ("class_patterns",),
}


@dataclass(frozen=True)
class QuickstartOptions:
    """Options of the quick start.

    Attributes:
        output: folder of the generated data, checkpoints, ``metrics.json`` and pictures.
        seed: of the scenes, the initial weights and the order of the data.
        iterations: training steps of every model. None is for ``maskx`` 1200; for
            ``class_patterns`` 500 of the classifier, 300 of each segmentation network; for
            ``transfernet`` 400 of the classifier, 200 of the first stage, 400 of the second; for
            ``larvseg`` 400 of the classifier, 350 of each method; for ``concept_mask`` 1200 of the
            embedding, 1000 of the refinement, 400 of the segmentation. Baselines of ``transfernet``
            train for as many steps as its two stages together.
        batch_size: images per step; None is 8 for ``maskx``, 16 for all others. For
            ``transfernet`` it must be even.
        compare: train one more baseline in the same way: of ``maskx`` the class-agnostic one, with
            GrabCut in the boxes that Mask^X finds evaluated too; of ``transfernet`` DecoupledNet.
        resume: go on with an interrupted run.
        device: ``auto``, ``cpu`` or ``cuda``.
        coco_train: annotation file and image folder to train on instead of generated scenes.
        coco_val: annotation file and image folder to evaluate on.
        masks_for: category split, see :func:`maskx.data.splits.resolve_split`: the categories
            with masks of ``maskx``, the source of ``transfernet``, the base classes of
            ``larvseg``, on COCO files the concepts with masks of ``concept_mask``, whose scenes
            have a split of their own; ``class_patterns`` learns from no masks. None is
            ``scenes_half``; on COCO files for ``maskx`` ``all``, for ``concept_mask``
            ``coco_voc``.
        skip_bad: leave bad annotations out, counted, instead of stopping at them.
        backbone: ``small`` or the name of a torchvision ResNet; ``vgg16`` too for ``transfernet``,
            ``larvseg`` and ``concept_mask``.
        pretrained: start from ImageNet weights, which torchvision downloads; not with ``small``.
        image_size: shorter side of the images in pixels; None is 128 for scenes, 256 else. All but
            ``maskx`` warp images to squares of this side.
        workers: processes that read images; 0 reads them in the process that trains.
        threshold: of ``class_patterns``, see
            :class:`maskx.systems.class_patterns.proxy_masks.ProxyMaskSettings`;
            None is "otsu", the paper has "zero".
        resolve: the same; None is "standardised", the paper has "ignore".
        crf: refine masks by a dense CRF: of ``class_patterns`` proxy masks of images with one
            label, and predictions; of ``transfernet`` predictions.
        multi_scale: of ``class_patterns``, test the segmentation network at three sizes, as the
            paper does.
    """

    output: Path
    seed: int = 0
    iterations: int | None = None
    batch_size: int | None = None
    compare: bool = False
    resume: bool = False
    device: str = "auto"
    coco_train: tuple[str, str] | None = None
    coco_val: tuple[str, str] | None = None
    masks_for: str | None = None
    skip_bad: bool = False
    backbone: str = "small"
    pretrained: bool = False
    image_size: int | None = None
    workers: int = 0
    threshold: str | None = None
    resolve: str | None = None
    crf: bool = False
    multi_scale: bool = False


def check_options(system: str, options: QuickstartOptions) -> None:
    """Refuse options that have no meaning for a system.

    Raises:
        ValueError: there is one; the message says for which systems it has a meaning.
    """
    default = {field.name: field.default for field in fields(QuickstartOptions)}
    for name, owners in _OWN_OPTIONS.items():
        if system not in owners and getattr(options, name) != default[name]:
            raise ValueError(
                f"{name} has no meaning for the system {system}, only for {', '.join(owners)}. "
                "Leave it out, or choose another system."
            )


def choose_image_size(options: QuickstartOptions) -> int:
    """Return the size that is asked for, or the default of scenes and of COCO files.

    Raises:
        ValueError: the size is below 1.
    """
    if options.image_size is None:
        return _COCO_SIZE if options.coco_train else SCENE_SIZE
    if options.image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {options.image_size}.")
    return options.image_size


def load_data(options: QuickstartOptions, *, sparse: bool = False) -> tuple[CocoData, CocoData]:
    """Read the training and the validation data, or generate the scenes of the seed.

    Args:
        options: what to read.
        sparse: generate fewer scenes, of few classes on quiet ground.

    Raises:
        ValueError: a file cannot be used, or the two do not fit together.
    """
    if (options.coco_train is None) != (options.coco_val is None):
        raise ValueError("COCO files are needed for training and for validation, got only one.")
    if options.coco_train is None:
        num_train, style = (SPARSE_SCENES, SPARSE_STYLE) if sparse else (TRAIN_SCENES, {})
        sources = []
        for name, count, seed in (
            ("train", num_train, 2 * options.seed),
            ("val", VAL_SCENES, 2 * options.seed + 1),
        ):
            folder = options.output / "scenes" / name
            json_file = generate_scenes(
                folder, count=count, size=SCENE_SIZE, seed=seed, progress=True, **style
            )
            sources.append((json_file, folder))
    else:
        sources = [options.coco_train, options.coco_val]
    train_data, val_data = (
        load_coco(json_file, images, strict=not options.skip_bad) for json_file, images in sources
    )
    if train_data.class_names != val_data.class_names:
        differing = sorted(set(train_data.class_names) ^ set(val_data.class_names))
        raise ValueError(
            f"'{train_data.json_file}' and '{val_data.json_file}' must have the same categories; "
            f"only one of them has {differing[:8] or 'another order of them'}."
        )
    for data in (train_data, val_data):
        if not data.records:
            raise ValueError(f"'{data.json_file}' has no images. Give a file with at least one.")
    return train_data, val_data


def write_metrics(
    options: QuickstartOptions,
    metrics: Mapping[str, Any],
    *,
    started: float,
    pictures: Sequence[str] = ("predictions.png",),
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Write ``metrics.json`` and say what the run has written.

    Args:
        options: of the run.
        metrics: what it measured.
        started: ``time.perf_counter()`` at its beginning.
        pictures: names of the pictures that lie beside the file.
        report: receives the line for the reader.

    Returns:
        The metrics with ``seconds``, the time since the beginning.
    """
    metrics = dict(metrics) | {"seconds": round(time.perf_counter() - started, 1)}
    write_json(options.output / "metrics.json", nan_to_null(metrics))
    written = [str(options.output / name) for name in ("metrics.json", *pictures)]
    report(f"\nWrote {', '.join(written)}")
    return metrics


def nan_to_null(value: Any) -> Any:
    """Make metrics fit for JSON: None for NaN, numbers rounded to four decimals."""
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
