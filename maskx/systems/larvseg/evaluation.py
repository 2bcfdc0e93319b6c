"""How good the label maps and the features of LarvSeg are."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from maskx.core.backbones import named_feature
from maskx.core.checks import check_choice
from maskx.core.images import positions_of_pixels
from maskx.core.sample_models import Sample
from maskx.core.seeds import step_seed
from maskx.data.images import read_image_sample
from maskx.data.label_maps import ignore_label
from maskx.evaluation.mean_iou import MeanIoU
from maskx.systems.larvseg.model import LarvSegModel
from maskx.systems.larvseg.samples import (
    LabelledImages,
    Record,
    classes_to_predict,
    true_label_map,
)


class LarvSegScores:
    """Mean IoU of label maps on all classes of a test set, on base and on novel ones.

    Pixels of which the truth knows nothing, among them those of label 0, count nowhere.

    Args:
        class_names: of the test set.
        novel: names of the novel classes, all others are base; None knows neither.
    """

    def __init__(self, class_names: Sequence[str], novel: Collection[str] | None = None) -> None:
        self.class_names = tuple(class_names)
        # Of labels with one name the first stands for the class.
        first = {name: index for index, name in reversed([*enumerate(class_names)])}
        self.classes = sorted(first.values())
        self.groups: dict[str, list[int]] = {}
        if novel is not None:
            for side, is_novel in (("base", False), ("novel", True)):
                self.groups[side] = [
                    i for i in self.classes if (class_names[i] in novel) == is_novel
                ]
        self._counts = MeanIoU(len(class_names))

    def update(self, record: Record, result: Mapping[str, Tensor]) -> None:
        """Count an image; ``result`` chose from the classes of the test set."""
        truth = true_label_map(record, self.class_names)
        self._counts.update(result["sem_seg"].cpu().numpy(), truth, record["image_id"])

    def merge(self, other: "LarvSegScores") -> None:
        """Add the counts of other images."""
        self._counts.merge(other._counts)

    def results(self) -> dict[str, Any]:
        """Return what :meth:`maskx.evaluation.mean_iou.MeanIoU.evaluate` does, in percent."""
        return self._counts.evaluate(self.groups)


@torch.inference_mode()
def predict_larvseg(
    model: LarvSegModel, test: LabelledImages, *, description: str = "label maps"
) -> Iterator[tuple[Record, dict[str, Tensor]]]:
    """Predict the classes of a test set, one image at a time.

    Yields:
        Record and result, the ``sem_seg`` of which is class index of the test set + 1.
    """
    model.eval()
    asked = {"class_indices": classes_to_predict(test.class_names, model.class_names)}
    for record in tqdm(test.records, desc=description, unit="img"):
        yield record, model([read_image_sample(record) | asked])[0]


def evaluate_larvseg(
    model: LarvSegModel,
    test: LabelledImages,
    novel: Collection[str] | None = None,
    *,
    description: str = "label maps",
) -> dict[str, Any]:
    """Compute :class:`LarvSegScores` of label maps; one image is held at a time."""
    scores = LarvSegScores(test.class_names, novel)
    for record, result in predict_larvseg(model, test, description=description):
        scores.update(record, result)
    return scores.results()


@torch.inference_mode()
def evaluate_grouping(
    model: LarvSegModel,
    test: LabelledImages,
    novel: Collection[str] | None = None,
    *,
    seed: int = 0,
    features: str = "tokens",
    read: Callable[[Record], Sample] = read_image_sample,
) -> dict[str, Any]:
    """Measure how well features group the pixels of a class (Eq. 2): the exploratory experiment.

    One random true pixel of each class present is given; every pixel takes the class of the most
    similar of them, see :func:`group_pixels`.

    Args:
        model: it is put into evaluation mode.
        test: images with true label maps.
        novel: see :class:`LarvSegScores`, which also says what is returned.
        seed: of the random pixels.
        features: ``tokens``, those of the classifier, or ``backbone``, the feature map before.
        read: makes the sample of an image in the order of channels of the model.
    """
    check_choice("features", features, ("tokens", "backbone"))
    model.eval()
    network = model.network
    scores = LarvSegScores(test.class_names, novel)
    ignore = ignore_label(len(test.class_names))
    for number, record in enumerate(tqdm(test.records, desc="pixel grouping", unit="img")):
        images = model.preprocess([read(record)])
        if features == "tokens":
            (maps,) = network(images)
        else:
            found = network.backbone(images)
            (maps,) = named_feature(found, network.in_feature, network.backbone)
        truth = torch.from_numpy(true_label_map(record, test.class_names))
        generator = torch.Generator().manual_seed(step_seed(seed, number))
        if (truth != ignore).any():  # an image without a known pixel counts nowhere
            grouped = group_pixels(maps.cpu(), truth, generator, ignore=ignore)
            scores.update(record, {"sem_seg": grouped})
    return scores.results()


@torch.no_grad()
def group_pixels(
    features: Tensor, label_map: Tensor, generator: torch.Generator, *, ignore: int
) -> Tensor:
    """Label each pixel as the most similar of one known pixel per class (Eq. 2 of the paper).

    "LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic Segmentation via
    Category-wise Attentive Classifier" (Yu et al., PRCV 2024), section 3.2. A random pixel of each
    class that is present is known; the token that holds it stands for the class. The cosine of
    every token to it is up-sampled bilinearly.

    Args:
        features: (C, h, w).
        label_map: (H, W) int64, the truth.
        generator: of the random pixels, on the CPU.
        ignore: label of the pixels that belong to no class.

    Returns:
        (H, W) int64, one of the labels that are present. All of it is ``ignore`` when none is. Of
        several classes with the same similarity it is the one of the lowest label.
    """
    labels = label_map[label_map != ignore].unique()
    if len(labels) == 0:
        return torch.full_like(label_map, ignore)
    size, points = tuple(label_map.shape), []
    for label in labels:
        places = (label_map == label).nonzero()
        points.append(places[torch.randint(len(places), (), generator=generator)].flip(0))
    responses = _responses(features, torch.stack(points), size)
    responses = F.interpolate(responses[None], size, mode="bilinear")[0]
    return labels[responses.argmax(dim=0)]


@torch.inference_mode()
def response_maps(model: LarvSegModel, sample: Sample, points: Sequence[tuple[int, int]]) -> Tensor:
    """Make the response maps of pixels, as in the paper's figure of pixel grouping (Eq. 2).

    Args:
        model: of either host, in evaluation mode.
        sample: with ``image``, of which `points` are pixels (x, y).

    Returns:
        (P, h, w) cosines of every token with that of a pixel.
    """
    (tokens,) = model.network(model.preprocess([sample])).float()
    size = tuple(sample["image"].shape[-2:])
    return _responses(tokens, torch.tensor(points, device=tokens.device).reshape(-1, 2), size)


def _responses(features: Tensor, points: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Return the (P, h, w) cosines of (C, h, w) features with those at P pixels."""
    tokens, size = F.normalize(features, dim=0).flatten(1), tuple(features.shape[-2:])
    seeds = tokens[:, positions_of_pixels(points, image_size, size).to(tokens.device)]
    return (seeds.T @ tokens).unflatten(1, size)
