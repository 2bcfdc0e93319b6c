"""A segmentation network that takes samples."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskx.core.losses import pixel_loss
from maskx.core.sample_models import Sample, SampleModel
from maskx.data.image_samples import ImageMapper
from maskx.data.label_maps import ignore_label
from maskx.systems.class_patterns.deeplab import DeepLab, multi_scale_scores, restrict_to_labels


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
            samples: as of :class:`maskx.data.image_samples.ImageMapper`: ``image``; in training
                ``sem_seg`` of this model's ``size``; in evaluation ``height`` and ``width``.

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
            found = tuple(sample["sem_seg"].shape) if "sem_seg" in sample else "no label map"
            if found != square:
                raise ValueError(
                    f"Image {sample.get('image_id')!r} came with {found}, but this model trains on "
                    f"label maps of {square}. Make samples with ImageMapper(..., size={self.size}, "
                    "label_maps=True)."
                )
        label_maps = [sample["sem_seg"] for sample in samples]
        stacked = torch.stack(label_maps) if label_maps else torch.zeros(0, *square).long()
        return stacked.to(self.device)


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
