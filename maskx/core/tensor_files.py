"""Tensors and what is said of them in one safetensors file, whole or not at all.

The file holds, beside the tensors, one JSON text with a digest of each, so that no flipped bit goes
unnoticed. Reading it executes no code.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskx.core.digests import digest_of
from maskx.core.files import written_whole

__all__ = ["read_content", "read_tensors", "write_tensors"]

# The metadata keeps no order among its keys, so one key holds everything.
_METADATA_KEY = "maskx"
_DIGEST, _DIGESTS = "digest", "digests"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], kind: str, content: Any
) -> None:
    """Write tensors and a JSON text, whole or not at all, whenever the process is killed.

    Args:
        path: file to write; a file of this name is replaced.
        tensors: by name; a tensor on another device is copied.
        kind: what the file is, in words; see :func:`read_content`.
        content: plain values.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    about = json.loads(json.dumps({"kind": kind, **content, _DIGESTS: digests}))
    text = json.dumps({**about, _DIGEST: digest_of(about)})
    with written_whole(path) as scratch:
        save_file(tensors, str(scratch), {_METADATA_KEY: text})


def read_content(
    path: str | os.PathLike[str], kind: str, types: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Read what a file of :func:`write_tensors` says of its tensors.

    Args:
        types: of the values that it must have, by key.

    Raises:
        ValueError: the file is damaged, not of this kind, or lacks a value.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}' with {kind}. Make it, or correct it.")
    content = _read_all(path)
    if content.get("kind") != kind:
        raise ValueError(
            f"'{path}' is a safetensors file, but not one with {kind}. Give the file that was "
            "written for them."
        )
    stated = content.pop(_DIGEST, None)
    if stated != digest_of(content):
        raise ValueError(
            f"'{path}' is damaged: what it says of its tensors is not what was written. Make it "
            "again."
        )
    for key, needed in (types or {}).items():
        if not isinstance(content.get(key), needed):
            raise ValueError(
                f"'{path}' is damaged: its {key} is {content.get(key)!r:.100}. Allowed: a "
                f"{needed.__name__}. Make it again."
            )
    return {key: value for key, value in content.items() if key != _DIGESTS}


def read_tensors(
    path: str | os.PathLike[str], names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Read the named tensors of a file, or all, and compare their digests.

    Raises:
        ValueError: the file is damaged, or lacks one of them.
    """
    digests = _read_all(path).get(_DIGESTS, {})
    names = sorted(digests) if names is None else list(names)
    try:
        with safe_open(str(path), framework="pt") as file:
            there = set(file.keys())
            missing = [name for name in names if name not in there]
            if missing:
                raise ValueError(
                    f"'{path}' is damaged: it lacks the tensors {missing}. Make it again."
                )
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' is damaged: {error}. Make it again.") from error
    wrong = [name for name, tensor in tensors.items() if _digest(tensor) != digests.get(name)]
    if wrong:
        raise ValueError(
            f"'{path}' is damaged: the values of {wrong} are not those that were written. Make it "
            "again."
        )
    return tensors


def _read_all(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"'{path}' is no safetensors file, or is damaged: {error}. Make it again."
        ) from error
    return content if isinstance(content, dict) else {}


def _digest(tensor: Tensor) -> str:
    values = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(values)
    return digest.hexdigest()
