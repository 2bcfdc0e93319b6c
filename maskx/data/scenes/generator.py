"""Generated scenes with instance masks, stuff maps, tags and attributes.

Scenes stand in for a real data set where none can be downloaded: quick starts, tests and small
controlled experiments. They are made so that a box alone does not give the mask (rings, combs,
stars, objects of two parts with one common box) while colour and shape give the category.

Every object carries its full visible mask. Partial supervision is not a property of the files:
a `CategorySplit` takes masks away when they are read; `half_split_names` gives a balanced one.

Folder written by `generate_scenes`::

    images/000000.png   colour image
    stuff/000000.png    8-bit label map: 0 = covered by a thing, s = stuff category with id s
    annotations.json    COCO instances with the additions listed at `generate_scenes`

Scene `index` of a seed is a function of (`seed`, `index`, `size`, `num_categories`, `style`) and of
nothing else: not of the number of scenes, the platform, or the versions of Python and numpy.
Coordinates are pixels, x to the right and y downwards; pixel (row, column) has its centre at
(column + 0.5, row + 0.5).
"""

import colorsys
import json
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from maskx.core.files import write_json
from maskx.data.scenes.shapes import (
    TEXTURE_NAMES,
    Outline,
    arms,
    box,
    cos_sin,
    disc,
    minus,
    polygon,
    posts,
    regular_polygon,
    ring,
    slats,
    smooth_noise,
    star,
    texture_depth,
    union,
)

# Raise it with every change that alters a pixel or a JSON entry: folders of another version are
# then refused instead of being mixed with new ones.
GENERATOR_VERSION = 2

_T = TypeVar("_T")

# Hue in degrees of each colour.
COLORS = {"red": 0, "yellow": 52, "green": 130, "blue": 220}


@dataclass(frozen=True)
class ThingCategory:
    """A category of countable objects.

    Attributes:
        family: shape family, the `supercategory` of the JSON.
        outline: shape in object coordinates.
        max_tilt: largest rotation to either side in degrees.
        color: one of `COLORS`.
        vivid: bright with dark texture; otherwise dark with light texture.
    """

    name: str
    family: str
    outline: Outline
    max_tilt: float
    color: str
    vivid: bool
    texture: str


@dataclass(frozen=True)
class StuffCategory:
    """A category of background regions.

    Attributes:
        color: mean colour, RGB in [0, 255].
        altitude: usual height of the region's centre: 0 = top of the image, 1 = bottom.
        grain: (height, width) of the texture's grain in pixels of a 128-pixel image.
        contrast: strength of the grain in grey levels.
        masonry: drawn with mortar joints.
    """

    name: str
    color: tuple[int, int, int]
    altitude: float
    grain: tuple[float, float]
    contrast: float
    masonry: bool = False


_UPRIGHT, _ANY_WAY = 25.0, 180.0

_LAMP_STAND = union(box(-0.14, 0, 0.14, 0.8), box(-0.6, 0.72, 0.6, 1))
_FLAG_CROSS = union(slats(0, half_width=0.26), posts(-0.25, half_width=0.26))
_ARCH = minus(union(disc(), box(-1, 0, 1, 1)), disc(0.6), box(-0.6, 0, 0.6, 1))
_SQUARE_FRAME = minus(box(-1, -1, 1, 1), box(-0.68, -0.68, 0.68, 0.68))
_GRID = union(slats(-0.84, 0, 0.84, half_width=0.16), posts(-0.84, 0, 0.84, half_width=0.16))
_COMB = union(box(-1, -1, 1, -0.5), posts(-0.84, -0.28, 0.28, 0.84, half_width=0.16))
_AXE_BLADE = polygon((0.12, -0.65), (0.9, -1), (0.9, 0.3), (0.12, -0.1))
_HELM_SPOKES = arms(6, 0.13)
_TWIN_ARCH = minus(
    box(-1, -1, 1, 1),
    *(union(disc(0.36, x=x, y=-0.3), box(x - 0.36, -0.3, x + 0.36, 1)) for x in (-0.5, 0.5)),
)
_DOUBLE_CROSS = union(
    box(-0.17, -1, 0.17, 1), box(-0.65, -0.8, 0.65, -0.46), box(-1, -0.1, 1, 0.24)
)
_WINDOW_FRAME = minus(
    box(-0.8, -1, 0.8, 1),
    *(
        box(x - 0.25, y - 0.34, x + 0.25, y + 0.34)
        for x, y in ((-0.36, -0.46), (0.36, -0.46), (-0.36, 0.46), (0.36, 0.46))
    ),
)
_LADDER = union(
    posts(-0.66, 0.66, half_width=0.14),
    *(box(-0.66, y - 0.11, 0.66, y + 0.11) for y in (-0.66, -0.22, 0.22, 0.66)),
)

