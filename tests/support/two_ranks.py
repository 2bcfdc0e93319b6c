"""Scripts that are run as two processes, which train together."""

import os
import socket
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[2]


def run_as_two(script):
    """Run a script as two ranks, ``<script> 0 <port>`` and ``<script> 1 <port>``.

    None is the process of the tests: Detectron2 keeps its process group, and the next test would
    get one that is no more.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(port)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()


def be_one_of_two(work):
    """Call ``work(rank)`` in a process group, as the main program of such a script."""
    warnings.simplefilter("ignore")
    rank, port = map(int, sys.argv[1:])
    address, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=180)
    dist.init_process_group("gloo", address, timeout, rank=rank, world_size=2)
    try:
        work(rank)
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
