"""Category-wise attention maps of LarvSeg, where in an image a class is, and the bank they need.

Section 3.3 of "LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic
Segmentation via Category-wise Attentive Classifier" (Yu et al., PRCV 2024). Nothing here has a
gradient.

The paper's bank holds K_top tokens of each of M images per class. Only the mean over them of a
cosine is ever used (Eq. 3), which is the cosine's first factor times the mean of the second: one
mean per image gives the same, with 1 / K_top of the memory.

Shape legend:
    N: images; K: classes of the vocabulary; L: classes that are scored; M: images per class in the
    bank; d: channels of the classifier; T: tokens of an image; P: (image, class) pairs of a batch,
    one for each label of each image.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.losses import LabelPairs

# A class is in the background of a single-label image when the mean cosine of its 5 best tokens is
# above this.
_MIN_BACKGROUND_COSINE = 0.35
_BACKGROUND_TOKENS = 5
# Classes whose maps are made at a time: 1,024 tokens of one pair take 4 MB.
_CLASS_CHUNK = 1024


class MemoryBank(nn.Module):
    """First in, first out queue of M image means per class; its state is in the checkpoint.

    It takes 4 * K * M * d bytes: 1.34 GB for 21,841 classes, 20 images and 768 channels.

    Args:
        num_classes: K.
        channels: d.
        size: M.
        warm_up: images of a class that are needed before it is foreground; 0 for M, when its
            queue has gone round once.

    Attributes:
        means: (K, M, d) mean tokens; zero where no image was seen yet.
        counts: (K,) int64, images seen per class, also those that left the queue.
    """

    def __init__(
        self, num_classes: int, channels: int, *, size: int = 20, warm_up: int = 0
    ) -> None:
        super().__init__()
        if size < 1 or warm_up < 0:
            raise ValueError(
                "size of a memory bank must be at least 1 and warm_up at least 0 (the size), got "
                f"{size} and {warm_up}."
            )
        self.size = size
        self.warm_up = warm_up or size
        self.register_buffer("means", torch.zeros(num_classes, size, channels))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def num_bytes(self) -> int:
        """Bytes that the bank holds."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def class_means(self, class_indices: Tensor) -> Tensor:
        """Average over the images of each of (P,) classes: (P, d), zero for one without images."""
        held = self.counts[class_indices].clamp(1, self.size)
        rows = class_indices[:, None] * self.size + torch.arange(self.size, device=held.device)
        # Sums them where they are: a copy of the means of many classes takes longer than the sums.
        return F.embedding_bag(rows, self.means.flatten(0, 1), mode="sum") / held[:, None]

    def seen(self, class_indices: Tensor) -> Tensor:
        """Say for each of (P,) classes if there is an image of it, (P,) bool."""
        return self.counts[class_indices] > 0

    def ready(self, class_indices: Tensor) -> Tensor:
        """Say for each of (P,) classes if its warm-up is over, (P,) bool."""
        return self.counts[class_indices] >= self.warm_up

    @torch.no_grad()
    def enqueue(self, class_indices: Tensor, means: Tensor, *, synchronise: bool = False) -> None:
        """Store one mean per pair, in this order; the oldest of a full queue leave.

        Args:
            class_indices: (P,), a class may be there several times.
            means: (P, d).
            synchronise: also store those of the other workers, in the order of their ranks, so that
                every worker holds the same bank. Each must then call this in each step, also
                with P = 0. It costs the pairs of all workers, not the bank.
        """
        # One type for all workers: under autocast the means are float16 where there are pairs.
        means = means.to(self.means.dtype)
        if synchronise and dist.is_available() and dist.is_initialized():
            class_indices, means = _gather(class_indices, means)
        # Place of a pair among those of its class: in sorted order, the distance to the first.
        order = class_indices.argsort(stable=True)
        classes = class_indices[order]
        place = torch.arange(len(classes), device=classes.device)
        place = place - torch.searchsorted(classes, classes)
        slots = (self.counts[classes] + place) % self.size
        values = means[order]
        self.counts.index_add_(0, classes, torch.ones_like(classes))
        if len(classes) > self.size:
            # A slot that is written twice keeps the newer: only the last M of a class are written.
            after = torch.searchsorted(classes, classes, right=True)
            newest = torch.arange(len(classes), device=classes.device) >= after - self.size
            classes, slots, values = classes[newest], slots[newest], values[newest]
        self.means[classes, slots] = values