# Families whose pairs are two parts of one object: both are drawn, each as its own instance. The
# boxes of the two overlap little in `part`; in `interlock` they are almost equal, and only the
# category tells which of the two masks is meant.
_COMPOUND_FAMILIES = ("part", "interlock")

# Name, family, outline, largest tilt. Two neighbours (0 and 1, 2 and 3, ...) are a pair; pairs of
# the compound families are drawn as one object.
_SHAPES: tuple[tuple[str, str, Outline, float], ...] = (
    ("lamp shade", "part", polygon((-0.4, -1), (0.4, -1), (0.8, 0), (-0.8, 0)), _UPRIGHT),
    ("lamp stand", "part", _LAMP_STAND, _UPRIGHT),
    ("flag cross", "interlock", _FLAG_CROSS, _UPRIGHT),
    ("flag field", "interlock", minus(box(-1, -1, 1, 1), _FLAG_CROSS), _UPRIGHT),
    ("thick ring", "ring", ring(1, 0.45), _ANY_WAY),
    ("crescent", "arc", minus(disc(), disc(0.85, x=0.5)), _ANY_WAY),
    ("plus", "cross", arms(4, 0.27), _ANY_WAY),
    ("square frame", "frame", _SQUARE_FRAME, _UPRIGHT),
    ("grid", "slat", _GRID, _UPRIGHT),
    ("five-point star", "star", star(5, 0.42), _ANY_WAY),
    ("axe handle", "part", box(-0.12, -1, 0.12, 1), _ANY_WAY),
    ("axe blade", "part", _AXE_BLADE, _ANY_WAY),
    ("helm spokes", "interlock", _HELM_SPOKES, _ANY_WAY),
    ("helm rim", "interlock", minus(ring(0.9, 0.55), _HELM_SPOKES), _ANY_WAY),
    ("thin ring", "ring", ring(1, 0.76), _ANY_WAY),
    ("arch", "arc", _ARCH, _UPRIGHT),
    ("tripod", "cross", arms(3, 0.2), _ANY_WAY),
    ("triangle frame", "frame", minus(regular_polygon(3), regular_polygon(3, 0.46)), _UPRIGHT),
    ("comb", "slat", _COMB, _UPRIGHT),
    ("spark", "star", star(4, 0.34), _ANY_WAY),
    ("double ring", "ring", union(ring(1, 0.76), disc(0.42)), _ANY_WAY),
    ("horseshoe", "arc", minus(ring(1, 0.62), box(-0.4, 0, 0.4, 1)), _ANY_WAY),
    ("asterisk", "cross", arms(6, 0.13), _ANY_WAY),
    ("window frame", "frame", _WINDOW_FRAME, _UPRIGHT),
    ("ladder", "slat", _LADDER, _UPRIGHT),
    ("hollow star", "star", minus(star(6, 0.58), star(6, 0.58, 0.5)), _ANY_WAY),
    ("split ring", "ring", minus(ring(1, 0.6), box(-1, -0.2, 1, 0.2)), _ANY_WAY),
    ("twin arch", "arc", _TWIN_ARCH, _UPRIGHT),
    ("double cross", "cross", _DOUBLE_CROSS, _UPRIGHT),
    ("hexagon frame", "frame", minus(regular_polygon(6), regular_polygon(6, 0.68)), _UPRIGHT),
)

