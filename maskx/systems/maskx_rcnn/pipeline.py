"""Quick start of Mask^X R-CNN."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from maskx.core.checks import default_of
from maskx.data.coco import CocoData
from maskx.data.grabcut import grabcut_masks
from maskx.data.images import read_image_sample
from maskx.data.masks import encode_masks
from maskx.engine.features import keep_features
from maskx.engine.options import QuickstartOptions, check_options
from maskx.engine.pipeline import train_one
from maskx.engine.quickstart import choose_image_size, load_split_data, write_metrics
from maskx.engine.runs import Run, link_run
from maskx.engine.start import Start, read_start
from maskx.engine.training import TrainingSettings, load_weights, select_device
from maskx.evaluation.average_precision import evaluate_detections, format_table
from maskx.evaluation.instance_figures import save_pictures
from maskx.supervision import CategorySplit
from maskx.systems.maskx_rcnn.evaluation import (
    Segment,
    by_grabcut,
    by_model,
    mean_iou_of_boxes,
)
from maskx.systems.maskx_rcnn.samples import InstanceMapper, pseudo_masks_line
from maskx.systems.maskx_rcnn.torchvision import (
    SampleDetector,
    detect,
    faster_rcnn,
    maskx_rcnn,
)
from maskx.systems.maskx_rcnn.weak_losses import EMATeacher

_ITERATIONS, _BATCH_SIZE = 1200, 8

# Per image of a batch. 0.00125 is usual for ResNets, 0.02 for a batch of 16.
LEARNING_RATES = {"light": 0.00375, "usual": 0.00125}

# The full method of the paper, with the light form of the MLP and mixed weights, and its baseline.
MASK_BRANCHES = {
    "maskx": {
        "predictor": "transfer",
        "transfer_inputs": "cls+box",
        "transfer_mix": 0.05,
        "transfer_normalise": True,
        "mlp": "bottleneck",
    },
    "class_agnostic": {"predictor": "class_agnostic", "mlp": "none"},
}


def quickstart_maskx(options: QuickstartOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """Run Mask^X R-CNN from data to ``metrics.json`` and ``predictions.png``.

    To compare, ``comparison.png`` shows the same images with the masks of each method in a row.
    """
    started = time.perf_counter()
    check_options("maskx", options)
    if options.start is not None and options.compare:
        raise ValueError(
            "start (--start) gives weights to Mask^X alone, and its baseline (--compare) has none. "
            "Leave one of them out."
        )
    device = select_device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    default_split = "all" if options.coco_train else "scenes_half"
    train_data, val_data, split = load_split_data(options, default_split, label_maps=False)
    report(
        f"{len(train_data.records)} training and {len(val_data.records)} validation images, "
        f"{len(split.with_masks)} categories with masks (A), {len(split.without_masks)} with "
        f"boxes only (B), on {device}"
    )
    for name, data in (("training", train_data), ("validation, scored against", val_data)):
        if line := pseudo_masks_line(data.records):
            report(f"{name}: {line}")
    link_run(options.output, "maskx")
    metrics: dict[str, Any] = {"system": "maskx"}
    detections: dict[str, list[dict[str, Any]]] = {}
    for name in ("maskx", "class_agnostic") if options.compare else ("maskx",):
        model, trained = train_detector(name, options, train_data, split, device, report)
        detections[name] = detect(
            model, val_data.records, val_data.category_ids, description=f"{name}: evaluation"
        )
        limit = {"max_detections": model.detector.roi_heads.detections_per_img}
        results = trained | _evaluate(name, val_data, detections[name], split, report, **limit)
        results |= _in_given_boxes(name, by_model(model), val_data, split, report)
        metrics |= results if name == "maskx" else {name: results}
    if options.compare:
        detections["grabcut"] = with_grabcut_masks(val_data, detections["maskx"])
        found = detections["grabcut"]
        metrics["grabcut"] = _evaluate("grabcut", val_data, found, split, report, **limit)
        metrics["grabcut"] |= _in_given_boxes("grabcut", by_grabcut, val_data, split, report)
    pictures = [path.name for path in save_pictures(options.output, val_data, detections, split)]
    return write_metrics(
        options,
        metrics,
        data=val_data,
        started=started,
        split=split,
        pictures=pictures,
        report=report,
    )


def train_detector(
    name: str,
    options: QuickstartOptions,
    data: CocoData,
    split: CategorySplit,
    device: torch.device,
    report: Callable[[str], None],
) -> tuple[SampleDetector, dict[str, Any]]:
    """Train one of ``MASK_BRANCHES`` in a folder of its name, and say what it cost."""
    iterations = _ITERATIONS if options.iterations is None else options.iterations
    batch_size = _BATCH_SIZE if options.batch_size is None else options.batch_size
    branch = MASK_BRANCHES[name] | ({"gt_boxes_only": True} if options.annotated_boxes else {})
    if options.box_loss:
        # BoxInst's 11 % of a training, in round numbers.
        branch |= {"box_loss": {"weight": options.box_loss, "warm_up": iterations // 10}}
    if options.tag_loss:
        branch |= {"tag_loss_weight": options.tag_loss}
    if options.ema_teacher:
        teacher = {
            "weight": options.ema_teacher,
            "warm_up": iterations // 10,
            # The average reaches back over a twentieth of a short training.
            "decay": min(default_of(EMATeacher, "decay"), max(0.0, 1 - 20 / max(iterations, 1))),
        }
        branch |= {"ema_teacher": teacher}
    settings = {
        "backbone": options.backbone,
        "frozen_norm": options.pretrained is not False,
        "frozen": options.frozen,
        "light": options.light or options.backbone == "small",
        "image_size": choose_image_size(options),
        "mask_branch": branch,
        "pseudo_weight": options.pseudo_weight,
    }
    build = functools.partial(build_detector, pretrained=options.pretrained)
    origins = {}
    if options.start is not None:
        start = read_start(options.start, "maskx")
        report(start.describe(data.class_names))
        build, origins = functools.partial(_build_from, start, build), {"start": start.origin}
    started = time.perf_counter()
    model, history = train_one(
        Run(
            system="maskx",
            host="pip",
            class_names=data.class_names,
            split=split,
            settings=settings,
            started_from=origins,
        ),
        data,
        options,
        TrainingSettings(
            iterations=iterations,
            batch_size=batch_size,
            learning_rate=LEARNING_RATES["light" if settings["light"] else "usual"] * batch_size,
            seed=options.seed,
            checkpoint_every=max(100, iterations // 50),
        ),
        folder=options.output / name,
        build=functools.partial(_new_detector, build, options),
        mapper=lambda model: InstanceMapper(
            split.indices_with_masks, pseudo_weight=options.pseudo_weight, sizes=model.sizes
        ),
        device=device,
        description=f"{name}: training",
    )
    return model, {
        "training_seconds": round(time.perf_counter() - started, 1),
        "iterations": iterations,
        "losses": {"start": history[0], "end": history[-1]},
    }


def _build_from(
    start: Start,
    build: Callable[..., SampleDetector],
    settings: Mapping[str, Any],
    class_names: Sequence[str],
) -> SampleDetector:
    return start.give_to(functools.partial(build, settings), class_names)


def _new_detector(
    build: Callable[..., SampleDetector],
    options: QuickstartOptions,
    settings: Mapping[str, Any],
    class_names: Sequence[str],
) -> SampleDetector:
    model = build(settings, class_names)
    if options.frozen:
        keep_features(model.detector.backbone.backbone, options.output, options.feature_cache)
    return model


def build_detector(
    settings: Mapping[str, Any], class_names: Sequence[str], *, pretrained: bool = False
) -> SampleDetector:
    """Build the detector of a run.

    Args:
        settings: ``backbone`` with ``frozen_norm``, ``frozen`` and ``light`` as of
            :func:`maskx.systems.maskx_rcnn.torchvision.faster_rcnn`; ``image_size`` in pixels of
            the shorter side; ``mask_branch``, arguments of
            :func:`maskx.torchvision.add_mask_branch`, None for a detector without masks.
    """
    size, branch = settings["image_size"], settings["mask_branch"]
    backbone, num_classes = settings["backbone"], len(class_names) + 1
    detector = {
        "pretrained": pretrained,
        "frozen_norm": settings["frozen_norm"],
        # Runs of earlier versions do not say these two.
        "frozen": settings.get("frozen", False),
        "light": settings.get("light"),
        "min_size": size,
        "max_size": 2 * size,
    }
    if branch is None:
        return SampleDetector(faster_rcnn(num_classes, backbone=backbone, **detector))
    model = maskx_rcnn(num_classes, backbone=backbone, detector=detector, **branch)
    return SampleDetector(model)


def open_detector(run: Run, device: torch.device) -> SampleDetector:
    """Open the trained detector of a run, in evaluation mode."""
    model = build_detector(run.settings, run.class_names).to(device)
    load_weights(model, run.weights_file)
    model.detector.roi_heads.ema_teacher = None  # it teaches in training alone
    return model.eval()


def _evaluate(
    name: str,
    data: CocoData,
    detections: Sequence[dict[str, Any]],
    split: CategorySplit,
    report: Callable[[str], None],
    *,
    max_detections: int,
) -> dict[str, Any]:
    results = evaluate_detections(
        data.json_file,
        detections,
        category_ids=data.category_ids,
        groups=split.groups(),
        max_detections=max_detections,
        image_ids=[record["image_id"] for record in data.records],
    )
    report(f"\n{name}, average precision in percent\n{format_table(results)}")
    return {  # without the lists by class
        task: {group: values for group, values in groups.items() if isinstance(values, dict)}
        for task, groups in results.items()
    }


def _in_given_boxes(
    name: str,
    segment: Segment,
    data: CocoData,
    split: CategorySplit,
    report: Callable[[str], None],
) -> dict[str, Any]:
    means = mean_iou_of_boxes(segment, data, split, description=f"{name}: masks of given boxes")
    known = {group: value for group, value in means.items() if not math.isnan(value)}
    shown = ", ".join(f"{group} {value:.3f}" for group, value in known.items()) or "no masks"
    report(f"\n{name}, mean IoU with the masks in annotated boxes: {shown}")
    return {"mean_iou": means}


def with_grabcut_masks(
    data: CocoData, detections: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Replace the masks of detections by GrabCut's in their boxes."""
    by_image: dict[Any, list] = {record["image_id"]: [] for record in data.records}
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    replaced = []
    for record in tqdm(data.records, desc="grabcut: evaluation", unit="img"):
        found = by_image[record["image_id"]]
        image = read_image_sample(record)["image"].permute(1, 2, 0).numpy()
        boxes = [
            (x, y, x + width, y + height) for x, y, width, height in (d["bbox"] for d in found)
        ]
        masks = encode_masks(grabcut_masks(image, boxes))
        replaced += [d | {"segmentation": m} for d, m in zip(found, masks, strict=True)]
    return replaced
