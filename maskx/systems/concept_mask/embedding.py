"""Stage 1 of ConceptMask: images and concepts in one space, learned from image tags.

"ConceptMask: Large-Scale Segmentation from Semantic Concepts" (Wang et al., ECCV 2018),
section 4.1.

Shape legend:
    N: images; C: channels of the feature map; h, w: its size; V: concepts of the vocabulary;
    k: length of the word vectors.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.backbones import check_feature, named_feature
from maskx.core.layers import msra_fill
from maskx.core.losses import label_pairs


class ConceptEmbedding(nn.Module):
    """A backbone and three fully connected layers, each with batch norm, into the word space.

    The layers see the average of a feature map, or every position of it: the same weights are then
    1x1 convolutions, and the batch norm is spatial.

    Args:
        backbone: maps (N, 3, H, W) images to a dictionary of feature maps.
        in_feature: name of the feature map that is embedded.
        in_channels: C.
        dim: k.
        stride: of the feature map in pixels; None to ask the backbone's ``feature_shapes``.
        hidden_channels: widths of the layers before the last.
        final_relu: ReLU after the last layer too, as the paper has it. No embedding then has a
            negative entry, which word vectors do have.

    Raises:
        ValueError: an argument does not fit the backbone, or is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        in_feature: str,
        in_channels: int,
        dim: int,
        stride: int | None = None,
        hidden_channels: Sequence[int] = (2048, 2048),
        final_relu: bool = False,
    ) -> None:
        super().__init__()
        check_feature(backbone, in_feature, in_channels)
        widths = (in_channels, *hidden_channels, dim)
        if min(widths) < 1:
            raise ValueError(f"the layers must be at least 1 wide, got {widths}.")
        self.backbone = backbone
        self.in_feature = in_feature
        self.dim = dim
        shapes = getattr(backbone, "feature_shapes", None)
        if stride is None:
            stride = 1 if shapes is None else shapes[in_feature].stride
        self.stride = stride
        self.layers = nn.Sequential()
        for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            # The batch norm would subtract a bias again.
            fc = nn.Linear(before, after, bias=False)
            msra_fill(fc)
            self.layers.add_module(f"fc{number}", fc)
            self.layers.add_module(f"norm{number}", nn.BatchNorm1d(after))
            if final_relu or number < len(widths) - 1:
                self.layers.add_module(f"relu{number}", nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) normalised images to (N, k) embeddings."""
        return self._embed(self._features(images).mean(dim=(2, 3)))

    def embedding_map(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) normalised images to (N, k, h, w), an embedding for every position."""
        features = self._features(images)
        num_images, _, height, width = features.shape
        rows = self._embed(features.permute(0, 2, 3, 1).flatten(0, 2))
        return rows.reshape(num_images, height, width, self.dim).permute(0, 3, 1, 2)

    def _embed(self, rows: Tensor) -> Tensor:
        """Map (R, C) features to (R, k)."""
        if len(rows) == 1 and self.training and isinstance(self.layers.norm1, nn.BatchNorm1d):
            raise ValueError(
                "the embedding is trained on a batch of one image and one position, which has no "
                "batch statistics. Use at least 2 images per batch (per worker, without "
                "synchronised batch norm)."
            )
        return self.layers(rows)

    def _features(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < self.stride:
            height, width = images.shape[-2:]
            raise ValueError(
                f"images of {height} x {width} pixels are smaller than the stride {self.stride} of "
                f"the feature {self.in_feature!r}. Resize them to at least {self.stride} pixels "
                "on both sides."
            )
        return named_feature(self.backbone(images), self.in_feature, self.backbone)


def soft_topics(image_labels: Sequence[Sequence[int]], vectors: Tensor, idf: Tensor) -> Tensor:
    """Sum the word vectors of the tags of each image, weighted by how rare they are.

    ``t = sum a_i w_i``, the soft topic embedding; its length has no part in the cosine loss. A tag
    that is there twice counts once.

    Args:
        image_labels: for each image the concept indices of its tags; may be empty.
        vectors: (V, k) word vectors.
        idf: (V,), ``a_i = -log p(w_i)``.

    Returns:
        (N, k); zero for an image without tags.

    Raises:
        ValueError: a concept index is out of range.
    """
    pairs = label_pairs(image_labels, len(vectors), vectors.device)
    weighted = idf[pairs.classes, None] * vectors[pairs.classes]
    return vectors.new_zeros(len(image_labels), vectors.shape[1]).index_add(
        0, pairs.images, weighted
    )


def embedding_loss(embeddings: Tensor, topics: Tensor) -> Tensor:
    """Mean of one minus the cosine between embedding and soft topic.

    Args:
        embeddings: (N, k).
        topics: (N, k), see :func:`soft_topics`; an image whose topic is zero has no loss.

    Returns:
        Scalar. Zero, with a graph through everything that made ``embeddings``, when no image has a
        topic.
    """
    # In half precision a squared norm overflows, or loses its digits.
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    known = (topics != 0).any(dim=1)
    cosines = F.cosine_similarity(embeddings, topics.to(embeddings.dtype), dim=1, eps=1e-6)
    return ((1 - cosines) * known).sum() / known.sum().clamp(min=1)
