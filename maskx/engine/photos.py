"""The quick start on photographs: its settings, and what it says before it starts."""

import math
from collections.abc import Mapping
from typing import Any

from maskx.core.text import listed
from maskx.data.coco import load_coco
from maskx.data.overview import overview_of
from maskx.engine.options import QuickstartOptions
from maskx.engine.quickstart import load_data, load_split_data
from maskx.engine.system import PhotoRecipe, find_system, system_names

__all__ = ["photo_options", "plan_of_photos"]

_SHARED: Mapping[str, Any] = {
    "backbone": "efficientnet_lite0",
    "pretrained": True,
    "frozen": True,
    "masks_for": "drawn",
    "held_out": 0.2,
}
"""Options of all systems on photographs; where nothing is held out, a file is evaluated on."""

# These say what has masks, each for a system of its own.
_SAY_WHAT_HAS_MASKS = frozenset(("concept_split", "target_train"))


def recipe_of(system: str) -> PhotoRecipe:
    """Return what a system does on photographs.

    Raises:
        ValueError: it has no settings for them.
    """
    recipe = find_system(system).photos
    if recipe is None:
        known = [name for name in system_names() if find_system(name).photos is not None]
        raise ValueError(
            f"The system {system!r} has no settings for photographs, only {listed(known)}. Give "
            "--coco-train and --coco-val in place of --photos, with settings of your own."
        )
    return recipe


def photo_options(system: str, given: Mapping[str, Any]) -> QuickstartOptions:
    """Make the options of the quick start on photographs.

    Args:
        given: options that count before the settings for photographs.

    Raises:
        ValueError: the system has no settings for photographs.
    """
    options = {**_SHARED, **recipe_of(system).options, **given}
    takes_split = (
        "masks_for" in find_system(system).options and not _SAY_WHAT_HAS_MASKS & given.keys()
    )
    if "masks_for" not in given and not takes_split:
        del options["masks_for"]
    if options.get("coco_val") is not None:
        options["held_out"] = 0.0
    if options["backbone"] == "small":  # which learns from random weights, all of it
        options |= {"pretrained": False, "frozen": False} | given
    return QuickstartOptions(**options)


def plan_of_photos(system: str, options: QuickstartOptions) -> list[str]:
    """Say what will be done, about how long it takes and what is to be expected, in lines.

    Args:
        options: of :func:`photo_options`.
    """
    recipe = recipe_of(system)
    if options.masks_for is None:
        train_data, val_data = load_data(options)
    else:
        train_data, val_data, split = load_split_data(options)
    seen = overview_of(train_data.records, train_data.class_names)
    num_train = seen.num_images + _num_of_target(options)
    known = []
    if options.masks_for is not None:
        known = [each for each in seen.categories if each.name in split.with_masks]
    elif "masks_for" in find_system(system).options:
        known = [each for each in seen.categories if each.has_pixels]
    masks = sum(each.masks + each.label_maps for each in known)
    of_masks = f"; {masks} masks of {len(known)} of them" if known else ""
    held_out = " held out of them" if options.held_out else ""
    weights = "with pretrained weights" if options.pretrained else "from random weights"
    frozen = ", frozen: its features of each photograph are computed once" if options.frozen else ""
    minutes = _minutes(recipe, options, num_train, len(val_data.records))
    return [
        f"Photographs: {num_train} to train on, {len(val_data.records)}{held_out} to "
        f"evaluate on, {len(seen.categories)} categories{of_masks}.",
        f"What is done: {recipe.title}",
        f"Backbone {options.backbone} {weights}{frozen}; {options.iterations} steps of "
        f"{options.batch_size} photographs at {options.image_size} pixels in each training. "
        f"The run is written to {options.output}.",
        f"How long: about {minutes} min on two CPU cores.",
        f"What to expect: {recipe.measured}{_compared(recipe, masks, len(known))}",
        "",
    ]


def _num_of_target(options: QuickstartOptions) -> int:
    """Count the photographs of a file of its own for the target, with tags."""
    if options.target_train is None:
        return 0
    return len(load_coco(*options.target_train, strict=not options.skip_bad).records)


def _minutes(recipe: PhotoRecipe, options: QuickstartOptions, train: int, val: int) -> int:
    """Estimate the time on two CPU cores; it follows the number of pixels."""
    seconds = recipe.step_seconds * options.iterations * options.batch_size
    seconds += recipe.image_seconds * (2 * train + val)  # mirrored, too
    share = options.image_size / recipe.options["image_size"]
    return max(1, math.ceil(seconds * share**2 / 60))


def _compared(recipe: PhotoRecipe, masks: int, categories: int) -> str:
    """Say how the data compare with those that the numbers are of."""
    if not recipe.masks:
        return ""
    if masks >= recipe.masks and categories >= recipe.categories:
        return " There are as many masks and categories with masks here, so expect about as much."
    lacks = [
        word
        for word, own, other in (
            ("masks", masks, recipe.masks),
            ("categories with masks", categories, recipe.categories),
        )
        if own < other
    ]
    return f" There are fewer {' and fewer '.join(lacks)} here, so expect less."
