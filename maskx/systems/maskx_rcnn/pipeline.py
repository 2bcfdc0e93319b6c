"""Quick start of Mask^X R-CNN."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_api
from tqdm import tqdm

from maskx.data.coco import CocoData
from maskx.data.grabcut import grabcut_masks
from maskx.data.image_samples import read_image_sample
from maskx.data.masks import decode_segmentation, encode_masks
from maskx.data.splits import resolve_split
from maskx.engine.batches import training_batches
from maskx.engine.options import QuickstartOptions, check_options
from maskx.engine.quickstart import choose_image_size, load_data, write_metrics
from maskx.engine.runs import Run, link_run, origin_of
from maskx.engine.training import TrainingSettings, load_weights, select_device, train
from maskx.evaluation.average_precision import evaluate_detections, format_table
from maskx.evaluation.figures import contact_sheet, draw_instances, save_png
from maskx.supervision import CategorySplit
from maskx.systems.maskx_rcnn.samples import InstanceMapper, check_masks
from maskx.systems.maskx_rcnn.torchvision import (
    SampleDetector,
    detect,
    maskx_rcnn_resnet_fpn,
    maskx_rcnn_small,
)

_ITERATIONS, _BATCH_SIZE = 1200, 8
_FIGURE_IMAGES, _FIGURE_COLUMNS, _FIGURE_SCORE = 8, 4, 0.5

# Per image of a batch. 0.00125 is usual for ResNets, 0.02 for a batch of 16.
_LEARNING_RATES = {"small": 0.00375}

# The full method of the paper, with the light form of the MLP, and its baseline.
_MASK_BRANCHES = {
    "maskx": {"predictor": "transfer", "transfer_inputs": "cls+box", "mlp": "bottleneck"},
    "class_agnostic": {"predictor": "class_agnostic", "mlp": "none"},
}


def quickstart_maskx(options: QuickstartOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """Run Mask^X R-CNN from data to ``metrics.json`` and ``predictions.png``.

    To compare, ``comparison.png`` shows the same images with the masks of each method in a row.

    Args:
        options: what to do.
        report: receives the lines for the reader.

    Returns:
        The content of ``metrics.json``.

    Raises:
        ValueError: an option, an annotation or a checkpoint cannot be used; the message says why.
    """
    started = time.perf_counter()
    check_options("maskx", options)
    device = select_device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    train_data, val_data = load_data(options)
    default_split = "all" if options.coco_train else "scenes_half"
    split = resolve_split(options.masks_for or default_split, train_data.class_names)
    report(
        f"{len(train_data.records)} training and {len(val_data.records)} validation images, "
        f"{len(split.with_masks)} categories with masks (A), {len(split.without_masks)} with "
        f"boxes only (B), on {device}"
    )

    check_masks(train_data.records, split)

    link_run(options.output, "maskx")
    metrics: dict[str, Any] = {"system": "maskx"}
    detections: dict[str, list[dict[str, Any]]] = {}
    for name in ("maskx", "class_agnostic") if options.compare else ("maskx",):
        model, trained = _train_detector(name, options, train_data, split, device)
        detections[name] = detect(
            model, val_data.records, val_data.category_ids, description=f"{name}: evaluation"
        )
        results = trained | _evaluate(name, val_data, detections[name], split, report)
        metrics |= results if name == "maskx" else {name: results}
    if options.compare:
        detections["grabcut"] = with_grabcut_masks(val_data, detections["maskx"])
        metrics["grabcut"] = _evaluate("grabcut", val_data, detections["grabcut"], split, report)
    pictures = save_pictures(options.output, val_data, detections, split)
    metrics["split"] = {"name": split.name, "A": split.with_masks, "B": split.without_masks}
    names = [path.name for path in pictures]
    return write_metrics(options, metrics, started=started, pictures=names, report=report)


def _train_detector(
    name: str,
    options: QuickstartOptions,
    data: CocoData,
    split: CategorySplit,
    device: torch.device,
) -> tuple[SampleDetector, dict[str, Any]]:
    iterations = _ITERATIONS if options.iterations is None else options.iterations
    batch_size = _BATCH_SIZE if options.batch_size is None else options.batch_size
    settings = TrainingSettings(
        iterations=iterations,
        batch_size=batch_size,
        learning_rate=_LEARNING_RATES.get(options.backbone, 0.00125) * batch_size,
        seed=options.seed,
        checkpoint_every=max(100, iterations // 50),
    )
    folder = options.output / name
    run = Run(
        system="maskx",
        host="pip",
        class_names=data.class_names,
        split=split,
        settings={
            "method": name,
            "backbone": options.backbone,
            "frozen_norm": options.pretrained,
            "image_size": choose_image_size(options),
        },
        started_from={"annotations": origin_of(data.json_file, folder)},
    )
    torch.manual_seed(options.seed)
    model = build_detector(run.settings, run.class_names, pretrained=options.pretrained)
    batches = functools.partial(
        training_batches,
        data.records,
        InstanceMapper(split.indices_with_masks, sizes=model.sizes),
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_workers=options.workers,
    )
    started = time.perf_counter()
    history = train(
        model,
        batches,
        settings,
        output_dir=folder,
        run=run,
        resume=options.resume,
        device=device,
        description=f"{name}: training",
    )
    seconds = time.perf_counter() - started
    return model, {
        "training_seconds": round(seconds, 1),
        "iterations": settings.iterations,
        "losses": {"start": history[0], "end": history[-1]},
    }


def build_detector(
    settings: Mapping[str, Any], class_names: Sequence[str], *, pretrained: bool = False
) -> SampleDetector:
    """Build the detector of a run.

    Args:
        settings: ``method``, "maskx" or "class_agnostic"; ``backbone``, "small" or the name of one
            of torchvision's, with ``frozen_norm``; ``image_size``, of their shorter side.
        class_names: by class index.
        pretrained: start from ImageNet weights, which torchvision downloads.

    Raises:
        ValueError: there are no pretrained weights of the backbone.
    """
    num_classes, size = len(class_names) + 1, settings["image_size"]
    branch = _MASK_BRANCHES[settings["method"]]
    if settings["backbone"] == "small":
        if pretrained:
            raise ValueError(
                "There are no pretrained weights of the backbone 'small'. Name one of torchvision, "
                "such as resnet50, or train from random weights."
            )
        return SampleDetector(maskx_rcnn_small(num_classes, min_size=size, **branch))
    detector = maskx_rcnn_resnet_fpn(
        num_classes,
        backbone=settings["backbone"],
        weights_backbone="DEFAULT" if pretrained else None,
        frozen_norm=settings["frozen_norm"],
        trainable_layers=3 if pretrained else 5,
        min_size=size,
        max_size=2 * size,
        **branch,
    )
    return SampleDetector(detector)


def open_detector(run: Run, device: torch.device) -> SampleDetector:
    """Open the trained detector of a run, in evaluation mode.

    Raises:
        FileNotFoundError: its weights are not there.
        ValueError: they are damaged.
    """
    model = build_detector(run.settings, run.class_names).to(device)
    load_weights(model, run.weights_file)
    return model


def _evaluate(
    name: str,
    data: CocoData,
    detections: Sequence[dict[str, Any]],
    split: CategorySplit,
    report: Callable[[str], None],
) -> dict[str, Any]:
    results = evaluate_detections(
        data.json_file, detections, category_ids=data.category_ids, groups=split.groups()
    )
    report(f"\n{name}, average precision in percent\n{format_table(results)}")
    return _without_class_lists(results)


def with_grabcut_masks(
    data: CocoData, detections: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Replace the masks of detections by GrabCut's in their boxes."""
    by_image: dict[Any, list] = {record["image_id"]: [] for record in data.records}
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    read_image = read_image_sample
    replaced = []
    for record in tqdm(data.records, desc="grabcut: evaluation", unit="img"):
        found = by_image[record["image_id"]]
        image = read_image(record)["image"].permute(1, 2, 0).numpy()
        boxes = [
            (x, y, x + width, y + height) for x, y, width, height in (d["bbox"] for d in found)
        ]
        masks = encode_masks(grabcut_masks(image, boxes))
        replaced += [d | {"segmentation": m} for d, m in zip(found, masks, strict=True)]
    return replaced


