"""Instance masks between their forms: COCO polygons, run lengths, arrays."""

import numpy as np
from pycocotools import mask as mask_api


def decode_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Rasterise a COCO segmentation.

    Args:
        segmentation: a list of polygons ``[x0, y0, x1, y1, ...]`` or a compressed run-length
            encoding.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        (height, width) bool.
    """
    if isinstance(segmentation, list):
        segmentation = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    return mask_api.decode(segmentation).astype(bool)


def encode_masks(masks: np.ndarray) -> list[dict]:
    """Encode masks as compressed run lengths, ready for JSON.

    Args:
        masks: (N, H, W) bool.

    Returns:
        N dictionaries ``{"size": [H, W], "counts": str}``.
    """
    if len(masks) == 0:
        return []
    encoded = mask_api.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]
