"""One training loop for every system on the embedded host: deterministic, resumable."""

import contextlib
import csv
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
    PolynomialDecayParamScheduler,
)
from torch import nn
from tqdm import tqdm

from maskx.core.archives import read_archive
from maskx.core.files import written_text
from maskx.core.seeds import step_seed
from maskx.core.tensor_files import read_tensors
from maskx.core.text import listed
from maskx.engine.batches import image_names
from maskx.engine.checkpoints import check_finite, locked, write_checkpoint
from maskx.engine.runs import MODEL_FILE_SUFFIX, Run, check_same_run, write_run

CHECKPOINT_NAME, CURVES_NAME = "checkpoint.pth", "losses.csv"
OPTIMIZERS = ("sgd", "adam")
DECAYS = ("cosine", "poly")

# Reading a loss waits for the device, so losses are read only this often.
_LOG_EVERY = 20

# Settings that do not change what is learned.
_FREE = ("training.checkpoint_every", "training.checkpoint_seconds")


@dataclass(frozen=True)
class TrainingSettings:
    """What a run is defined by; a resumed run must have the same settings.

    Attributes:
        learning_rate: peak of the schedule.
        weight_decay: for weights of convolutions and linear layers; not for biases and norms. Both
            optimizers add it to the gradient.
        warmup_fraction: share of the steps in which the learning rate rises linearly; then it
            falls to 0.
        seed: of initial weights, data order and sampling.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: after so much time there is one too, as a step on photographs may take
            seconds.
        optimizer: "sgd", with momentum 0.9, or "adam", with betas 0.9 and 0.999.
        lr_multipliers: factors of the learning rate by prefix of the parameter's name, such as
            {"network.backbone.": 0.05}. Of several prefixes that fit a name the longest counts;
            a parameter without one has factor 1.
        decay: how the learning rate falls: "cosine", or "poly", as (1 - share of the rest)^0.9.
    """

    iterations: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.05
    seed: int = 0
    checkpoint_every: int = 100
    checkpoint_seconds: float = 120.0
    optimizer: str = "sgd"
    # Without it in the hash, settings stay hashable; equal settings have equal hashes all the same.
    lr_multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    decay: str = "cosine"

    def __post_init__(self) -> None:
        for key in ("iterations", "batch_size", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}."
            )
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {self.decay!r}.")
        object.__setattr__(self, "lr_multipliers", dict(self.lr_multipliers))
        for prefix, factor in self.lr_multipliers.items():
            if not (factor > 0 and math.isfinite(factor)):
                raise ValueError(
                    f"lr_multipliers[{prefix!r}] must be a positive number, got {factor}. To keep "
                    "parameters as they are, set their requires_grad to False."
                )

    def schedule(self) -> ParamScheduler:
        """Learning rate by the share of the run that is done, in [0, 1]."""
        if self.decay == "poly":
            falling = PolynomialDecayParamScheduler(self.learning_rate, 0.9)
        else:
            falling = CosineParamScheduler(self.learning_rate, 0.0)
        return CompositeParamScheduler(
            [LinearParamScheduler(0.01 * self.learning_rate, self.learning_rate), falling],
            lengths=[self.warmup_fraction, 1 - self.warmup_fraction],
            interval_scaling=["rescaled", "rescaled"],
        )


def select_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"Device '{name}' was asked for, but PyTorch finds no GPU here. Use 'cpu' or 'auto', "
            "or install a PyTorch build that fits the GPU driver."
        )
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"Device must be 'auto', 'cpu' or 'cuda', got '{name}'.")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Device '{name}' has no number. Use 'cuda' or 'cuda:0'.") from error


