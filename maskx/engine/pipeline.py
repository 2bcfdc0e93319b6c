"""The quick start of a system whose model trains in one step."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from maskx.data.image_samples import read_image_sample
from maskx.data.splits import resolve_split
from maskx.engine.batches import training_batches
from maskx.engine.options import QuickstartOptions, check_options
from maskx.engine.quickstart import choose_image_size, load_data, write_metrics
from maskx.engine.runs import Run, origin_of, write_run
from maskx.engine.system import System
from maskx.engine.training import TrainingSettings, load_weights, select_device, train

__all__ = ["one_stage", "open_one_stage", "predict_and_score"]


def one_stage(
    system: System,
    *,
    iterations: int,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    optimizer: str = "adam",
) -> Callable[[QuickstartOptions, Callable[[str], None]], dict[str, Any]]:
    """Make the pipeline of a system that gives ``build``, ``samples`` and ``scores``.

    Its settings are ``image_size``, ``backbone`` and ``pretrained``; the run folder is the output
    folder.

    Args:
        system: without a pipeline yet.
        iterations: steps where the options do not say.
        batch_size: images per step, likewise.
        learning_rate: peak of the schedule.
        optimizer: see :class:`maskx.engine.training.TrainingSettings`.
    """

    def pipeline(options: QuickstartOptions, report: Callable[[str], None]) -> dict[str, Any]:
        started = time.perf_counter()
        check_options(system.name, options)
        device = select_device(options.device)
        options.output.mkdir(parents=True, exist_ok=True)
        train_data, val_data = load_data(options)
        split = resolve_split(
            options.masks_for or ("all" if options.coco_train else "scenes_half"),
            train_data.class_names,
        )
        settings = {
            "image_size": choose_image_size(options),
            "backbone": options.backbone,
            "pretrained": options.pretrained,
        }
        training = TrainingSettings(
            iterations=options.iterations or iterations,
            batch_size=options.batch_size or batch_size,
            learning_rate=learning_rate,
            optimizer=optimizer,
            seed=options.seed,
        )
        report(
            f"{len(train_data.records)} training and {len(val_data.records)} validation images, "
            f"{len(split.with_masks)} of {len(split.class_names)} categories with masks, on "
            f"{device}"
        )
        torch.manual_seed(options.seed)
        model = system.build(settings, train_data.class_names)
        run = Run(
            system=system.name,
            host="pip",
            class_names=train_data.class_names,
            settings=settings,
            split=split,
            started_from={"annotations": origin_of(train_data.json_file)},
        )
        write_run(options.output, run)
        history = train(
            model,
            functools.partial(
                training_batches,
                train_data.records,
                system.samples(settings, train_data.class_names, split),
                batch_size=training.batch_size,
                seed=training.seed,
                num_workers=options.workers,
            ),
            training,
            output_dir=options.output,
            resume=options.resume,
            identity={"settings": settings, "categories with masks": list(split.with_masks)},
            device=device,
        )
        results = predict_and_score(system, model, val_data.records, split)
        metrics = {"system": system.name, "losses": history[-1], **results}
        metrics["split"] = {"name": split.name, "A": split.with_masks, "B": split.without_masks}
        return write_metrics(options, metrics, started=started, pictures=(), report=report)

    return pipeline


def open_one_stage(system: System, run: Run, device: torch.device) -> nn.Module:
    """Load the model that :func:`one_stage` trained."""
    model = system.build({**run.settings, "pretrained": False}, run.class_names).to(device)
    load_weights(model, run.weights_file)
    return model


@torch.inference_mode()
def predict_and_score(
    system: System, model: nn.Module, records: list[Mapping[str, Any]], split: Any
) -> dict[str, Any]:
    """Evaluate a model on records, one image at a time."""
    model.eval()
    scores = system.scores(split.class_names, split)
    for record in records:
        (result,) = model([read_image_sample(record)])
        scores.update(record, result)
    return scores.results()
