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
    # Not imread, which on Windows finds no path with other than ASCII characters.
    try:
        content = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Image '{path}' (id {image_id}): there is no such file. Check the image folder, or "
            "remove the image from the annotation file."
        ) from None
    image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
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
