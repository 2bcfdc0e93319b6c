"""Objects of Visual Genome as concepts: tags and boxes with the names of words.

`maskx.data.prepare.visual_genome` names classes by their synsets, but those of COCO. Here other
lists are to share the names, so a synset such as `bag.n.01` becomes "bag": of several synsets of
one word the one with most boxes, as for the classes of COCO. The others keep the synset as their
name, and so does one whose word is a class of COCO: `orange.n.02` is not COCO's "orange".
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskx.core.files import write_json
from maskx.core.word_table import spelled
from maskx.data.coco import read_coco_json
from maskx.data.prepare.visual_genome import SPLITS
from maskx.data.tag_lists import write_tag_lines
from maskx.data.vocabularies import COCO_THING_CLASSES

__all__ = [
    "VisualGenomeConceptSummary",
    "prepare_visual_genome_concepts",
    "word_names",
]

_SYNSET = re.compile(r"(.+)\.[a-z]\.\d+")
_NUM_EXAMPLES = 10


@dataclass(frozen=True)
class VisualGenomeConceptSummary:
    """What `prepare_visual_genome_concepts` wrote.

    Attributes:
        splits: Of each split the number of images with a tag, tags, boxes, and images without one.
        kept_synsets: Classes that keep the synset as their name, with their boxes.
    """

    splits: dict[str, tuple[int, int, int, int]]
    kept_synsets: Counter[str]
    most_frequent: list[tuple[str, int]]

    def __str__(self) -> str:
        columns = ("images", "tags", "boxes", "left out")
        lines = [f"{'split':<8}" + "".join(f"{column:>10}" for column in columns)]
        for split, numbers in self.splits.items():
            lines.append(f"{split:<8}" + "".join(f"{number:>10}" for number in numbers))
        for what, named in (
            ("Most boxes", self.most_frequent),
            (
                f"{len(self.kept_synsets)} concepts keep their synset as name",
                self.kept_synsets.most_common(_NUM_EXAMPLES),
            ),
        ):
            lines.append(f"{what}: {', '.join(f'{name} ({n})' for name, n in named) or 'none'}.")
        return "\n".join(lines)


def prepare_visual_genome_concepts(
    folder: str | os.PathLike[str],
) -> VisualGenomeConceptSummary:
    """Write `concepts_{train,val,test}_{tags.jsonl,boxes.json}`.

    The tags of an image are the classes of its boxes. Images without a box have no tag and are in
    neither file.

    Args:
        folder: With `instances_vg3k_{train,val,test}.json` as `prepare_visual_genome` writes them;
            the files are written there too.

    Raises:
        ValueError: A file is not what `prepare_visual_genome` writes.
    """
    folder = Path(folder)
    data = {split: _read(folder / f"instances_vg3k_{split}.json") for split in SPLITS}
    categories = data["train"]["categories"]
    for split, content in data.items():
        if content["categories"] != categories:
            raise ValueError(
                f"{folder}: the files of 'train' and '{split}' have other categories. Run "
                "datasets/prepare.py visual_genome again."
            )
    boxes = Counter(a["category_id"] for content in data.values() for a in content["annotations"])
    counts = {category["id"]: boxes[category["id"]] for category in categories}
    names = word_names(categories, counts)
    categories = [{**category, "name": names[category["id"]]} for category in categories]
    splits = {split: _write(folder, split, content, categories) for split, content in data.items()}
    ranked = Counter({names[id_]: number for id_, number in counts.items()})
    return VisualGenomeConceptSummary(
        splits=splits,
        kept_synsets=Counter({n: ranked[n] for n in ranked if _SYNSET.fullmatch(n)}),
        most_frequent=ranked.most_common(_NUM_EXAMPLES),
    )


def word_names(
    categories: Sequence[Mapping[str, Any]], counts: Mapping[int, int]
) -> dict[int, str]:
    """Name categories by words where these are unique.

    Args:
        categories: With `id`, `name`, `synset` and, for classes of COCO, `coco`.
        counts: Boxes by category id. Of equally frequent synsets of a word the first one takes it.

    Returns:
        Names by category id, in lower case; no two are the same.
    """
    names = {c["id"]: c["coco"] for c in categories if "coco" in c}
    taken = set(COCO_THING_CLASSES)
    for category in sorted(categories, key=lambda c: -counts[c["id"]]):
        if category["id"] in names:
            continue
        found = _SYNSET.fullmatch(category["synset"])
        word = spelled(found.group(1)).lower() if found else category["synset"]
        names[category["id"]] = category["synset"] if word in taken else word
        taken.add(word)
    return names


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file. Run datasets/prepare.py visual_genome first."
        )
    content = read_coco_json(path)
    lacking = [category for category in content["categories"] if "synset" not in category]
    if lacking:
        raise ValueError(
            f"{path}: category {lacking[0]['id']} ({lacking[0]['name']!r}) has no synset. Write "
            "the file again with datasets/prepare.py visual_genome."
        )
    return content


def _write(
    folder: Path,
    split: str,
    content: Mapping[str, Any],
    categories: Sequence[Mapping[str, Any]],
) -> tuple[int, int, int, int]:
    """Write the two files of a split; return its images, tags, boxes, and images left out."""
    shown: dict[int, set[int]] = defaultdict(set)
    for annotation in content["annotations"]:
        shown[annotation["image_id"]].add(annotation["category_id"])
    images = [image for image in content["images"] if image["id"] in shown]
    words = [category["name"] for category in categories]
    place = {category["id"]: index for index, category in enumerate(categories)}
    write_tag_lines(
        folder / f"concepts_{split}_tags.jsonl",
        ((i["file_name"], sorted(place[id_] for id_ in shown[i["id"]])) for i in images),
        words,
    )
    boxes = {**content, "images": images, "categories": categories}
    write_json(folder / f"concepts_{split}_boxes.json", boxes, compact=True)
    num_tags = sum(map(len, shown.values()))
    num_left_out = len(content["images"]) - len(images)
    return len(images), num_tags, len(content["annotations"]), num_left_out
