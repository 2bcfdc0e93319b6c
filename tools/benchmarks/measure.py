"""Time and memory of training steps that are to be compared with each other.

Absolute times differ between machines and between hours; what can be compared are the ratios of
steps that ran in one process, interleaved.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import maskx

# A step shorter than this is called again until so much time has gone by, see `measure`.
_ROUND_SECONDS = 0.2


class Measurement(NamedTuple):
    """Cost of one step.

    Attributes:
        seconds: median over the rounds.
        seconds_min: of the fastest round.
        ratio: median over the rounds of the time divided by that of the first step.
        peak_bytes: see :func:`peak_bytes`.
    """

    seconds: float
    seconds_min: float
    ratio: float
    peak_bytes: int


def measure(
    steps: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[str, Measurement]:
    """Measure steps against the first of them.

    After one round that warms up, every round runs all steps in turn. The time of a step in a
    round is that of its fastest call: a step of a few milliseconds is called for 0.2 seconds, for
    whatever else the machine does at the time only ever adds to it. A long step is called once.

    Args:
        steps: by name; the first is what the ratios refer to.
        rounds: at least 1.
        device: where the steps run.

    Returns:
        A measurement by name.

    Raises:
        ValueError: ``rounds`` is out of range.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(_fastest_call(step, device))
    reference = next(iter(seconds.values()))
    return {
        name: Measurement(
            statistics.median(times),
            min(times),
            statistics.median(t / r for t, r in zip(times, reference, strict=True)),
            peak_bytes(steps[name], device),
        )
        for name, times in seconds.items()
    }


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Measure the most memory that tensors made by a step occupy at one time.

    What was there before the step, such as the weights of a model, does not count; gradients do,
    when the step makes them. On a GPU this is what PyTorch's allocator counts, on a CPU what the
    profiler of PyTorch sees allocated and freed, so neither depends on what else is in memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    allocated = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Say where and with what a measurement was made."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "maskx": maskx.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _fastest_call(step: Callable[[], object], device: torch.device) -> float:
    fastest, spent = float("inf"), 0.0
    while spent < _ROUND_SECONDS:
        _synchronize(device)
        started = time.perf_counter()
        step()
        _synchronize(device)
        seconds = time.perf_counter() - started
        fastest, spent = min(fastest, seconds), spent + seconds
    return fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Case(NamedTuple):
    """A step to be measured.

    Attributes:
        name: unique within its section.
        step: does the work.
        parameters: number of trained parameters of the model.
        settings: sizes and options, by name.
    """

    name: str
    step: Callable[[], object]
    parameters: int
    settings: dict[str, Any]


def num_parameters(model: nn.Module) -> int:
    """Count the trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
