"""Digests of what files and networks hold."""

import functools
import hashlib
from pathlib import Path

import torch
from torch import nn


def network_hash(model: nn.Module) -> str:
    """Hash all parameters and buffers: their names, shapes, types and values, on any device."""
    digest = hashlib.sha256()
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Digest of what a file holds."""
    return _sha256(path, path.stat().st_mtime_ns)


@functools.cache
def _sha256(path: Path, mtime_ns: int) -> str:
    """Digest of a file; the modification time serves the cache alone."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
