"""The segmentation network driven with samples, on both hosts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskx.core.images import resized_image
from maskx.core.losses import pixel_loss
from maskx.core.sample_models import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Sample,
    SampleModel,
    required,
    take_classifier_backbone,
)
from maskx.data import dense_crf
from maskx.data.images import ImageMapper
from maskx.data.label_maps import ignore_label
from maskx.systems.class_patterns.deeplab import DeepLab, multi_scale_scores, restrict_to_labels

__all__ = ["SampleSegmenter", "predict_label_maps"]


class SampleSegmenter(SampleModel):
    """Drives a segmentation network with samples.

    Weights of :class:`maskx.core.sample_models.SampleClassifier` give the backbone to start from.

    Args:
        network: maps normalised images to logits of the background and K classes.
        test_sizes: sides in pixels of the squares to which an image is warped to predict it; the
            scores are averaged.
        crf: whether a dense CRF refines what is predicted.
        pixel_mean: see :class:`maskx.core.sample_models.SampleModel`.
        pixel_std: likewise.

    Raises:
        ImportError: there is no library for the CRF.
        ValueError: a size is not above 0.
    """

    def __init__(
        self,
        network: DeepLab,
        *,
        test_sizes: Sequence[int] = (328,),
        crf: bool = False,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        if not test_sizes or not all(isinstance(s, int) and s > 0 for s in test_sizes):
            raise ValueError(
                f"test_sizes (TEST.MASKX.SIZES) is {test_sizes}. Allowed: one or more sides of a "
                "square in pixels, such as (241, 328, 401)."
            )
        if crf:
            dense_crf.check_crf()
        self.network = network
        self.num_classes = network.num_classes
        self.test_sizes = tuple(test_sizes)
        self.crf = crf

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        take_classifier_backbone(self.network.backbone, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute the loss in training, label maps in evaluation.

        Args:
            samples: each with ``image`` (3, H, W) in [0, 255]; in training all of one size, with
                ``sem_seg``, the label map (H, W); in evaluation see :meth:`predict`.

        Returns:
            ``{"loss_pixels": scalar}``, zero where no pixel is known; or per sample ``sem_seg``
            (height, width) int64, and ``sem_seg_prob`` (K + 1, height, width), background first.

        Raises:
            ValueError: a training sample has no label map, or the sizes differ.
        """
        if not self.training:
            probs = [self.predict(sample) for sample in samples]
            return [{"sem_seg": prob.argmax(dim=0), "sem_seg_prob": prob} for prob in probs]
        remedy = "Use a mapper that makes label maps."
        label_maps = [required(sample, "sem_seg", remedy) for sample in samples]
        logits = self.network(self.training_images(samples))
        targets = torch.stack(label_maps).to(self.device)
        return {"loss_pixels": pixel_loss(logits, targets, ignore=ignore_label(self.num_classes))}

    def predict(self, sample: Sample, labels: Sequence[int] | None = None) -> Tensor:
        """Predict what one image shows, in evaluation mode.

        Args:
            sample: with ``image`` (3, H, W) in [0, 255], and the size of the output, ``height``
                and ``width``; without them it is that of the image.
            labels: class indices known to be present: all others get probability 0; None if they
                are not known.

        Returns:
            (K + 1, height, width) probabilities, background first.

        Raises:
            ValueError: a label is no class index.
        """
        image = sample["image"]
        size = (sample.get("height", image.shape[1]), sample.get("width", image.shape[2]))
        prob = multi_scale_scores(
            self.network, self.normalise(sample), sizes=self.test_sizes, output_size=size
        )
        if labels is not None:
            prob = restrict_to_labels(prob, labels)
        if not self.crf:
            return prob
        if labels is None:
            kept = list(range(len(prob)))
        else:  # the CRF takes time for every label, also for those that were ruled out
            kept = [0, *(index + 1 for index in sorted(set(labels)))]
        pixels = resized_image(image, *size)
        refined = dense_crf.refine(pixels, prob[kept].float().cpu().numpy())
        result = torch.zeros_like(prob)
        result[kept] = torch.from_numpy(refined).to(prob)
        return result


def predict_label_maps(
    model: SampleSegmenter,
    records: Iterable[Mapping[str, Any]],
    *,
    read_image: Callable[[Mapping[str, Any]], Sample] | None = None,
    only_image_labels: bool = False,
    description: str = "label maps",
) -> Iterator[tuple[int | str, np.ndarray]]:
    """Predict label maps, one image at a time.

    Args:
        model: the model; it is put into evaluation mode.
        records: as of :func:`maskx.data.coco.load_coco`.
        read_image: makes a sample of a record, in the channel order of the model; None for RGB.
        only_image_labels: predict nothing but the background and the image labels of the record,
            for images whose labels are known to be complete.
        description: label of the progress bar.

    Yields:
        Image id and (H, W) label map of the size of the file, uint8 for up to 254 classes, else
        int32. No pixel is ignored.
    """
    model.eval()
    if read_image is None:
        read_image = ImageMapper(model.num_classes, size=None, label_maps=False).read_image
    label_type = np.uint8 if ignore_label(model.num_classes) <= 255 else np.int32
    for record in tqdm(records, desc=description, unit="img"):
        sample = read_image(record)
        # Around the model alone: the caller's code runs between two images.
        with torch.inference_mode():
            labels = sample["image_labels"] if only_image_labels else None
            best = model.predict(sample, labels).argmax(dim=0)
        yield sample["image_id"], best.cpu().numpy().astype(label_type)
