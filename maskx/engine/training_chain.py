"""What chains of trainings have in common, whatever they train."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskx.core.backbones import Backbone
from maskx.engine.features import keep_features
from maskx.engine.runs import Origin, Run
from maskx.engine.training import TrainingSettings, train


def start_of(pretrained: bool | str, frozen: bool) -> str:
    """Say what a backbone that is trained starts from, for the choice of a learning rate.

    Returns:
        "imagenet" for pretrained weights, which a high rate would wipe out; "random" for others,
        and where the backbone is frozen, so that nothing can be lost.
    """
    return "imagenet" if pretrained and not frozen else "random"


class TrainingChain:
    """Trainings of one seed; each leaves its checkpoint in a folder of its own.

    Args:
        run: what all trainings have in common: system, class list, split, data.
    """

    def __init__(
        self,
        settings: Any,
        *,
        output: Path,
        resume: bool,
        run: Run,
        device: torch.device | str,
    ) -> None:
        self.settings = settings
        self.output, self.resume, self.device = output, resume, torch.device(device)
        self.run = run
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add what runs inside to `seconds`."""
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started

    def _keep_features(self, *backbones: Backbone) -> None:
        """Let frozen backbones compute their features once, from now on."""
        if self.settings.frozen:
            for backbone in backbones:
                keep_features(backbone, self.output, self.settings.feature_cache)

    def _train(
        self,
        model: nn.Module,
        name: str,
        batches: Callable[..., Iterable[list[dict]]],
        identity: Mapping[str, Any],
        *,
        model_settings: Mapping[str, Any] | None = None,
        started_from: Mapping[str, str] | None = None,
        iterations: int,
        rate: float,
        lr_multipliers: Mapping[str, float] | None = None,
        description: str | None = None,
    ) -> None:
        """Train a model, in the folder ``name``, and leave it in evaluation mode."""
        settings, run = self.settings, self.run
        origins = {key: Origin(digest) for key, digest in (started_from or {}).items()}
        run = replace(
            run,
            settings={**run.settings, **dict(model_settings or {}), "chain": dict(identity)},
            started_from={**run.started_from, **origins},
        )
        training = TrainingSettings(
            iterations=iterations,
            batch_size=settings.batch_size,
            learning_rate=rate,
            weight_decay=0.0,
            seed=settings.seed,
            checkpoint_every=max(50, iterations // 20),
            optimizer="adam",
            lr_multipliers=lr_multipliers or {},
        )
        batches = functools.partial(
            batches,
            batch_size=settings.batch_size,
            seed=settings.seed,
            num_workers=settings.workers,
        )
        with self.timed(name):
            train(
                model,
                batches,
                training,
                output_dir=self.output / name,
                run=run,
                resume=self.resume,
                device=self.device,
                description=description or f"{name}: training",
            )
        model.eval()
