"""The one reader of image files, on both hosts, and the samples of whole-image models."""

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskx.core.images import warp_image, warp_label_map
from maskx.core.memory import give_back_free_memory
from maskx.data.label_maps import semantic_label_map

__all__ = [
    "MAX_PIXELS",
    "ImageMapper",
    "as_sample_image",
    "read_image",
    "read_image_sample",
    "read_record_image",
    "read_rgb",
]

MAX_PIXELS = 2**28
"""Pixels of an image at most, 268 million: a small file may hold billions, all alike."""

_TAIL = 4096  # bytes in which the end of an image must be
_ORIENTATION = 0x0112  # EXIF
_TURNED = (5, 6, 7, 8)  # the sides are the other way round; more is not allowed and turns nothing
_LARGE = 2**25  # bytes of an image before which memory that was freed is worth giving back
_STRIP = 256  # rows that are turned from BGR to RGB at a time
# Since OpenCV 4.11, as is the constant: into an empty array, which then holds the decoded pixels.
_READS_INTO_ARRAYS = hasattr(cv2, "IMREAD_COLOR_RGB")
_MAX_RATIO = 200  # of the sides; a thinner image has no pixel left at the size of a network


def read_record_image(record: Mapping[str, Any], *, image_format: str = "BGR") -> np.ndarray:
    """Read the image of a record.

    Args:
        record: of :func:`maskx.data.coco.load_coco`; ``height`` and ``width`` may be missing, as of
            tag lists, then any size is right.
        image_format: "BGR" or "RGB".

    Returns:
        As of :func:`read_image`.

    Raises:
        ValueError: the file is no readable image, or of another size.
    """
    size = record.get("height"), record.get("width")
    return read_image(record["file_name"], *size, record.get("image_id"), image_format=image_format)


def read_image(
    path: str | os.PathLike[str],
    height: int | None,
    width: int | None,
    image_id: int | str | None,
    *,
    image_format: str = "BGR",
) -> np.ndarray:
    """Read an image that is to have a certain size, in the memory of its pixels alone.

    It is turned as its EXIF tag says. Grey images of 16 bits are read by their upper 8.

    Args:
        height: in pixels, as its annotations say; None if they do not.
        image_format: "BGR" or "RGB".

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: it is no whole image, too large or too thin, or of another size.
    """
    where = f"Image '{os.fspath(path)}'" + ("" if image_id is None else f" (id {image_id})")
    try:
        with open(path, "rb") as file:
            head, tail = _ends(file)
            size = _check_before_decoding(file, head, tail, height, width, where)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{where}: there is no such file. Check the image folder, or remove the image from the "
            "annotation file."
        ) from None
    if size is not None and 3 * size[0] * size[1] >= _LARGE:
        give_back_free_memory()
    try:
        image = _decoded(os.fspath(path), head)
    except cv2.error as error:
        raise ValueError(f"{where} cannot be read: {error}.") from error
    if image is None:
        raise ValueError(f"{where} cannot be read. Is the file an image, and complete?")
    if height is not None and image.shape[:2] != (height, width):
        raise _other_size(where, image.shape[1], image.shape[0], width, height)
    if image_format == "RGB":
        for top in range(0, len(image), _STRIP):
            strip = image[top : top + _STRIP]
            strip[:] = cv2.cvtColor(strip, cv2.COLOR_BGR2RGB)
    return image


def _decoded(path: str, head: bytes) -> np.ndarray | None:
    """Decode a file to (H, W, 3) uint8 BGR; None if it cannot be.

    Args:
        head: its first bytes.
    """
    # Into an array imread turns no TIFF file, and on Windows it finds ASCII paths alone.
    can_read = head[:2] not in (b"II", b"MM") and (sys.platform != "win32" or path.isascii())
    if _READS_INTO_ARRAYS and can_read:
        image = cv2.imread(path, np.empty(0, np.uint8), cv2.IMREAD_COLOR)
        if image is not None and image.size:
            return image
    return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)  # which copies it


