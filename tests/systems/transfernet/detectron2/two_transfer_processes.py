"""One of two CPU processes that train TransferNet together; rank 1 has no image with a label.

test_training.py calls ``run`` for rank 0 and runs ``two_transfer_processes.py 1 <port>``
beside it.
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from maskx.core.image_classifier import ImageClassifier
from maskx.detectron2 import MaskXSmallResNet, MaskXTransferNet
from maskx.systems.transfernet.attention import FactoredAttention
from maskx.systems.transfernet.baselines import BaselineNet, DecoupledNet
from maskx.systems.transfernet.decoder import TransposedDecoder
from maskx.systems.transfernet.network import TransferNet


def run(rank, port):
    address, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=180)
    dist.init_process_group("gloo", address, timeout, rank=rank, world_size=2)
    try:
        for method in (TransferNet, BaselineNet, DecoupledNet):
            take_steps(method, rank)
    finally:
        dist.destroy_process_group()


def make_network(method):
    backbone = MaskXSmallResNet(widths=(4, 4, 4, 8))
    form = {"in_feature": "layer4", "in_channels": 8, "num_classes": 4}
    form["decoder"] = TransposedDecoder(stride=8)
    if method is TransferNet:
        attention = FactoredAttention(in_channels=8, num_classes=4, num_factors=8)
        return TransferNet(backbone, attention=attention, hidden_channels=8, **form)
    return method(backbone, classifier_channels=8, **form)


def make_batch(rank):
    label_map = torch.zeros(32, 32, dtype=torch.int64)
    label_map[8:20] = 2
    samples = [{"image": torch.rand(3, 32, 32) * 255, "image_labels": []} for _ in range(2)]
    if rank == 0:
        samples[0] |= {"image_labels": [1], "sem_seg": label_map}
        samples[1] |= {"image_labels": [0, 3]}
    return samples


def take_steps(method, rank):
    torch.manual_seed(0)
    classifier = ImageClassifier(
        MaskXSmallResNet(widths=(4, 4, 4, 8)), in_feature="layer4", in_channels=8, num_classes=4
    )
    model = MaskXTransferNet(
        network=make_network(method),
        classifier=classifier,
        size=32,
        pixel_mean=[128.0] * 3,
        pixel_std=[58.0] * 3,
    )
    # As Detectron2 wraps it: without find_unused_parameters a missing gradient is a hang.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    torch.manual_seed(rank)
    with EventStorage():
        for _ in range(2):
            losses = parallel(make_batch(rank))
            assert all((loss > 0) == (rank == 0) for loss in losses.values())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            own = torch.cat([p.detach().flatten() for p in trained])
            others = [torch.empty_like(own) for _ in range(2)]
            dist.all_gather(others, own)
            assert torch.isfinite(own).all()
            assert torch.equal(*others)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(int(sys.argv[1]), int(sys.argv[2]))
    # Threads of gloo may abort the interpreter while it ends.
    os._exit(0)
