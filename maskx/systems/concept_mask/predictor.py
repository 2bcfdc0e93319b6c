"""Finding concepts by name in images, with a trained ConceptMask, and pictures of what is found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from maskx.core.checks import check_choice
from maskx.core.text import file_name_of
from maskx.data.images import read_rgb
from maskx.evaluation.figures import (
    contact_sheet,
    draw_heat_map,
    draw_label_map,
    plain_tile,
    save_png,
)
from maskx.systems.concept_mask.model import EmbeddingModel

_TILE_SIDE = 256
_ORDERS = ("RGB", "BGR")


@dataclass(frozen=True, eq=False)
class FoundConcept:
    """One concept in one image.

    Attributes:
        initial: (H, W) in [0, 1], the map of its word vector alone (Eq. 1).
        attention: (H, W) in [0, 1], the refined or blended map; that of an unseen word which is not
            blended, and all in stage 1, are the initial ones.
        mask_prob: (H, W) in [0, 1].
        mask: (H, W) bool, above 0.5.
        existence: how much it seems to be in the image.
        exists: whether that is above its threshold.
        borrowed: name of the concept with boxes that a part of the map was taken from, if any.
        own_share: of its own map, theta.
    """

    initial: np.ndarray
    attention: np.ndarray
    mask_prob: np.ndarray
    mask: np.ndarray
    existence: float
    exists: bool
    borrowed: str | None
    own_share: float


def said_of_map(borrowed: str | None, own_share: float) -> str | None:
    """Say how much of a map is that of which other concept; None where all of it is its own."""
    return None if borrowed is None else f"{1 - own_share:.0%} '{borrowed}'"


class ConceptPredictor:
    """Finds concepts in images.

    Args:
        blend_unseen: blend maps of unseen words with those of the nearest concept with boxes.
        model_format: order of channels that the model takes, "RGB" or "BGR".
        order: that of the images.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        *,
        blend_unseen: bool = False,
        model_format: str = "RGB",
        order: str = "RGB",
    ) -> None:
        for name, value in (("model_format", model_format), ("order", order)):
            check_choice(name, value, _ORDERS)
        self.model, self.blend_unseen = model.eval(), blend_unseen
        self._order, self._turned = order, model_format != order

    def __call__(
        self, image: np.ndarray, concepts: Sequence[str | int | np.ndarray] | None = None
    ) -> dict[str, FoundConcept]:
        """Find concepts in one image; what is computed of the image alone is shared by them.

        Args:
            image: (H, W, 3) uint8, in the order of channels of the predictor.
            concepts: names of the word table or of the unseen words, concept indices, or vectors;
                None for all of the word table that seem to exist in the image.

        Returns:
            What was found by name, in the order asked for; a concept given as a vector has the
            name "vector" and its position.
        """
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"The image has shape {image.shape} and dtype {image.dtype}. Allowed: (H, W, 3) "
                f"uint8, {self._order}."
            )
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        query = None
        if concepts is not None:
            query = self.model.ask(concepts, blended=self.blend_unseen)
        pixels = pixels.flip(0) if self._turned else pixels
        result = self.model.predict({"image": pixels}, query)
        keys = ("initial", "attention", "masks_prob", "masks")
        arrays = (result[key].cpu().numpy() for key in keys)
        scores = (result[key].tolist() for key in ("existence", "exists"))
        parts = zip(*arrays, *scores, result["borrowed"], result["own_share"].tolist(), strict=True)
        found = (FoundConcept(*part) for part in parts)
        return dict(zip(result["concepts"], found, strict=True))


@dataclass(frozen=True, eq=False)
class ConceptRow:
    """A row of a picture: (H, W, 3) uint8 RGB, and by title of their column (H, W) maps and masks.

    Maps are numbers in [0, 1].
    """

    title: str
    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    masks: Mapping[str, np.ndarray]


def draw_concepts(path: Path, rows: Sequence[ConceptRow]) -> None:
    """Write a PNG file of at least one row; all have the same columns."""
    tiles = []
    for row in rows:
        tiles.append(plain_tile(row.image, _TILE_SIDE))
        tiles += [
            draw_heat_map(row.image, values, symmetric=False, side=_TILE_SIDE)
            for values in row.maps.values()
        ]
        tiles += [
            draw_label_map(row.image, mask.astype(np.uint8), num_classes=1, side=_TILE_SIDE)
            for mask in row.masks.values()
        ]
    columns = ["image", *rows[0].maps, *rows[0].masks]
    sheet = contact_sheet(
        tiles,
        columns=len(columns),
        row_titles=[row.title for row in rows],
        column_titles=columns,
        legend=(((253, 231, 37), "maps: most"), ((128, 0, 0), "mask")),
    )
    save_png(path, sheet)


def segment_files(
    predictor: Callable[..., dict[str, FoundConcept]],
    images: Sequence[str | Path],
    output: Path,
    concepts: Sequence[str] | None = None,
) -> dict[str, dict[str, FoundConcept]]:
    """Find concepts in image files and write a picture and masks of each image.

    Of image ``photos/a.jpg`` the picture is ``a/concepts.png`` in ``output``; the mask of a concept
    is ``a/CONCEPT.png``, 0 or 255, with "_" for all but letters and digits in the name, and "_"
    behind it where another file has that name. Of an image without any concept nothing is written.

    Args:
        predictor: of RGB images.
        images: files with different names.
        concepts: names; None for all that seem to exist.

    Returns:
        What was found by name of the image, without ending, and by concept.
    """
    stems = [Path(path).stem for path in images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(
            f"Two images are named '{twice[0]}', so that one would replace the results of the "
            "other. Find concepts in one of them at a time."
        )
    results = {}
    for stem, path in zip(stems, tqdm(images, desc="images", unit="img"), strict=True):
        image = read_rgb(path)
        results[stem] = found = predictor(image, concepts)
        if not found:
            continue
        (output / stem).mkdir(parents=True, exist_ok=True)
        rows, written = [], {"concepts"}
        for name, each in found.items():
            title = f"{name} ({'exists' if each.exists else 'seems not to be there'})"
            if remark := said_of_map(each.borrowed, each.own_share):
                title += f", {remark}"
            maps = {"initial map": each.initial, "refined map": each.attention}
            rows.append(ConceptRow(title, image, maps, {"mask": each.mask}))
            file_name = file_name_of(name)
            while file_name in written:
                file_name += "_"
            written.add(file_name)
            mask = each.mask[:, :, None].repeat(3, axis=2) * np.uint8(255)
            save_png(output / stem / f"{file_name}.png", mask)
        draw_concepts(output / stem / "concepts.png", rows)
    return results