_PAIRS_PER_ROUND = 5  # ten shapes of all eight families
_ROUND = 2 * len(COLORS) * _PAIRS_PER_ROUND  # categories: every shape of a round in every colour
_HUE_SPREAD = 14.0  # degrees to either side; the closest two colours are 52 apart

# Colours of a pair's first (A) and second category (B) in the four versions of the pair; in odd
# versions the two shapes are swapped. Each shape is so seen with masks in two colours and without
# in the two others, and where the two are drawn as one object, each colour is foreground in one
# mask of A and background in another.
_VERSION_COLORS = ((0, 2), (1, 3), (2, 0), (3, 1))


def _thing_category(index: int) -> ThingCategory:
    """Category of a place in the table: a shape in a colour."""
    # Neither shape nor colour alone tells whether a category has masks (even places) or not (odd
    # places), only both together: what is learned on one side can be put together to categories of
    # the other. A colour of its own for each category would teach that those of B are background.
    round_index, place = divmod(index, _ROUND)
    half, place = divmod(place, _ROUND // 2)
    pair, place = divmod(place, 4)
    version, side = 2 * half + place // 2, place % 2
    first_shape = 2 * (_PAIRS_PER_ROUND * round_index + pair)
    name, family, outline, max_tilt = _SHAPES[first_shape + (side ^ (version % 2))]
    color = tuple(COLORS)[(_VERSION_COLORS[version][side] + pair) % len(COLORS)]
    return ThingCategory(
        f"{color} {name}",
        family,
        outline,
        max_tilt,
        color=color,
        vivid=round_index % 2 == 0,
        texture=TEXTURE_NAMES[index % len(TEXTURE_NAMES)],
    )


THING_CATEGORIES = tuple(_thing_category(index) for index in range(len(COLORS) * len(_SHAPES)))

STUFF_CATEGORIES = (
    StuffCategory("sky", (168, 198, 222), 0.05, (14, 30), 45),
    StuffCategory("brick", (150, 112, 98), 0.4, (2, 3), 30, masonry=True),
    StuffCategory("water", (72, 104, 132), 0.55, (3, 16), 60),
    StuffCategory("grass", (104, 134, 78), 0.8, (6, 1.7), 70),
    StuffCategory("sand", (206, 190, 150), 0.9, (1.3, 1.3), 40),
)

_MIN_SIZE, _MAX_SIZE = 64, 4096  # tested up to 512
_MIN_VISIBLE_SHARE, _MIN_VISIBLE_PIXELS = 0.3, 30
_POSES_PER_OBJECT = 8
_TYPICAL_TEXTURE_SHARE = 0.7


@dataclass(frozen=True)
class SceneStyle:
    """How scenes are composed.

    Attributes:
        compounds: objects of two parts, whose categories always occur together, are among them.
        min_scale: smallest side of an object over the shorter side of the image.
        crowding: share of the objects that are placed on purpose where another one is.
        company: share of the objects after the first that are its companion on purpose: of the
            category that makes a pair with its own.
    """

    compounds: bool
    min_instances: int
    max_instances: int
    min_scale: float
    max_scale: float
    crowding: float
    company: float = 0.0


STYLES = {
    "crowded": SceneStyle(True, 2, 5, 0.2, 0.6, 0.35),
    "sparse": SceneStyle(False, 1, 2, 0.35, 0.8, 0.1),
    "together": SceneStyle(False, 2, 2, 0.35, 0.7, 0.1, company=0.8),
    "large": SceneStyle(True, 1, 4, 0.35, 0.7, 0.15),
}
"""What scenes are for: "crowded" for instances; "sparse" for image labels, from which no network
could tell apart categories that always occur together, and in which half of the scenes have one
category only; "together" for image labels of categories that mostly occur in pairs, one of each
with masks in the standard split; "large" for maps of low resolution, with parts and wholes."""


@dataclass(frozen=True)
class SceneInstance:
    """One object of a scene.

    Attributes:
        class_index: index into the `scene_categories` of the scene.
        mask: (H, W) bool, the visible part; masks of one scene are disjoint.
        attributes: `color` (one of `COLORS`) and `texture` (one of `TEXTURE_NAMES`).
    """

    class_index: int
    mask: np.ndarray
    attributes: dict[str, str]


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        stuff: (H, W) uint8: 0 where an instance is, otherwise 1 + index into `STUFF_CATEGORIES`.
        instances: the objects, in drawing order: later ones cover earlier ones.
    """

    image: np.ndarray
    stuff: np.ndarray
    instances: list[SceneInstance]


@dataclass(frozen=True)
class _Pose:
    """Centre and half sides in pixels, rotation in degrees."""

    x: float
    y: float
    half_width: float
    half_height: float
    degrees: float


@dataclass(frozen=True)
class _Patch:
    """The pixels around one posed object, clipped to the image."""

    window: tuple[slice, slice]
    label: np.ndarray
    x: np.ndarray
    y: np.ndarray
    areas: list[int]


def scene_categories(num_categories: int, style: str = "crowded") -> tuple[ThingCategory, ...]:
    """Return the categories of scenes by class index: the first of the table that the style has.

    Raises:
        ValueError: the style is not known; `num_categories` is no multiple of 4, or too large.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(map(repr, STYLES))}, got {style!r}")
    candidates = tuple(
        category
        for category in THING_CATEGORIES
        if STYLES[style].compounds or category.family not in _COMPOUND_FAMILIES
    )
    _check_range("num_categories", num_categories, 4, len(candidates))
    if num_categories % 4:
        raise ValueError(
            f"num_categories must be a multiple of 4 (a pair of shapes in two versions), got "
            f"{num_categories}."
        )
    return candidates[:num_categories]


