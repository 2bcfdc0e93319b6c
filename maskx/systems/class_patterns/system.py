"""What class patterns is to the tools, and its quick start."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskx.engine.options import QuickstartOptions, check_options
from maskx.engine.quickstart import choose_image_size, load_data, write_metrics
from maskx.engine.results import Prediction, label_map_prediction
from maskx.engine.system import PhotoRecipe, System
from maskx.engine.training import select_device
from maskx.systems.class_patterns.model import exportable
from maskx.systems.class_patterns.pipeline import NAME, TagSettings, learn_from_tags, open_model
from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings

PHOTOS = PhotoRecipe(
    title="a classifier learns the tags, masks of the photographs are made of its features, and a "
    "segmentation network learns from these masks, then from what it predicts itself.",
    options={"iterations": 200, "batch_size": 4, "image_size": 224},
    step_seconds=0.38,
    image_seconds=0.28,
    measured="on 266 photographs of 20 categories, the masks that one run made of their tags had a "
    "mean IoU of 26 percent; the network that learns from them was not measured.",
)


def quickstart_class_patterns(
    options: QuickstartOptions, report: Callable[[str], None]
) -> dict[str, Any]:
    """Learn from image labels alone, from data to ``metrics.json`` and ``predictions.png``.

    See :func:`maskx.systems.class_patterns.pipeline.learn_from_tags`.
    """
    started = time.perf_counter()
    check_options(NAME, options)
    device = select_device(options.device)
    chosen = {
        "iterations": options.iterations,
        "segmenter_iterations": options.iterations,
        "batch_size": options.batch_size,
        "max_images_per_class": options.max_images,
    }
    default = TagSettings().masks
    settings = TagSettings(
        backbone=options.backbone,
        pretrained=options.pretrained,
        frozen=options.frozen,
        feature_cache=options.feature_cache,
        image_size=choose_image_size(options),
        seed=options.seed,
        layer=options.layer,
        masks=ProxyMaskSettings(
            threshold=options.threshold or default.threshold,
            resolve=options.resolve or default.resolve,
            crf=options.crf,
        ),
        multi_scale=options.multi_scale,
        workers=options.workers,
        **{key: value for key, value in chosen.items() if value is not None},
    )
    options.output.mkdir(parents=True, exist_ok=True)
    train_data, val_data = load_data(options, style="sparse")
    report(
        f"{len(train_data.records)} training images with nothing but image labels, "
        f"{len(val_data.records)} validation images, {len(train_data.class_names)} classes, on "
        f"{device}. True masks of training images, where there are any, are only measured with."
    )
    root = options.coco_train[1] if options.coco_train else train_data.json_file.parent
    metrics = {"system": NAME}
    metrics |= learn_from_tags(
        train_data,
        val_data,
        settings,
        image_root=Path(root),
        output=options.output,
        resume=options.resume,
        device=device,
        report=report,
    )
    return write_metrics(options, metrics, data=val_data, started=started, report=report)


def _prediction(result: Mapping[str, Any], class_names: Sequence[str]) -> Prediction:
    return label_map_prediction(result, class_names, scores=result["sem_seg_prob"].amax(dim=0))


SYSTEM = System(
    name=NAME,
    title="class patterns",
    pipeline=quickstart_class_patterns,
    open=open_model,
    prediction=_prediction,
    exportable=exportable,
    learns_from=("tags",),
    photos=PHOTOS,
    options=frozenset(["threshold", "resolve", "crf", "multi_scale", "layer", "max_images"]),
    words={
        "proxy": "proxy masks, by layer",
        "proxy_decided_only": "proxy masks, decided pixels alone: mean IoU in percent",
        "proxy_undecided": "proxy masks, undecided: share of the pixels",
        "proxy_paper": "proxy masks with threshold 0, conflicts ignored: mean IoU in percent",
        "trained": "network, trained on the proxy masks",
        "retrained": "network, trained again on what it predicts",
        "segmenter": "network, trained on the proxy masks",
        "uncertain_patterns": "patterns whose sign is uncertain",
    },
)
