"""Tags, boxes and masks of ConceptMask: three lists of concepts and the images of each.

"ConceptMask: Large-Scale Segmentation from Semantic Concepts" (Wang et al., ECCV 2018), sections 3
and 5.1: a vocabulary known by tags (18K), some of it with boxes (750), some of those with masks
(80). A *concept index* is a place in the vocabulary, which is the row of the word table. Concepts
are matched with the class lists of data sets by name, '_' and ' ' being the same. Records are those
of `maskx.data.coco.load_coco` with concept indices for class indices.
"""

import dataclasses
import difflib
import functools
import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskx.core.files import parse_json, write_json
from maskx.core.text import listed
from maskx.core.word_table import spelled
from maskx.data.coco import CocoData, read_coco_json
from maskx.data.scenes.concepts import scene_concept_lists
from maskx.data.splits import check_masks
from maskx.data.tag_lists import TagList
from maskx.supervision import Supervision, split_one_side

logger = logging.getLogger(__name__)

_BOX_KEYS = ("id", "bbox", "iscrowd")
_IMAGE_KEYS = ("file_name", "height", "width", "image_id")

Record = dict[str, Any]


@dataclass(frozen=True)
class ConceptSplit:
    """Which concepts have masks, which have boxes, which have tags only.

    Names are held with spaces for underscores, as word tables hold them.

    Attributes:
        vocabulary: all concepts with tags, by concept index.
        masked: those with masks; they have boxes too.
        unseen: concepts of the data sets that training is to know nothing of, not in the
            vocabulary; what is labelled as one is withheld.
    """

    vocabulary: tuple[str, ...]
    boxed: tuple[str, ...]
    masked: tuple[str, ...]
    unseen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            names = tuple(map(spelled, getattr(self, field.name)))
            object.__setattr__(self, field.name, names)
            repeated = [name for name, times in Counter(names).items() if times > 1]
            if repeated:
                raise ValueError(
                    f"The list '{field.name}' has {listed(repeated)} more than once ('_' and ' ' "
                    "are the same). Every concept stands in it once."
                )
        if not self.vocabulary:
            raise ValueError(
                "The vocabulary is empty. List the concepts that images are tagged with."
            )
        for inner, outer in (("boxed", "vocabulary"), ("masked", "boxed")):
            known = frozenset(getattr(self, outer))
            missing = [name for name in getattr(self, inner) if name not in known]
            if missing:
                raise ValueError(
                    f"{len(missing)} concepts of the list '{inner}' are not in '{outer}': "
                    f"{listed(missing)}.{_closest(missing[0], getattr(self, outer))} Add them to "
                    f"'{outer}' or take them out of '{inner}'."
                )
        known = sorted(set(self.unseen) & set(self.vocabulary))
        if known:
            raise ValueError(
                f"Unseen concepts are in the vocabulary: {listed(known)}. Take them out of one of "
                "the two lists."
            )

    @functools.cached_property
    def boxed_indices(self) -> tuple[int, ...]:
        """Concept indices with boxes, ascending."""
        return self._indices(self.boxed)

    @functools.cached_property
    def masked_indices(self) -> tuple[int, ...]:
        """Concept indices with masks, ascending."""
        return self._indices(self.masked)

    @functools.cached_property
    def levels(self) -> tuple[str, ...]:
        """Level of each concept of the vocabulary."""
        boxed, masked = frozenset(self.boxed_indices), frozenset(self.masked_indices)
        return tuple(
            "mask" if index in masked else "box" if index in boxed else "image"
            for index in range(len(self.vocabulary))
        )

    def level_of(self, index: int) -> str:
        """Return the level of a concept index; -1, outside the vocabulary, is "unseen"."""
        if index == -1:
            return "unseen"
        if not 0 <= index < len(self.vocabulary):
            raise ValueError(
                f"Concept index {index} is outside the vocabulary. Allowed: 0 to "
                f"{len(self.vocabulary) - 1}, or -1 for an unseen concept."
            )
        return self.levels[index]

    def _indices(self, names: Sequence[str]) -> tuple[int, ...]:
        position = {name: index for index, name in enumerate(self.vocabulary)}
        return tuple(sorted(position[name] for name in names))


def scene_concept_split() -> ConceptSplit:
    """Return the split of the generated scenes with concepts."""
    return ConceptSplit(**scene_concept_lists())