def half_split_names(num_categories: int, style: str = "crowded") -> tuple[str, ...]:
    """Categories that keep their masks in the standard split: every second one of the table.

    Raises:
        ValueError: as :func:`scene_categories`.
    """
    return tuple(category.name for category in scene_categories(num_categories, style)[::2])


def scene_half_of(class_names: Sequence[str]) -> tuple[str, ...] | None:
    """Return `half_split_names` for the class list of some style, None if it is of no style."""
    count = len(class_names)
    for style in STYLES:
        try:
            names = [category.name for category in scene_categories(count, style)]
        except ValueError:
            continue
        if names == list(class_names):
            return half_split_names(count, style)
    return None


def render_scene(
    seed: int,
    index: int,
    *,
    size: int | tuple[int, int],
    num_categories: int,
    style: str = "crowded",
) -> Scene:
    """Draws one scene.

    Args:
        seed: 0 to 2^32 - 1.
        index: number of the scene within the seed, 0 to 2^32 - 1.
        size: image side or (height, width) in pixels, at least 64.
        num_categories: a multiple of 4; see `scene_categories`.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check_range("seed", seed, 0, 2**32 - 1)
    _check_range("index", index, 0, 2**32 - 1)
    categories = scene_categories(num_categories, style)
    shape = _height_width(size)
    random = np.random.RandomState([seed, index])
    image, stuff = _draw_background(shape, random)
    owner, instances = _draw_things(image, categories, STYLES[style], random)
    stuff[owner > 0] = 0
    return Scene(
        image=_photograph(image, random),
        stuff=stuff,
        instances=[
            SceneInstance(class_index, owner == number, attributes)
            for number, (class_index, attributes) in enumerate(instances, start=1)
        ],
    )


# --- random values: only `random_sample` is used, whose stream numpy has frozen -----------------


def _uniform(random: np.random.RandomState, low: float, high: float) -> float:
    return low + (high - low) * float(random.random_sample())


def _integer(random: np.random.RandomState, low: int, high: int) -> int:
    """Uniform over `low` to `high`, both included."""
    return low + int(random.random_sample() * (high - low + 1))


def _choice(random: np.random.RandomState, items: Sequence[_T]) -> _T:
    return items[_integer(random, 0, len(items) - 1)]


# --- background -----------------------------------------------------------------------------------


def _draw_background(
    shape: tuple[int, int], random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Textured stuff regions with clutter on them."""
    stuff = _stuff_regions(shape, random)
    image = np.empty((*shape, 3))
    for label in np.unique(stuff).tolist():
        region = stuff == label
        image[region] = _stuff_pixels(STUFF_CATEGORIES[label - 1], shape, random)[region]
    _draw_clutter(image, random)
    return image, stuff


