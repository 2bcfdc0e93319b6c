"""What a network says of itself in its checkpoints, beside its weights: classes, architecture.

For ``get_extra_state`` and ``set_extra_state`` of a module. Detectron2's checkpointer takes nothing
but tensors, and drops those of another shape before the module sees them, so what is said goes as
compressed JSON into a tensor of one size for all but the largest class lists.
"""

import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["EXTRA_STATE", "pack_state", "same_class_names", "unpack_state"]

EXTRA_STATE = "_extra_state"
"""Name in a state dict, behind the prefix of the module."""

_BLOCK = 2**18  # 21,000 class names need a third of it


def pack_state(content: Mapping[str, Any], *, version: int) -> Tensor:
    """Make a tensor of plain values.

    Args:
        content: what JSON can hold.
        version: of its form, for :func:`unpack_state`.

    Returns:
        (256 KiB or a multiple of it,) uint8.
    """
    text = json.dumps({"version": version, **content}).encode()
    data = zlib.compress(text, 9)
    padded = data + bytes(-len(data) % _BLOCK)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8)


def unpack_state(state: Tensor, *, version: int, what: str) -> dict[str, Any]:
    """Read what :func:`pack_state` made.

    Raises:
        ValueError: the tensor is something else, or of another version.
    """
    try:
        content = json.loads(zlib.decompressobj().decompress(state.cpu().numpy().tobytes()))
        found = content.pop("version")
    except (zlib.error, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"What the checkpoint says of {what} cannot be read ({type(error).__name__}). Give a "
            "checkpoint of this system, or train anew."
        ) from error
    if found != version:
        raise ValueError(
            f"The checkpoint holds {what} in form {found}, but this version of maskx reads form "
            f"{version}. Train anew, or use the version of maskx that made it."
        )
    return content


def same_class_names(found: Sequence[str], own: Sequence[str], remedy: str) -> tuple[str, ...]:
    """Return the class names of a checkpoint and a model, of which either may have none.

    Raises:
        ValueError: they differ.
    """
    for index, (theirs, ours) in enumerate(itertools.zip_longest(found, own)):
        if found and own and theirs != ours:
            raise ValueError(
                f"Class {index} is {theirs!r} in the checkpoint, but {ours!r} by the data sets. "
                f"{remedy}"
            )
    return tuple(own or found)
