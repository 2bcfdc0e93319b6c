"""Whole-image models on the embedded host: classifiers of images and of pixels."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from maskx.data.label_maps import ignore_label, semantic_label_map
from maskx.evaluation.mean_iou import MeanIoU
from maskx.modeling.deeplab import DeepLab, multi_scale_scores, pixel_loss, restrict_to_labels
from maskx.modeling.image_classifier import ImageClassifier, multi_hot, multi_label_loss
from maskx.torchvision.images import ImageMapper, warp_image

__all__ = [
    "Sample",
    "SampleClassifier",
    "SampleModel",
    "SampleSegmenter",
    "evaluate_label_maps",
    "predict_image_labels",
    "predict_label_maps",
]

# RGB in [0, 1]; what torchvision's ImageNet weights were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Sample = dict[str, Any]


class SampleModel(nn.Module):
    """Turns samples into normalised squares."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}.")
        self.size = size
        # Not in the weights: they are constants.
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).reshape(3, 1, 1), persistent=False)

    def normalise(self, sample: Sample) -> Tensor:
        """Return the image of a sample as (3, H, W) float, of ImageNet's mean and deviation."""
        return (sample["image"].to(self.mean.device).float() / 255 - self.mean) / self.std

    def preprocess(self, samples: Sequence[Sample]) -> Tensor:
        """Make a batch of images.

        Args:
            samples: each with ``image`` (3, H, W) uint8 RGB, of any size.

        Returns:
            (N, 3, S, S) float with S the ``size`` of this model, normalised.
        """
        images = [warp_image(self.normalise(sample), self.size) for sample in samples]
        return torch.stack(images) if images else self.mean.new_zeros(0, 3, self.size, self.size)


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
            samples: as of :class:`maskx.torchvision.images.ImageMapper`: ``image`` and, in
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


