"""Scripts that are run as two processes, which train together."""

import os
import runpy
import sys
import tempfile
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def run_as_two(script):
    """Run ``work(rank)`` of a script as two ranks that train together.

    None is the process of the tests: Detectron2 keeps its process group, and the next test would
    get one that is no more. They are its forks, which have loaded all libraries; where there are
    GPUs they are not, as threads of autograd are lost in a fork, nor where forks are not safe.
    """
    may_fork = sys.platform == "linux" and not torch.cuda.is_available()
    start_method = "fork" if may_fork else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        arguments = (script, f"file://{folder}/store")
        torch.multiprocessing.start_processes(
            _be_one_of_two, arguments, nprocs=2, start_method=start_method
        )


def _be_one_of_two(rank, script, store):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # those of the process of the tests are lost in a fork
    timeout = timedelta(seconds=180)
    dist.init_process_group("gloo", store, timeout, rank=rank, world_size=2)
    try:
        runpy.run_path(str(script))["work"](rank)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of gloo may abort the interpreter while it ends


def mean_gradient(loss, parameters):
    """Average the gradients of both processes, as training does, in one vector."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
    total = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(total)
    return total / 2


def train_together(model, batches, check, *, lr=1e-3):
    """Train in a process group and see that both processes keep the same weights.

    ``check`` is called with the losses of each batch.
    """
    # As Detectron2 wraps it: without find_unused_parameters a missing gradient is a hang.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    for batch in batches:
        losses = parallel(batch)
        check(losses)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        own = torch.cat([p.detach().flatten() for p in trained])
        others = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(others, own)
        assert torch.isfinite(own).all()
        assert torch.equal(*others)