def _draw_clutter(image: np.ndarray, random: np.random.RandomState) -> None:
    """Scatters small blobs and strokes of any colour: neither a hue nor an edge makes a thing."""
    shape = image.shape[:2]
    side = min(shape)
    for _ in range(_integer(random, 3, 9)):
        half_width = max(1.0, side * _uniform(random, 0.01, 0.025))
        half_height = max(1.0, side * _uniform(random, 0.01, 0.09))
        center = _random_center(shape, 0.0, random)
        pose = _Pose(*center, half_width, half_height, _uniform(random, 0, 360))
        hue = _uniform(random, 0, 360)
        color = _hsv(hue, _uniform(random, 0, 0.9), _uniform(random, 0.2, 0.95))
        patch = _patch(pose, (disc(),), shape)
        image[patch.window][patch.label > 0] = color


def _stuff_regions(shape: tuple[int, int], random: np.random.RandomState) -> np.ndarray:
    """Label map of 2 to 4 stuff categories: nearest site, with borders bent by noise."""
    height, width = shape
    ranks = np.argsort(random.random_sample(len(STUFF_CATEGORIES)), kind="stable").tolist()
    present = sorted(ranks[: _integer(random, 2, 4)])
    y = ((np.arange(height) + 0.5) / height)[:, None]
    x = ((np.arange(width) + 0.5) / width)[None, :]
    cell = (height / 7, width / 7)
    distances = []
    for category in present:
        dx = x - _uniform(random, 0, 1)
        dy = y - STUFF_CATEGORIES[category].altitude - _uniform(random, -0.25, 0.25)
        distances.append(0.5 * dx * dx + dy * dy + 0.3 * smooth_noise(shape, cell, random))
    nearest = np.argmin(np.stack(distances), axis=0)
    return (np.array(present, np.uint8) + 1)[nearest].astype(np.uint8)


