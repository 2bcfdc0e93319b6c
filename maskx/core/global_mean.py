"""Means and flags of what all processes of a training see together."""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_PER_PROCESS = contextvars.ContextVar("means_per_process", default=False)


@contextlib.contextmanager
def means_per_process(is_on: bool = True) -> Iterator[None]:
    """Make :func:`global_mean` divide by what a process counts alone, as most public code does."""
    token = _PER_PROCESS.set(is_on)
    try:
        yield
    finally:
        _PER_PROCESS.reset(token)


def global_mean(total: Tensor, count: Tensor | int, *, takes_part: bool = True) -> Tensor:
    """Divide the sum of a loss so that its weight does not depend on the number of processes.

    Training averages gradients over processes. If each divided by its own count, what one with few
    pixels or objects sees would weigh more than what the others see, and one without any would
    halve the loss of the other. All processes must call it, in the same order.

    Args:
        total: sum over what this process sees, with its graph.
        count: how much that is; 0 counts as 1 where no process sees anything.
        takes_part: whether this process could have seen something. One that could not, since its
            batch is of a data set without this supervision, is as if it made no step.

    Returns:
        ``total`` by the mean count of the processes that take part.
    """
    if not dist.is_available() or not dist.is_initialized() or _PER_PROCESS.get():
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
    counts = torch.tensor([0, int(takes_part)], device=total.device)
    counts[0] += count
    dist.all_reduce(counts)
    return total * (counts[1] / counts[0].clamp(min=1))


def unite_flags(flags: Tensor) -> None:
    """Set a bool tensor, in place, where that of any process is set; all processes must call it."""
    if dist.is_available() and dist.is_initialized():
        counts = flags.to(torch.uint8)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        flags.copy_(counts > 0)
