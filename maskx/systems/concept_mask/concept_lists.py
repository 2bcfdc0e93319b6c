"""Which concepts of several data sets have boxes and masks: the lists of ConceptMask, section 5.1.

The paper merges boxes of Open Images and Visual Genome, drops rare classes, and has masks of the
80 classes of COCO, which are among the 750 with boxes.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskx.core.text import listed
from maskx.core.word_table import spelled
from maskx.data.coco import read_coco_json
from maskx.systems.concept_mask.concept_sets import ConceptSplit

__all__ = ["ConceptListSummary", "choose_concepts", "format_concept_lists"]


@dataclass(frozen=True)
class ConceptListSummary:
    """What `choose_concepts` found.

    Attributes:
        box_images: Images with boxes by concept of the vocabulary, over all files.
        rare: Those of fewer images than asked for; their boxes are withheld.
        unknown: Images with boxes by name that is not in the vocabulary; they are listed as unseen.
    """

    box_images: Counter[str]
    rare: Counter[str]
    unknown: Counter[str]


def choose_concepts(
    vocabulary: Sequence[str],
    *,
    boxes: Sequence[str | os.PathLike[str]],
    masks: str | os.PathLike[str],
    min_images: int = 8,
) -> tuple[ConceptSplit, ConceptListSummary]:
    """Make the lists of concepts with boxes and with masks.

    Masked are the categories of the file of masks; boxed are these and the categories of the files
    of boxes that are in enough images. Names that are not in the vocabulary are listed as unseen,
    so that what is labelled as one is withheld.

    Args:
        vocabulary: Names of a word table.
        boxes: COCO files with boxes; that of masks counts too.
        masks: COCO file with masks.
        min_images: Images with a box that a category needs, over all files. 8 is the least in the
            paper, which does not say where it drew the line.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is no COCO file, `min_images` is below 1, or a category with masks is not
            in the vocabulary.
    """
    if min_images < 1:
        raise ValueError(f"min_images is {min_images}. Allowed: at least 1.")
    known = set(map(spelled, vocabulary))
    found: Counter[str] = Counter()
    for path in boxes:
        found.update(_images_by_category(path))
    of_masks = _images_by_category(masks)
    found.update(of_masks)
    missing = [name for name in of_masks if name not in known]
    if missing:
        raise ValueError(
            f"{os.fspath(masks)}: {len(missing)} of {len(of_masks)} categories with masks are not "
            f"among the {len(known)} concepts of the vocabulary: {listed(missing)}. Add tags of "
            "them before word vectors are learned, or lower --min-count there."
        )
    in_vocabulary = Counter({name: n for name, n in found.items() if n and name in known})
    often = [name for name, n in in_vocabulary.items() if n >= min_images and name not in of_masks]
    split = ConceptSplit(
        vocabulary=tuple(vocabulary),
        boxed=(*of_masks, *sorted(often)),
        masked=tuple(of_masks),
        unseen=tuple(sorted(name for name, n in found.items() if n and name not in known)),
    )
    boxed = frozenset(split.boxed)
    return split, ConceptListSummary(
        box_images=in_vocabulary,
        rare=Counter({name: n for name, n in in_vocabulary.items() if name not in boxed}),
        unknown=Counter({name: found[name] for name in split.unseen}),
    )


def format_concept_lists(split: ConceptSplit, summary: ConceptListSummary) -> str:
    """Lay out the lists and what was left out for people."""
    without = [name for name in split.boxed if not summary.box_images[name]]
    lines = [
        f"{len(split.vocabulary)} concepts: {len(split.masked)} with masks, "
        f"{len(split.boxed)} with boxes."
    ]
    for what, names in (
        ("Of these without a box in the files", without),
        ("Too rare for the list of boxes", [name for name, _ in summary.rare.most_common()]),
        (
            "Not in the vocabulary, listed as unseen",
            [name for name, _ in summary.unknown.most_common()],
        ),
    ):
        lines.append(f"{what}: {f'{len(names)}, {listed(names)}' if names else 'none'}.")
    return "\n".join(lines)


def _images_by_category(path: str | os.PathLike[str]) -> Counter[str]:
    """Count the images with a box of each category of a file, in its order, also 0."""
    content = read_coco_json(Path(path))
    categories = sorted(content["categories"], key=lambda category: category["id"])
    name_of = {category["id"]: spelled(category["name"]) for category in categories}
    images = Counter(
        name
        for name, _ in {(name_of[a["category_id"]], a["image_id"]) for a in content["annotations"]}
    )
    return Counter({name: images[name] for name in name_of.values()})
