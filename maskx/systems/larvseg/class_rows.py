"""Rows of tensors that belong to classes, moved from one class list to another."""

from collections.abc import Sequence

import torch
from torch import Tensor


def take_rows(
    own: Tensor, new_rows: Sequence[int], found: Tensor, old_rows: Sequence[int], *, what: str
) -> Tensor:
    """Return a tensor with some rows replaced by those of another class list.

    Args:
        own: (K, ...), which stays as it is.
        new_rows: rows to replace; see :func:`maskx.systems.larvseg.class_table.match_rows`.
        found: (K', ...) of the other class list.
        old_rows: for each of them the row of `found`.
        what: name of the tensor, for the error.

    Raises:
        ValueError: rows have another shape.
    """
    if found.shape[1:] != own.shape[1:]:
        raise ValueError(
            f"A row of {what} has shape {tuple(found.shape[1:])} in the checkpoint, but "
            f"{tuple(own.shape[1:])} in this model. Give both the same channels and bank size."
        )
    rows = own.detach().clone()
    rows[torch.tensor(new_rows)] = found[torch.tensor(old_rows)].to(rows)
    return rows
