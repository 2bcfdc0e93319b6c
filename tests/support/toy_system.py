"""A sixth system, whole: it tells the classes of pixels apart by their colour.

Tests import it as a project that brings a system of its own would.
"""

import torch
from torch import nn

from maskx.core.sample_models import SampleModel
from maskx.data.images import ImageMapper
from maskx.data.label_maps import ignore_label, semantic_label_map
from maskx.engine.pipeline import one_stage_system
from maskx.engine.results import Prediction
from maskx.engine.system import register_system
from maskx.evaluation.mean_iou import MeanIoU


class ColourModel(SampleModel):
    """A perceptron on the colour of each pixel.

    Args:
        size: side of the squares that training images are warped to.
        num_classes: K, without the background.
        **pixels: ``pixel_mean`` and ``pixel_std``.
    """

    def __init__(self, *, size, num_classes, **pixels):
        super().__init__(size, **pixels)
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, num_classes + 1, 1)
        )

    def forward(self, samples):
        """Compute ``loss_pixels`` in training, ``sem_seg`` (H, W) in evaluation."""
        if not self.training:
            logits = [self.layers(self.normalise(sample)[None])[0] for sample in samples]
            return [{"sem_seg": each.argmax(dim=0)} for each in logits]
        targets = torch.stack([sample["sem_seg"] for sample in samples]).to(self.device)
        logits = self.layers(self.preprocess(samples))
        ignore = ignore_label(self.num_classes)
        total = nn.functional.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")
        return {"loss_pixels": total / (targets != ignore).sum().clamp(min=1)}


class ColourScores:
    """Mean IoU of label maps."""

    def __init__(self, class_names, split):
        self.split, self.counts = split, MeanIoU(len(class_names))

    def update(self, record, result):
        truth = semantic_label_map(record, self.counts.num_classes)
        self.counts.update(result["sem_seg"].cpu().numpy(), truth, record["image_id"])

    def merge(self, other):
        self.counts.merge(other.counts)

    def results(self):
        means = self.counts.evaluate(self.split.groups())["mIoU"]
        return {"sem_seg": {"mIoU": means["all"], "mIoU_B": means["B"]}}


def build(settings, class_names):
    return ColourModel(size=settings["image_size"], num_classes=len(class_names))


def samples(settings, class_names, split):
    return ImageMapper(len(class_names), size=settings["image_size"], label_maps=True)


def prediction(result, class_names):
    return Prediction(class_names=tuple(class_names), label_map=result["sem_seg"].cpu().numpy())


SYSTEM = one_stage_system(
    "colours",
    "Colours",
    training={"iterations": 40, "batch_size": 8, "learning_rate": 0.02, "optimizer": "adam"},
    build=build,
    samples=samples,
    scores=ColourScores,
    prediction=prediction,
)
register_system("colours", SYSTEM)