def _stuff_pixels(
    category: StuffCategory, shape: tuple[int, int], random: np.random.RandomState
) -> np.ndarray:
    """(H, W, 3) float64 texture of one stuff category."""
    unit = min(shape) / 128
    grain = smooth_noise(shape, tuple(max(1.0, unit * g) for g in category.grain), random)
    tint = _uniform(random, -12, 12)
    level = tint + category.contrast * (grain - 0.5)
    if category.masonry:
        brick_height, brick_width = max(4, round(7 * unit)), max(8, round(15 * unit))
        row, column = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
        shifted = column + (row // brick_height % 2) * (brick_width // 2)
        joint = (row % brick_height < max(1, round(unit))) | (shifted % brick_width < round(unit))
        level = np.where(joint, level + 45, level)
    return np.array(category.color, np.float64) + level[:, :, None]


# --- things ---------------------------------------------------------------------------------------


def _draw_things(
    image: np.ndarray,
    table: Sequence[ThingCategory],
    style: SceneStyle,
    random: np.random.RandomState,
) -> tuple[np.ndarray, list[tuple[int, dict[str, str]]]]:
    """Draws objects into `image`, later ones over earlier ones."""
    shape = image.shape[:2]
    objects = _objects(table)
    owner = np.zeros(shape, np.int64)
    instances: list[tuple[int, dict[str, str]]] = []
    full_areas: list[int] = []
    poses: list[_Pose] = []
    # The last object may be a compound, which adds two instances.
    wanted = _integer(random, style.min_instances, style.max_instances - int(style.compounds))
    while len(instances) < wanted:
        classes = _choice(random, objects)
        if style.company and instances and random.random_sample() < style.company:
            classes = (instances[0][0] ^ 1,)
        categories = [table[c] for c in classes]
        for _ in range(_POSES_PER_OBJECT):
            pose = _random_thing_pose(shape, categories[0].max_tilt, poses, style, random)
            patch = _patch(pose, [category.outline for category in categories], shape)
            candidate = owner.copy()
            covered = patch.label > 0
            candidate[patch.window][covered] = patch.label[covered] + len(instances)
            if not _all_visible(candidate, full_areas + patch.areas):
                continue
            owner = candidate
            full_areas += patch.areas
            poses.append(pose)
            for part, category in enumerate(categories, start=1):
                attributes = _paint(image, patch, part, pose, category, random)
                instances.append((classes[part - 1], attributes))
            break
    return owner, instances


def _objects(table: Sequence[ThingCategory]) -> list[tuple[int, ...]]:
    """Class indices of each kind of object: a single category, or both parts of a compound."""
    objects: list[tuple[int, ...]] = []
    for first in range(0, len(table), 2):
        if table[first].family in _COMPOUND_FAMILIES:
            objects.append((first, first + 1))
        else:
            objects.extend([(first,), (first + 1,)])
    return objects


def _random_center(
    shape: tuple[int, int], margin: float, random: np.random.RandomState
) -> tuple[float, float]:
    """Point (x, y) at least `margin` pixels inside the image."""
    height, width = shape
    return _uniform(random, margin, width - margin), _uniform(random, margin, height - margin)


def _random_thing_pose(
    shape: tuple[int, int],
    max_tilt: float,
    others: Sequence[_Pose],
    style: SceneStyle,
    random: np.random.RandomState,
) -> _Pose:
    """Poses an object mostly inside the image, often in or over one of the `others`."""
    half_side = 0.5 * min(shape) * _uniform(random, style.min_scale, style.max_scale)
    narrowing = _uniform(random, 0.75, 1)
    x_share, y_share = _choice(random, ((narrowing, 1), (1, narrowing)))
    x, y = _random_center(shape, 0.7 * half_side, random)
    if others and random.random_sample() < style.crowding:
        other = _choice(random, others)
        x = other.x + other.half_width * _uniform(random, -0.5, 0.5)
        y = other.y + other.half_height * _uniform(random, -0.5, 0.5)
        # Several such steps in a row could leave the image.
        height, width = shape
        x, y = min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))
    tilt = _uniform(random, -max_tilt, max_tilt)
    return _Pose(x, y, half_side * x_share, half_side * y_share, tilt)


def _patch(pose: _Pose, outlines: Sequence[Outline], shape: tuple[int, int]) -> _Patch:
    c, s = cos_sin(pose.degrees)
    reach_x = abs(c) * pose.half_width + abs(s) * pose.half_height
    reach_y = abs(s) * pose.half_width + abs(c) * pose.half_height
    left, right = math.floor(pose.x - reach_x), math.ceil(pose.x + reach_x)
    top, bottom = math.floor(pose.y - reach_y), math.ceil(pose.y + reach_y)
    dx = (np.arange(left, right) + 0.5 - pose.x)[None, :]
    dy = (np.arange(top, bottom) + 0.5 - pose.y)[:, None]
    x = (dx * c + dy * s) / pose.half_width
    y = (dy * c - dx * s) / pose.half_height
    label = np.zeros(x.shape, np.int64)
    for part, outline in enumerate(outlines, start=1):
        label[outline(x, y)] = part
    areas = np.bincount(label.ravel(), minlength=len(outlines) + 1)[1:].tolist()
    height, width = shape
    window = (slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width)))
    inside = tuple(slice(w.start - o, w.stop - o) for w, o in zip(window, (top, left), strict=True))
    return _Patch(window, label[inside], x[inside], y[inside], areas)


