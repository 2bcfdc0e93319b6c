"""One of two CPU processes that train TransferNet together; rank 1 has no image with a label."""

import torch
from detectron2.utils.events import EventStorage
from two_ranks import train_together

from maskx.core.image_classifier import ImageClassifier
from maskx.detectron2 import MaskXSmallResNet, MaskXTransferNet
from maskx.systems.transfernet.baselines import BaselineNet, DecoupledNet
from maskx.systems.transfernet.decoder import TransposedDecoder
from maskx.systems.transfernet.network import FactoredAttention, TransferNet


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

    def check(losses):
        assert all((loss > 0) == (rank == 0) for loss in losses.values())

    torch.manual_seed(rank)
    with EventStorage():
        train_together(model, [make_batch(rank) for _ in range(2)], check, lr=1e-2)


def work(rank):
    for method in (TransferNet, BaselineNet, DecoupledNet):
        take_steps(method, rank)