def read_rgb(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image of any size.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: as of :func:`read_image`.
    """
    return read_image(path, None, None, None, image_format="RGB")


def problem_of_file(
    path: str | os.PathLike[str], height: int, width: int
) -> tuple[str, str, str] | None:
    """Say why an image file is not what its annotations say, by its header and its end.

    That takes 0.2 ms, most of it for the size.

    Returns:
        The kind of problem, what it is, and the remedy; None if there is none.
    """
    with open(path, "rb") as file:
        head, tail = _ends(file)
        problem = _problem_of(head, tail)
        if not problem:
            found = image_size(file)
            # What Pillow does not know, OpenCV may.
            if found is None and not cv2.haveImageReader(os.fspath(path)):
                problem = "is of no kind of image that can be read"
    if problem:
        return "image_broken", problem, "Restore it"
    # Whether an image is turned is known of JPEG files alone.
    right = [(height, width)] if head[:1] == b"\xff" else [(height, width), (width, height)]
    if found is None or found in right:
        return None
    return (
        "image_of_other_size",
        f"is {found[1]} x {found[0]} pixels, but its annotations say {width} x {height}",
        "Correct width and height in the annotation file, or restore the original image",
    )


def image_size(file: str | os.PathLike[str] | BinaryIO) -> tuple[int, int] | None:
    """Return (height, width) of an image, turned as its EXIF tag says; None if Pillow cannot."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            # Of a PNG file this would read all of it, to look for the tag behind the pixels.
            if image.format == "JPEG" and image.getexif().get(_ORIENTATION) in _TURNED:
                return width, height
            return height, width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _ends(file: BinaryIO) -> tuple[bytes, bytes]:
    """Read the first 16 and the last 4096 bytes."""
    head = file.read(16)
    file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
    return head, file.read()


def _problem_of(head: bytes, tail: bytes) -> str:
    """Say what is wrong by the first 16 and the last 4096 bytes."""
    if not head:
        return "is empty"
    if head.startswith(b"\xff\xd8"):
        return "" if b"\xff\xd9" in tail else "is a JPEG file that is cut off"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "" if b"IEND" in tail else "is a PNG file that is cut off"
    if re.match(rb"\s*(<!doctype|<html|<\?xml|\{)", head, re.IGNORECASE):
        return "is a page of text, as from a failed download, and no image"
    return ""


def _check_before_decoding(
    file: BinaryIO, head: bytes, tail: bytes, height: int | None, width: int | None, where: str
) -> tuple[int, int] | None:
    """Refuse a file by its header and its end, before its pixels take any memory.

    Returns:
        (W, H) in pixels as the file holds them; None if Pillow does not know its kind.
    """
    problem = _problem_of(head, tail)
    if problem:
        raise ValueError(f"{where} {problem}. It cannot be read; restore the file.")
    try:
        with Image.open(file) as image:
            found = image.size
    except Image.DecompressionBombError:
        found = (MAX_PIXELS, MAX_PIXELS)
    except (OSError, SyntaxError, ValueError):
        return None  # of a kind that Pillow does not know; OpenCV may
    if found[0] * found[1] > MAX_PIXELS:
        raise ValueError(
            f"{where} has more than {MAX_PIXELS // 10**6} million pixels. Cut it into parts, with "
            "its annotations, or make it smaller."
        )
    if max(found) > _MAX_RATIO * min(found):
        raise ValueError(
            f"{where} is {found[0]} x {found[1]} pixels. Allowed: one side at most {_MAX_RATIO} "
            "times the other. Cut it into parts, or remove it from the annotation file."
        )
    # A turned image has its sides the other way round; the size of all is checked once it is read.
    if height is not None and sorted(found) != sorted((width, height)):
        raise _other_size(where, *found, width, height)
    return found


def _other_size(
    where: str, width: int, height: int, said_width: int | None, said_height: int | None
) -> ValueError:
    return ValueError(
        f"{where} is {width} x {height} pixels, but its annotations say {said_width} x "
        f"{said_height}. Correct width and height in the annotation file, or restore the original "
        "image."
    )


ReadLabelMap = Callable[[Mapping[str, Any]], np.ndarray]


def read_image_sample(
    record: Mapping[str, Any], resize: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Any]:
    """Read the image of a record for inference.

    Args:
        resize: see :func:`as_sample_image`.

    Returns:
        ``image``: (3, H, W) uint8 RGB; ``height``, ``width`` in pixels of the file; ``image_id``.

    Raises:
        ValueError: the file is no readable image, or its size is not the record's.
    """
    pixels = read_record_image(record, image_format="RGB")
    return {
        "image": as_sample_image(pixels, resize),
        "height": record["height"],
        "width": record["width"],
        "image_id": record["image_id"],
    }


def as_sample_image(pixels: np.ndarray, resize: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Turn (H, W, 3) pixels into the (3, H, W) of a sample.

    Args:
        resize: what makes the image smaller, without a copy of it as large as it is.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return (image if resize is None else resize(image)).contiguous()


class ImageMapper:
    """Reads the image of a record, its image labels and, if asked for, its label map.

    Args:
        size: training images and their label maps are warped to squares of this side in pixels, so
            that they make a batch; None leaves them as they are.
        flip: mirror half of the training samples.
        label_maps: give training samples ``sem_seg``, their label map. Without it no mask and no
            label map is opened or decoded, so nothing of them can reach a loss: that is learning
            from tags.
        read_label_map: maps a record to its (H, W) label map, in place of
            :func:`maskx.data.label_maps.semantic_label_map`.

    Raises:
        ValueError: the size is below 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        size: int | None,
        flip: bool = True,
        label_maps: bool,
        read_label_map: ReadLabelMap | None = None,
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1 pixel, or None, got {size}.")
        self.num_classes = num_classes
        self.size = size
        self.flip = flip
        self.label_maps = label_maps
        self.read_label_map = read_label_map

    def read_image(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Read the image of a record for inference; it is never warped.

        Returns:
            ``image``: (3, H, W) uint8 RGB; ``height``, ``width`` of the file in pixels;
            ``image_id``; ``image_labels``: the class indices known to be present, perhaps none.

        Raises:
            ValueError: the file is no readable image, its size is not the record's, or an image
                label is no class index.
        """
        return self._read_image(record)

    def _read_image(
        self, record: Mapping[str, Any], resize: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Any]:
        image_labels = list(record.get("image_labels", ()))
        unknown = [label for label in image_labels if not 0 <= label < self.num_classes]
        if unknown:
            raise ValueError(
                f"Image {record['image_id']!r} has the image labels {unknown}. Allowed: class "
                f"indices 0 to {self.num_classes - 1}. Is it a record of another class list?"
            )
        return read_image_sample(record, resize) | {"image_labels": image_labels}

    def __call__(
        self, record: Mapping[str, Any], random_state: np.random.RandomState
    ) -> dict[str, Any]:
        """Make a training sample."""
        warp = None if self.size is None else functools.partial(warp_image, size=self.size)
        sample = self._read_image(record, warp)
        if self.label_maps:
            sample["sem_seg"] = self._label_map(record)
            if self.size is not None:
                sample["sem_seg"] = warp_label_map(sample["sem_seg"], self.size)
        if self.flip and random_state.randint(2):
            for key in sample.keys() & {"image", "sem_seg"}:
                sample[key] = sample[key].flip(-1)
        return sample

    def _label_map(self, record: Mapping[str, Any]) -> Tensor:
        if self.read_label_map is None:
            label_map = semantic_label_map(record, self.num_classes)
        else:
            label_map = self.read_label_map(record)
        if label_map.shape != (record["height"], record["width"]):
            raise ValueError(
                f"The label map of image {record['image_id']!r} has shape {label_map.shape}, its "
                f"image has height {record['height']} and width {record['width']}. They must be "
                "equal."
            )
        return torch.from_numpy(label_map.astype(np.int64))
