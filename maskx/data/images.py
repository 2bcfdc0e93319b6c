"""The one reader of image files, on both hosts."""

import io
import os
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image

from maskx.data.image_files import problem_of

__all__ = ["MAX_PIXELS", "read_image", "read_record_image", "read_rgb"]

MAX_PIXELS = 2**28
"""Pixels of an image at most, 268 million: a small file may hold billions, all alike."""

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
        FileNotFoundError: there is no such file.
        ValueError: the file is no readable image, or of another size.
    """
    image = read_image(
        record["file_name"], record.get("height"), record.get("width"), record.get("image_id")
    )
    return image if image_format == "BGR" else np.ascontiguousarray(image[:, :, ::-1])


def read_image(
    path: str | os.PathLike[str], height: int | None, width: int | None, image_id: int | str | None
) -> np.ndarray:
    """Read an image that is to have a certain size.

    It is turned as its EXIF tag says. Grey images of 16 bits are read by their upper 8.

    Args:
        path: image file.
        height: in pixels, as its annotations say; None if they do not.
        width: likewise.
        image_id: as in the annotation file, for errors.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no readable image, is cut off, too large or too thin, or of another
            size.
    """
    where = f"Image '{os.fspath(path)}'" + ("" if image_id is None else f" (id {image_id})")
    # Not imread, which on Windows finds no path with other than ASCII characters.
    try:
        content = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{where}: there is no such file. Check the image folder, or remove the image from the "
            "annotation file."
        ) from None
    _check_before_decoding(content, height, width, where)
    try:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ValueError(f"{where} cannot be read: {error}.") from error
    if image is None:
        raise ValueError(f"{where} cannot be read. Is the file an image, and complete?")
    if height is not None and image.shape[:2] != (height, width):
        raise _other_size(where, image.shape[1], image.shape[0], width, height)
    return image


def read_rgb(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image of any size.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as of :func:`read_image`.
    """
    return np.ascontiguousarray(read_image(path, None, None, None)[:, :, ::-1])


def _check_before_decoding(
    content: np.ndarray, height: int | None, width: int | None, where: str
) -> None:
    """Refuse a file by its header and its end, before its pixels take any memory."""
    problem = problem_of(content[:16].tobytes(), content[-4096:].tobytes())
    if problem:
        raise ValueError(f"{where} {problem}. It cannot be read; restore the file.")
    try:
        with Image.open(io.BytesIO(content)) as image:
            found = image.size
    except Image.DecompressionBombError:
        found = (MAX_PIXELS, MAX_PIXELS)
    except (OSError, SyntaxError, ValueError):
        return  # of a kind that Pillow does not know; OpenCV may
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


def _other_size(
    where: str, width: int, height: int, said_width: int | None, said_height: int | None
) -> ValueError:
    return ValueError(
        f"{where} is {width} x {height} pixels, but its annotations say {said_width} x "
        f"{said_height}. Correct width and height in the annotation file, or restore the original "
        "image."
    )
