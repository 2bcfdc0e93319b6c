"""Attention maps of ConceptMask: by the word vector alone, and refined by what boxes taught.

"ConceptMask: Large-Scale Segmentation from Semantic Concepts" (Wang et al., ECCV 2018),
Eq. 1 and section 4.2.

Shape legend:
    N: images; V: concepts of the vocabulary; C: concepts that are asked for; k: length of the word
    vectors; H: hidden channels; h, w: size of the embedding map; P: (image, concept) pairs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def initial_attention(embedding_map: Tensor, vectors: Tensor, *, cosine: bool = False) -> Tensor:
    """Compute the attention maps of concepts from their word vectors (Eq. 1).

    Args:
        embedding_map: (N, k, h, w), see :meth:`ConceptEmbedding.embedding_map`.
        vectors: (C, k) word vectors, of any concepts; or (N, C, k), others for each image.
        cosine: the cosine, in [-1, 1], instead of the inner product of the paper.

    Returns:
        (N, C, h, w).
    """
    columns = embedding_map.flatten(2)
    if cosine:
        columns, vectors = F.normalize(columns, dim=1), F.normalize(vectors, dim=-1)
    return (vectors @ columns).unflatten(2, embedding_map.shape[-2:])


class AttentionRefinement(nn.Module):
    """Two 1x1 convolutions over the initial attention maps of all concepts (section 4.2).

    ``V maps -> H, ReLU -> V``. The V maps are a product with the word vectors, and so is what
    follows up to the ReLU: the first convolution and the word vectors are multiplied to one (H, k)
    matrix, and of the second only the rows that are asked for are used. No map of a concept that
    nobody asked for is made.

    In evaluation mode and without a gradient the product is computed once and used until either
    factor changes. Changes that PyTorch does not count, through ``.data`` or a NumPy view, need a
    call of ``train()`` or ``eval()``. The product is no part of the state dict.

    Args:
        num_concepts: V.
        hidden_channels: H.
    """

    def __init__(self, num_concepts: int, *, hidden_channels: int = 1024) -> None:
        super().__init__()
        if min(num_concepts, hidden_channels) < 1:
            raise ValueError(
                f"num_concepts is {num_concepts}, hidden_channels {hidden_channels}. Allowed: at "
                "least 1."
            )
        self.conv1 = nn.Conv2d(num_concepts, hidden_channels, kernel_size=1)
        self.conv2 = nn.Conv2d(hidden_channels, num_concepts, kernel_size=1)
        # By fan-in: V and H may differ 20 times, and the hidden layer keeps the size of its input.
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_in", nonlinearity="relu")
        nn.init.normal_(self.conv2.weight, std=0.01)
        nn.init.zeros_(self.conv1.bias)
        nn.init.zeros_(self.conv2.bias)
        self._kept: _KeptProduct | None = None

    def forward(
        self, embedding_map: Tensor, vectors: Tensor, concepts: Tensor | None = None
    ) -> Tensor:
        """Compute refined attention maps: ``logits(hidden(embedding_map, vectors), concepts)``.

        Args:
            embedding_map: (N, k, h, w).
            vectors: (V, k) word vectors.
            concepts: see :meth:`logits`.

        Returns:
            (N, C, h, w) logits.
        """
        return self.logits(self.hidden(embedding_map, vectors), concepts)

    def hidden(self, embedding_map: Tensor, vectors: Tensor) -> Tensor:
        """Map (N, k, h, w) embeddings to the (N, H, h, w) layer that all concepts share."""
        # Not F.conv2d, which rounds float32 to TF32 on a GPU.
        product = self._product(vectors)
        columns = product @ embedding_map.flatten(2) + self.conv1.bias[:, None]
        return F.relu(columns).unflatten(2, embedding_map.shape[-2:])

    def logits(self, hidden: Tensor, concepts: Tensor | None = None) -> Tensor:
        """Compute the maps of some concepts.

        Args:
            hidden: (N, H, h, w), see :meth:`hidden`.
            concepts: (C,) concept indices, or (N, C) others for each image; None for all V.

        Returns:
            (N, C, h, w) logits.
        """
        weight, bias = self.conv2.weight.flatten(1), self.conv2.bias
        if concepts is not None:
            # index_select refuses the -1 of an unseen concept, where indexing takes the last row.
            rows = concepts.flatten()
            weight = weight.index_select(0, rows).unflatten(0, concepts.shape)
            bias = bias.index_select(0, rows).unflatten(0, concepts.shape)
        return (weight @ hidden.flatten(2) + bias[..., None]).unflatten(2, hidden.shape[-2:])

    def pair_logits(self, hidden: Tensor, pair_images: Tensor, pair_concepts: Tensor) -> Tensor:
        """Compute the map of one concept in one image, for many such pairs.

        Args:
            hidden: (N, H, h, w), see :meth:`hidden`.
            pair_images: (P,) positions in the batch.
            pair_concepts: (P,) concept indices.

        Returns:
            (P, h, w) logits.
        """
        # All of the batch's concepts in all of its images are less than P times H x h x w.
        concepts, columns = pair_concepts.unique(return_inverse=True)
        return self.logits(hidden, concepts)[pair_images, columns]

    def train(self, mode: bool = True) -> "AttentionRefinement":
        """Set the mode; the product is then made anew."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the product out of copies and pickles."""
        return {**self.__dict__, "_kept": None}

    def _product(self, vectors: Tensor) -> Tensor:
        """Multiply the first convolution and the word vectors to (H, k)."""
        factors = (self.conv1.weight, vectors)
        has_graph = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
        # A graph means that an optimiser step follows, and fused optimisers do not count theirs.
        # Nor are changes counted of tensors that were made in inference mode.
        if has_graph or self.training or any(factor.is_inference() for factor in factors):
            self._kept = None
            return _multiply(*factors)
        states = [(f.data_ptr(), f.device, f.dtype, f._version) for f in factors]
        if self._kept is None or self._kept.states != states:
            # Not an inference tensor, which no later graph could use.
            with torch.inference_mode(False), torch.no_grad():
                held = [factor.detach() for factor in factors]
                self._kept = _KeptProduct(_multiply(*factors), states, held)
        return self._kept.product


class _KeptProduct(NamedTuple):
    """A product, and how its factors were when it was made.

    Attributes:
        product: (H, k).
        states: address, device, type and count of changes of each factor.
        held: share the memory of the factors, so that nothing else can get its address.
    """

    product: Tensor
    states: list[tuple[int, torch.device, torch.dtype, int]]
    held: list[Tensor]


def _multiply(weight: Tensor, vectors: Tensor) -> Tensor:
    # Sums of V products, which are worth full precision: autocast would round both factors.
    with torch.autocast(weight.device.type, enabled=False):
        return weight.flatten(1) @ vectors
