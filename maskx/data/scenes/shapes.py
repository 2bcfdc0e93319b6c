"""Outlines and textures for generated scenes, as functions of object coordinates.

An *outline* says for each point whether it belongs to the shape. It takes two equally shaped
arrays `x` (to the right) and `y` (downwards) in object coordinates, where the object fills
[-1, 1] x [-1, 1], and returns a bool array. Outlines are built from primitives such as
`disc`, `box` and `star` with the combinators `union` and `minus`.

Array arithmetic is limited to operations that IEEE 754 rounds exactly (+, -, *, /, floor,
comparisons): the same shape has the same pixels on every platform and with every version of numpy.
"""

import math
from collections.abc import Callable

import numpy as np

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]

TEXTURE_NAMES = ("plain", "stripes", "checks", "dots", "noise")

# Closes the seam between two parts that share an edge but compute it in different ways.
_SEAM = 1e-9
_NOISE_LATTICE = 32


def cos_sin(degrees: float) -> tuple[float, float]:
    """Cosine and sine, rounded so that they do not depend on the platform's math library."""
    angle = math.radians(degrees)
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def disc(radius: float = 1.0, *, x: float = 0.0, y: float = 0.0) -> Outline:
    """Filled circle around (`x`, `y`)."""
    return lambda px, py: (px - x) * (px - x) + (py - y) * (py - y) <= radius * radius


def box(left: float, top: float, right: float, bottom: float) -> Outline:
    """Filled axis-aligned rectangle."""
    return lambda px, py: (px >= left) & (px <= right) & (py >= top) & (py <= bottom)


def polygon(*corners: tuple[float, float]) -> Outline:
    """Filled convex polygon, corners clockwise as seen on the screen."""
    edges = list(zip(corners, corners[1:] + corners[:1], strict=True))

    def contains(px: np.ndarray, py: np.ndarray) -> np.ndarray:
        inside = np.ones(px.shape, bool)
        for (x0, y0), (x1, y1) in edges:
            inside &= (x1 - x0) * (py - y0) - (y1 - y0) * (px - x0) >= -_SEAM
        return inside

    return contains


def regular_polygon(sides: int, radius: float = 1.0) -> Outline:
    """Filled regular polygon with corners at `radius`, lying on one of its sides."""
    start = 90 + 180 / sides
    directions = [cos_sin(start + 360 * k / sides) for k in range(sides)]
    return polygon(*((radius * c, radius * s) for c, s in directions))


def star(points: int, inner: float, radius: float = 1.0) -> Outline:
    """Filled star with tips at `radius` (one points up) and notches at `inner` * `radius`."""
    half_turn = 180 / points
    tips = [-90 + 2 * half_turn * k for k in range(points)]

    def at(degrees: float, distance: float) -> tuple[float, float]:
        c, s = cos_sin(degrees)
        return distance * c, distance * s

    notch = inner * radius
    return union(
        *(
            polygon(
                (0.0, 0.0), at(tip - half_turn, notch), at(tip, radius), at(tip + half_turn, notch)
            )
            for tip in tips
        )
    )


def arms(count: int, half_width: float, radius: float = 1.0) -> Outline:
    """Straight arms from the centre, evenly spaced, the first one pointing up."""
    directions = [cos_sin(-90 + 360 * k / count) for k in range(count)]

    def contains(px: np.ndarray, py: np.ndarray) -> np.ndarray:
        inside = px * px + py * py <= half_width * half_width
        for c, s in directions:
            along, across = px * c + py * s, py * c - px * s
            inside |= (along >= 0) & (along <= radius) & (np.abs(across) <= half_width)
        return inside

    return contains


def ring(outer: float, inner: float) -> Outline:
    """Points between two circles around the centre."""
    return minus(disc(outer), disc(inner))


def slats(*centers: float, half_width: float) -> Outline:
    """Horizontal bars through the whole object, at these heights."""
    return union(*(box(-1, y - half_width, 1, y + half_width) for y in centers))


def posts(*centers: float, half_width: float) -> Outline:
    """Vertical bars through the whole object, at these places from left to right."""
    return union(*(box(x - half_width, -1, x + half_width, 1) for x in centers))


def union(*outlines: Outline) -> Outline:
    """Points of any of the `outlines`."""

    def contains(px: np.ndarray, py: np.ndarray) -> np.ndarray:
        inside = outlines[0](px, py)
        for outline in outlines[1:]:
            inside = inside | outline(px, py)
        return inside

    return contains


def minus(base: Outline, *holes: Outline) -> Outline:
    """Points of `base` that are in none of the `holes`."""
    return lambda px, py: base(px, py) & ~union(*holes)(px, py)


def texture_depth(
    name: str, x: np.ndarray, y: np.ndarray, random: np.random.RandomState
) -> np.ndarray:
    """How much of the accent colour each point takes.

    Args:
        name: one of `TEXTURE_NAMES`.
        x: point coordinates in texture cells: a stripe, a square of the checks, the distance
            between dots and a grain of the noise all measure one cell.

    Returns:
        float array shaped like `x` with values in [0, 1]; all zero for `plain`.
    """
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    if name == "plain":
        return np.zeros(x.shape)
    if name == "stripes":
        return (row & 1).astype(np.float64)
    if name == "checks":
        return ((column + row) & 1).astype(np.float64)
    if name == "dots":
        dx, dy = x - column - 0.5, y - row - 0.5
        return (dx * dx + dy * dy <= 0.1).astype(np.float64)
    if name == "noise":
        grains = random.random_sample((_NOISE_LATTICE, _NOISE_LATTICE))
        return grains[row % _NOISE_LATTICE, column % _NOISE_LATTICE]
    raise ValueError(f"unknown texture {name!r}; known: {', '.join(TEXTURE_NAMES)}")


def smooth_noise(
    shape: tuple[int, int], cell: tuple[float, float], random: np.random.RandomState
) -> np.ndarray:
    """Random height field: a lattice of uniform values, interpolated.

    Args:
        shape: (height, width) of the field.
        cell: (height, width) of a lattice cell in pixels.

    Returns:
        (height, width) float64 with values in [0, 1].
    """
    (row, row_weight), (column, column_weight) = (
        _lattice_positions(length, step) for length, step in zip(shape, cell, strict=True)
    )
    lattice = random.random_sample((int(row[-1]) + 2, int(column[-1]) + 2))
    # Columns are interpolated first: that array is smaller than the field.
    lines = lattice[:, column] + column_weight * (lattice[:, column + 1] - lattice[:, column])
    upper = lines[row]
    return upper + row_weight[:, None] * (lines[row + 1] - upper)


def _lattice_positions(length: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Index of the lattice point before each pixel, and the smoothed weight of the one after."""
    position = np.arange(length) / step
    before = np.floor(position).astype(np.int64)
    fraction = position - before
    return before, fraction * fraction * (3 - 2 * fraction)
