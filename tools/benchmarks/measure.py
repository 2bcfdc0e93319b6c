"""Time and memory of steps that are to be compared with each other.

Absolute times differ between machines and between hours; what can be compared are ratios of what
ran in one process, interleaved: to the first step of a table, and to the floor, what the operations
of a step or the bytes that it must move take at the rates that this machine showed in the same run.
"""

import json
import math
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import maskx

# A step shorter than this is called again until so much time has gone by, see `measure`.
_ROUND_SECONDS = 0.2
# As a share: of ratios within a run, and of the rates of a machine from run to run.
_LEAST_NOISE, _NOISE_OF_RATES = 0.01, 0.05


class Measurement(NamedTuple):
    """Cost of one step.

    Attributes:
        seconds: median over the rounds.
        seconds_min: of the fastest round.
        ratio: median over the rounds of the time divided by that of the first step.
        peak_bytes: see :func:`peak_bytes`.
        spread: half of the ratios lie within this share of their median, of the first step half of
            the times: the noise of the machine.
    """

    seconds: float
    seconds_min: float
    ratio: float
    peak_bytes: int
    spread: float = 0.0


class Rates(NamedTuple):
    """What a machine can do at most: bytes moved and operations (2 per multiply-add) a second."""

    bytes_per_second: float
    operations_per_second: float

    def floor(self, operations: float, num_bytes: float) -> float:
        """Seconds that work takes at least; 0 where none is known."""
        by_bytes, by_operations = num_bytes / self.bytes_per_second, operations
        return max(by_bytes, by_operations / self.operations_per_second)


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
    measured = {}
    for name, times in seconds.items():
        ratios = [t / r for t, r in zip(times, reference, strict=True)]
        measured[name] = Measurement(
            statistics.median(times),
            min(times),
            statistics.median(ratios),
            peak_bytes(steps[name], device),
            _spread(times if times is reference else ratios),
        )
    return measured


def measure_rates(device: torch.device, *, size: int = 2048) -> Rates:
    """Measure the rates of copies of 64 MiB and of products of float matrices of a size."""
    source = torch.ones(2**24, device=device)
    target, matrix = torch.empty_like(source), torch.ones(size, size, device=device)
    product = torch.empty_like(matrix)
    copying = _fastest_call(lambda: target.copy_(source), device)
    multiplying = _fastest_call(lambda: torch.mm(matrix, matrix, out=product), device)
    return Rates(2 * source.nbytes / copying, 2 * size**3 / multiplying)


def count_operations(step: Callable[[], object]) -> int:
    """Count the operations of the matrix products and convolutions of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def changes(rows: Sequence[Mapping[str, Any]], stored: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compare rows with those of an earlier run, one line for each row that both have.

    What is compared is the ratio to the first row of the table and, of the first row itself, to its
    floor, so that the runs may be of different machines; of whole processes it is their memory. A
    change within three times the noise of both runs is none.
    """
    before = {(row["table"], row["name"]): row for row in stored}
    lines = []
    for row in rows:
        old = before.get((row["table"], row["name"]))
        if old is None:
            continue
        is_first = row["ratio"] == old["ratio"] == 1
        key = "over_floor" if is_first and row["over_floor"] and old.get("over_floor") else "ratio"
        key = "peak_bytes" if "floor_bytes" in row else key
        change = row[key] / old[key] - 1
        least = _NOISE_OF_RATES if key == "over_floor" else _LEAST_NOISE
        noise = 3 * math.hypot(row["spread"], old.get("spread", 0.0), least)
        worse, better = ("larger", "smaller") if key == "peak_bytes" else ("slower", "faster")
        verdict = "unchanged" if abs(change) <= noise else worse if change > 0 else better
        lines.append(f"{row['name']}: {verdict} ({change:+.0%}, noise {noise:.0%})")
    return lines


def _spread(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


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


def sync_share(step: Callable[[], object], device: torch.device) -> float | None:
    """Measure in which share of a step the host waits for the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    step()
    _synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        _synchronize(device)
    # The last one, after the step, waits as well, but not in the step: it is the device's own.
    waits = [event for event in profiler.key_averages() if event.key == "cudaStreamSynchronize"]
    return sum(event.self_cpu_time_total for event in waits) / 1e6 / seconds


def memory_row(
    table: str, name: str, peak: int, *, alternative: int, floor: int, **settings: Any
) -> dict[str, Any]:
    """Make a row of a table that compares the memory of whole processes."""
    row = {"table": table, "name": name, "peak_bytes": peak, "alternative_bytes": alternative}
    row |= {"floor_bytes": floor, "ratio": peak / alternative, "over_floor": peak / floor}
    return {**row, "spread": 0.0, "settings": settings}


def format_memory_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out rows of :func:`memory_row`."""
    table = [("", "alternative MB", "floor MB", "MB", "ratio", "over floor")]
    for row in rows:
        sizes = [row[f"{key}_bytes"] for key in ("alternative", "floor", "peak")]
        cells = [f"{size / 1e6:.0f}" for size in sizes]
        table.append((row["name"], *cells, f"{row['ratio']:.3f}", f"{row['over_floor']:.3f}"))
    return format_table(table)


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
        num_bytes: that the step must move at least; operations of PyTorch are counted.
        traced: whether memory is what Python and numpy allocate, not PyTorch.
    """

    name: str
    step: Callable[[], object]
    parameters: int
    settings: dict[str, Any]
    num_bytes: int = 0
    traced: bool = False


def measure_table(
    title: str, cases: Sequence[Case], *, rounds: int, device: torch.device, rates: Rates
) -> list[dict[str, Any]]:
    """Measure the cases of a table and return a row for each, ready for JSON."""
    costs = measure({case.name: case.step for case in cases}, rounds=rounds, device=device)
    rows = []
    for case in cases:
        cost = costs[case.name]
        operations = count_operations(case.step)
        floor = rates.floor(operations, case.num_bytes)
        row = {"table": title, "name": case.name, "parameters": case.parameters, **cost._asdict()}
        if case.traced:
            row["peak_bytes"] = traced_peak_bytes(case.step)
        row |= {"operations": operations, "num_bytes": case.num_bytes, "floor_seconds": floor}
        row["over_floor"] = cost.seconds / floor if floor else None
        row["sync_share"] = sync_share(case.step, device)
        rows.append({**row, "settings": case.settings})
    return rows


_COLUMNS = ("alternative", "floor", "ms", "fastest", "ratio", "over floor", "peak MB")


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out rows: the first is the alternative, whose time is that of every row's ratio."""
    has_syncs = any(row.get("sync_share") is not None for row in rows)
    table = [("", "parameters", *_COLUMNS, *["waiting for the GPU"] * has_syncs)]
    for row in rows:
        times = [rows[0]["seconds"], row["floor_seconds"], row["seconds"], row["seconds_min"]]
        over = "-" if row["over_floor"] is None else f"{row['over_floor']:.1f}"
        cells = [f"{1e3 * seconds:.2f}" for seconds in times] + [f"{row['ratio']:.2f}", over]
        cells += [f"{row['peak_bytes'] / 1e6:.2f}"]
        cells += [f"{row['sync_share']:.0%}"] if has_syncs else []
        table.append((row["name"], f"{row['parameters']:,}", *cells))
    return format_table(table)


def traced_peak_bytes(step: Callable[[], object]) -> int:
    """Measure the most memory that Python and numpy allocate in a step."""
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def num_parameters(model: nn.Module) -> int:
    """Count the trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
