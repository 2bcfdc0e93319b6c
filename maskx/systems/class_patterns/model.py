"""DeepLab with a large field of view: network, inference at several sizes, the model of samples.

"Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs" (Chen et al.,
ICLR 2015), the LargeFOV form; inference at several sizes as in "Learning Saliency-Free Model with
Generic Features for Weakly-Supervised Semantic Segmentation" (Luo & Yang, AAAI 2020).

Shape legend:
    N: images; K: classes without the background; L = K + 1: labels, 0 the background and c + 1
    class index c; H, W: size of the image; h, w: size of the feature map.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from maskx.core.backbones import named_feature
from maskx.core.image_classifier import multi_hot
from maskx.core.images import resized_image
from maskx.core.layers import msra_fill
from maskx.core.losses import pixel_loss
from maskx.core.sample_models import ClassListModel, Sample, required, take_classifier_backbone
from maskx.data import dense_crf
from maskx.data.images import ImageMapper
from maskx.data.label_maps import ignore_label
from maskx.engine.model_export import Exportable, export_label_maps


class LargeFOVHead(nn.Sequential):
    """Map (N, C, h, w) features to (N, L, h, w) logits.

    The first layer sees a window of 2 * dilation + 1 positions: 25 at dilation 12, which is for a
    feature map of stride 8.
    """

    def __init__(
        self,
        in_channels: int,
        num_labels: int,
        *,
        hidden_channels: int = 1024,
        dilation: int = 12,
        dropout: float = 0.5,
    ) -> None:
        wide = nn.Conv2d(in_channels, hidden_channels, 3, padding=dilation, dilation=dilation)
        narrow = nn.Conv2d(hidden_channels, hidden_channels, 1)
        last = nn.Conv2d(hidden_channels, num_labels, 1)
        msra_fill(wide)
        msra_fill(narrow)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        super().__init__(
            wide, nn.ReLU(), nn.Dropout(dropout), narrow, nn.ReLU(), nn.Dropout(dropout), last
        )


class DeepLab(nn.Module):
    """Segmentation network: a backbone, best of output stride 8, and :class:`LargeFOVHead`.

    Args:
        backbone: maps images to a dictionary of feature maps.
        in_feature: name of the feature map that the head reads.
        **head: options of :class:`LargeFOVHead`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        in_feature: str,
        in_channels: int,
        num_classes: int,
        **head: Any,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.in_feature = in_feature
        self.num_classes = num_classes
        self.head = LargeFOVHead(in_channels, num_classes + 1, **head)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) normalised images to (N, L, h, w) logits at the feature's stride."""
        features = self.backbone(images)
        return self.head(named_feature(features, self.in_feature, self.backbone))


@torch.no_grad()
def multi_scale_scores(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    sizes: Sequence[int],
    output_size: tuple[int, int],
) -> Tensor:
    """Predict the labels of an image from several sizes of it.

    The logits of each size are resized to the output and averaged there, before the softmax.

    Args:
        network: maps (1, 3, S, S) images to (1, L, h, w) logits; in evaluation mode.
        image: (3, H, W), normalised.
        sizes: sides S of the squares that the image is warped to. The reference's are 241, 328
            and 401.
        output_size: (H, W) of the result.

    Returns:
        (L, *output_size) probabilities.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"The sizes for inference are {tuple(sizes)}. Allowed: one or more sides of a square "
            "in pixels, such as (241, 328, 401)."
        )
    total = 0
    for size in sizes:
        # Antialiased as by Pillow, since most images are made smaller.
        warped = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)
        total = total + F.interpolate(network(warped), output_size, mode="bilinear")[0]
    return (total / len(sizes)).softmax(dim=0)


def restrict_to_labels(prob: Tensor, labels: Sequence[int]) -> Tensor:
    """Leave only the background and the classes that an image is known to have.

    Args:
        prob: (L, H, W) probabilities.
        labels: class indices of the image, in [0, L - 1).

    Returns:
        (L, H, W), 0 for every other class: what a softmax over the other logits would have given.
    """
    kept = F.pad(multi_hot([labels], len(prob) - 1, prob.device)[0], (1, 0), value=1)
    prob = prob * kept[:, None, None]
    # A pixel where nothing but other classes has a probability above the smallest float is
    # background.
    prob[0] += prob.sum(dim=0) == 0
    return prob / prob.sum(dim=0)


class SampleSegmenter(ClassListModel):
    """Drives a segmentation network with samples.

    Weights of :class:`maskx.core.sample_models.SampleClassifier` give the backbone to start from.

    Args:
        network: the network.
        test_sizes: see :func:`multi_scale_scores`.
        crf: whether a dense CRF refines what is predicted.
        **options: of :class:`maskx.core.sample_models.ClassListModel`.

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
        **options: Sequence[Any],
    ) -> None:
        super().__init__(**options)
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
            (height, width) int64, and ``sem_seg_prob`` (L, height, width), background first.
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
            sample: with ``image`` (3, H, W) in [0, 255] and, where the output is to be of another
                size, ``height`` and ``width``.
            labels: class indices known to be present, all others get probability 0; None if they
                are not known.

        Returns:
            (L, height, width) probabilities, background first.
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
        # The CRF takes time for every label, also for those that were ruled out.
        present = range(self.num_classes) if labels is None else sorted(set(labels))
        kept = [0, *(index + 1 for index in present)]
        refined = dense_crf.refine(resized_image(image, *size), prob[kept].float().cpu().numpy())
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
    """Predict label maps, one image at a time; the model is put into evaluation mode.

    Args:
        model: the model.
        records: as of :func:`maskx.data.coco.load_coco`.
        read_image: makes a sample of a record, in the channel order of the model; None for RGB.
        only_image_labels: predict nothing but the background and the image labels of the record,
            which are then taken for complete.
        description: of the progress bar.

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


class _LabelMaps(nn.Module):
    """What is exported of a segmenter: an image (1, 3, H, W) in, label map and scores out."""

    def __init__(self, segmenter: SampleSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        scores, label_map = self.segmenter.predict({"image": image[0]}).max(dim=0)
        return label_map, scores


def exportable(model: SampleSegmenter, class_names: Sequence[str]) -> Exportable:
    """Describe a trained segmenter for :func:`maskx.engine.model_export.export_model`.

    Raises:
        ValueError: it refines its predictions by a CRF.
    """
    dense_crf.check_no_crf(model.crf)
    return export_label_maps(_LabelMaps(model), class_names, "probability of the label")
