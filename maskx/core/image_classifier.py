"""Classifier of image labels with class activation maps, and taps on the layers of its backbone.

The network and the maps are those of "Learning Deep Features for Discriminative Localization"
(Zhou et al., CVPR 2016); every label has its own sigmoid, as an image may have several.

Shape legend:
    N: number of images; K: number of classes without background; C: channels of the features;
    h x w: size of the features.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from types import TracebackType

import torch
from torch import Tensor, nn

from maskx.core.backbones import check_feature, listen


class ImageClassifier(nn.Module):
    """Global average pooling and a linear layer on one feature map of a backbone.

    Args:
        backbone: maps (N, 3, H, W) images to a dictionary of feature maps.
        in_feature: name of the feature map that is classified.
    """

    def __init__(
        self, backbone: nn.Module, *, in_feature: str, in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        check_feature(backbone, in_feature, in_channels)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        self.backbone = backbone
        self.in_feature = in_feature
        self.num_classes = num_classes
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Predict (N, K) logits of the labels of (N, 3, H, W) normalised images."""
        features = self.backbone(images)[self.in_feature]
        return self.classifier(features.mean(dim=(2, 3)))

    def activation_maps(self, features: Tensor, labels: Sequence[int] | None = None) -> Tensor:
        """Compute what every pixel contributes to the logits.

        Args:
            features: (N, C, h, w) feature map ``in_feature`` of the backbone.
            labels: L class indices whose maps are made; None for all K.

        Returns:
            (N, L, h, w), or (N, K, h, w), without the bias: the mean over the pixels plus the bias
            is the logit.
        """
        weight = self.classifier.weight
        if labels is not None:
            weight = weight[torch.as_tensor(labels, dtype=torch.long, device=weight.device)]
        return torch.einsum("nchw,lc->nlhw", features, weight)


def choose_labels(probs: Tensor, threshold: float = 0.6) -> Tensor:
    """Choose the labels of each image: those of at least the threshold, else the most probable.

    Args:
        threshold: smallest probability of a chosen label.

    Returns:
        (N, K) bool with at least one label per image.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a probability in [0, 1], got {threshold}.")
    chosen = probs >= threshold
    return chosen.scatter(1, probs.argmax(dim=1, keepdim=True), True)


def multi_hot(
    image_labels: Sequence[Sequence[int]],
    num_classes: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Write the labels of each image as a row of zeros and ones.

    Args:
        image_labels: for each image the class indices known to be present; may repeat.

    Returns:
        (N, K) float in {0, 1}.

    Raises:
        ValueError: a label is no class index.
    """
    for position, labels in enumerate(image_labels):
        unknown = sorted({int(label) for label in labels if not 0 <= label < num_classes})
        if unknown:
            raise ValueError(
                f"image {position} of the batch has image_labels {unknown}; class indices of "
                f"{num_classes} classes are 0 to {num_classes - 1}. Is the number of classes of "
                "the model that of the data set?"
            )
    rows = [row for row, labels in enumerate(image_labels) for _ in labels]
    columns = [int(label) for label in chain.from_iterable(image_labels)]
    targets = torch.zeros(len(image_labels), num_classes)
    targets[rows, columns] = 1
    return targets.to(device)


class LayerTaps:
    """Keep the outputs of inner layers of a backbone while its forward passes run.

    ``with LayerTaps(backbone, ("C41",)) as taps: model(images)`` leaves (N, C, h, w) in
    ``taps.features["C41"]``, that of the last forward pass. Outputs are kept as they are, with
    their graph; one that the network itself changes in place afterwards is kept changed.

    Args:
        names: aliases of ``backbone.layer_aliases``, where it has them, or names of its modules.

    Raises:
        ValueError: the backbone has no layer of that name, or what it puts out is no tensor.
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        aliases = getattr(backbone, "layer_aliases", {})
        modules = dict(backbone.named_modules())
        del modules[""]
        unknown = [name for name in names if name not in aliases and name not in modules]
        if unknown:
            raise ValueError(
                f"{type(backbone).__name__} has no layer {', '.join(map(repr, unknown))}; it has "
                f"{', '.join([*aliases, *modules])}."
            )
        self.features: dict[str, Tensor] = {}
        self._backbone = backbone
        self._names: dict[str, list[str]] = {}
        for name in names:
            self._names.setdefault(aliases.get(name, name), []).append(name)
        self._ends: list[Callable[[], object]] = []

    def __enter__(self) -> "LayerTaps":
        self.features.clear()
        for path in self._names:
            keep = functools.partial(self._keep, path)
            self._ends.append(listen(self._backbone, path, keep))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._ends:
            self._ends.pop()()

    def _keep(self, path: str, output: object) -> None:
        for name in self._names[path]:
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"layer {name!r} puts out a {type(output).__name__}, not a tensor: tap a "
                    "layer inside it."
                )
            self.features[name] = output
