"""Label maps of LarvSeg by sliding windows, without logits of all classes.

Logits are linear in the scaled tokens of a :class:`LogitFactors`, so that it is tokens that are
averaged where windows overlap. Windows begin at multiples of the stride of the feature map: their
tokens lie on each other, and the mean of the tokens gives the mean of the logits exactly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskx.systems.larvseg.large_vocabulary import predict_label_map
from maskx.systems.larvseg.network import LarvSeg


def check_windows(window: int, stride: int, feature_stride: int) -> None:
    """Refuse windows whose tokens would not lie on each other, or that leave pixels out.

    Raises:
        ValueError: a size is not allowed.
    """
    sizes_fit = window % feature_stride == 0 and stride % feature_stride == 0
    if not sizes_fit or not 0 < stride <= window:
        raise ValueError(
            f"Sliding windows of {window} pixels with stride {stride} do not fit: both must be "
            f"multiples of {feature_stride}, by the stride of the feature map, and the stride at "
            "least that and no larger than the window."
        )


@torch.no_grad()
def predict_windows(
    network: LarvSeg,
    image: Tensor,
    size: tuple[int, int],
    *,
    class_indices: Tensor,
    window: int,
    stride: int,
    feature_stride: int,
    top_k: int = 1,
) -> tuple[Tensor, Tensor]:
    """Predict the labels of every pixel from the mean logits of windows.

    The image is resized so that its shorter side is as long as a window; both sides are rounded to
    multiples of the stride of the feature map.

    Args:
        network: in evaluation mode.
        image: (3, H, W), normalised.
        size: height and width of the result.
        class_indices: (L,) int64, the labels to choose from, as they are: also those that training
            never showed.
        window: side in pixels, a multiple of `feature_stride`; see :func:`check_windows`.
        stride: from window to window in pixels. The last one of a row or column ends with the
            image.
        feature_stride: of the feature map that is classified.
        top_k: labels per pixel.

    Returns:
        Labels, (top_k, *size) int64, and their logits, best first.
    """
    check_windows(window, stride, feature_stride)
    scale = window / min(image.shape[-2:])
    height, width = (
        max(window, round(scale * side / feature_stride) * feature_stride)
        for side in image.shape[-2:]
    )
    image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)
    vectors = network.classifier.class_vectors(class_indices)
    shape = (height // feature_stride, width // feature_stride)
    total, count = image.new_zeros(network.classifier.channels, *shape), image.new_zeros(shape)
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            tokens = network(image[:, :, top : top + window, left : left + window])
            factors = network.classifier.factors(tokens, vectors)
            rows, columns = (
                slice(start // feature_stride, (start + window) // feature_stride)
                for start in (top, left)
            )
            total[:, rows, columns] += factors.tokens[0]
            count[rows, columns] += 1
    labels, scores = predict_label_map(total / count, factors.vectors, size, top_k=top_k)
    return labels, scores + factors.shift


def _starts(length: int, window: int, stride: int) -> list[int]:
    return [*range(0, length - window, stride), length - window]
