"""One of two CPU processes that train together; on rank 1 nothing is known of any pixel."""

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from two_ranks import train_together

from maskx.core.image_classifier import ImageClassifier
from maskx.detectron2 import (
    MaskXDeepLab,
    MaskXImageClassifier,
    MaskXImageLabelEvaluator,
    MaskXSmallResNet,
)
from maskx.systems.class_patterns.model import DeepLab

NAMES = ["cat", "dog", "owl", "yak"]


def work(rank):
    for make in (make_classifier, make_segmenter):
        take_steps(make, rank)
    evaluate(rank)
    # Detectron2 keeps the group of its gathering; one that is left may abort at exit.
    comm._get_global_gloo_group.cache_clear()


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

    def check(losses):
        (loss,) = losses.values()
        assert (loss > 0) == (rank == 0 or make is make_classifier)

    torch.manual_seed(rank)
    with EventStorage():
        train_together(model, [make_batch(rank) for _ in range(2)], check)


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