class SampleSegmenter(SampleModel):
    """Drives a segmentation network with samples, as Detectron2 drives its models.

    Args:
        network: maps normalised images to logits of the background and K classes.
        size: side in pixels of the squares that training images are warped to.
        test_sizes: sides of the squares whose scores are averaged in evaluation; only ``size``
            without.
    """

    def __init__(
        self, network: DeepLab, *, size: int, test_sizes: Sequence[int] | None = None
    ) -> None:
        super().__init__(size)
        self.network = network
        self.num_classes = network.num_classes
        self.test_sizes = (size,) if test_sizes is None else tuple(test_sizes)

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute losses in training, probabilities in evaluation.

        Args:
            samples: as of :class:`maskx.torchvision.images.ImageMapper`: ``image``; in training
                ``label_map`` of this model's ``size``; in evaluation ``height`` and ``width``.

        Returns:
            ``{"loss_pixels"}``, or per sample ``{"prob": (K + 1, H, W)}`` at the size of the file,
            background first.

        Raises:
            ValueError: a training sample has no label map, or one of another size.
        """
        if self.training:
            label_maps = self._label_maps(samples)
            logits = self.network(self.preprocess(samples))
            ignore = ignore_label(self.num_classes)
            return {"loss_pixels": pixel_loss(logits, label_maps, ignore=ignore)}
        return [{"prob": self._prob(sample)} for sample in samples]

    def _prob(self, sample: Sample) -> Tensor:
        return multi_scale_scores(
            self.network,
            self.normalise(sample),
            sizes=self.test_sizes,
            output_size=(sample["height"], sample["width"]),
        )

    def _label_maps(self, samples: list[Sample]) -> Tensor:
        square = (self.size, self.size)
        for sample in samples:
            found = tuple(sample["label_map"].shape) if "label_map" in sample else "no label map"
            if found != square:
                raise ValueError(
                    f"Image {sample.get('image_id')!r} came with {found}, but this model trains on "
                    f"label maps of {square}. Make samples with ImageMapper(..., size={self.size}, "
                    "label_maps=True)."
                )
        label_maps = [sample["label_map"] for sample in samples]
        stacked = torch.stack(label_maps) if label_maps else torch.zeros(0, *square).long()
        return stacked.to(self.mean.device)


@torch.inference_mode()
def predict_image_labels(
    model: SampleClassifier,
    records: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    description: str = "image labels",
) -> np.ndarray:
    """Predict which classes images have.

    Args:
        model: the model; it is put into evaluation mode.
        records: as of :func:`maskx.data.coco.load_coco`.
        batch_size: images at a time.
        description: label of the progress bar.

    Returns:
        (number of records, K) float32 probabilities.
    """
    model.eval()
    read_image = ImageMapper(model.num_classes, size=None, label_maps=False).read_image
    prob = np.zeros((len(records), model.num_classes), np.float32)
    with tqdm(total=len(records), desc=description, unit="img") as progress:
        for start in range(0, len(records), batch_size):
            samples = [read_image(record) for record in records[start : start + batch_size]]
            logits = torch.stack([output["logits"] for output in model(samples)])
            prob[start : start + len(samples)] = logits.float().sigmoid().cpu().numpy()
            progress.update(len(samples))
    return prob


def predict_label_maps(
    model: SampleSegmenter,
    records: Iterable[Mapping[str, Any]],
    *,
    only_image_labels: bool = False,
    refine: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    description: str = "label maps",
) -> Iterator[tuple[int | str, np.ndarray]]:
    """Predict label maps, one image at a time.

    Args:
        model: the model; it is put into evaluation mode.
        records: as of :func:`maskx.data.coco.load_coco`.
        only_image_labels: predict nothing but the background and the image labels of the record,
            for images whose labels are known to be complete.
        refine: maps an image (H, W, 3) uint8 RGB and its probabilities (L, H, W) float32 to
            better probabilities, such as :func:`maskx.data.dense_crf.refine`. With
            ``only_image_labels`` it gets only the rows of the labels that are left.
        description: label of the progress bar.

    Yields:
        Image id and (H, W) label map of the size of the file, uint8 for up to 254 classes, else
        int32. No pixel is ignored.

    Raises:
        ValueError: what ``refine`` returns has another shape.
    """
    model.eval()
    read_image = ImageMapper(model.num_classes, size=None, label_maps=False).read_image
    label_type = np.uint8 if ignore_label(model.num_classes) <= 255 else np.int32
    for record in tqdm(records, desc=description, unit="img"):
        sample = read_image(record)
        # Around the model alone: the caller's code runs between two images.
        with torch.inference_mode():
            prob = model([sample])[0]["prob"]
            labels = np.arange(model.num_classes + 1)
            if only_image_labels:
                kept = [0, *(index + 1 for index in sorted(set(sample["image_labels"])))]
                labels = np.array(kept)
                prob = restrict_to_labels(prob, sample["image_labels"])[kept]
            if refine is None:
                best = prob.argmax(dim=0).cpu().numpy()
        if refine is not None:
            best = _refined(refine, sample, prob.float().cpu().numpy()).argmax(axis=0)
        yield sample["image_id"], labels[best].astype(label_type)


def _refined(refine: Callable, sample: Sample, prob: np.ndarray) -> np.ndarray:
    image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
    refined = np.asarray(refine(image, prob))
    if refined.shape != prob.shape:
        raise ValueError(
            f"For image {sample['image_id']!r} refine returned shape {refined.shape} for "
            f"probabilities of shape {prob.shape}. They must be equal."
        )
    return refined


def evaluate_label_maps(
    predictions: Iterable[tuple[int | str, np.ndarray]],
    records: Sequence[Mapping[str, Any]],
    num_classes: int,
    groups: Mapping[str, Iterable[int]] | None = None,
) -> dict[str, Any]:
    """Compute the mean IoU of predicted label maps; see :class:`maskx.evaluation.mean_iou.MeanIoU`.

    The truth is what :func:`maskx.data.label_maps.semantic_label_map` gives for each record. One
    image is held at a time.

    Args:
        predictions: image id and (H, W) label map of each record once, in any order.
        records: as of :func:`maskx.data.coco.load_coco`.
        num_classes: number of classes, without the background.
        groups: class indices by name, as `CategorySplit.groups` gives them.

    Returns:
        What `MeanIoU.evaluate` returns.

    Raises:
        ValueError: an image is not among the records, was predicted twice or never, or a label map
            does not fit its image.
    """
    missing = {record["image_id"]: record for record in records}
    counts = MeanIoU(num_classes)
    for image_id, label_map in predictions:
        if image_id not in missing:
            raise ValueError(
                f"Image {image_id!r} was predicted, but is not among the {len(records)} records, "
                "or was predicted before. Predict each record once."
            )
        counts.update(label_map, semantic_label_map(missing.pop(image_id), num_classes), image_id)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(records)} images have no prediction, the first is "
            f"{next(iter(missing))!r}. Predict each record once."
        )
    return counts.evaluate(groups)
