"""Label maps over vocabularies whose logits at full size would not fit in memory.

21,841 classes at 512 x 512 pixels are 22.9 GB of logits. The best classes of every pixel are found
here without them, and exactly. Between four tokens the score of a class is bilinear, so that no
pixel in there exceeds the largest of the four: a class all of whose corners are below what some
other class reaches at every pixel of the cell cannot win there. Two passes stream over the classes.
The first collects good classes at the tokens and halfway between them, whose best score at each
pixel is a lower bound. The second makes the scores again, of the chunks of classes that reach the
bound anywhere, and evaluates, pixel by pixel, only those classes that exceed it in a cell, and then
in a block of a few pixels of that cell.

Shape legend:
    K: classes; C: channels; h, w: tokens; H, W: pixels of the label map; k: labels per pixel.
    A cell lies between four tokens; cells at the border lie outside the outer tokens' centres, and
    repeat them. There are (h + 1) x (w + 1) cells, each has g x g blocks of pixels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Pixels of a block per side, about.
_BLOCK_SIZE = 4
# Candidates and their blocks that are looked at at a time: with 25 corners of blocks per candidate
# and 16 pixels per block, 2 and 4 MB.
_MAX_CANDIDATES, _MAX_BLOCKS = 2**14, 2**16
# Scores that wait to be merged into the best ones: 10 MB, and some times as much while they are.
_MAX_WAITING = 2**19


@torch.no_grad()
def predict_label_map(
    tokens: Tensor,
    class_vectors: Tensor,
    size: tuple[int, int],
    *,
    chunk: int = 512,
    top_k: int = 1,
) -> tuple[Tensor, Tensor]:
    """Find the best classes of each pixel of the bilinearly up-sampled products.

    The result is that of ``F.interpolate(logits, size, mode="bilinear", align_corners=False)``
    and its argmax over the classes, or its ``top_k``. What is held grows with the pixels and with
    `chunk`; with the number of classes only by one score per chunk and token. Of classes with equal
    scores the lowest comes first; scores that differ by no more than rounding may be taken in
    either order, as the order in which a matrix product sums is not fixed. Where very many classes
    score alike all over the image, all of them are evaluated: that takes time, but no more memory.

    Args:
        tokens: (C, h, w), scaled so that their products with the vectors are the scores wanted:
            unit vectors for cosines, those of a ``LogitFactors`` for logits (but its shift).
        class_vectors: (K, C).
        size: (H, W).
        chunk: classes of which products are made at a time.
        top_k: k; no more than K labels are returned.

    Returns:
        Class indices, (k, H, W) int64, the best first, and their scores, (k, H, W).

    Raises:
        ValueError: sizes do not match or are out of range.
    """
    if tokens.ndim != 3 or class_vectors.ndim != 2 or len(tokens) != class_vectors.shape[1]:
        raise ValueError(
            f"tokens must be (C, h, w) and class_vectors (K, C), got {tuple(tokens.shape)} and "
            f"{tuple(class_vectors.shape)}."
        )
    if min(*size, *tokens.shape, len(class_vectors), chunk, top_k) < 1:
        raise ValueError(
            "size, chunk, top_k and what tokens and class_vectors hold must be at least 1, got "
            f"size {tuple(size)}, chunk {chunk}, top_k {top_k}, tokens {tuple(tokens.shape)} and "
            f"class_vectors {tuple(class_vectors.shape)}."
        )
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    # Bounds hold for the precision of these: products must not be made in a lower one.
    with torch.autocast(tokens.device.type, enabled=False):
        return _search(
            tokens.permute(1, 2, 0).to(dtype),
            class_vectors.to(dtype),
            size,
            chunk,
            min(top_k, len(class_vectors)),
        )


def _search(
    tokens: Tensor, class_vectors: Tensor, size: tuple[int, int], chunk: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Do the work of :func:`predict_label_map` on (h, w, C) tokens."""
    rows, columns = (
        _make_axis(n, pixels, tokens) for n, pixels in zip(tokens.shape[:2], size, strict=True)
    )
    # Sums of C products, in whatever order they are made, differ by less than this.
    info = torch.finfo(tokens.dtype)
    largest = tokens.norm(dim=-1).amax() * class_vectors.norm(dim=-1).amax()
    if not largest.isfinite():
        raise ValueError("tokens or class_vectors hold values that are not finite.")
    margin = (tokens.shape[-1] + 16) * info.eps * largest + info.tiny
    leaders, peaks = _find_leaders(tokens, class_vectors, chunk, top_k)
    bound = _lower_bound(tokens, class_vectors, leaders, rows, columns) - margin
    blocks = _make_blocks(bound, rows, columns)
    best = _BestClasses(bound, top_k)
    needed = [bool((peak >= blocks.cell_thresholds).any()) for peak in peaks]
    for start, scores in _products(tokens, class_vectors, chunk, needed):
        for pixels, values, classes in _candidates(scores, blocks):
            best.insert(pixels, values, start + classes)
    return best.classes_and_scores()


