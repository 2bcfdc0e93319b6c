"""Memory of what the tokens of each class looked like in the images seen last.

Section 3.3 of "LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic
Segmentation via Category-wise Attentive Classifier" (Yu et al., PRCV 2024), whose bank holds
K_top tokens of each of M images per class. Only the mean over them of a cosine is ever used
(Eq. 3), which is the cosine's first factor times the mean of the second: one mean per image gives
the same, with 1 / K_top of the memory.

Shape legend:
    K: classes; M: images per class; d: channels; P: (image, class) pairs of a batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """First in, first out queue of M image means per class; its state is in the checkpoint.

    It takes 4 * K * M * d bytes: 1.34 GB for 21,841 classes, 20 images and 768 channels.

    Args:
        num_classes: K.
        channels: d.
        size: M.
        warm_up: images of a class that are needed before it is foreground; None for M, when its
            queue has gone round once.

    Attributes:
        means: (K, M, d) mean tokens; zero where no image was seen yet.
        counts: (K,) int64, images seen per class, also those that left the queue.
    """

    def __init__(
        self, num_classes: int, channels: int, *, size: int = 20, warm_up: int | None = None
    ) -> None:
        super().__init__()
        warm_up = size if warm_up is None else warm_up
        if size < 1 or warm_up < 1:
            raise ValueError(
                f"size and warm_up of a memory bank must be at least 1, got {size} and {warm_up}."
            )
        self.size = size
        self.warm_up = warm_up
        self.register_buffer("means", torch.zeros(num_classes, size, channels))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def num_bytes(self) -> int:
        """Bytes that the bank holds."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def class_means(self, class_indices: Tensor) -> Tensor:
        """Average over the images of each class.

        Args:
            class_indices: (P,).

        Returns:
            (P, d); zero for a class without images.
        """
        held = self.counts[class_indices].clamp(1, self.size)
        return self.means[class_indices].sum(dim=1) / held[:, None]

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
