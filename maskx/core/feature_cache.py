"""Feature maps of a frozen backbone, computed once for each image.

An entry is found by the pixels that the backbone is given, so by the image and all that was done to
it: its size, its normalisation, whether it is mirrored. Another image is another entry.

Shape legend:
    N: images of a batch; C: channels of a map; h x w: size of a map.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskx.core.checks import check_choice
from maskx.core.digests import network_hash
from maskx.core.files import read_json, remove_leftovers, write_json, written_whole

__all__ = ["FeatureCache", "cached_features"]

logger = logging.getLogger(__name__)

ABOUT_NAME = "features.json"
DTYPES = {"float16": torch.float16, "float32": torch.float32}

Maps = dict[str, Tensor]


class FeatureCache:
    """Keeps feature maps, in memory or as files.

    What is kept and what is computed anew is rounded alike, so that results do not depend on what
    the cache holds.

    Args:
        backbone: whose maps they are, and whose weights never change.
        folder: where a file for each image is kept, for other processes too; None keeps them in
            memory.
        max_bytes: most that is kept; images beyond it are computed each time, which is said once.
        dtype: "float16", or "float32" to lose nothing.

    Attributes:
        hits: images whose maps were there.
        misses: images whose maps were computed.

    Raises:
        ValueError: the folder holds maps of another backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int = 2 * 10**9,
        dtype: str = "float16",
    ) -> None:
        check_choice("dtype of the feature cache", dtype, tuple(DTYPES))
        if max_bytes < 0:
            raise ValueError(
                f"max_bytes of the feature cache is {max_bytes}. Allowed: 0, to keep nothing, or "
                "more."
            )
        self.folder = None if folder is None else Path(folder)
        self.max_bytes, self.dtype = max_bytes, DTYPES[dtype]
        self.hits = self.misses = 0
        self._memory: dict[str, Maps] = {}
        self._is_full = False
        self._bytes = self._open(backbone, dtype) if self.folder is not None else 0

    def maps_of(self, image: Tensor, names: Sequence[str], compute: Callable[[], Maps]) -> Maps:
        """Return the maps of an image.

        Args:
            image: (1, 3, H, W) as the backbone gets it.
            names: of the maps that are wanted.
            compute: makes them, each (1, C, h, w).
        """
        key = _key(image)
        maps = self._read(key) or {}
        if all(name in maps for name in names):
            self.hits += 1
        else:
            self.misses += 1
            before = _num_bytes(maps)
            maps = {name: map_.to(self.dtype).cpu() for name, map_ in compute().items()}
            self._keep(key, maps, _num_bytes(maps) - before)
        return {name: maps[name].to(image.device, image.dtype) for name in names}

    def _open(self, backbone: nn.Module, dtype: str) -> int:
        """Claim the folder, and return how many bytes it holds."""
        about = {"backbone": str(backbone), "weights": network_hash(backbone), "dtype": dtype}
        path = self.folder / ABOUT_NAME
        if path.is_file():
            found = read_json(path)
            if found != about:
                raise ValueError(
                    f"'{self.folder}' holds features of {_described(found)}, not of "
                    f"{_described(about)}. Remove that folder, or name another for the features."
                )
            remove_leftovers(self.folder)
        else:
            with self._named_if_full():
                write_json(path, about)
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str) -> Maps | None:
        if self.folder is None:
            return self._memory.get(key)
        try:
            return load_file(self._path(key))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("'%s' is made again: %s", self._path(key), error)
            return None

    def _keep(self, key: str, maps: Maps, size: int) -> None:
        if self._bytes + size > self.max_bytes:
            self._say_full()
            return
        if self.folder is None:
            self._memory[key] = maps
        else:
            with self._named_if_full(), written_whole(self._path(key)) as scratch:
                save_file({name: map_.contiguous() for name, map_ in maps.items()}, scratch)
        self._bytes += size

    def _say_full(self) -> None:
        if not self._is_full and self.max_bytes:
            logger.warning(
                "The feature cache is full: it may hold %.1f GB. Features of further images are "
                "computed in each step. Allow more (--feature-cache GB), or choose a smaller image "
                "size.",
                self.max_bytes / 1e9,
            )
        self._is_full = True

    @contextlib.contextmanager
    def _named_if_full(self) -> Iterator[None]:
        """Say what to do where features cannot be written, such as on a full disk."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Features could not be written to '{self.folder}': {error}. Make room on that "
                "disk, allow fewer (--feature-cache GB; 0 keeps none), or choose an output folder "
                "on another."
            ) from error


def cached_features(
    cache: FeatureCache,
    images: Tensor,
    names: Sequence[str],
    stride: int,
    compute: Callable[[Tensor], Mapping[str, Tensor]],
) -> Maps:
    """Compute the maps of a batch, each image by itself.

    Rows and columns at the end of an image that are 0 throughout, as padding is, are left out of
    the computation but for a multiple of the stride, so that an image has the same features beside
    any other; there, the maps are 0.

    Args:
        images: (N, 3, H, W), normalised.
        names: of the maps.
        stride: the largest of the network.
        compute: maps (1, 3, H', W') images to maps.

    Returns:
        By name (N, C, h, w), without a graph.
    """
    height, width = images.shape[-2:]
    found = []
    with torch.no_grad():
        for image, size in zip(images, _filled_sizes(images), strict=True):
            rows, columns = (
                min(-(-own // stride) * stride, full)
                for own, full in zip(size, (height, width), strict=True)
            )
            part = image[None, :, :rows, :columns].contiguous()
            maps = cache.maps_of(part, names, lambda part=part: dict(compute(part)))
            found.append(_as_of_batch(maps, part.shape[-2:], (height, width)))
    return {name: torch.cat([maps[name] for maps in found]) for name in names}


def _filled_sizes(images: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of each image up to the last that is not 0 throughout."""
    filled = (images != 0).any(dim=1)
    sizes = []
    for rows, columns in zip(filled.any(dim=2), filled.any(dim=1), strict=True):
        ends = [int(line.nonzero()[-1]) + 1 if line.any() else 1 for line in (rows, columns)]
        sizes.append((ends[0], ends[1]))
    return sizes


def _as_of_batch(maps: Maps, size: Sequence[int], full: tuple[int, int]) -> Maps:
    """Pad the maps of a part of an image to those of all of it."""
    if tuple(size) == full:
        return maps
    padded = {}
    for name, map_ in maps.items():
        # The part is a multiple of the stride, so that its maps tell theirs.
        height, width = (
            -(-whole * cells // pixels)
            for whole, cells, pixels in zip(full, map_.shape[-2:], size, strict=True)
        )
        right, below = width - map_.shape[-1], height - map_.shape[-2]
        padded[name] = nn.functional.pad(map_, (0, right, 0, below))
    return padded


def _num_bytes(maps: Maps) -> int:
    return sum(map_.nbytes for map_ in maps.values())


def _key(image: Tensor) -> str:
    digest = hashlib.blake2b(str((*image.shape, image.dtype)).encode(), digest_size=20)
    digest.update(image.detach().cpu().numpy().data)
    return digest.hexdigest()


def _described(about: Mapping[str, str]) -> str:
    return (
        f"{about.get('backbone')} with weights {str(about.get('weights'))[:12]} in "
        f"{about.get('dtype')}"
    )
