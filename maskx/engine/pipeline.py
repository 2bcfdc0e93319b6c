"""The quick start of a system whose model trains in one step."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskx.data.coco import CocoData
from maskx.data.images import read_image_sample
from maskx.engine.batches import RecordMapper, training_batches
from maskx.engine.options import QuickstartOptions, check_options
from maskx.engine.quickstart import choose_image_size, load_split_data, write_metrics
from maskx.engine.runs import Run, origins_of_data
from maskx.engine.system import Scores, System, find_system
from maskx.engine.training import TrainingSettings, load_weights, select_device, train


def one_stage_system(name: str, title: str, *, training: Mapping[str, Any], **parts: Any) -> System:
    """Make a system whose model trains in one step.

    The settings that ``build`` and ``samples`` get are ``image_size``, ``backbone`` and
    ``pretrained``; the run folder is the output folder.

    Args:
        training: of :class:`maskx.engine.training.TrainingSettings`, with ``iterations`` and
            ``batch_size`` where the options say nothing.
    """
    return System(
        name=name,
        title=title,
        options=frozenset({"masks_for"}),
        pipeline=functools.partial(_pipeline, name, dict(training)),
        open=_open,
        **parts,
    )


def _pipeline(
    name: str,
    training: Mapping[str, Any],
    options: QuickstartOptions,
    report: Callable[[str], None],
) -> dict[str, Any]:
    started = time.perf_counter()
    system = find_system(name)
    check_options(name, options)
    device = select_device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    default_split = "all" if options.coco_train else "scenes_half"
    train_data, val_data, split = load_split_data(options, default_split)
    report(
        f"{len(train_data.records)} training and {len(val_data.records)} validation images, "
        f"{len(split.with_masks)} of {len(split.class_names)} categories with masks, on {device}"
    )
    settings = {
        "image_size": choose_image_size(options),
        "backbone": options.backbone,
        "pretrained": options.pretrained,
    }
    chosen = {"iterations": options.iterations, "batch_size": options.batch_size}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    model, history = train_one(
        Run(
            system=name,
            host="pip",
            class_names=train_data.class_names,
            settings=settings,
            split=split,
        ),
        train_data,
        options,
        TrainingSettings(seed=options.seed, **{**training, **chosen}),
        folder=options.output,
        build=system.build,
        mapper=lambda _: system.samples(settings, train_data.class_names, split),
        device=device,
    )
    scores = system.scores(split.class_names, split)
    metrics = {"system": name, "losses": history[-1]}
    metrics |= predict_and_score(model, val_data.records, scores)
    return write_metrics(
        options,
        metrics,
        data=val_data,
        started=started,
        split=split,
        pictures=(),
        report=report,
    )


def train_one(
    run: Run,
    data: CocoData,
    options: QuickstartOptions,
    training: TrainingSettings,
    *,
    folder: Path,
    build: Callable[[Mapping[str, Any], Sequence[str]], nn.Module],
    mapper: Callable[[nn.Module], RecordMapper],
    device: torch.device,
    description: str = "training",
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train the model of a run on data; return it and the history of its losses."""
    run = replace(run, started_from={**run.started_from, **origins_of_data(data, folder)})
    torch.manual_seed(options.seed)
    model = build(run.settings, run.class_names)
    batches = functools.partial(
        training_batches,
        data.records,
        mapper(model),
        batch_size=training.batch_size,
        seed=training.seed,
        num_workers=options.workers,
    )
    history = train(
        model,
        batches,
        training,
        output_dir=folder,
        run=run,
        resume=options.resume,
        device=device,
        description=description,
    )
    return model, history


def _open(run: Run, device: torch.device) -> nn.Module:
    settings = {**run.settings, "pretrained": False}
    model = find_system(run.system).build(settings, run.class_names).to(device)
    load_weights(model, run.weights_file)
    return model


@torch.inference_mode()
def predict_and_score(
    model: nn.Module, records: Sequence[Mapping[str, Any]], scores: Scores
) -> dict[str, Any]:
    """Evaluate a model on records, one image at a time."""
    model.eval()
    for record in records:
        (result,) = model([read_image_sample(record)])
        scores.update(record, result)
    return scores.results()
