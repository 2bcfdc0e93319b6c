"""Instance masks: COCO polygons, run lengths, arrays; decoded small, pasted one at a time.

Shape legend:
    R: number of masks; M: resolution of a mask in its box; (H, W): size of the image.
"""

import math
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_api
from torch import Tensor

from maskx.data.coco_shapes import runs_of

_LARGE = 2**22  # pixels


def decode_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Rasterise a COCO segmentation.

    Args:
        segmentation: a list of polygons ``[x0, y0, x1, y1, ...]`` or a compressed run-length
            encoding.

    Returns:
        (height, width) bool.
    """
    encoded = run_lengths(segmentation, height, width)
    if height * width < _LARGE:
        return mask_api.decode(encoded).view(bool)  # 0 and 1
    # pycocotools has a large mask in memory twice for a moment, and takes ten times as long: 80
    # and 7 ms for 41 megapixels.
    runs = runs_of(encoded["counts"])
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def run_lengths(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """Say a COCO segmentation as compressed run lengths, without an array of its pixels.

    Args:
        segmentation: as of :func:`decode_segmentation`; no polygon at all is an empty mask.

    Returns:
        ``{"size": [height, width], "counts": ...}`` as pycocotools takes it.
    """
    if not isinstance(segmentation, list):
        return segmentation
    polygons = [np.asarray(polygon, dtype=float).tolist() for polygon in segmentation]
    if not polygons:
        empty = {"size": [height, width], "counts": [height * width]}
        return mask_api.frPyObjects(empty, height, width)
    return mask_api.merge(mask_api.frPyObjects(polygons, height, width))


def encode_masks(masks: np.ndarray) -> list[dict]:
    """Encode masks as compressed run lengths, ready for JSON.

    Args:
        masks: (N, H, W) bool.

    Returns:
        N dictionaries ``{"size": [H, W], "counts": str}``.
    """
    if len(masks) == 0:
        return []
    by_column = np.asfortranarray(masks.transpose(1, 2, 0)).view(np.uint8)  # copies unless it is so
    encoded = mask_api.encode(by_column)
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]


def encode_each(masks: "Tensor | PastedMasks") -> list[dict]:
    """Encode (R, H, W) bool masks, one of which is in main memory at a time; see `encode_masks`."""
    if isinstance(masks, PastedMasks):
        return masks.encode()
    return [encode_masks(mask[None].cpu().numpy())[0] for mask in masks]


# Pixels of a box that are computed at a time.
_CHUNK = 2**20


def decode_at_size(
    segmentation: list | dict, height: int, width: int, size: tuple[int, int]
) -> np.ndarray:
    """Rasterise a COCO segmentation of an image that is used at another size.

    Polygons are drawn at that size. Run lengths are decoded and resized; a pixel is on where at
    least half of its area is.

    Args:
        segmentation: polygons, or a compressed run-length encoding, in pixels of the image.
        size: (H, W) of the result.

    Returns:
        (H, W) bool.
    """
    if size == (height, width):
        return decode_segmentation(segmentation, height, width)
    if isinstance(segmentation, list):
        scale = np.array([size[1] / width, size[0] / height])
        scaled = [
            (np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in segmentation
        ]
        return decode_segmentation(scaled, *size)
    # It lies by column, as large as the image; turned it is resized without a copy.
    turned = decode_segmentation(segmentation, height, width).T.view(np.uint8)
    turned *= 255
    resized = cv2.resize(turned, size, interpolation=cv2.INTER_AREA) >= 128
    return np.ascontiguousarray(resized.T)


class PastedMasks:
    """The masks of detections in an image, each of which is pasted when it is asked for.

    A sequence of (H, W) bool tensors, which takes the memory of R small masks. Indexed by a slice
    or a tensor it gives another sequence. ``tensor``, ``numpy()`` and ``np.asarray`` make all of
    them, as (R, H, W). It can be a field of Detectron2's ``Instances``.

    Args:
        mask_prob: (R, M, M) probabilities.
        boxes: (R, 4) XYXY pixels of the image.
        size: (H, W) of the image.
        threshold: a pixel is on from this probability.
    """

    dtype = torch.bool

    def __init__(
        self, mask_prob: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
    ) -> None:
        self.mask_prob = mask_prob
        self.boxes = boxes
        self.size = size
        self.threshold = threshold

    def __len__(self) -> int:
        return len(self.mask_prob)

    def __iter__(self) -> Iterator[Tensor]:
        return (self._paste(index) for index in range(len(self)))

    def __getitem__(self, item: Any) -> "Tensor | PastedMasks":
        if isinstance(item, int):
            return self._paste(item)
        return PastedMasks(self.mask_prob[item], self.boxes[item], self.size, self.threshold)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, H, W)."""
        return (len(self), *self.size)

    @property
    def device(self) -> torch.device:
        """Where the masks are made."""
        return self.mask_prob.device

    @property
    def tensor(self) -> Tensor:
        """All masks, (R, H, W) bool."""
        masks = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        for index, mask in enumerate(masks):
            self._paste(index, mask)
        return masks

    def to(self, device: torch.device | str) -> "PastedMasks":
        """Move to a device."""
        return PastedMasks(
            self.mask_prob.to(device), self.boxes.to(device), self.size, self.threshold
        )

    def cpu(self) -> "PastedMasks":
        """Move to main memory."""
        return self.to("cpu")

    def numpy(self) -> np.ndarray:
        """All masks, (R, H, W) bool."""
        return self.tensor.cpu().numpy()

    def encode(self) -> list[dict]:
        """Encode the masks as compressed run lengths; see `encode_masks`."""
        encoded = []
        # One mask at a time, laid out by column as it is encoded: a photograph of 41 megapixels
        # takes 41 MB.
        mask = torch.zeros(self.size[::-1], dtype=torch.bool, device=self.device).T
        for index in range(len(self)):
            self._paste(index, mask.zero_())
            encoded += encode_masks(mask[None].cpu().numpy())
        return encoded

    def _paste(self, index: int, mask: Tensor | None = None) -> Tensor:
        """Resample one mask in its box. Bilinear, so it is a product along either axis."""
        if mask is None:
            mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        prob, box = self.mask_prob[index].float(), self.boxes[index].tolist()
        x0, columns = _resampling(box[0], box[2], self.size[1], prob)
        y0, rows = _resampling(box[1], box[3], self.size[0], prob)
        x1, step = x0 + len(columns), max(1, _CHUNK // max(1, len(columns)))
        of_columns = prob @ columns.T
        for start in range(0, len(rows), step):
            pasted = rows[start : start + step] @ of_columns
            top = y0 + start
            mask[top : top + len(pasted), x0:x1] = pasted >= self.threshold
        return mask


def _resampling(low: float, high: float, size: int, prob: Tensor) -> tuple[int, Tensor]:
    """Return the first pixel near a box along an axis, and (pixels, M) weights of the values."""
    # The centre of a pixel is at half its index more, and beyond its outer centres a mask fades to
    # zero, as in Detectron2.
    start, stop = max(0, math.floor(low) - 1), min(size, math.ceil(high) + 1)
    centres = torch.arange(start, max(start, stop), device=prob.device) + 0.5
    position = (centres - low) / (high - low) * len(prob) - 0.5
    values = torch.arange(len(prob), device=prob.device)
    return start, (1 - (position[:, None] - values).abs()).clamp(min=0)