def train(
    model: nn.Module,
    batches: Callable[..., Iterable[list[dict]]],
    settings: TrainingSettings,
    *,
    output_dir: Path,
    run: Run | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    description: str = "training",
) -> list[dict[str, float]]:
    """Train a model whose forward maps a list of samples to a dictionary of losses.

    Interrupt it at any point, by the keyboard or by force: a run that is resumed from its last
    checkpoint ends, on a CPU, with exactly the weights of a run that was not interrupted. All
    randomness of a step, in the model and in its data, comes from the seed and the number of the
    step. On a GPU the step runs in mixed precision. Weights that are not finite never replace a
    checkpoint, and no other process writes into the folder meanwhile.

    Args:
        batches: called with the keywords ``start`` and ``stop``, makes the batches of these steps.
        output_dir: run folder, where the checkpoint, ``run.json`` and ``losses.csv`` are written.
        run: what the run is, beside ``settings``; a resumed run must be the same.
        resume: go on from the checkpoint in ``output_dir`` if there is one. Else such a checkpoint
            is kept as ``previous_checkpoint.pth``, in the place of an older one.

    Where TensorBoard is installed (the extra ``tensorboard``), it can show the losses of the folder
    as they come.

    Returns:
        The losses every 20 steps and at the last: ``iteration``, the ``total`` as the mean over the
        steps since the row before, and each loss as that over those of them that have it: it is
        zero in a step that has nothing to learn it from.

    Raises:
        ValueError: the checkpoint is not of this run, or another process is at work in the folder.
        FloatingPointError: a loss, a gradient or a weight is not finite.
        OSError: the disk is full or cannot be written to; the last checkpoint is as it was.
    """
    named = run is not None
    run = run or Run(system="", host="pip", class_names=(), settings={})
    parts = {**run.settings, "training": dataclasses.asdict(settings)}
    run = dataclasses.replace(run, settings=parts, weights=CHECKPOINT_NAME)
    with locked(output_dir):
        loop = _Loop(model, settings, Path(output_dir) / CHECKPOINT_NAME, run, torch.device(device))
        loop.start(resume)
        if named:
            write_run(output_dir, run)
        loop.go_on(batches, description)
    return loop.history


