"""Files of ``torch.save``, read without running code and only where they are whole.

They are ZIP archives with a checksum of each part, which PyTorch does not compare when it reads.
Here it is compared, so that no flipped bit goes unnoticed.
"""

import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["find_damage", "read_archive"]


def read_archive(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    remedy: str = "Give another one, or remove it to train anew.",
) -> Any:
    """Read a file of ``torch.save``, after its checksums were compared; it runs no code.

    Args:
        remedy: what the error says to do where it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint '{path}'. Train first, or correct it.")
    damage = find_damage(path)
    if damage is None:
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # PyTorch raises whatever its reader meets
            damage = f"{type(error).__name__}: {str(error).partition('.')[0]}"
    raise ValueError(f"'{path}' is no checkpoint, or is damaged ({damage}). {remedy}")


def find_damage(path: str | os.PathLike[str]) -> str | None:
    """Say what is damaged in a file of ``torch.save``; None where it is whole.

    Files in PyTorch's form before 1.6 have no checksums; they count as whole if not empty.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start != b"PK\x03\x04":
            if _is_tar(path):
                return "it is a tar archive, of which PyTorch before 2.6 runs code"
            return None if start else "it is empty or cut off"
        if not zipfile.is_zipfile(path):
            return "it is empty or cut off"
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # the reader raises whatever it meets
        return f"{type(error).__name__}: {error}"
    return None if part is None else f"the checksum of '{part}' differs"


def _is_tar(path: str | os.PathLike[str]) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False
