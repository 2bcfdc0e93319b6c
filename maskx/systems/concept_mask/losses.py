"""Losses of stage 2 of ConceptMask: boxes, what stage 1 knew, and concepts that do not overlap.

"ConceptMask: Large-Scale Segmentation from Semantic Concepts" (Wang et al., ECCV 2018),
Eqs. 2 to 4. Every loss is zero, with a graph through its logits, where there is nothing to learn.

Shape legend:
    N: images; V: concepts of the vocabulary; k: length of the word vectors; h, w: size of the
    attention maps, a position of which is a cell; B: boxes; P: pairs of an image and a concept
    with boxes; M: concepts per image that are matched; U: concepts that are negatives of any pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskx.core.global_mean import global_mean
from maskx.systems.concept_mask.network import full_precision, initial_attention


def box_maps(
    boxes: Tensor,
    box_rows: Tensor,
    num_rows: int,
    image_size: tuple[int, int],
    map_size: tuple[int, int],
) -> Tensor:
    """Draw unions of (B, 4) boxes, XYXY absolute pixels, on attention maps.

    A cell is on where its centre lies in a box of the row. A box in which no centre lies turns on
    the cell that its own centre lies in, so that no concept is lost.

    Args:
        boxes: what lies outside of the image is cut off.
        box_rows: (B,) the row of each box.
        num_rows: R.
        image_size: (H, W).
        map_size: (h, w).

    Returns:
        (R, h, w) in {0, 1}, of the type of the boxes.
    """
    inside = []
    for axis in (1, 0):
        length, cells = image_size[1 - axis], map_size[1 - axis]
        low, high = boxes[:, axis].clamp(0, length), boxes[:, axis + 2].clamp(0, length)
        centres = (torch.arange(cells, device=boxes.device) + 0.5) * (length / cells)
        covered = (low[:, None] <= centres) & (centres < high[:, None])
        own = ((low + high) * (cells / (2 * length))).long().clamp(max=cells - 1)
        inside.append((covered, F.one_hot(own, cells).bool()))
    (rows, own_row), (columns, own_column) = inside
    empty = ~(rows.any(dim=1) & columns.any(dim=1))[:, None]
    rows, columns = torch.where(empty, own_row, rows), torch.where(empty, own_column, columns)
    drawn = (rows[:, :, None] & columns[:, None]).to(boxes.dtype)
    return boxes.new_zeros(num_rows, *map_size).index_add(0, box_rows, drawn).clamp(max=1)


def box_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of (P, h, w) logits and {0, 1} targets (first term of Eq. 2)."""
    logits = full_precision(logits)
    total = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return global_mean(total, logits.numel())


@torch.no_grad()
def peak_activations(embedding_map: Tensor, vectors: Tensor, *, chunk: int = 1024) -> Tensor:
    """Compute the (N, V) maxima of the initial attention maps of all concepts.

    They are made `chunk` at a time: 1024, for 16 images of 16 x 16 cells, take 17 MB.
    """
    parts = (initial_attention(embedding_map, part) for part in vectors.split(chunk))
    return torch.cat([part.amax(dim=(2, 3)) for part in parts], dim=1)


def matched_concepts(embedding_map: Tensor, vectors: Tensor, num_matched: int = 800) -> Tensor:
    """Find the concepts of each image whose initial attention is highest anywhere (Psi of Eq. 2).

    Args:
        embedding_map: (N, k, h, w) of the frozen copy of stage 1.
        vectors: (V, k).
        num_matched: the paper's N; half of the vocabulary if that is less.

    Returns:
        (N, M) int64 concept indices, the highest first.
    """
    count = min(num_matched, len(vectors) // 2)
    return peak_activations(embedding_map, vectors).topk(count, dim=1).indices


def matching_loss(
    logits: Tensor, embedding_map: Tensor, vectors: Tensor, concepts: Tensor
) -> Tensor:
    """Binary cross-entropy to what stage 1 saw, so that it is not forgotten (2nd term of Eq. 2).

    The target is on where the initial attention is above its mean plus its standard deviation over
    the map; nowhere, in a constant map.

    Args:
        logits: (N, M, h, w) refined attention of the ``concepts``.
        embedding_map: (N, k, h, w) of the frozen copy of stage 1; no gradient flows through it.
        vectors: (V, k).
        concepts: (N, M), see :func:`matched_concepts`.

    Returns:
        The sum over cells and concepts, the mean over images, without the weight c.
    """
    if logits.numel() == 0:
        return global_mean(logits.sum() * 0, len(logits))
    logits = full_precision(logits)
    with torch.no_grad():
        original = full_precision(initial_attention(embedding_map, vectors[concepts]))
        std, mean = torch.std_mean(original, dim=(2, 3), correction=0, keepdim=True)
        targets = original > mean + std
    total = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return global_mean(total, len(logits))


def negative_concepts(
    concepts: Tensor, gamma: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Find what must not be where the concepts are (Eq. 4).

    Args:
        concepts: (P,) concept index of each pair.
        gamma: weights of Eq. 4 as sparse rows: ``indptr`` (V + 1,), ``indices`` and ``weights``;
            row i holds the negatives j of concept i with their gamma_ij.

    Returns:
        (U,) concept indices, and the (P, U) weights of each pair for them.
    """
    indptr, indices, weights = gamma
    starts, counts = indptr[concepts], indptr[concepts + 1] - indptr[concepts]
    pairs = torch.repeat_interleave(counts)
    within = torch.arange(len(pairs), device=pairs.device) - (counts.cumsum(0) - counts)[pairs]
    entries = starts[pairs] + within
    negatives, columns = indices[entries].unique(return_inverse=True)
    table = weights.new_zeros(len(concepts), len(negatives))
    return negatives, table.index_put((pairs, columns), weights[entries])


def discrimination_loss(
    logits: Tensor, targets: Tensor, pair_images: Tensor, pair_weights: Tensor
) -> Tensor:
    """Push concepts down where others are that they do not overlap with (section 4.2).

    The mean of ``-gamma_ij log(1 - alpha_j)`` over the cells of G_i and the negatives j, then over
    the pairs that have both. As in the paper, a cell that a box of j covers too is no exception.
    gamma spares it where most of i is also j; but of a part in its whole, such as a face (j) in a
    person (i), gamma is high, so the part is pushed down on itself too.

    Args:
        logits: (N, U, h, w) refined attention of the negatives.
        targets: (P, h, w) in {0, 1}: G of each pair, see :func:`box_maps`.
        pair_images: (P,) position in the batch of the image of each pair.
        pair_weights: (P, U), see :func:`negative_concepts`.
    """
    losses = F.softplus(full_precision(logits.flatten(2)))
    cells = targets.flatten(1).to(losses.dtype)
    weights = pair_weights.to(losses.dtype)
    num_cells = cells.sum(dim=1, keepdim=True)
    num_negatives = (weights > 0).sum(dim=1, keepdim=True)
    count = ((num_cells > 0) & (num_negatives > 0)).sum()
    cells, weights = cells / num_cells.clamp(min=1), weights / num_negatives.clamp(min=1)
    # The pairs are summed before the logits are read: (N, U, P) instead of (P, U, h * w).
    member = pair_images == torch.arange(len(logits), device=logits.device)[:, None]
    share = (member[:, None] * weights.T) @ cells
    return global_mean((losses * share).sum(), count)
