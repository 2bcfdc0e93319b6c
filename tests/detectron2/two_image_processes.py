"""One of two CPU processes that train together; on rank 1 nothing is known of any pixel.

test_image_training.py calls ``run`` for rank 0 and runs ``two_image_processes.py 1 <port>`` beside
it.
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from maskx.core.image_classifier import ImageClassifier
from maskx.detectron2 import (
    MaskXDeepLab,
    MaskXImageClassifier,
    MaskXImageLabelEvaluator,
    MaskXSmallResNet,
)
from maskx.systems.class_patterns.model import DeepLab

NAMES = ["cat", "dog", "owl", "yak"]


def run(rank, port):
    address, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=180)
    dist.init_process_group("gloo", address, timeout, rank=rank, world_size=2)
    try:
        for make in (make_classifier, make_segmenter):
            take_steps(make, rank)
        evaluate(rank)
    finally:
        # Detectron2 keeps the group of its gathering; one that is left may abort at exit.
        comm._get_global_gloo_group.cache_clear()
        dist.destroy_process_group()


def make_batch(rank):
    label_maps = torch.randint(5, (2, 32, 32)) if rank == 0 else torch.full((2, 32, 32), 255)
    return [
        {"image": torch.rand(3, 32, 32) * 255, "image_labels": [rank], "sem_seg": label_map}
        for label_map in label_maps
    ]


def make_classifier():
    backbone = MaskXSmallResNet(widths=(4, 4, 4, 8))
    backbone.drop_layers_after("layer3")
    network = ImageClassifier(backbone, in_feature="layer3", in_channels=4, num_classes=4)
    return MaskXImageClassifier(classifier=network, size=32)


def make_segmenter():
    backbone = MaskXSmallResNet(widths=(4, 4, 4, 8))
    network = DeepLab(backbone, in_feature="layer4", in_channels=8, num_classes=4)
    return MaskXDeepLab(network=network)


def take_steps(make, rank):
    torch.manual_seed(0)
    model = make()
    # As Detectron2 wraps it: without find_unused_parameters a missing gradient is a hang.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    with EventStorage():
        for _ in range(2):
            (loss,) = parallel(make_batch(rank)).values()
            assert (loss > 0) == (rank == 0 or make is make_classifier)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own = torch.cat([p.detach().flatten() for p in model.parameters()])
            others = [torch.empty_like(own) for _ in range(2)]
            dist.all_gather(others, own)
            assert torch.isfinite(own).all()
            assert torch.equal(*others)


def evaluate(rank):
    """Each process has two of four images; rank 0 scores all of them."""
    name = f"two_processes_{rank}"
    records = [{"file_name": "", "image_id": i, "image_labels": [i]} for i in range(4)]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = NAMES
    evaluator = MaskXImageLabelEvaluator(name)
    for image_id in range(rank, 4, 2):
        prob = torch.eye(4)[image_id] if image_id else torch.ones(4)
        evaluator.process([{"image_id": image_id}], [{"image_labels_prob": prob}])
    result = evaluator.evaluate()
    if rank:
        assert result == {}
    else:  # image 0 shares the first rank of cat alone, of the others with their own image
        found = {key: v for key, v in result["image_labels"].items() if key.startswith("AP-")}
        assert found == {"AP-cat": 100, "AP-dog": 50, "AP-owl": 50, "AP-yak": 50}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(int(sys.argv[1]), int(sys.argv[2]))
    # Threads of gloo may abort the interpreter while it ends.
    os._exit(0)