def _all_visible(owner: np.ndarray, full_areas: Sequence[int]) -> bool:
    """Whether each instance shows enough of itself, out of `full_areas` pixels."""
    visible = np.bincount(owner.ravel(), minlength=len(full_areas) + 1)[1:].tolist()
    return all(
        pixels >= max(_MIN_VISIBLE_PIXELS, _MIN_VISIBLE_SHARE * full)
        for pixels, full in zip(visible, full_areas, strict=True)
    )


def _paint(
    image: np.ndarray,
    patch: _Patch,
    part: int,
    pose: _Pose,
    category: ThingCategory,
    random: np.random.RandomState,
) -> dict[str, str]:
    """Colours one part of an object in `image` and returns its attributes."""
    hue = (COLORS[category.color] + _uniform(random, -_HUE_SPREAD, _HUE_SPREAD)) % 360
    saturation = _uniform(random, 0.75, 1)
    value = _uniform(random, 0.8, 1) if category.vivid else _uniform(random, 0.35, 0.55)
    color = _hsv(hue, saturation, value)
    accent = 0.35 * color if category.vivid else color + 0.6 * (255 - color)
    if random.random_sample() < _TYPICAL_TEXTURE_SHARE:
        texture = category.texture
    else:
        texture = _choice(random, TEXTURE_NAMES)
    half_side = max(pose.half_width, pose.half_height)
    cell = max(2.0, half_side * _uniform(random, 0.16, 0.26))
    mask = patch.label == part
    depth = texture_depth(
        texture,
        patch.x[mask] * (pose.half_width / cell),
        patch.y[mask] * (pose.half_height / cell),
        random,
    )
    image[patch.window][mask] = color + depth[:, None] * (accent - color)
    return {"color": category.color, "texture": texture}


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB in [0, 255]; `hue` in degrees, the others in [0, 1]."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue / 360, saturation, value))


