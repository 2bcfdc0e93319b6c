"""Pictures of predictions: what was segmented, and which categories had masks in training."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

# RGB. Green and red differ in brightness too, for readers who cannot tell them apart by hue.
COLOR_WITH_MASKS = (60, 220, 60)
COLOR_WITHOUT_MASKS = (230, 30, 30)

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_LEGEND_HEIGHT = 34


def draw_instances(
    image: np.ndarray,
    *,
    boxes: np.ndarray,
    masks: np.ndarray,
    labels: Sequence[str],
    with_masks: Sequence[bool],
    side: int = 400,
) -> np.ndarray:
    """Draw instances into a square tile.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) XYXY pixels.
        masks: (N, H, W) bool.
        labels: text of each instance.
        with_masks: whether the category of each instance had masks in training: green, else red.
        side: size of the tile in pixels; the image is fitted into it.

    Returns:
        (side, side, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    tile = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    colors = [COLOR_WITH_MASKS if seen else COLOR_WITHOUT_MASKS for seen in with_masks]
    for mask, color in zip(masks, colors, strict=True):
        inside = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        tile[inside > 0] = (0.6 * tile[inside > 0] + 0.4 * np.array(color)).astype(np.uint8)
        contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(tile, contours, -1, color, 2)
    for box, label, color in zip(boxes, labels, colors, strict=True):
        x0, y0, x1, y1 = (round(float(v) * scale) for v in box)
        cv2.rectangle(tile, (x0, y0), (x1, y1), color, 1)
        _draw_label(tile, label, (x0, y0), color)
    square = np.full((side, side, 3), 255, np.uint8)
    square[: size[1], : size[0]] = tile
    return square


def contact_sheet(
    tiles: Sequence[np.ndarray], *, columns: int = 4, row_titles: Sequence[str] = ()
) -> np.ndarray:
    """Lay tiles of one size out in rows under a legend of the two box colours.

    Args:
        tiles: row by row.
        columns: tiles in a row.
        row_titles: text above each row; none without.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    blank = np.full_like(tiles[0], 255)
    filled = [*tiles, *[blank] * (-len(tiles) % columns)]
    rows = [np.hstack(filled[i : i + columns]) for i in range(0, len(filled), columns)]
    legend = np.full((_LEGEND_HEIGHT, rows[0].shape[1], 3), 255, np.uint8)
    if row_titles:
        titled = zip(row_titles, rows, strict=True)
        rows = [part for title, row in titled for part in (_title(title, row.shape[1]), row)]
    x = 10
    for color, text in (
        (COLOR_WITH_MASKS, "masks and boxes in training (A)"),
        (COLOR_WITHOUT_MASKS, "only boxes in training (B)"),
    ):
        cv2.rectangle(legend, (x, 8), (x + 18, 26), color, -1)
        cv2.putText(legend, text, (x + 26, 23), _FONT, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
        x += 60 + cv2.getTextSize(text, _FONT, 0.55, 1)[0][0]
    return np.vstack([legend, *rows])


def _title(text: str, width: int) -> np.ndarray:
    strip = np.full((_LEGEND_HEIGHT, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (10, 24), _FONT, 0.65, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def save_png(path: Path, image: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 RGB image.

    Raises:
        OSError: the file cannot be written.
    """
    encoded, content = cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))
    if not encoded:
        raise OSError(f"'{path}' could not be encoded as PNG.")
    path.write_bytes(content.tobytes())


def _draw_label(
    tile: np.ndarray, text: str, corner: tuple[int, int], color: tuple[int, int, int]
) -> None:
    (width, height), _ = cv2.getTextSize(text, _FONT, 0.4, 1)
    x = int(np.clip(corner[0], 0, max(0, tile.shape[1] - width - 4)))
    y = int(np.clip(corner[1], height + 6, tile.shape[0]))
    cv2.rectangle(tile, (x, y - height - 6), (x + width + 4, y), color, -1)
    cv2.putText(tile, text, (x + 2, y - 4), _FONT, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
