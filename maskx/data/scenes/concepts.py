"""Generated scenes with concepts of every kind, for ConceptMask.

A thing of `maskx.data.scenes.generator` is a shape in a colour ("green plus"). The concepts of a
scene are its things, their shapes ("plus"), colours ("green") and textures ("stripes"), groups of
shapes ("pointed") and of colours ("cold"), wholes of two parts ("lamp" = "lamp shade" + "lamp
stand") and the stuff around ("grass"). They lie over one another as the tags of a photograph do:
each pixel of an object belongs to at least five of them, so that what a name means can be learned
from what it occurs with.

The files have true masks of all concepts, for evaluation. What training may see of them is said by
:func:`scene_concept_lists`: masks of half of the things, boxes of others and of some shapes, tags
of the rest. Four things and one shape are *unseen*: training shows them without their names, but
with the tags of their colours and shapes. Their vectors come from what they occur with in the tag
lists of :func:`write_scene_tags`.
"""

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskx.core.files import write_json, written_text
from maskx.data.coco import read_coco_json
from maskx.data.label_maps import read_label_map
from maskx.data.masks import decode_segmentation, encode_masks
from maskx.data.scenes.generator import (
    COLORS,
    STUFF_CATEGORIES,
    SceneInstance,
    generate_scenes,
    half_split_names,
    render_scene,
    scene_categories,
)
from maskx.data.scenes.shapes import TEXTURE_NAMES

__all__ = [
    "generate_concept_scenes",
    "scene_concept_kinds",
    "scene_concept_lists",
    "scene_concept_masks",
    "write_scene_tags",
]

# Raise it with every change of the concepts: a file of another version is written again.
_VERSION = 1
_STYLE, _NUM_THINGS = "large", 40
_TAG_SCENE_SIZE = 64  # the smallest: of these scenes only the tags are kept

# The two parts of one object are neighbours in the table and are drawn one after the other.
_WHOLES = {"lamp shade": "lamp", "lamp stand": "lamp", "flag cross": "flag", "flag field": "flag"}
_GROUPS = {
    "thick ring": "round",
    "crescent": "round",
    "square frame": "square",
    "grid": "square",
    "plus": "pointed",
    "five-point star": "pointed",
    "red": "warm",
    "yellow": "warm",
    "green": "cold",
    "blue": "cold",
}

# A rim of stuff between the gaps of an object is no tag: 1/64 of an image of 128 pixels is 4 cells
# of an attention map of stride 8.
_MIN_STUFF_SHARE = 1 / 64

# Parts always occur together, so tags alone cannot tell "lamp shade" from "lamp stand". The other
# shapes are what is nearest to the things with tags only among all that has boxes.
_BOXED_SHAPES = (*_WHOLES, "plus", "grid", "thick ring", "five-point star")
# Things of the half without masks. All the parts among them have boxes.
_BOXED_WHOLE_THINGS = ("yellow thick ring", "green crescent", "red crescent", "blue square frame")
_UNSEEN = ("green plus", "blue grid", "red five-point star", "yellow square frame", "crescent")

_THINGS = scene_categories(_NUM_THINGS, _STYLE)
_SHAPES = tuple(thing.name.removeprefix(f"{thing.color} ") for thing in _THINGS)


def scene_concept_kinds() -> dict[str, str]:
    """Return the kind of every concept by name, in the order of the categories of the files.

    Kinds are "thing", "shape", "whole", "group", "color", "texture" and "stuff".
    """
    names = {
        "thing": [thing.name for thing in _THINGS],
        "shape": _SHAPES,
        "whole": _WHOLES.values(),
        "group": _GROUPS.values(),
        "color": COLORS,
        "texture": TEXTURE_NAMES,
        "stuff": [stuff.name for stuff in STUFF_CATEGORIES],
    }
    return {name: kind for kind in names for name in names[kind]}


def scene_concept_lists() -> dict[str, tuple[str, ...]]:
    """Return what training may see: 20 concepts with masks, 20 with boxes, 26 with tags, 5 unseen.

    Neither colour nor shape tells the level of a thing: every shape has masks in two colours and
    none in the two others.

    Returns:
        ``vocabulary``, the first 66; ``boxed``, those with masks among them; ``masked``;
        ``unseen``.
    """
    masked = half_split_names(_NUM_THINGS, _STYLE)
    boxed_parts = [
        thing.name
        for thing, shape in zip(_THINGS, _SHAPES, strict=True)
        if shape in _WHOLES and thing.name not in masked
    ]
    return {
        "vocabulary": tuple(name for name in scene_concept_kinds() if name not in _UNSEEN),
        "boxed": (*masked, *boxed_parts, *_BOXED_WHOLE_THINGS, *_BOXED_SHAPES),
        "masked": tuple(masked),
        "unseen": _UNSEEN,
    }