class _Loop:
    """A training: what changes from step to step, and what a checkpoint holds of it."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings,
        checkpoint: Path,
        run: Run,
        device: torch.device,
    ) -> None:
        self.model, self.settings, self.checkpoint = model, settings, checkpoint
        self.run, self.device = run, device
        model.to(device).train()
        groups, self.lr_multipliers = _parameter_groups(model, settings)
        if settings.optimizer == "adam":
            self.optimizer = torch.optim.Adam(groups, lr=settings.learning_rate)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.losses = _MeanLosses()
        self.iteration, self.history = 0, []

    def start(self, resume: bool) -> None:
        """Go on from the checkpoint that is there, or move it away."""
        if self.checkpoint.is_file():
            if resume:
                self._load()
            else:
                self.checkpoint.replace(self.checkpoint.with_name(f"previous_{CHECKPOINT_NAME}"))

    def go_on(self, batches: Callable[..., Iterable[list[dict]]], description: str) -> None:
        """Make the steps that are left."""
        stop, schedule = self.settings.iterations, self.settings.schedule()
        progress = tqdm(total=stop, initial=self.iteration, desc=description, unit="it")
        saved_at = time.monotonic()
        with progress, _tensorboard(self.checkpoint.parent, self.iteration) as show:
            for batch in batches(start=self.iteration, stop=stop):
                self._step(batch, schedule(self.iteration / stop))
                self.iteration += 1
                progress.update()
                is_last = self.iteration == stop
                is_due = self.iteration % self.settings.checkpoint_every == 0
                waited = time.monotonic() - saved_at
                saves = is_last or is_due or waited >= self.settings.checkpoint_seconds
                logs = is_last or (self.iteration - 1) % _LOG_EVERY == 0
                if saves or logs:
                    row = self.losses.read(self.iteration - 1)
                if logs:
                    self.losses.clear()
                    self.history.append(row)
                    show(row)
                    names = (name for name in row if name != "iteration")
                    progress.set_postfix({n.removeprefix("loss_"): f"{row[n]:.3f}" for n in names})
                if saves:
                    self._save()
                    saved_at = time.monotonic()

    def _step(self, batch: list[dict], learning_rate: float) -> None:
        iteration, device_type = self.iteration, self.device.type
        torch.manual_seed(step_seed(self.settings.seed, iteration))
        for group, factor in zip(self.optimizer.param_groups, self.lr_multipliers, strict=True):
            group["lr"] = learning_rate * factor
        with torch.autocast(device_type, enabled=device_type == "cuda"):
            losses = self.model(batch)
            total = sum(losses.values())
        self.losses.add(losses, total, batch)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        # One unusual batch must not throw the weights of a short run far off.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        # Elsewhere reading them would wait for the device, and the scaler leaves such a step out.
        if device_type == "cpu" and not (total.isfinite() and norm.isfinite()):
            self.losses.read(iteration)  # says more, if that is where it begins
            raise FloatingPointError(
                f"The gradient at iteration {iteration} is not finite. {self.losses.remedy()}"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()  # not kept while images are read or the model is evaluated

    def _save(self) -> None:
        parts = ("model", "optimizer", "scaler", "losses")
        content = {name: getattr(self, name).state_dict() for name in parts}
        when = f"after iteration {self.iteration - 1}"
        check_finite(content["model"], when=when, images=self.losses.images)
        content |= {
            "run": self.run.as_json(),
            "iteration": self.iteration,
            "history": self.history,
        }
        write_checkpoint(self.checkpoint, content)
        _write_curves(self.checkpoint.with_name(CURVES_NAME), self.history)

    def _load(self) -> None:
        path = self.checkpoint
        content = read_checkpoint(path, self.device)
        check_same_run(Run.from_json(content["run"], path), self.run, source=path, free=_FREE)
        load_state(self.model, content["model"], path)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            if content["scaler"]:  # empty when the run began on a CPU
                self.scaler.load_state_dict(content["scaler"])
            self.losses.load_state_dict(content["losses"])
            self.iteration, self.history = content["iteration"], content["history"]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"'{path}' holds weights, but not all that a training needs to go on "
                f"({type(error).__name__}: {error}). Start anew without resuming."
            ) from error


@contextlib.contextmanager
def _tensorboard(folder: Path, start: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Open the event files of a folder; yields what takes a row, and does nothing without them.

    Args:
        folder: of the training.
        start: the step it goes on from; what was shown beyond it is dropped.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda row: None
        return
    with SummaryWriter(str(folder), purge_step=start) as writer:

        def show(row: Mapping[str, float]) -> None:
            for name, value in row.items():
                if name != "iteration":
                    writer.add_scalar(name, value, row["iteration"])

        yield show


def _write_curves(path: Path, history: list[dict[str, float]]) -> None:
    """Write the losses as a table for spreadsheets and plots; a row as of :func:`train`."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    with written_text(path) as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(history)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a finished or running training for inference."""
    model.eval()
    load_state(model, read_checkpoint(checkpoint, "cpu")["model"], checkpoint)


def _parameter_groups(
    model: nn.Module, settings: TrainingSettings
) -> tuple[list[dict], list[float]]:
    """Group parameters by what the optimizer does with them; the factors are by group."""
    names, factors = [name for name, _ in model.named_parameters()], settings.lr_multipliers
    for prefix in factors:  # which may be that of a frozen backbone: it has nothing to do
        if not any(name.startswith(prefix) for name in names):
            shown = ", ".join([*names[:3], *names[3:][-3:]])
            raise ValueError(
                f"lr_multipliers has the prefix {prefix!r}, which fits none of the {len(names)} "
                f"parameters. Their names are such as: {shown}."
            )

    def factor_of(name: str) -> float:
        fitting = [prefix for prefix in factors if name.startswith(prefix)]
        return float(factors[max(fitting, key=len)]) if fitting else 1.0

    learned = [(factor_of(name), p) for name, p in model.named_parameters() if p.requires_grad]
    groups, multipliers = [], []
    for factor in sorted({1.0, *(factor for factor, _ in learned)}):
        chosen = [p for own, p in learned if own == factor]
        groups += [
            {"params": [p for p in chosen if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in chosen if p.ndim <= 1], "weight_decay": 0.0},
        ]
        multipliers += [factor, factor]
    return groups, multipliers


