"""What ConceptMask is asked for in an image, and what it answers.

Shape legend:
    V: concepts of the word table; k: length of a word vector; C: asked concepts; H, W: size of the
    masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ConceptQuery:
    """Concepts that are asked for.

    Attributes:
        indices: (C,) int64, rows of the word table; -1 for an unseen word.
        vectors: (C, k) float, read for unseen words only.
    """

    indices: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class ConceptResults:
    """What is predicted of the concepts of one image.

    Attributes:
        indices: (C,) int64, rows of the word table; -1 for an unseen word.
        attention: (C, H, W) in [0, 1], what the masks are made from: blended maps, see
            :func:`maskx.systems.concept_mask.segmenter.mean_maps`.
        initial: (C, H, W) in [0, 1], the same of the maps of Eq. 1.
        mask_prob: (C, H, W) probability, at the output's size.
        masks: (C, H, W) bool, above 0.5.
        existence: (C,) see :meth:`ConceptMask.existence`.
        exists: (C,) bool, the existence is above the threshold.
    """

    indices: Tensor
    attention: Tensor
    initial: Tensor
    mask_prob: Tensor
    masks: Tensor
    existence: Tensor
    exists: Tensor


def concept_query(
    indices: Sequence[int] | np.ndarray | Tensor, vectors: np.ndarray | Tensor
) -> ConceptQuery:
    """Make a query of what ``WordTable.resolve`` returns.

    Args:
        indices: (C,) rows of the word table; -1 for an unseen word.
        vectors: (C, k).
    """
    return ConceptQuery(
        torch.as_tensor(indices, dtype=torch.int64), torch.as_tensor(vectors, dtype=torch.float32)
    )


def checked_query(query: ConceptQuery, table: Tensor) -> ConceptQuery:
    """Bring a query to the device of the word table, with its vectors for what is in it.

    Args:
        query: C concepts.
        table: (V, k) word vectors.

    Raises:
        ValueError: an index is out of range, or the vectors are not (C, k).
    """
    indices, vectors = query.indices, query.vectors
    if len(indices) == 0 and vectors.ndim == 2:
        vectors = table[:0]
    if vectors.shape != (len(indices), table.shape[1]):
        raise ValueError(
            f"A query of {len(indices)} concepts has vectors of shape {tuple(vectors.shape)}. "
            f"Needed: ({len(indices)}, {table.shape[1]}), as in the word table."
        )
    outside = indices[(indices < -1) | (indices >= len(table))]
    if len(outside):
        raise ValueError(
            f"The query has the concept indices {sorted(set(outside.tolist()))}. Allowed: 0 "
            f"to {len(table) - 1}, and -1 for an unseen word with its vector."
        )
    indices = indices.to(table.device)
    vectors = vectors.to(table.device, table.dtype)
    known = (indices >= 0)[:, None]
    return ConceptQuery(indices, torch.where(known, table[indices.clamp(min=0)], vectors))
