"""Images and label maps as tensors, warped to squares."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_STRIP = 64  # rows


def warp_image(image: Tensor, size: int) -> Tensor:
    """Warp an image to a square, bilinearly.

    What makes it smaller is antialiased, as Pillow does it and as
    :func:`maskx.systems.class_patterns.model.multi_scale_scores` does it at inference: a network
    sees textures in one form only.

    Args:
        image: (3, H, W) float or uint8.
        size: side of the square in pixels.

    Returns:
        (3, ``size``, ``size``) of the same type.
    """
    if image.shape[-2:] == (size, size):
        return image
    return warp_images(image[None], size)[0]


def warp_images(images: Tensor, size: int) -> Tensor:
    """Warp (N, 3, H, W) images as :func:`warp_image` does; the sizes may be those of a trace."""
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def warp_label_map(label_map: Tensor, size: int) -> Tensor:
    """Warp a label map to a square; every pixel has a label of the map.

    Args:
        label_map: (H, W) integers.
        size: side of the square in pixels.

    Returns:
        (``size``, ``size``) int64.
    """
    # "nearest-exact" keeps pixel centres where the image has them; "nearest" shifts by up to half a
    # pixel. float32 holds all labels, which are below 2^24.
    as_image = label_map[None, None].float()
    return F.interpolate(as_image, (size, size), mode="nearest-exact")[0, 0].long()


def positions_of_pixels(
    points: Tensor, image_size: tuple[int, int], map_size: tuple[int, int]
) -> Tensor:
    """Return which position of a map, flattened, each pixel lies in.

    Args:
        points: (P, 2) int64 (x, y) in an image.
        image_size: its height and width.
        map_size: those of the map of the whole image.

    Raises:
        ValueError: a point is outside the image.
    """
    height, width = image_size
    x, y = points.unbind(dim=1)
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    if outside.any():
        raise ValueError(
            f"The point {tuple(points[outside][0].tolist())} is outside the image. Allowed: x from "
            f"0 to {width - 1}, y from 0 to {height - 1}."
        )
    rows, columns = map_size
    return (y * rows // height) * columns + x * columns // width


def resized_image(image: Tensor, height: int, width: int) -> np.ndarray:
    """Make an image (height, width, 3) uint8 of a sample's (3, H, W) in [0, 255]."""
    pixels = image.cpu().clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = height < pixels.shape[0]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=interpolation)


def resize_in_strips(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image bilinearly to the pixels that Pillow makes of it, in less memory.

    Pillow resizes rows, then columns, of a copy that has four bytes for each pixel. Of images that
    are much higher than wide it may resize columns first, which rounds otherwise.

    Args:
        image: (H, W, 3) uint8, at most twice as high as wide.

    Returns:
        (height, width, 3) uint8.
    """
    strips = [image[top : top + _STRIP] for top in range(0, len(image), _STRIP)]
    rows = np.concatenate([_resized(strip, len(strip), width) for strip in strips])
    return _resized(rows, height, width)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def shrink_image(image: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Make an image smaller, never larger; each pixel is a mean of those that it stands for.

    Args:
        image: (3, H, W) uint8 or float.
        sizes: the most that the shorter side may have, and the longer one.
    """
    sides = image.shape[-2:]
    scale = min(sizes[0] / min(sides), sizes[1] / max(sides))
    if scale >= 1:
        return image
    size = [max(1, round(side * scale)) for side in sides]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def scale_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Take (R, 4) XYXY boxes from an image of size (H, W) to the same image at another size."""
    if tuple(old) == tuple(new):
        return boxes
    return boxes * boxes.new_tensor([new[1] / old[1], new[0] / old[0]] * 2)
