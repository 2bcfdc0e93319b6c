"""Quick start of ConceptMask."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskx.data.splits import resolve_split
from maskx.engine.options import QuickstartOptions, check_options
from maskx.engine.quickstart import (
    SCENE_SIZE,
    VAL_SCENES,
    choose_image_size,
    load_data,
    write_metrics,
)
from maskx.engine.training import select_device
from maskx.systems.concept_mask.chain import ConceptMaskSettings
from maskx.systems.concept_mask.model import ConceptNetwork
from maskx.systems.concept_mask.pipeline import (
    ConceptData,
    coco_concept_data,
    learn_concept_mask,
    scene_concept_data,
)

__all__ = ["make_scene_data", "quickstart_concept_mask"]

CONCEPT_SCENES, TAG_SCENES = 2000, 4000


def quickstart_concept_mask(
    options: QuickstartOptions, report: Callable[[str], None]
) -> dict[str, Any]:
    """Learn ConceptMask, from data to ``metrics.json`` and ``predictions.png``.

    Generated scenes have concepts of every level. Of COCO files all categories have tags and boxes,
    and those that ``masks_for`` names have masks. See
    :func:`maskx.systems.concept_mask.pipeline.learn_concept_mask`.

    Args:
        options: what to do.
        report: receives the lines for the reader.

    Returns:
        The content of ``metrics.json``.

    Raises:
        ValueError: an option, an annotation or a checkpoint cannot be used; the message says why.
    """
    started = time.perf_counter()
    check_options("concept_mask", options)
    if options.masks_for is not None and options.coco_train is None:
        raise ValueError(
            "masks_for has no meaning for generated scenes with concepts, whose levels are fixed. "
            "Leave it out, or give COCO files."
        )
    device = select_device(options.device)
    size = choose_image_size(options)
    settings = ConceptMaskSettings(
        network=_network_of(options.backbone, options.pretrained, size),
        seed=options.seed,
        workers=options.workers,
    )
    chosen = {"batch_size": options.batch_size}
    for stage in ("embedding", "refinement", "segmentation"):
        chosen[f"{stage}_iterations"] = options.iterations
    settings = replace(settings, **{k: value for k, value in chosen.items() if value is not None})
    options.output.mkdir(parents=True, exist_ok=True)
    data = _load(options)
    report(
        f"{len(data.train.records)} training images, {len(data.fitting.records)} to fit "
        f"thresholds, {len(data.val.records)} validation images, on {device}"
    )
    metrics: dict[str, Any] = {"system": "concept_mask"}
    metrics |= learn_concept_mask(
        data,
        settings,
        output=options.output,
        resume=options.resume,
        device=device,
        report=report,
    )
    split = data.split
    metrics["split"] = {
        name: list(getattr(split, name)) for name in ("vocabulary", "boxed", "masked", "unseen")
    }
    return write_metrics(options, metrics, started=started, report=report)


def _network_of(backbone: str, pretrained: bool, image_size: int) -> ConceptNetwork:
    """Choose a network for images of a size: it is trained on half of it, as is the first map."""
    half = max(1, image_size // 2)
    return ConceptNetwork(
        backbone=backbone,
        pretrained=pretrained,
        image_size=image_size,
        embedding_size=half,
        attention_sizes=(half, image_size),
    )


def make_scene_data(folder: Path, seed: int) -> ConceptData:
    """Generate the scenes and word vectors of a seed; see :func:`scene_concept_data`."""
    return scene_concept_data(
        folder,
        num_train=CONCEPT_SCENES,
        num_val=VAL_SCENES,
        num_tags=TAG_SCENES,
        size=SCENE_SIZE,
        seed=seed,
    )


def _load(options: QuickstartOptions) -> ConceptData:
    if options.coco_train is None and options.coco_val is None:
        return make_scene_data(options.output / "scenes", options.seed)
    train, val = load_data(options)
    split = resolve_split(options.masks_for or "coco_voc", train.class_names)
    return coco_concept_data(train, val, split)