def save_pictures(
    folder: Path,
    data: CocoData,
    detections: Mapping[str, Sequence[dict[str, Any]]],
    split: CategorySplit,
) -> list[Path]:
    """Draw the images on which Mask^X is surest; with several methods, side by side as well."""
    confident = {name: confident_detections(data, found) for name, found in detections.items()}
    records = interesting_records(data, confident["maskx"], split)
    paths = [folder / "predictions.png"]
    save_png(paths[0], contact_sheet(_draw_tiles(data, records, confident["maskx"], split)))
    if len(confident) > 1:
        rows = [
            tile
            for by_image in confident.values()
            for tile in _draw_tiles(data, records[:_FIGURE_COLUMNS], by_image, split)
        ]
        paths.append(folder / "comparison.png")
        columns = min(_FIGURE_COLUMNS, len(records))
        save_png(paths[1], contact_sheet(rows, columns=columns, row_titles=list(confident)))
    return paths


def confident_detections(
    data: CocoData, detections: Sequence[dict[str, Any]]
) -> dict[Any, list[dict[str, Any]]]:
    """Keep confident detections that no surer one covers, by image, the surest first."""
    by_image: dict[Any, list] = {record["image_id"]: [] for record in data.records}
    for detection in sorted(detections, key=lambda d: -d["score"]):
        others = by_image[detection["image_id"]]
        if detection["score"] >= _FIGURE_SCORE and not _is_repeated(detection, others):
            others.append(detection)
    return by_image


