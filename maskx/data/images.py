"""Image files."""

import os

import cv2
import numpy as np


def read_image(
    path: str | os.PathLike[str], height: int, width: int, image_id: int | str
) -> np.ndarray:
    """Read an image that is to have a certain size.

    Args:
        path: image file.
        height: in pixels, as its annotations say.
        width: in pixels, as its annotations say.
        image_id: as in the annotation file, for errors.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no readable image, or of another size.
    """
    try:
        image = _read(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Image '{path}' (id {image_id}): there is no such file. Check the image folder, or "
            "remove the image from the annotation file."
        ) from None
    if image is None:
        raise ValueError(
            f"Image '{path}' (id {image_id}) cannot be read. Is the file an image, and complete?"
        )
    if image.shape[:2] != (height, width):
        raise ValueError(
            f"Image '{path}' (id {image_id}) is {image.shape[1]} x {image.shape[0]} pixels, but "
            f"its annotations say {width} x {height}. Correct width and height in the annotation "
            "file, or restore the original image."
        )
    return image


def read_rgb(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image of any size.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no readable image.
    """
    try:
        image = _read(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"Image '{path}': there is no such file.") from None
    if image is None:
        raise ValueError(f"Image '{path}' cannot be read. Is the file an image, and complete?")
    return np.ascontiguousarray(image[:, :, ::-1])


def _read(path: str | os.PathLike[str]) -> np.ndarray | None:
    # Not imread, which on Windows finds no path with other than ASCII characters.
    content = np.fromfile(path, np.uint8)
    return cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
