"""How well the tokens of a class group together: the exploratory experiment of LarvSeg."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
        features: (C, h, w) feature map of an image.
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
    (height, width), (rows, columns) = label_map.shape, features.shape[-2:]
    seeds = []
    for label in labels:
        places = (label_map == label).nonzero()
        y, x = places[torch.randint(len(places), (), generator=generator)].unbind()
        seeds.append((y * rows // height) * columns + x * columns // width)
    tokens = F.normalize(features, dim=0).flatten(1)
    responses = (tokens[:, torch.stack(seeds)].T @ tokens).unflatten(1, (rows, columns))
    responses = F.interpolate(
        responses[None], size=(height, width), mode="bilinear", align_corners=False
    )[0]
    return labels[responses.argmax(dim=0)]