def interesting_records(
    data: CocoData, by_image: Mapping[Any, Sequence[dict[str, Any]]], split: CategorySplit
) -> list[dict[str, Any]]:
    """Choose the surest images that show both A and B."""
    in_a = {data.category_ids[index] for index in split.indices_with_masks}

    def interest(record: dict) -> tuple[int, float]:
        found = by_image[record["image_id"]]
        sides = [d["category_id"] in in_a for d in found]
        shown = min(2, sides.count(True)) + min(2, sides.count(False))
        return shown, sum(d["score"] for d in found) / max(1, len(found))

    return sorted(data.records, key=interest, reverse=True)[:_FIGURE_IMAGES]


def _draw_tiles(
    data: CocoData,
    records: Sequence[dict[str, Any]],
    by_image: Mapping[Any, Sequence[dict[str, Any]]],
    split: CategorySplit,
) -> list[np.ndarray]:
    class_index = {category: index for index, category in enumerate(data.category_ids)}
    in_a = set(split.indices_with_masks)
    read_image = read_image_sample
    tiles = []
    for record in records:
        found = by_image[record["image_id"]]
        indices = [class_index[d["category_id"]] for d in found]
        boxes = np.array([d["bbox"] for d in found], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        height, width = record["height"], record["width"]
        masks = [decode_segmentation(d["segmentation"], height, width) for d in found]
        tile = draw_instances(
            read_image(record)["image"].permute(1, 2, 0).numpy(),
            boxes=boxes,
            masks=np.array(masks, dtype=bool).reshape(-1, height, width),
            labels=[
                f"{data.class_names[i]} {d['score']:.2f}"
                for i, d in zip(indices, found, strict=True)
            ],
            with_masks=[i in in_a for i in indices],
        )
        tiles.append(tile)
    return tiles


def _is_repeated(detection: dict[str, Any], surer: Sequence[dict[str, Any]]) -> bool:
    """Whether a surer detection, of any category, covers nearly the same pixels."""
    masks = [other["segmentation"] for other in surer]
    overlaps = mask_api.iou([detection["segmentation"]], masks, [0] * len(masks))
    return len(masks) > 0 and bool(np.max(overlaps) > 0.5)


def _without_class_lists(results: dict[str, Any]) -> dict[str, Any]:
    return {
        task: {group: values for group, values in groups.items() if isinstance(values, dict)}
        for task, groups in results.items()
    }
