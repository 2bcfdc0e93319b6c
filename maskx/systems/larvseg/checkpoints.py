"""Trained LarvSeg models: opened as they are, or with their weights taken by class name."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskx.core.backbone_choice import build_backbone, choose_feature
from maskx.engine.training import CHECKPOINT_NAME, load_state, load_weights, read_checkpoint
from maskx.systems.larvseg.class_rows import take_rows
from maskx.systems.larvseg.class_table import RowMatch, match_rows
from maskx.systems.larvseg.model import SampleLarvSeg
from maskx.systems.larvseg.network import LarvSeg

__all__ = ["MODEL_NAME", "build_larvseg", "load_matching_weights", "open_larvseg"]

logger = logging.getLogger(__name__)

MODEL_NAME = "model.json"
"""File beside a checkpoint that says what network it is of."""


def open_larvseg(
    folder: str | Path, device: torch.device | str = "cpu", *, sliding: bool = False
) -> SampleLarvSeg:
    """Open a model that :class:`maskx.systems.larvseg.chain.LarvSegChain` trained.

    Args:
        folder: its folder, such as ``larvseg`` in that of the run.
        device: where to compute.
        sliding: see :class:`maskx.systems.larvseg.model.SampleLarvSeg`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another kind.
    """
    folder = Path(folder)
    path = folder / MODEL_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file '{path}', which says what network the model is. Give the folder "
            "'larvseg' or 'baseline' of a finished run: tools/quickstart.py --system larvseg."
        )
    try:
        model = build_larvseg(json.loads(path.read_bytes()), sliding=sliding)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' is damaged ({type(error).__name__}: {error}). Train the model again."
        ) from error
    load_weights(model, folder / CHECKPOINT_NAME)
    return model.to(device)


def build_larvseg(
    content: Mapping[str, Any],
    *,
    scored: Mapping[str, Sequence[int]] | None = None,
    sliding: bool = False,
) -> SampleLarvSeg:
    """Build a model from the content of its `MODEL_NAME`, with initial weights.

    Args:
        content: ``backbone``, ``frozen_norm``, ``image_size``, ``class_names`` and ``network``,
            arguments of :class:`maskx.systems.larvseg.network.LarvSeg`.
        scored: see :class:`maskx.systems.larvseg.model.SampleLarvSeg`.
        sliding: the same.
    """
    backbone = build_backbone(
        content["backbone"], frozen_norm=content["frozen_norm"], pretrained=False
    )
    in_feature, shape = choose_feature(backbone)
    network = LarvSeg(
        backbone,
        in_feature=in_feature,
        in_channels=shape.channels,
        num_classes=len(content["class_names"]),
        **content["network"],
    )
    return SampleLarvSeg(
        network,
        size=content["image_size"],
        class_names=content["class_names"],
        scored=scored,
        sliding=sliding,
    )


def load_matching_weights(model: SampleLarvSeg, checkpoint: Path) -> RowMatch:
    """Load a checkpoint of another vocabulary: rows of classes go by name.

    The rows of the class embeddings and of the memory bank that the checkpoint has under the same
    name are taken, all other weights as they are. Classes that the checkpoint does not have keep
    their initial rows and count as not trained, so that they are never predicted.

    Args:
        model: the model to fill.
        checkpoint: of :class:`maskx.systems.larvseg.chain.LarvSegChain`.

    Returns:
        Which rows were taken; the names without a partner, on either side, are logged as well.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of LarvSeg, of another network, or shares no class.
    """
    model.eval()
    content = read_checkpoint(checkpoint, "cpu")
    old_names = content["run"].get("classes")
    if old_names is None:
        raise ValueError(
            f"'{checkpoint}' does not say which classes it has. Give a checkpoint of LarvSeg."
        )
    match = match_rows(old_names, model.class_names)
    if not match.new_rows:
        raise ValueError(
            f"'{checkpoint}' has none of the {len(model.class_names)} classes. It has "
            f"{', '.join(old_names[:8])}{' and more' if len(old_names) > 8 else ''}."
        )
    weights, own = content["model"], model.state_dict()
    for name in ("classifier.class_embeddings", "classifier.trained", "bank.means", "bank.counts"):
        key = f"network.{name}"
        if key not in own:  # a bank that this model has no use for
            weights.pop(key, None)
            continue
        rows = own[key].cpu()
        if name == "classifier.trained":
            rows = torch.zeros_like(rows)
        if key in weights:
            try:
                rows = take_rows(rows, match.new_rows, weights[key], match.old_rows, what=key)
            except ValueError as error:
                raise ValueError(f"'{checkpoint}' does not fit this model. {error}") from error
        weights[key] = rows
    load_state(model, weights, checkpoint)
    for names, what in (
        (match.only_new, "are not in the checkpoint and will not be predicted until trained"),
        (match.only_old, "of the checkpoint are not wanted"),
    ):
        if names:
            shown = ", ".join(names[:8]) + (" and more" if len(names) > 8 else "")
            logger.warning("%s: %d classes %s: %s.", checkpoint, len(names), what, shown)
    return match