def _photograph(image: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """What a camera would add: uneven light, soft edges, sensor noise. Returns uint8."""
    height, width = image.shape[:2]
    light = 0.8 + 0.35 * smooth_noise((height, width), (height / 2, width / 2), random)
    lit = image * light[:, :, None]
    padded = np.pad(lit, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    soft = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
    noise = 16 * (random.random_sample((height, width, 1)) - 0.5)
    return np.clip(soft + noise, 0, 255).astype(np.uint8)


# --- files ----------------------------------------------------------------------------------------


def generate_scenes(
    root: str | os.PathLike[str],
    *,
    count: int,
    size: int | tuple[int, int],
    num_categories: int = _ROUND,
    style: str = "crowded",
    seed: int,
    progress: bool = False,
) -> Path:
    """Writes scenes 0 to `count` - 1 of a seed as a COCO data set.

    The JSON is written last and in one step: a folder with a JSON is complete. If it was made
    with the same parameters it is left as it is, so calling this again costs nothing.

    Additions to the COCO instance format:

    - `info`: the parameters and `generator_version`.
    - `images[]`: `image_labels` (ids of the thing categories in the image), `stuff_labels` (ids
      of the stuff categories) and `stuff_file_name`. File names are relative to `root`.
    - `annotations[]`: `attributes`, a dict of `color` and `texture`.
    - `stuff_categories[]`: the values of the stuff maps. Their ids are counted from 1
      independently of `categories[]`.

    Boxes and areas are those of the visible mask. Masks of one piece without holes are stored as
    polygons, all others as compressed RLE.

    Args:
        size: image side or (height, width) in pixels, at least 64.
        num_categories: a multiple of 4; see `scene_categories`.
        seed: 0 to 2^32 - 1.

    Returns:
        Path of `annotations.json`.

    Raises:
        ValueError: an argument is out of its range, or `root` holds another data set.
    """
    _check_range("count", count, 1, 10**6)
    _check_range("seed", seed, 0, 2**32 - 1)
    categories = scene_categories(num_categories, style)
    shape = _height_width(size)
    info = {
        "description": "scenes generated by maskx.data.scenes",
        "generator_version": GENERATOR_VERSION,
        "count": int(count),
        "size": list(shape),
        "num_categories": int(num_categories),
        "style": style,
        "seed": int(seed),
    }
    root = Path(root)
    json_path = root / "annotations.json"
    if json_path.exists():
        _check_same_parameters(json_path, info)
        return json_path
    for folder in ("images", "stuff"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in tqdm(range(count), desc="scenes", disable=not progress):
        scene = render_scene(seed, index, size=shape, num_categories=num_categories, style=style)
        image = _image_record(scene, index)
        _write_png(root / image["file_name"], scene.image[:, :, ::-1])
        _write_png(root / image["stuff_file_name"], scene.stuff)
        images.append(image)
        annotations.extend(
            {"id": number, "image_id": image["id"], **_annotation(instance)}
            for number, instance in enumerate(scene.instances, start=len(annotations) + 1)
        )
    dataset = {
        "info": info,
        "categories": [
            {"id": i, "name": category.name, "supercategory": category.family}
            for i, category in enumerate(categories, start=1)
        ],
        "stuff_categories": [
            {"id": i, "name": category.name, "supercategory": "stuff"}
            for i, category in enumerate(STUFF_CATEGORIES, start=1)
        ],
        "images": images,
        "annotations": annotations,
    }
    write_json(json_path, dataset, compact=True)
    return json_path


def _image_record(scene: Scene, index: int) -> dict:
    height, width = scene.stuff.shape
    return {
        "id": index,
        "file_name": f"images/{index:06d}.png",
        "stuff_file_name": f"stuff/{index:06d}.png",
        "height": height,
        "width": width,
        "image_labels": sorted({instance.class_index + 1 for instance in scene.instances}),
        "stuff_labels": [label for label in np.unique(scene.stuff).tolist() if label > 0],
    }


def _annotation(instance: SceneInstance) -> dict:
    ys = np.flatnonzero(instance.mask.any(axis=1))
    xs = np.flatnonzero(instance.mask.any(axis=0))
    top, bottom = int(ys[0]), int(ys[-1]) + 1
    left, right = int(xs[0]), int(xs[-1]) + 1
    return {
        "category_id": instance.class_index + 1,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(np.count_nonzero(instance.mask)),
        "iscrowd": 0,
        "segmentation": _segmentation(instance.mask),
        "attributes": instance.attributes,
    }


def _segmentation(mask: np.ndarray) -> list[list[float]] | dict:
    """Polygon of a mask of one piece without holes, else compressed RLE."""
    height, width = mask.shape
    # OpenCV's outline runs through pixel centres and so loses half a pixel all around. With each
    # pixel doubled and the vertices taken back to where they were, it loses only a quarter, and
    # every pixel centre of the mask is inside.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) == 1:
        vertices = contours[0][:, 0, :]
        # The vertex at which an outline starts is OpenCV's choice.
        start = int(np.lexsort((vertices[:, 0], vertices[:, 1]))[0])
        return [((np.roll(vertices, -start, axis=0) + 0.5) / 2).ravel().tolist()]
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _write_png(path: Path, pixels: np.ndarray) -> None:
    written, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not written:
        raise OSError(f"OpenCV could not encode {path}")
    path.write_bytes(data.tobytes())


# --- checks ---------------------------------------------------------------------------------------


def _check_same_parameters(json_path: Path, info: dict) -> None:
    try:
        found = json.loads(json_path.read_text(encoding="utf-8"))["info"]
        differing = [key for key in info if found.get(key) != info[key]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{json_path} was not written by generate_scenes; choose another folder"
        ) from None
    if differing:
        differences = ", ".join(
            f"{key}: found {found.get(key)!r}, asked for {info[key]!r}" for key in differing
        )
        raise ValueError(
            f"{json_path.parent} holds scenes made with other parameters ({differences}); "
            "choose another folder or delete this one"
        )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2:
        raise ValueError(
            f"size must be an integer or (height, width) from {_MIN_SIZE} to {_MAX_SIZE}, "
            f"got {size!r}"
        )
    for side in sides:
        _check_range("size", side, _MIN_SIZE, _MAX_SIZE)
    return operator.index(sides[0]), operator.index(sides[1])
