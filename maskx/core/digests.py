"""Digests of what files, networks and settings hold."""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def network_hash(model: nn.Module) -> str:
    """Hash all parameters and buffers: their names, shapes, types and values, on any device."""
    digest = hashlib.sha256()
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # A copy, as strides of one value may be 0, of which `contiguous` makes no other view.
        values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Digest of what a file holds; it is read once until it changes."""
    path = Path(path)
    about = path.stat()
    return _sha256(path, about.st_mtime_ns, about.st_size)


def digest_of(value: Any) -> str:
    """Digest of plain values, such as settings, whatever the order of the keys in them."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    """Digest of a file; time and size serve the cache alone."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
