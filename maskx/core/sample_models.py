"""Whole-image models that take samples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskx.core.image_classifier import ImageClassifier, multi_hot
from maskx.core.images import warp_image
from maskx.core.losses import multi_label_loss

# RGB in [0, 255]; what torchvision's ImageNet weights were trained with.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

Sample = dict[str, Any]


class SampleModel(nn.Module):
    """Turns samples into normalised squares; the base of models that see whole images.

    Args:
        size: side S in pixels of the squares that images are warped to.
        pixel_mean: by channel, in the order of the images, of values from 0 to 255.
        pixel_std: likewise.

    Raises:
        ValueError: the size is below 1.
    """

    def __init__(
        self,
        size: int,
        *,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}.")
        self.size = size
        # Not in the weights: they are constants.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        """Where the model is; samples are moved there."""
        return self.pixel_mean.device

    def normalise(self, sample: Sample) -> Tensor:
        """Return the image of a sample as (3, H, W) float, less the mean, over the deviation."""
        return (sample["image"].to(self.device) - self.pixel_mean) / self.pixel_std

    def preprocess(self, samples: Sequence[Sample]) -> Tensor:
        """Make a batch of images.

        Args:
            samples: each with ``image`` (3, H, W) from 0 to 255, of any size.

        Returns:
            (N, 3, S, S) float with S the ``size`` of this model, normalised.
        """
        images = [warp_image(self.normalise(sample), self.size) for sample in samples]
        if not images:
            return self.pixel_mean.new_zeros(0, 3, self.size, self.size)
        return torch.stack(images)


class SampleClassifier(SampleModel):
    """Drives an image classifier with samples, as Detectron2 drives its models.

    Args:
        classifier: maps normalised images to logits of K classes.
        size: side in pixels of the squares that images are warped to.
    """

    def __init__(self, classifier: ImageClassifier, *, size: int) -> None:
        super().__init__(size)
        self.classifier = classifier
        self.num_classes = classifier.num_classes

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute losses in training, logits in evaluation.

        Args:
            samples: as of :class:`maskx.data.image_samples.ImageMapper`: ``image`` and, in
                training, ``image_labels``.

        Returns:
            ``{"loss_labels"}``, or per sample ``{"logits": (K,)}``.
        """
        logits = self.classifier(self.preprocess(samples))
        if not self.training:
            return [{"logits": row} for row in logits]
        image_labels = [sample["image_labels"] for sample in samples]
        labels = multi_hot(image_labels, self.num_classes, logits.device)
        return {"loss_labels": multi_label_loss(logits, labels)}