def read_concept_split(
    path: str | Path,
    vocabulary: Sequence[str] | None = None,
    *,
    default: Sequence[str] | None = None,
) -> ConceptSplit:
    """Read a split from a JSON file.

    Args:
        path: file ``{"vocabulary": [...], "boxed": [...], "masked": [...], "unseen": [...]}``,
            of which `unseen` may be left out.
        vocabulary: what the concept indices count, such as the names of a word table. A file that
            lists a vocabulary must list the same.
        default: vocabulary of a file that lists none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such concept split. Give a JSON file with the lists "
            "'vocabulary', 'boxed' and 'masked'."
        )
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Concept split {path} is not valid JSON: {error}.") from error
    required, others = {"boxed", "masked"}, {"vocabulary", "unseen"}
    if not isinstance(content, dict) or not required <= set(content) <= required | others:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"Concept split {path} holds {found}. Allowed is a JSON object with the lists 'boxed' "
            "and 'masked' and, if there are any, 'vocabulary' and 'unseen'."
        )
    for key, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"Concept split {path}: {key} must be a list of names, got {names!r:.80}."
            )
    names = content.setdefault("vocabulary", vocabulary or default)
    if names is None:
        raise ValueError(
            f"Concept split {path} lists no 'vocabulary', and none was given. Add it, or give the "
            "word table that the split is for."
        )
    difference = vocabulary_difference(names, vocabulary or names)
    if difference is not None:
        raise ValueError(
            f"Concept split {path} is of another vocabulary: {difference}. Use the word table that "
            "the split was made for, or leave 'vocabulary' out of the file."
        )
    try:
        return ConceptSplit(**content)
    except ValueError as error:
        raise ValueError(f"Concept split {path}: {error}") from None


def write_concept_split(path: str | Path, split: ConceptSplit) -> None:
    """Write a split as :func:`read_concept_split` reads it, whole or not at all."""
    write_json(Path(path), dataclasses.asdict(split))


@dataclass(frozen=True)
class ConceptSets:
    """Training images by what is known of them; an image may be in several sets.

    Records hold `file_name`, `image_id`, `supervision`, `image_labels` (sorted concept indices),
    `annotations` and, unless they are of a tag list, `height` and `width`.

    Attributes:
        tagged: images with tags, without annotations.
        boxed: images with boxes of boxed concepts; their annotations are `id`, `bbox`
            ([x1, y1, x2, y2], absolute pixels), `class_index` (a concept index) and `iscrowd`.
        masked: images with annotations of masked concepts, which have a `segmentation` if the file
            has one; at least one concept has those of all its instances.
        withheld: number of things that are in the files and not in the sets, by kind.
    """

    split: ConceptSplit
    tagged: list[Record]
    boxed: list[Record]
    masked: list[Record]
    withheld: Mapping[str, int]


def concept_sets(
    split: ConceptSplit,
    *,
    tags: CocoData | TagList | None = None,
    boxes: CocoData | None = None,
    masks: CocoData | None = None,
    tag_images: str | Path = "",
) -> ConceptSets:
    """Make the training sets of the three stages from files with tags, boxes and masks.

    Classes are matched with concepts by name. What a level may not see is withheld, so that no
    reader on any host can meet it: everything labelled as an unseen concept, boxes of concepts
    that are not boxed, masks of concepts that are not masked. It is counted and logged. One file
    may serve for all three.

    Args:
        tags: a file of whose images the `image_labels` are taken, or a tag list, whose images have
            neither `height` nor `width`.
        tag_images: folder of the images of a tag list, joined to its image ids.
    """
    withheld: Counter[str] = Counter()
    tagged = [] if tags is None else _tagged(split, tags, tag_images, withheld)
    boxed = [] if boxes is None else _annotated(split, boxes, Supervision.BOX, withheld)
    masked = [] if masks is None else _annotated(split, masks, Supervision.MASK, withheld)
    if masks is not None:
        claimed = split_one_side("masked", split.vocabulary, with_masks=split.masked)
        check_masks(masked, claimed)
    withheld = +withheld  # without zeros
    if withheld:
        counts = ", ".join(f"{number} {kind}" for kind, number in withheld.items())
        logger.info("Not in the training sets: %s.", counts)
    return ConceptSets(split, tagged, boxed, masked, withheld)


def fully_masked(annotations: Sequence[Mapping[str, Any]]) -> list[int]:
    """List the classes of an image of which all instances have a mask, in ascending order."""
    present = {annotation["class_index"] for annotation in annotations}
    return sorted(present - {a["class_index"] for a in annotations if "segmentation" not in a})


def vocabulary_difference(found: Sequence[str], asked: Sequence[str]) -> str | None:
    """Say how the vocabulary of a file differs from the one asked for; None if it does not."""
    found, asked = [*map(spelled, found)], [*map(spelled, asked)]
    if found == asked:
        return None
    if len(found) != len(asked):
        return f"it has {len(found)} concepts, not {len(asked)}"
    index = next(i for i, (a, b) in enumerate(zip(found, asked, strict=True)) if a != b)
    return f"concept {index} is '{found[index]}', not '{asked[index]}'"


def _tagged(
    split: ConceptSplit, tags: CocoData | TagList, folder: str | Path, withheld: Counter[str]
) -> list[Record]:
    if isinstance(tags, CocoData):
        matched = _Matched(split, tags.class_names, tags.json_file)
        images = ((_image_of(record), record["image_labels"]) for record in tags.records)
    else:
        matched = _Matched(split, tags.names, tags.source)
        for image_id in tags.image_ids:
            if not isinstance(image_id, str):
                raise ValueError(
                    f"{tags.source}: image {image_id!r} of the tag list has no file name, so it "
                    "cannot be trained on. Give every image its 'file_name'."
                )
        images = (
            ({"file_name": os.path.join(folder, name), "image_id": name}, tags.tags_of(n).tolist())
            for n, name in enumerate(tags.image_ids)
        )
    records = []
    for image, labels in images:
        concepts = matched.concepts(labels, image["image_id"])
        withheld["tags of unseen concepts"] += len(labels) - len(concepts)
        withheld["images without tags"] += not concepts
        if concepts:
            level = Supervision.IMAGE.value
            records.append(
                {**image, "image_labels": concepts, "annotations": [], "supervision": level}
            )
    if not records:
        raise ValueError(
            f"{matched.source}: no image has a tag of the vocabulary. Give a list with tags; in a "
            "COCO-style file they are the 'image_labels' of images."
        )
    found = {concept for record in records for concept in record["image_labels"]}
    matched.warn_of_missing(range(len(split.vocabulary)), found, "tag")
    return records


def _annotated(
    split: ConceptSplit, data: CocoData, level: Supervision, withheld: Counter[str]
) -> list[Record]:
    """Keep the annotations of the concepts that have boxes, or masks."""
    of_boxes = level is Supervision.BOX
    indices, keys, list_name, plural = (
        (split.boxed_indices, _BOX_KEYS, "boxed", "boxes")
        if of_boxes
        else (split.masked_indices, (*_BOX_KEYS, "segmentation"), "masked", "masks")
    )
    matched = _Matched(split, data.class_names, data.json_file)
    allowed, found = frozenset(indices), set()
    records = []
    for record in data.records:
        annotations = []
        for annotation in record["annotations"]:
            concept = matched.concept(annotation["class_index"], record["image_id"])
            if concept in allowed:
                kept = {key: annotation[key] for key in keys if key in annotation}
                annotations.append({**kept, "class_index": concept})
            elif of_boxes or "segmentation" in annotation:
                withheld[f"{plural} of concepts that are not to have any"] += 1
        usable = {a["class_index"] for a in annotations} if of_boxes else fully_masked(annotations)
        found.update(usable)
        withheld[f"images without usable {plural}"] += not usable
        if usable:
            concepts = matched.concepts(record["image_labels"], record["image_id"])
            labels = {"image_labels": concepts, "annotations": annotations}
            records.append({**_image_of(record), **labels, "supervision": level.value})
    if not records:
        names = [split.vocabulary[index] for index in indices]
        raise ValueError(
            f"{data.json_file}: no image has usable {plural} of the {len(names)} concepts of the "
            f"list '{list_name}': {listed(names)}. Its classes are {listed(data.class_names)}. Add "
            f"those with {plural} to the list, or give another file."
        )
    matched.warn_of_missing(indices, found, level.value)
    return records


class _Matched:
    """Concepts of the labels of a file."""

    def __init__(self, split: ConceptSplit, names: Sequence[str], source: str | Path) -> None:
        self.split, self.names, self.source = split, names, source
        places: dict[str, int | None] = {n: i for i, n in enumerate(split.vocabulary)}
        places |= dict.fromkeys(split.unseen)
        self.places = [places.get(spelled(name), -1) for name in names]

    def concept(self, label: int, image_id: int | str) -> int | None:
        """Concept index, None for unseen concepts."""
        concept, vocabulary = self.places[label], self.split.vocabulary
        if concept == -1:
            name = spelled(self.names[label])
            raise ValueError(
                f"{self.source}: image {image_id!r} is labelled with '{name}', which is not among "
                f"the {len(vocabulary)} concepts of the vocabulary.{_closest(name, vocabulary)} "
                "Rename it in the file, add it to the vocabulary (the word table needs a vector "
                "for it), or list it as 'unseen', which withholds its labels."
            )
        return concept

    def concepts(self, labels: Sequence[int], image_id: int | str) -> list[int]:
        """Concept indices of the labels of an image, sorted, without the unseen ones."""
        return sorted({self.concept(label, image_id) for label in labels} - {None})

    def warn_of_missing(self, indices: Sequence[int], found: Collection[int], what: str) -> None:
        missing = [self.split.vocabulary[index] for index in indices if index not in found]
        if missing:
            logger.warning(
                "%s: %d of %d concepts have no usable %s in it: %s.",
                self.source,
                len(missing),
                len(indices),
                what,
                listed(missing),
            )


def _image_of(record: Mapping[str, Any]) -> Record:
    return {key: record[key] for key in _IMAGE_KEYS}


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f" Closest to '{name}': {listed(close)}." if close else ""


@dataclass(frozen=True)
class ConceptListSummary:
    """What `choose_concepts` found.

    Attributes:
        box_images: images with boxes by concept of the vocabulary, over all files.
        rare: those of fewer images than asked for; their boxes are withheld.
        unknown: images with boxes by name that is not in the vocabulary; it is listed as unseen.
    """

    box_images: Counter[str]
    rare: Counter[str]
    unknown: Counter[str]


def choose_concepts(
    vocabulary: Sequence[str],
    *,
    boxes: Sequence[str | Path],
    masks: str | Path,
    min_images: int = 8,
) -> tuple[ConceptSplit, ConceptListSummary]:
    """Make the lists of concepts with boxes and with masks, as in section 5.1.

    Masked are the categories of the file of masks; boxed are these and the categories of the files
    of boxes that are in enough images. Names that are not in the vocabulary are listed as unseen,
    so that what is labelled as one is withheld.

    Args:
        min_images: images with a box that a category needs, over all files. 8 is the least in the
            paper, which does not say where it drew the line.
    """
    if min_images < 1:
        raise ValueError(f"min_images is {min_images}. Allowed: at least 1.")
    known = set(map(spelled, vocabulary))
    of_masks = _images_by_category(masks)
    found: Counter[str] = Counter()
    for counted in (*map(_images_by_category, boxes), of_masks):
        found.update(counted)
    missing = [name for name in of_masks if name not in known]
    if missing:
        raise ValueError(
            f"{masks}: {len(missing)} of {len(of_masks)} categories with masks are not "
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
    rare = Counter({name: n for name, n in in_vocabulary.items() if name not in boxed})
    unknown = Counter({name: found[name] for name in split.unseen})
    return split, ConceptListSummary(in_vocabulary, rare, unknown)


def format_concept_lists(split: ConceptSplit, summary: ConceptListSummary) -> str:
    """Lay out the lists and what was left out for people."""
    without = [name for name in split.boxed if not summary.box_images[name]]
    rare, unknown = ([*dict(each.most_common())] for each in (summary.rare, summary.unknown))
    lines = [
        f"{len(split.vocabulary)} concepts: {len(split.masked)} with masks, "
        f"{len(split.boxed)} with boxes."
    ]
    for what, names in (
        ("Of these without a box in the files", without),
        ("Too rare for the list of boxes", rare),
        ("Not in the vocabulary, listed as unseen", unknown),
    ):
        lines.append(f"{what}: {f'{len(names)}, {listed(names)}' if names else 'none'}.")
    return "\n".join(lines)


def weak_lists(
    split: ConceptSplit, masks: Sequence[str | Path], *, min_images: int = 5
) -> dict[str, tuple[str, ...]]:
    """Sort the concepts of test sets by what training knows of them, as in section 5.1.

    Args:
        masks: COCO files of images that are not trained on.
        min_images: images that a concept needs in which all its objects have masks; the paper has
            5 to 10.

    Returns:
        Names under "weak_box" (boxes, no masks), "weak_image" (tags alone) and "zero_shot" (not in
        the vocabulary). None has masks in training, and none is in two lists.
    """
    found: Counter[str] = Counter()
    for path in masks:
        found.update(_images_by_category(path, fully_masked=True))
    names = sorted(name for name, n in found.items() if n >= min_images)
    boxed, known = frozenset(split.boxed), frozenset(split.vocabulary)
    without_masks = [name for name in names if name not in frozenset(split.masked)]
    lists = {
        "weak_box": tuple(name for name in without_masks if name in boxed),
        "weak_image": tuple(name for name in without_masks if name in known - boxed),
        "zero_shot": tuple(name for name in without_masks if name not in known),
    }
    listed_names = [name for each in lists.values() for name in each]
    assert len(set(listed_names)) == len(listed_names)
    assert not set(listed_names) & set(split.masked)
    return lists


def _images_by_category(path: str | Path, *, fully_masked: bool = False) -> Counter[str]:
    """Count the images with a box of each category of a file, in its order, also 0.

    Args:
        fully_masked: only those in which all its objects have masks.
    """
    content = read_coco_json(Path(path))
    categories = sorted(content["categories"], key=lambda category: category["id"])
    name_of = {category["id"]: spelled(category["name"]) for category in categories}
    pairs = {(name_of[a["category_id"]], a["image_id"]) for a in content["annotations"]}
    if fully_masked:
        pairs -= {
            (name_of[a["category_id"]], a["image_id"])
            for a in content["annotations"]
            if not a.get("segmentation")
        }
    images = Counter(name for name, _ in pairs)
    return Counter({name: images[name] for name in name_of.values()})
