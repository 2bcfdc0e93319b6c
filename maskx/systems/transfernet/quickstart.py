"""Quick start of TransferNet."""

import time
from collections.abc import Callable
from typing import Any

from maskx.data.splits import resolve_split
from maskx.engine.options import QuickstartOptions, check_options
from maskx.engine.quickstart import choose_image_size, load_data, write_metrics
from maskx.engine.training import select_device
from maskx.systems.transfernet.pipeline import TransferSettings, learn_to_transfer


def quickstart_transfernet(
    options: QuickstartOptions, report: Callable[[str], None]
) -> dict[str, Any]:
    """Learn TransferNet and BaselineNet, from data to ``metrics.json`` and ``predictions.png``.

    Source categories are those that ``masks_for`` names, target categories all others; of the
    images that show a target category, only the tags are used. See
    :func:`maskx.systems.transfernet.pipeline.learn_to_transfer`.

    Args:
        options: what to do.
        report: receives the lines for the reader.

    Returns:
        The content of ``metrics.json``.

    Raises:
        ImportError: the CRF is asked for, but not installed.
        ValueError: an option, an annotation or a checkpoint cannot be used; the message says why.
    """
    started = time.perf_counter()
    check_options("transfernet", options)
    device = select_device(options.device)
    chosen = {"batch_size": options.batch_size, "image_size": choose_image_size(options)}
    for name in ("iterations", "attention_iterations", "joint_iterations"):
        chosen[name] = options.iterations
    settings = TransferSettings(
        backbone=options.backbone,
        pretrained=options.pretrained,
        seed=options.seed,
        workers=options.workers,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    options.output.mkdir(parents=True, exist_ok=True)
    train_data, val_data = load_data(options, sparse=True)
    split = resolve_split(options.masks_for or "scenes_half", train_data.class_names)
    report(
        f"{len(train_data.records)} training and {len(val_data.records)} validation images, "
        f"{len(split.with_masks)} source categories with masks, {len(split.without_masks)} target "
        f"categories with tags, on {device}"
    )
    metrics: dict[str, Any] = {"system": "transfernet"}
    metrics |= learn_to_transfer(
        train_data,
        val_data,
        split,
        settings,
        output=options.output,
        compare=options.compare,
        crf=options.crf,
        resume=options.resume,
        device=device,
        report=report,
    )
    metrics["split"] = {"name": split.name, "A": split.with_masks, "B": split.without_masks}
    return write_metrics(options, metrics, started=started, report=report)