class _Axis(NamedTuple):
    """Pixels of one side of the image, by cell and by block."""

    cells: Tensor  # (P,) of each pixel
    weights: Tensor  # (P,) of the second token of the cell; that of the first is 1 - weight
    num_blocks: int  # g, per cell
    block_pixels: Tensor  # (cells * g, p) pixels of each block, P where it has fewer than p
    block_weights: Tensor  # (cells * g, p) their weights


def _make_axis(num_tokens: int, num_pixels: int, like: Tensor) -> _Axis:
    scale = like.new_tensor(num_tokens) / num_pixels
    source = scale * (torch.arange(num_pixels, device=like.device) + 0.5).to(like) - 0.5
    first = source.floor()
    fraction = source - first
    # Before the centre of the first token F.interpolate takes that token alone.
    weights = fraction * (source >= 0)
    cells = first.long() + 1
    num_blocks = min(max(round(num_pixels / num_tokens / _BLOCK_SIZE), 1), 8)
    place = (fraction * num_blocks).long().clamp(max=num_blocks - 1)
    blocks = cells * num_blocks + place
    every = torch.arange((num_tokens + 1) * num_blocks, device=like.device)
    starts = torch.searchsorted(blocks, every)
    counts = torch.searchsorted(blocks, every, right=True) - starts
    places = torch.arange(int(counts.max()), device=like.device)
    pixels = torch.where(places < counts[:, None], starts[:, None] + places, num_pixels)
    return _Axis(cells, weights, num_blocks, pixels, weights[pixels.clamp(max=num_pixels - 1)])


