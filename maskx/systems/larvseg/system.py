"""What LarvSeg is to the tools."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maskx.engine.options import QuickstartOptions, check_options
from maskx.engine.quickstart import choose_image_size, load_split_data, write_metrics
from maskx.engine.results import Prediction, label_map_prediction
from maskx.engine.system import PhotoRecipe, System
from maskx.engine.training import select_device
from maskx.systems.larvseg.evaluation import response_maps
from maskx.systems.larvseg.model import exportable
from maskx.systems.larvseg.pipeline import LarvSegSettings, learn_larvseg, open_larvseg

SCENES = {"attentive_weight": 1.0}
"""Settings for generated scenes: the paper's weight is for 320,000 steps, not a few hundred."""

PHOTOS = PhotoRecipe(
    title="every pixel gets one of the categories: of some learned from masks, of the others from "
    "tags, by LarvSeg and, to compare, by its baseline without attention.",
    options={"iterations": 300, "batch_size": 8, "image_size": 128},
    step_seconds=0.011,
    image_seconds=0.04,
    measured="on 750 photographs of clothing, 300 of them with masks of 29 of 58 labels, three "
    "runs ended, in the mean, with a mean IoU of 6.7 percent on labels with masks and 0.3 on the "
    "others; the baseline had 7.4 and 0.0. So short a training finds next to nothing of labels "
    "without masks.",
    masks=1582,
    categories=29,
)


def quickstart_larvseg(options: QuickstartOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """Learn LarvSeg and its baseline, from data to ``metrics.json`` and ``predictions.png``.

    Base classes are those that ``masks_for`` names, novel ones all others; of these only image
    labels are used. See :func:`maskx.systems.larvseg.pipeline.learn_larvseg`.
    """
    started = time.perf_counter()
    check_options("larvseg", options)
    device = select_device(options.device)
    chosen = {
        "batch_size": options.batch_size,
        "image_size": choose_image_size(options),
        "start_iterations": options.iterations,
        "iterations": options.iterations,
    }
    if options.coco_train is None:
        chosen |= SCENES
    settings = LarvSegSettings(
        backbone=options.backbone,
        pretrained=options.pretrained,
        frozen=options.frozen,
        feature_cache=options.feature_cache,
        seed=options.seed,
        workers=options.workers,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    options.output.mkdir(parents=True, exist_ok=True)
    train_data, val_data, split = load_split_data(options, style="sparse")
    report(
        f"{len(train_data.records)} training and {len(val_data.records)} validation images, on "
        f"{device}"
    )
    metrics = {"system": "larvseg"} | learn_larvseg(
        train_data,
        val_data,
        split,
        settings,
        output=options.output,
        resume=options.resume,
        device=device,
        report=report,
    )
    return write_metrics(
        options, metrics, data=val_data, started=started, split=split, report=report
    )


def _prediction(result: Mapping[str, Any], class_names: Sequence[str]) -> Prediction:
    return label_map_prediction(result, class_names, scores=result["top_scores"][0].sigmoid())


SYSTEM = System(
    name="larvseg",
    title="LarvSeg",
    pipeline=quickstart_larvseg,
    open=lambda run, device: open_larvseg(run.weights_file, device),
    prediction=_prediction,
    exportable=exportable,
    similarity=response_maps,
    has_background=False,
    learns_from=("tags_and_masks", "many_tags_and_masks"),
    options=frozenset(["masks_for"]),
    photos=PHOTOS,
    words={
        "start": "image classifier that all start from",
        "larvseg": "LarvSeg",
        "larvseg_single_image": "LarvSeg, single image",
        "larvseg_score_map": "LarvSeg, score map",
        "larvseg_normalised": "LarvSeg, attention divided by its sum",
        "base": "base classes",
        "novel": "novel classes",
    },
)