class _MeanLosses:
    """Means of the losses since the last row of the history, and the images they are of.

    The losses of one step say little: with data sets that take turns, those of one of them are zero
    in every other step. Such steps are left out of the mean of a loss, which would say how often it
    is there, as they are in Detectron2's log. The sums stay on the device, since reading them waits
    for it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._steps = 0
        self.images: list[str] = []

    def add(
        self, losses: Mapping[str, torch.Tensor], total: torch.Tensor, batch: list[dict]
    ) -> None:
        self._steps += 1
        for name, loss in {**losses, "total": total}.items():
            loss = loss.detach().float()
            self._sums[name] = self._sums.get(name, 0) + loss
            self._counts[name] = self._counts.get(name, 0) + (loss != 0)
        self._counts["total"] = torch.full_like(self._sums["total"], self._steps)
        if total.device.type == "cpu":  # each step is looked at
            self.images.clear()
        self.images += image_names(batch)

    def read(self, iteration: int) -> dict[str, float]:
        sums, counts = (torch.stack([*each.values()]) for each in (self._sums, self._counts))
        values = (sums / counts.clamp(min=1)).cpu().tolist()
        row = dict(zip(self._sums, values, strict=True))
        if not all(math.isfinite(value) for value in values):
            is_exact = self._steps == 1 or self._sums["total"].device.type == "cpu"
            since = "" if is_exact else f" or up to {self._steps - 1} steps before"
            raise FloatingPointError(
                f"Losses at iteration {iteration}{since} are not finite: {row}. {self.remedy()}"
            )
        return {"iteration": iteration, **row}

    def remedy(self) -> str:
        """Say what can be done where something is not finite."""
        images = f" ({listed(self.images)})" if self.images else ""
        return f"Lower the learning rate, or look at the images of that step{images}."

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "counts": self._counts, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._steps = state["steps"]


def read_checkpoint(path: Path, device: torch.device | str) -> dict:
    """Read a checkpoint of :func:`train`: ``model``, ``run``, ``iteration`` and more.

    Of a file of :func:`maskx.engine.model_files.write_model_file` the ``model`` alone.
    """
    if Path(path).suffix == MODEL_FILE_SUFFIX:
        return {"model": {k: v.to(device) for k, v in read_tensors(path).items()}}
    content = read_archive(path, device)
    if not isinstance(content, dict) or not {"model", "run", "iteration"} <= content.keys():
        raise ValueError(
            f"'{path}' is no checkpoint of maskx's training loop. Give one that is called "
            f"{CHECKPOINT_NAME}."
        )
    return content


def _misfit(own: Mapping[str, Any], weights: Mapping[str, Any]) -> str:
    """Say which weights do not fit: of a checkpoint of another network there are hundreds."""
    found = {
        "Missing": [name for name in own if name not in weights],
        "Not of this model": [name for name in weights if name not in own],
        "Of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    return " ".join(
        f"{words} ({len(names)}): {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}."
        for words, names in found.items()
        if names
    )


def load_state(model: nn.Module, weights: dict, path: Path) -> None:
    """Load weights into a model."""
    try:
        model.load_state_dict(weights)
    except ValueError as error:  # of a module, which says more than names
        raise ValueError(f"'{path}' does not fit this model. {error}") from error
    except RuntimeError as error:
        found = _misfit(model.state_dict(), weights) or error
        raise ValueError(
            f"'{path}' does not fit this model. {found} Give the checkpoint of such a model, or "
            "train this one anew."
        ) from error
