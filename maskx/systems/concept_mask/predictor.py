"""Finding concepts by name in images, with a trained ConceptMask, and pictures of what is found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from maskx.core.word_table import WordTable, load_word_table
from maskx.evaluation.figures import (
    contact_sheet,
    draw_heat_map,
    draw_label_map,
    plain_tile,
    save_png,
)
from maskx.systems.concept_mask.model import (
    UNSEEN_NAME,
    SampleConceptMask,
    check_table,
    open_concept_mask,
)
from maskx.systems.concept_mask.steps import FoundConcept, found_concepts, image_tensor, named_query

__all__ = [
    "ConceptPredictor",
    "ConceptRow",
    "draw_concepts",
    "read_rgb",
    "segment_files",
]

_TILE_SIDE = 256


class ConceptPredictor:
    """Finds concepts in images.

    Args:
        model: a trained model.
        table: the word table that it was trained with.
        unseen: words that are not in the table, found by their vectors alone.

    Raises:
        ValueError: the table is another.
    """

    def __init__(
        self, model: SampleConceptMask, table: WordTable, *, unseen: WordTable | None = None
    ) -> None:
        check_table(table, model.table_hash, Path("model"))
        self.model, self.table, self.unseen = model.eval(), table, unseen

    @classmethod
    def open(cls, run: str | Path, *, device: torch.device | str = "cpu") -> "ConceptPredictor":
        """Open the model of a finished run with the words that lie beside it.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or files do not fit together.
        """
        model, table, _ = open_concept_mask(run, device=device)
        unseen = Path(run) / UNSEEN_NAME
        return cls(model, table, unseen=load_word_table(unseen) if unseen.is_file() else None)

    def __call__(
        self, image: np.ndarray, concepts: Sequence[str | int | np.ndarray] | None = None
    ) -> dict[str, FoundConcept]:
        """Find concepts in one image; what is computed of the image alone is shared by them.

        Args:
            image: (H, W, 3) uint8 RGB.
            concepts: names of the word table or of the unseen words, concept indices, or vectors;
                None for all of the word table that seem to exist in the image.

        Returns:
            What was found by name, in the order asked for; a concept given as a vector has the
            name "vector" and its position.

        Raises:
            ValueError: the image is of another kind or too small, the list is empty, or a concept
                is not known or asked for twice.
        """
        sample = {"image": image_tensor(image, "RGB")}
        names, query = None, None
        if concepts is not None:
            names, query = named_query(self.table, self.unseen, concepts)
        result = self.model.predict(sample, query)
        if names is None:
            names = [self.table.names[index] for index in result.indices.tolist()]
        return found_concepts(result, names)


@dataclass(frozen=True, eq=False)
class ConceptRow:
    """A row of a picture.

    Attributes:
        title: such as the name of the concept.
        image: (H, W, 3) uint8 RGB.
        maps: numbers in [0, 1] by the title of their column, each (H, W).
        masks: (H, W) bool by the title of their column.
    """

    title: str
    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    masks: Mapping[str, np.ndarray]


def draw_concepts(path: Path, rows: Sequence[ConceptRow]) -> None:
    """Draw concepts in images: the image, maps and masks.

    Args:
        path: PNG file to write.
        rows: with the same columns, at least one.
    """
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


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image file of any size.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no readable image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Image '{path}': there is no such file. Correct the path.")
    content = np.fromfile(path, np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    if image is None:
        raise ValueError(f"'{path}' cannot be read. Is the file an image, and complete?")
    return np.ascontiguousarray(image[:, :, ::-1])


def segment_files(
    predictor: ConceptPredictor,
    images: Sequence[str | Path],
    output: Path,
    concepts: Sequence[str] | None = None,
) -> dict[str, dict[str, FoundConcept]]:
    """Find concepts in image files and write a picture and masks of each image.

    Of image ``photos/a.jpg`` the picture is ``a/concepts.png`` in ``output``; the mask of a concept
    is ``a/CONCEPT.png``, 0 or 255, with "_" for all but letters and digits in the name, and "_"
    behind it where another file has that name.

    Args:
        predictor: of a trained model.
        images: files with different names.
        output: folder to write to; it is created.
        concepts: names; None for all that seem to exist. Of an image without any nothing is
            written.

    Returns:
        What was found by name of the image, without ending, and by concept.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: an image cannot be read, two have one name, or a concept is not known.
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
            maps = {"initial map": each.initial, "refined map": each.attention}
            rows.append(ConceptRow(title, image, maps, {"mask": each.mask}))
            file_name = "".join(c if c.isalnum() else "_" for c in name)
            while file_name in written:
                file_name += "_"
            written.add(file_name)
            mask = each.mask[:, :, None].repeat(3, axis=2) * np.uint8(255)
            save_png(output / stem / f"{file_name}.png", mask)
        draw_concepts(output / stem / "concepts.png", rows)
    return results
