"""DeepLab with a large field of view: network, loss, multi-scale inference.

"Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs" (Chen et al.,
ICLR 2015), the LargeFOV form; inference at several sizes as in "Learning Saliency-Free Model with
Generic Features for Weakly-Supervised Semantic Segmentation" (Luo & Yang, AAAI 2020).

Shape legend:
    N: images; K: classes without the background; L = K + 1: labels, 0 the background and c + 1
    class index c; H, W: size of the image; h, w: size of the feature map.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.backbones import named_feature
from maskx.core.layers import msra_fill


class LargeFOVHead(nn.Sequential):
    """Head whose first layer sees a window of 2 * dilation + 1 positions: 25 at dilation 12.

    Args:
        in_channels: channels of the feature map.
        num_labels: L.
        hidden_channels: channels of the two hidden layers.
        dilation: of the 3x3 convolution. The default is that of a feature map of stride 8.
        dropout: probability with which a hidden value is dropped in training.
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

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C, h, w) features to (N, L, h, w) logits."""
        return super().forward(features)


class DeepLab(nn.Module):
    """Segmentation network: a backbone, best of output stride 8, and :class:`LargeFOVHead`.

    Args:
        backbone: maps images to a dictionary of feature maps.
        in_feature: name of the feature map that the head reads.
        in_channels: its channels.
        num_classes: K.
        **head: options of :class:`LargeFOVHead`.

    Raises:
        ValueError: in forward, the backbone has no feature map `in_feature`.
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

    The image is warped to a square of each size. The scores (logits) are resized to the output and
    averaged there, before the softmax.

    Args:
        network: maps (1, 3, S, S) images to (1, L, h, w) logits; in evaluation mode.
        image: (3, H, W), normalised.
        sizes: the sides S of the squares in pixels. The reference's are 241, 328 and 401.
        output_size: (H, W) of the result.

    Returns:
        (L, *output_size) probabilities.

    Raises:
        ValueError: `sizes` is empty or has a size below 1.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"The sizes for inference are {tuple(sizes)}. Allowed: one or more sides of a square "
            "in pixels, such as (241, 328, 401)."
        )
    total = None
    for size in sizes:
        # Antialiased as by Pillow, since most images are made smaller.
        warped = _resize(image[None], (size, size), antialias=True)
        scores = _resize(network(warped), output_size)[0]
        total = scores if total is None else total + scores
    return (total / len(sizes)).softmax(dim=0)


def restrict_to_labels(prob: Tensor, labels: Sequence[int]) -> Tensor:
    """Leave only the background and the classes that an image is known to have.

    The result is what a softmax over their logits alone would have given.

    Args:
        prob: (L, H, W) probabilities.
        labels: class indices of the image, in [0, L - 1).

    Returns:
        (L, H, W) probabilities, 0 for every other class.

    Raises:
        ValueError: a class index is out of range.
    """
    num_classes = len(prob) - 1
    unknown = sorted(label for label in set(labels) if not 0 <= label < num_classes)
    if unknown:
        raise ValueError(
            f"The image labels have the class indices {unknown}. Allowed: 0 to {num_classes - 1}."
        )
    kept = prob.new_zeros(len(prob))
    kept[[0, *(label + 1 for label in labels)]] = 1
    prob = prob * kept[:, None, None]
    # A pixel where nothing but other classes has a probability above the smallest float is
    # background.
    prob[0] += prob.sum(dim=0) == 0
    return prob / prob.sum(dim=0)


def _resize(images: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    return F.interpolate(
        images, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias
    )
