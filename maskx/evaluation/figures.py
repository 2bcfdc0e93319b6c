"""Pictures of predictions: instances, label maps and maps of numbers, laid out in sheets.

Label maps and maps of numbers are blended with the image as shades of grey, so that colours have
one meaning.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from maskx.core.files import written_whole
from maskx.data.label_maps import ignore_label, voc_palette

# RGB. Green and red differ in brightness too, for readers who cannot tell them apart by hue.
COLOR_WITH_MASKS = (60, 220, 60)
COLOR_WITHOUT_MASKS = (230, 30, 30)

SPLIT_LEGEND = (
    (COLOR_WITH_MASKS, "masks and boxes in training (A)"),
    (COLOR_WITHOUT_MASKS, "only boxes in training (B)"),
)

Record = Mapping[str, Any]

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_LEGEND_HEIGHT = 34
_OPACITY = 0.6  # of label maps and maps of numbers over their image
_COLOR_UNKNOWN = (150, 150, 150)
# Largest less smallest of red, green and blue. Colours of VOC below it, such as that of its seventh
# class, (128, 128, 128), are too grey to be seen on grey.
_MIN_CHROMA = 64

Color = tuple[int, int, int]


def draw_instances(
    image: np.ndarray,
    *,
    boxes: np.ndarray,
    masks: Iterable[np.ndarray],
    labels: Sequence[str],
    with_masks: Sequence[bool],
    side: int = 400,
) -> np.ndarray:
    """Draw instances into a square tile.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) XYXY pixels.
        masks: N of (H, W) bool, one of which is in memory at a time if they are made so.
        with_masks: whether the category of each instance had masks in training: green, else red.
        side: size of the tile in pixels; the image is fitted into it.

    Returns:
        (side, side, 3) uint8 RGB.
    """
    scale, size = _fitted(image, side)
    tile = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    colors = [COLOR_WITH_MASKS if seen else COLOR_WITHOUT_MASKS for seen in with_masks]
    for inside, color in zip(_resized(masks, size), colors, strict=True):
        tile[inside > 0] = (0.6 * tile[inside > 0] + 0.4 * np.array(color)).astype(np.uint8)
        contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(tile, contours, -1, color, 2)
    for box, label, color in zip(boxes, labels, colors, strict=True):
        x0, y0, x1, y1 = (round(float(v) * scale) for v in box)
        cv2.rectangle(tile, (x0, y0), (x1, y1), color, 1)
        _draw_label(tile, label, (x0, y0), color)
    return _squared(tile, side)


def _resized(masks: Iterable[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
    for mask in masks:
        # Decoded masks lie by column; turned they are resized without a copy of their size.
        turned = mask.T.view(np.uint8)
        inside = cv2.resize(turned, size[::-1], interpolation=cv2.INTER_NEAREST).T.copy()
        del mask, turned  # before the next one is made
        yield inside


def plain_tile(image: np.ndarray, side: int = 400) -> np.ndarray:
    """Fit an (H, W, 3) uint8 RGB image into a square tile, as the other tiles have it."""
    _, size = _fitted(image, side)
    return _squared(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), side)


def draw_label_map(
    image: np.ndarray,
    label_map: np.ndarray,
    *,
    num_classes: int,
    names: Sequence[str] | None = None,
    side: int = 400,
) -> np.ndarray:
    """Draw a label map into a square tile; unknown pixels are hatched.

    Classes have the colours of VOC without the greyish ones: those of its label maps up to the
    sixth class.

    Args:
        image: (H, W, 3) uint8 RGB.
        label_map: (H, W) integers, 0 to `num_classes` and `ignore_label(num_classes)`.
        num_classes: number of classes, without the background. There are 231 colours; above that
            many classes they repeat.
        names: names by class index, written on the classes that are there; none without.
        side: size of the tile in pixels; the image is fitted into it.

    Returns:
        (side, side, 3) uint8 RGB.

    Raises:
        ValueError: the label map has not the size of the image.
    """
    if label_map.shape != image.shape[:2]:
        raise ValueError(
            f"The label map has shape {label_map.shape}, its image {image.shape[:2]}. They must be "
            "equal."
        )
    _, size = _fitted(image, side)
    tile = _grey(image, size)
    # INTER_NEAREST_EXACT keeps pixel centres where the image has them.
    labels = cv2.resize(
        label_map.astype(np.int32), size, interpolation=cv2.INTER_NEAREST_EXACT
    ).astype(np.int64)
    is_unknown = labels == ignore_label(num_classes)
    is_object = (labels > 0) & ~is_unknown
    tile[is_object] = _blend(tile[is_object], _class_color(labels[is_object]))
    rows, columns = np.indices(labels.shape)
    hatched = is_unknown & ((rows + columns) // 4 % 2 == 0)
    tile[hatched] = _COLOR_UNKNOWN
    if names is not None:
        for label in np.unique(labels[is_object]).tolist():
            x, y = _innermost(labels == label)
            (width, height), _ = cv2.getTextSize(names[label - 1], _FONT, 0.4, 1)
            corner = (x - width // 2, y + height // 2 + 3)
            _draw_label(tile, names[label - 1], corner, tuple(_class_color(label).tolist()))
    return _squared(tile, side)


def draw_heat_map(
    image: np.ndarray, values: np.ndarray, *, symmetric: bool, side: int = 400
) -> np.ndarray:
    """Draw a map of numbers over its image into a square tile. Positions of NaN are grey.

    Args:
        image: (H, W, 3) uint8 RGB.
        values: (h, w) float of any resolution, up-sampled bilinearly.
        symmetric: for numbers of both signs, such as projections on a class pattern: blue is
            negative, white 0, red positive, up to the largest absolute value. Else, such as for
            attention: from dark, 0 and below, to bright, the largest value.
        side: size of the tile in pixels; the image is fitted into it.

    Returns:
        (side, side, 3) uint8 RGB.
    """
    _, size = _fitted(image, side)
    tile = _grey(image, size)
    is_known = np.isfinite(values)
    filled = np.where(is_known, values, 0).astype(np.float32)  # NaN would spread to its neighbours
    if not symmetric:
        filled = np.maximum(filled, 0)
    scaled = cv2.resize(filled / (np.abs(filled).max() or 1), size, interpolation=cv2.INTER_LINEAR)
    inside = cv2.resize(is_known.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT) > 0
    colors = _diverging(scaled) if symmetric else _sequential(scaled)
    tile = _blend(tile, colors)
    tile[~inside] = _COLOR_UNKNOWN
    return _squared(tile, side)


def draw_similarities(
    image: np.ndarray,
    points: Sequence[tuple[int, int]],
    maps: np.ndarray,
    *,
    symmetric: bool,
    side: int = 400,
) -> np.ndarray:
    """Draw an image with points in it, and how alike every position is to each of them.

    Args:
        image: (H, W, 3) uint8 RGB.
        points: P pixels (x, y) of the image, which are marked.
        maps: (P, h, w) of any resolution.
        symmetric: see :func:`draw_heat_map`.
        side: of each of the 1 + P tiles, which stand in a row.

    Returns:
        (height, (1 + P) * side, 3) uint8 RGB.
    """
    scale, _ = _fitted(image, side)
    tiles = [plain_tile(image, side)]
    tiles += [draw_heat_map(image, values, symmetric=symmetric, side=side) for values in maps]
    for number, (x, y) in enumerate(points, start=1):
        place = round(scale * (x + 0.5)), round(scale * (y + 0.5))
        for tile in (tiles[0], tiles[number]):
            cv2.circle(tile, place, 6, (0, 0, 0), -1, cv2.LINE_AA)
            cv2.circle(tile, place, 4, tuple(_class_color(number).tolist()), -1, cv2.LINE_AA)
    titles = ["image", *(f"({x}, {y})" for x, y in points)]
    return contact_sheet(tiles, columns=len(tiles), column_titles=titles, legend=())


def contact_sheet(
    tiles: Sequence[np.ndarray],
    *,
    columns: int = 4,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    legend: Sequence[tuple[Color, str]] = SPLIT_LEGEND,
) -> np.ndarray:
    """Lay tiles of one size out in rows.

    Args:
        row_titles: text above each row; none without.
        column_titles: text at the top of each column; none without.
        legend: RGB colours and what they mean, above everything else; by default the two box
            colours of :func:`draw_instances`. No strip without entries.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: there are not as many titles as rows or columns.
    """
    blank = np.full_like(tiles[0], 255)
    filled = [*tiles, *[blank] * (-len(tiles) % columns)]
    rows = [np.hstack(filled[i : i + columns]) for i in range(0, len(filled), columns)]
    for kind, titles, count in (
        ("row", row_titles, len(rows)),
        ("column", column_titles, columns),
    ):
        if titles and len(titles) != count:
            raise ValueError(f"The sheet has {count} {kind}s, but {len(titles)} {kind} titles.")
    width = rows[0].shape[1]
    parts = [_legend(legend, width)] if legend else []
    if column_titles:
        parts.append(np.hstack([_title(title, blank.shape[1]) for title in column_titles]))
    for index, row in enumerate(rows):
        parts += [_title(row_titles[index], width), row] if row_titles else [row]
    return np.vstack(parts)


def _legend(entries: Sequence[tuple[Color, str]], width: int) -> np.ndarray:
    legend = np.full((_LEGEND_HEIGHT, width, 3), 255, np.uint8)
    x = 10
    for color, text in entries:
        cv2.rectangle(legend, (x, 8), (x + 18, 26), color, -1)
        cv2.putText(legend, text, (x + 26, 23), _FONT, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
        x += 60 + cv2.getTextSize(text, _FONT, 0.55, 1)[0][0]
    return legend


def _title(text: str, width: int) -> np.ndarray:
    strip = np.full((_LEGEND_HEIGHT, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (10, 24), _FONT, 0.65, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def save_png(path: Path, image: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 RGB image, whole or not at all; its folder is made.

    Raises:
        OSError: the file cannot be written.
    """
    encoded, content = cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))
    if not encoded:
        raise OSError(f"'{path}' could not be encoded as PNG.")
    with written_whole(path) as scratch:
        scratch.write_bytes(content.tobytes())