def scene_concept_masks(
    instances: Sequence[SceneInstance], stuff: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """List the concepts of one scene with their visible pixels.

    Args:
        instances: things of a scene of style "large" with 40 categories, in drawing order.
        stuff: (H, W), the stuff map of the scene.

    Returns:
        (name, (H, W) bool mask): a thing and its shape for every instance, a whole for every pair
        of parts, each group, colour, texture and stuff once. Masks have at least one pixel, those
        of stuff 1/64 of the image.
    """
    found: list[tuple[str, np.ndarray]] = []
    shared: dict[str, np.ndarray] = {}
    for instance in instances:
        shape = _SHAPES[instance.class_index]
        color, texture = (instance.attributes[key] for key in ("color", "texture"))
        found += [(_THINGS[instance.class_index].name, instance.mask), (shape, instance.mask)]
        groups = [_GROUPS[name] for name in (shape, color) if name in _GROUPS]
        for name in (*groups, color, texture):
            shared[name] = shared.get(name, False) | instance.mask
    for first, second in itertools.pairwise(instances):
        is_pair = first.class_index % 2 == 0 and second.class_index == first.class_index + 1
        if is_pair and _SHAPES[first.class_index] in _WHOLES:
            found.append((_WHOLES[_SHAPES[first.class_index]], first.mask | second.mask))
    for label, category in enumerate(STUFF_CATEGORIES, start=1):
        region = stuff == label
        if np.count_nonzero(region) >= _MIN_STUFF_SHARE * stuff.size:
            shared[category.name] = region
    return found + list(shared.items())


def generate_concept_scenes(
    root: str | os.PathLike[str],
    *,
    count: int,
    size: int | tuple[int, int],
    seed: int,
    progress: bool = False,
) -> Path:
    """Write scenes with the true masks and tags of all their concepts as a COCO data set.

    The folder is one of `maskx.data.scenes.generator.generate_scenes` with the style "large",
    beside whose files `concepts.json` is written, last and in one step. Its categories are all
    concepts, the unseen ones too, with their kind as `supercategory`; its annotations are those of
    :func:`scene_concept_masks`; `image_labels` of an image are the ids of all concepts in it.
    Calling this again with the same arguments costs next to nothing.

    Args:
        size: image side or (height, width) in pixels, at least 64.
        seed: 0 to 2^32 - 1.

    Returns:
        Path of `concepts.json`.
    """
    scenes_json = generate_scenes(
        root,
        count=count,
        size=size,
        num_categories=_NUM_THINGS,
        style=_STYLE,
        seed=seed,
        progress=progress,
    )
    path = scenes_json.with_name("concepts.json")
    scenes = read_coco_json(scenes_json)
    info = {**scenes["info"], "concepts_version": _VERSION}
    if path.exists() and read_coco_json(path).get("info") == info:
        return path

    things = defaultdict(list)
    for annotation in scenes["annotations"]:
        things[annotation["image_id"]].append(annotation)
    kinds = scene_concept_kinds()
    category_ids = {name: number for number, name in enumerate(kinds, start=1)}
    images, annotations = [], []
    for image in tqdm(scenes["images"], desc="concepts", disable=not progress):
        instances = _things(things[image["id"]], image["height"], image["width"])
        stuff = read_label_map(
            scenes_json.parent / image["stuff_file_name"],
            image["height"],
            image["width"],
            num_classes=len(STUFF_CATEGORIES),
            image_id=image["id"],
        )
        entries = _annotations(scene_concept_masks(instances, stuff), category_ids)
        kept = {key: image[key] for key in ("id", "file_name", "height", "width")}
        images.append({**kept, "image_labels": sorted({e["category_id"] for e in entries})})
        annotations += [
            {"id": number, "image_id": image["id"], **entry}
            for number, entry in enumerate(entries, start=len(annotations) + 1)
        ]
    dataset = {
        "info": info,
        "categories": [
            {"id": category_ids[name], "name": name, "supercategory": kind}
            for name, kind in kinds.items()
        ],
        "images": images,
        "annotations": annotations,
    }
    write_json(path, dataset, compact=True)
    return path


def write_scene_tags(
    path: str | os.PathLike[str],
    *,
    count: int,
    seed: int,
    unseen: bool = False,
    progress: bool = False,
) -> Path:
    """Write the tags of scenes 0 to `count` - 1 of a seed, without any image.

    Word vectors are learned from such a list, and with `unseen` it says what the unseen concepts
    occur with, for their fold-in.

    Args:
        path: file to write, JSON lines ``{"image_id": 0, "tags": ["green", "plus", ...]}``; it is
            there whole or not at all.
        seed: 0 to 2^32 - 1; another one than that of the images, to have other scenes.
        unseen: whether unseen concepts are in the lists.

    Returns:
        ``path``.
    """
    path = Path(path)
    left_out = () if unseen else _UNSEEN
    with written_text(path) as file:
        for index in tqdm(range(count), desc="tags", disable=not progress):
            scene = render_scene(
                seed, index, size=_TAG_SCENE_SIZE, num_categories=_NUM_THINGS, style=_STYLE
            )
            present = {name for name, _ in scene_concept_masks(scene.instances, scene.stuff)}
            tags = [n for n in scene_concept_kinds() if n in present and n not in left_out]
            file.write(json.dumps({"image_id": index, "tags": tags}) + "\n")
    return path


def _things(annotations: Sequence[dict], height: int, width: int) -> list[SceneInstance]:
    """Read the things of one image of a file of `generate_scenes`."""
    return [
        SceneInstance(
            annotation["category_id"] - 1,
            decode_segmentation(annotation["segmentation"], height, width),
            annotation["attributes"],
        )
        for annotation in annotations
    ]


def _annotations(
    concepts: Sequence[tuple[str, np.ndarray]], category_ids: dict[str, int]
) -> list[dict]:
    entries = []
    encoded = encode_masks(np.stack([mask for _, mask in concepts]))
    for (name, mask), segmentation in zip(concepts, encoded, strict=True):
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top = int(xs[0]), int(ys[0])
        entries.append(
            {
                "category_id": category_ids[name],
                "bbox": [left, top, int(xs[-1]) + 1 - left, int(ys[-1]) + 1 - top],
                "area": int(np.count_nonzero(mask)),
                "iscrowd": 0,
                "segmentation": segmentation,
            }
        )
    return entries