def _gather(class_indices: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate what the workers hold; their numbers of rows may differ."""
    workers = dist.get_world_size()
    num_rows = class_indices.new_tensor([len(class_indices)])
    all_rows = [torch.zeros_like(num_rows) for _ in range(workers)]
    dist.all_gather(all_rows, num_rows)
    counts = torch.cat(all_rows).tolist()
    gathered = []
    for values in (class_indices, means):
        padded = values.new_zeros((max(counts), *values.shape[1:]))
        padded[: len(values)] = values
        parts = [torch.zeros_like(padded) for _ in range(workers)]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]))
    return gathered[0], gathered[1]


@torch.no_grad()
def top_token_means(
    tokens: Tensor, class_vectors: Tensor, pairs: LabelPairs, num_tokens: int
) -> Tensor:
    """Average, for each pair, the tokens of the image that are most like the class.

    Args:
        tokens: (N, d, h, w) of unit norm.
        class_vectors: (L, d) of unit norm.
        pairs: of the batch.
        num_tokens: how many; an image with fewer tokens gives all of them.

    Returns:
        (P, d).
    """
    tokens = tokens.flatten(2)
    cosines = pairs.pad(class_vectors[pairs.classes]) @ tokens
    num_tokens = min(num_tokens, tokens.shape[-1])
    best = cosines.topk(num_tokens, dim=-1).indices
    weights = torch.zeros_like(cosines).scatter(-1, best, 1 / num_tokens)
    return pairs.unpad(weights @ tokens.transpose(1, 2))


@torch.no_grad()
def score_regions(tokens: Tensor, class_vectors: Tensor, pairs: LabelPairs) -> Tensor:
    """Select, for each pair, the tokens of the image with a high score of the class.

    That is the paper's other design, from the classification score map of the image alone. A score
    is high above the middle between the lowest and the highest of the image; the paper does not
    say where it draws the line.

    Args:
        tokens: (N, d, h, w) of unit norm.
        class_vectors: (L, d) of unit norm.
        pairs: of the batch.

    Returns:
        (P, T), 1 where a token is selected, else 0.
    """
    scores = pairs.unpad(pairs.pad(class_vectors[pairs.classes]) @ tokens.flatten(2))
    lowest, highest = scores.aminmax(dim=-1, keepdim=True)
    return (scores >= (lowest + highest) / 2).to(tokens.dtype)


@torch.no_grad()
def attention_maps(
    tokens: Tensor,
    pairs: LabelPairs,
    foreground: Tensor,
    known: Tensor,
    background: Tensor | None = None,
) -> Tensor:
    """Compute the category-wise attention map of each pair (Eqs. 3 and 4).

    ``A = sigmoid(norm(S_fg - S_bg))`` with ``S = f . mean``, the z-score over the tokens as norm.
    S_bg is the mean over the background's classes; without one, A is that of S_fg alone.

    Args:
        tokens: (N, d, h, w) of unit norm.
        pairs: of the batch.
        foreground: (P, d) mean of the class of each pair.
        known: (P,) bool: whether that mean is one. A class without images is no background.
        background: (P, T) map S_bg, see :func:`pseudo_background`; None takes the other labels of
            the image as its background.

    Returns:
        (P, T) in (0, 1); of no meaning for a pair whose mean is not known.
    """
    tokens = tokens.flatten(2)
    if background is None:
        # S is linear in the mean: f . fg - mean(f . bg) = f . (fg - mean(bg)).
        own = foreground * known[:, None]
        others = pairs.pad(own).sum(dim=1)[pairs.images] - own
        known = known.to(tokens.dtype)
        count = pairs.pad(known).sum(dim=1)[pairs.images] - known
        foreground = foreground - others / count.clamp(min=1)[:, None]
    scores = pairs.unpad(pairs.pad(foreground) @ tokens)
    if background is not None:
        scores = scores - background
    return F.layer_norm(scores, scores.shape[-1:], eps=1e-5).sigmoid()


@torch.no_grad()
def pseudo_background(
    tokens: Tensor,
    pairs: LabelPairs,
    foreground: Tensor,
    bank: MemoryBank,
    class_indices: Tensor,
) -> Tensor:
    """Guess what else is in images of which one label is known.

    Background of a pair are the classes with images in the bank whose 5 best tokens have a mean
    cosine above 0.35, and whose map is negatively correlated with that of the foreground.

    Args:
        tokens: (N, d, h, w) of unit norm.
        pairs: of the batch.
        foreground: (P, d) mean of the class of each pair.
        bank: with the means of the classes.
        class_indices: (L,) rows of the bank: the classes that may be background.

    Returns:
        (P, T) mean map of the background's classes, zero where there is none.
    """
    tokens = tokens.flatten(2)
    scores = pairs.unpad(pairs.pad(foreground) @ tokens)
    centred = scores - scores.mean(dim=-1, keepdim=True)
    # A map's covariance with that of the foreground is the product of the mean with these; its
    # sign is that of the correlation. So half of the maps need not be made.
    directions = (tokens[pairs.images] @ centred[:, :, None]).squeeze(-1)
    images = pairs.images.tolist()
    total = torch.zeros_like(scores)
    count = scores.new_zeros(len(scores), 1)
    for chunk in class_indices.split(_CLASS_CHUNK):
        means = bank.class_means(chunk)
        opposed = (means @ directions.T < 0) & bank.seen(chunk)[:, None]
        for pair, image in enumerate(images):
            maps = means[opposed[:, pair]] @ tokens[image]
            # Few are left, whose best tokens are sought.
            likely = maps[maps.amax(dim=-1) > _MIN_BACKGROUND_COSINE]
            best = likely.topk(min(_BACKGROUND_TOKENS, maps.shape[-1]), dim=-1).values.mean(dim=-1)
            is_there = best > _MIN_BACKGROUND_COSINE
            total[pair] += likely[is_there].sum(dim=0)
            count[pair] += is_there.sum()
    return total / count.clamp(min=1)