def varied_records(
    records: Sequence[Record], *, num_labels: float, shown: Collection[int] | None = None
) -> list[Record]:
    """Choose six images for a picture, whose labels are not among those chosen before.

    Args:
        records: as of :func:`maskx.data.coco.load_coco`.
        num_labels: images with about so many labels come first.
        shown: class indices that matter; None for all.
    """
    chosen, seen = [], set()
    rest = [record for record in records if record["image_labels"]]
    rest.sort(key=lambda record: abs(num_labels - len(record["image_labels"])))

    def labels_of(record: Record) -> set[int]:
        return {label for label in record["image_labels"] if shown is None or label in shown}

    while rest and len(chosen) < 6:
        best = max(rest, key=lambda record: len(labels_of(record) - seen))
        rest.remove(best)
        chosen.append(best)
        seen |= labels_of(best)
    return chosen


def _fitted(image: np.ndarray, side: int) -> tuple[float, tuple[int, int]]:
    """Scale and (width, height) with which an image fits into a square."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    return scale, (max(1, round(width * scale)), max(1, round(height * scale)))


def _squared(tile: np.ndarray, side: int) -> np.ndarray:
    square = np.full((side, side, 3), 255, np.uint8)
    square[: tile.shape[0], : tile.shape[1]] = tile
    return square


def _grey(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    resized = cv2.resize(grey, size, interpolation=cv2.INTER_LINEAR)
    return np.repeat(resized[:, :, None], 3, axis=2)


def _blend(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    return np.round((1 - _OPACITY) * pixels + _OPACITY * colors).astype(np.uint8)


def _class_color(labels: np.ndarray | int) -> np.ndarray:
    """Colours of labels from 1 on."""
    colors = voc_palette()[1:]
    colors = colors[np.ptp(colors, axis=1) >= _MIN_CHROMA]
    return colors[(np.asarray(labels) - 1) % len(colors)]


def _diverging(values: np.ndarray) -> np.ndarray:
    """Blue, white, red for [-1, 1]."""
    ends = np.where(values[..., None] < 0, (30, 60, 220), (220, 30, 30))
    return 255 + np.abs(values)[..., None] * (ends - 255)


def _sequential(values: np.ndarray) -> np.ndarray:
    """Viridis for [0, 1]."""
    levels = np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)
    return cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[:, :, ::-1]


def _innermost(mask: np.ndarray) -> tuple[int, int]:
    """The (x, y) of a pixel of a mask that is farthest from its edge."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return int(x) - 1, int(y) - 1


def _draw_label(tile: np.ndarray, text: str, corner: tuple[int, int], color: Color) -> None:
    (width, height), _ = cv2.getTextSize(text, _FONT, 0.4, 1)
    x = int(np.clip(corner[0], 0, max(0, tile.shape[1] - width - 4)))
    y = int(np.clip(corner[1], height + 6, tile.shape[0]))
    cv2.rectangle(tile, (x, y - height - 6), (x + width + 4, y), color, -1)
    is_dark = np.dot(color, (0.299, 0.587, 0.114)) < 80
    ink = (255, 255, 255) if is_dark else (0, 0, 0)
    cv2.putText(tile, text, (x + 2, y - 4), _FONT, 0.4, ink, 1, cv2.LINE_AA)