def _products(
    tokens: Tensor, class_vectors: Tensor, chunk: int, needed: Sequence[bool] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first class of each chunk that is needed, and its (h, w, chunk) scores."""
    flat = tokens.flatten(0, 1)
    for number, vectors in enumerate(class_vectors.split(chunk)):
        if needed is None or needed[number]:
            yield number * chunk, (flat @ vectors.T).unflatten(0, tokens.shape[:2])


def _find_leaders(
    tokens: Tensor, class_vectors: Tensor, chunk: int, top_k: int
) -> tuple[Tensor, list[Tensor]]:
    """Find the (2h - 1, 2w - 1, k) best classes at the tokens and halfway between them.

    Beside them, for each chunk, the (h + 1, w + 1) largest score at the corners of each cell.
    """
    height, width = tokens.shape[:2]
    values = tokens.new_full((2 * height - 1, 2 * width - 1, top_k), float("-inf"))
    classes = torch.zeros_like(values, dtype=torch.int64)
    peaks = []
    for start, scores in _products(tokens, class_vectors, chunk):
        peaks.append(_corner_max(_corner_max(scores.amax(dim=-1), 0), 1))
        # The order of the classes halfway is that of the sums.
        below = scores[:-1] + scores[1:]
        points = [scores, scores[:, :-1] + scores[:, 1:], below, below[:, :-1] + below[:, 1:]]
        for place, sums in enumerate(points):
            best_values = values[place // 2 :: 2, place % 2 :: 2]
            best_classes = classes[place // 2 :: 2, place % 2 :: 2]
            # After the first chunks few points find a better class.
            better = (sums.amax(dim=-1) > best_values[:, :, -1]).nonzero(as_tuple=True)
            found = sums[better].topk(min(top_k, sums.shape[-1]), dim=-1)
            both = torch.cat((best_values[better], found.values), dim=-1)
            both_classes = torch.cat((best_classes[better], start + found.indices), dim=-1)
            kept, order = both.topk(top_k, dim=-1)
            best_values[better] = kept
            best_classes[better] = both_classes.gather(-1, order)
    return classes, peaks


def _corner_max(values: Tensor, dim: int) -> Tensor:
    """Take the larger of neighbours along a side of n, and of the ends: n + 1 values."""
    count = values.shape[dim]
    shape = list(values.shape)
    shape[dim] = count + 1
    largest = values.new_empty(shape)
    first, last = values.narrow(dim, 0, count - 1), values.narrow(dim, 1, count - 1)
    torch.maximum(first, last, out=largest.narrow(dim, 1, count - 1))
    largest.narrow(dim, 0, 1).copy_(values.narrow(dim, 0, 1))
    largest.narrow(dim, count, 1).copy_(values.narrow(dim, count - 1, 1))
    return largest


def _lower_bound(
    tokens: Tensor, class_vectors: Tensor, leaders: Tensor, rows: _Axis, columns: _Axis
) -> Tensor:
    """Evaluate the leaders of each cell at its pixels: (H, W) k-th largest of their scores."""
    top_k = leaders.shape[-1]
    height, width = tokens.shape[:2]
    bounds = []
    # Leaders at the nine points of each cell, one row of cells at a time.
    points = [
        torch.arange(-2, 2 * n + 1, device=tokens.device).clamp(0, 2 * n - 2)
        for n in (height, width)
    ]
    leaders = leaders[points[0][:, None], points[1]]
    leaders = leaders.unfold(0, 3, 2).unfold(1, 3, 2).flatten(2).sort(dim=-1).values
    across = torch.arange(-1, width + 1, device=tokens.device).clamp(0, width - 1)
    for cell in rows.cells.unique_consecutive().tolist():
        ends = [min(max(row, 0), height - 1) for row in (cell - 1, cell)]
        corners = tokens[ends][:, across].permute(1, 2, 0)
        corners = torch.cat((corners[:-1], corners[1:]), dim=-1)
        # (w + 1, 9k, 4): upper left, lower left, upper right, lower right.
        scores = class_vectors[leaders[cell]] @ corners
        left, right = scores[columns.cells].unflatten(2, (2, 2)).unbind(dim=2)
        weights = columns.weights[:, None, None]
        upper, lower = ((1 - weights) * left + weights * right).unbind(dim=-1)
        weights = rows.weights[rows.cells == cell][:, None, None]
        values = (1 - weights) * upper + weights * lower
        if top_k > 1:
            again = F.pad(leaders[cell].diff(dim=-1) == 0, (1, 0))
            values = values.masked_fill(again[columns.cells], float("-inf"))
        bounds.append(values.topk(top_k, dim=-1).values[..., -1])
    return torch.cat(bounds)


class _Blocks(NamedTuple):
    """What a class must exceed, and where it is evaluated if it does."""

    cell_thresholds: Tensor  # (h + 1, w + 1); infinite without pixels
    thresholds: Tensor  # ((h + 1) * (w + 1), g * g) of the blocks of each cell
    pixel_thresholds: Tensor  # (blocks, p * p) of their pixels, infinite where it has fewer
    rows: _Axis
    columns: _Axis


def _make_blocks(bound: Tensor, rows: _Axis, columns: _Axis) -> _Blocks:
    padded = F.pad(bound, (0, 1, 0, 1), value=float("inf"))
    pixels = padded[rows.block_pixels[:, None, :, None], columns.block_pixels[:, None]].flatten(2)
    blocks = pixels.amin(dim=2)
    blocks = blocks.unflatten(1, (-1, columns.num_blocks)).unflatten(0, (-1, rows.num_blocks))
    blocks = blocks.transpose(1, 2).flatten(2)
    return _Blocks(blocks.amin(dim=2), blocks.flatten(0, 1), pixels.flatten(0, 1), rows, columns)


def _candidates(scores: Tensor, blocks: _Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the classes of (h, w, chunk) scores that exceed the bound at a pixel, some at a time.

    They come as (n,) flat pixels, scores and classes in the chunk, rising for each pixel.
    """
    rows, columns = blocks.rows, blocks.columns
    height, width, chunk = scores.shape
    largest = _corner_max(_corner_max(scores, 0), 1)
    cells = (largest >= blocks.cell_thresholds[:, :, None]).nonzero()
    # From the corners of a cell to those of its blocks.
    weights = [
        torch.linspace(0, 1, axis.num_blocks + 1, dtype=scores.dtype, device=scores.device)
        for axis in (rows, columns)
    ]
    weights = [torch.stack((1 - w, w)) for w in weights]
    weights = torch.einsum("ap,bq->abpq", *weights).flatten(2).flatten(0, 1)
    for part in cells.split(_MAX_CANDIDATES):
        row, column, classes = part.unbind(dim=1)
        ends = [
            ((row + i).clamp(0, height - 1) * width + (column + j).clamp(0, width - 1)) * chunk
            for i in (-1, 0)
            for j in (-1, 0)
        ]
        corners = scores.flatten()[torch.stack(ends, dim=1) + classes[:, None]]
        points = (corners @ weights).unflatten(1, (rows.num_blocks + 1, columns.num_blocks + 1))
        points = torch.maximum(points[:, 1:], points[:, :-1])
        points = torch.maximum(points[:, :, 1:], points[:, :, :-1]).flatten(1)
        thresholds = blocks.thresholds.index_select(0, row * (width + 1) + column)
        for some in (points >= thresholds).nonzero().split(_MAX_BLOCKS):
            which, place = some.unbind(dim=1)
            row_blocks = row[which] * rows.num_blocks + place // columns.num_blocks
            column_blocks = column[which] * columns.num_blocks + place % columns.num_blocks
            pixels, values, better = _evaluate(
                corners.index_select(0, which), row_blocks, column_blocks, blocks
            )
            yield pixels, values, classes[which[better]]


def _evaluate(
    corners: Tensor, row_blocks: Tensor, column_blocks: Tensor, blocks: _Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate n classes at the pixels of n blocks, by (n, 4) scores at the corners of the cell.

    Of the scores that exceed their bound: (m,) flat pixels, scores, and positions among the n.
    """
    rows, columns = blocks.rows, blocks.columns
    weights = columns.block_weights.index_select(0, column_blocks)[:, None]
    left, right = corners.unflatten(1, (2, 2, 1)).unbind(dim=2)
    upper, lower = ((1 - weights) * left + weights * right).unbind(dim=1)
    weights = rows.block_weights.index_select(0, row_blocks)[:, :, None]
    values = (1 - weights) * upper[:, None] + weights * lower[:, None]
    num_columns = len(columns.block_pixels)
    thresholds = blocks.pixel_thresholds.index_select(0, row_blocks * num_columns + column_blocks)
    which, place = (values.flatten(1) > thresholds).nonzero().unbind(dim=1)
    block_width = columns.block_pixels.shape[1]
    row, column = place // block_width, place % block_width
    pixels = rows.block_pixels[row_blocks[which], row] * len(columns.cells)
    pixels += columns.block_pixels[column_blocks[which], column]
    return pixels, values[which, row, column], which


class _BestClasses:
    """The k best classes found so far of each pixel; the k-th best exceeds the (H, W) bound."""

    def __init__(self, bound: Tensor, top_k: int) -> None:
        self._size = bound.shape
        self._values = bound.flatten()[:, None].repeat(1, top_k)
        self._classes = torch.full_like(self._values, -1, dtype=torch.int64)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def insert(self, pixels: Tensor, values: Tensor, classes: Tensor) -> None:
        """Take (n,) classes; of one pixel they come in rising order, and after earlier ones."""
        better = values > self._values[pixels, -1]
        self._waiting.append((pixels[better], values[better], classes[better]))
        if sum(len(pixels) for pixels, _, _ in self._waiting) >= _MAX_WAITING:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        top_k = self._values.shape[1]
        pixels, values, classes = (torch.cat(each) for each in zip(*self._waiting, strict=True))
        self._waiting.clear()
        order = values.argsort(descending=True, stable=True)
        order = order[pixels[order].argsort(stable=True)]
        pixels, values, classes = pixels[order], values[order], classes[order]
        rank = torch.arange(len(pixels), device=pixels.device)
        rank = rank - torch.searchsorted(pixels, pixels)
        kept = rank < top_k
        touched, row = pixels[kept].unique_consecutive(return_inverse=True)
        new_values = values.new_full((len(touched), top_k), float("-inf"))
        new_classes = classes.new_full((len(touched), top_k), -1)
        new_values[row, rank[kept]] = values[kept]
        new_classes[row, rank[kept]] = classes[kept]
        all_values = torch.cat((self._values[touched], new_values), dim=1)
        all_classes = torch.cat((self._classes[touched], new_classes), dim=1)
        all_values, order = all_values.sort(dim=1, descending=True, stable=True)
        self._values[touched] = all_values[:, :top_k]
        self._classes[touched] = all_classes.gather(1, order[:, :top_k])

    def classes_and_scores(self) -> tuple[Tensor, Tensor]:
        """Return (k, H, W) class indices and scores, the best first."""
        self._merge()
        return tuple(
            table.T.unflatten(1, self._size).contiguous() for table in (self._classes, self._values)
        )
