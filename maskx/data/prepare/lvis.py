"""LVIS v1 (Gupta et al., CVPR 2019): masks of 1203 categories on images of COCO.

Two files are made. One is LVIS as maskx reads it, with names in words and the path of each image.
What is known not to be in an image (`neg_category_ids`) and what is not annotated in full
(`not_exhaustive_category_ids`) stays, and mask AP goes by it
(:func:`maskx.evaluation.average_precision.evaluate_detections`).

The other is for testing ConceptMask: categories outside the 80 of COCO, on images of COCO's
val2017, which no training on COCO has seen (LVIS's own val has images of train2017 too). Objects of
a category that is not annotated in full have no mask there, so that their image is no truth of it.

- Names are those of LVIS with spaces: `bat_(animal)` becomes "bat" where no other category is
  called so, else "bat (animal)".
- The classes of COCO are told by their synsets and have COCO's names.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskx.core.files import write_json
from maskx.core.text import listed
from maskx.core.word_table import spelled
from maskx.data.coco import read_coco_json
from maskx.data.vocabularies import COCO_THING_CLASSES

__all__ = ["COCO_SYNSETS", "LVISSummary", "prepare_lvis"]

_OTHER_SYNSETS = {
    "fire hydrant": "fireplug.n.01",
    "cow": "beef.n.01",
    "handbag": "bag.n.04",
    "tie": "necktie.n.01",
    "suitcase": "bag.n.06",
    "skis": "ski.n.01",
    "sports ball": "ball.n.06",
    "kite": "kite.n.03",
    "wine glass": "wineglass.n.01",
    "bowl": "bowl.n.03",
    "banana": "banana.n.02",
    "hot dog": "sausage.n.01",
    "donut": "doughnut.n.02",
    "cake": "cake.n.03",
    "couch": "sofa.n.01",
    "potted plant": "pot.n.04",
    "toilet": "toilet.n.02",
    "tv": "television_receiver.n.01",
    "mouse": "mouse.n.04",
    "remote": "remote_control.n.01",
    "keyboard": "computer_keyboard.n.01",
    "cell phone": "cellular_telephone.n.01",
    "microwave": "microwave.n.02",
    "toaster": "toaster.n.02",
    "refrigerator": "electric_refrigerator.n.01",
    "teddy bear": "teddy.n.01",
    "hair drier": "hand_blower.n.01",
}

COCO_SYNSETS = {
    name: _OTHER_SYNSETS.get(name, f"{name.replace(' ', '_')}.n.01") for name in COCO_THING_CLASSES
}
"""Synsets by which LVIS knows the classes of COCO."""

_KEYS = {
    "images": ("coco_url", "neg_category_ids", "not_exhaustive_category_ids"),
    "categories": ("synset", "frequency"),
}
_UNSEEN_IMAGES = "val2017/"


@dataclass(frozen=True)
class LVISSummary:
    """What `prepare_lvis` wrote.

    Attributes:
        num_images: Images of the whole file; those of the concepts.
        num_categories: The same, of which there is an object.
        missing: Classes of COCO that no category has the synset of.
        not_exhaustive: Objects without mask in the file of concepts, as others like them may be in
            their image.
        renamed: Names that keep what stands in brackets.
    """

    num_images: tuple[int, int]
    num_categories: tuple[int, int]
    missing: list[str]
    not_exhaustive: int
    renamed: list[str]

    def __str__(self) -> str:
        lines = [
            f"{self.num_images[0]} images with objects of {self.num_categories[0]} categories.",
            f"Concepts: {self.num_images[1]} images of val2017 with objects of "
            f"{self.num_categories[1]} categories that COCO does not have; {self.not_exhaustive} "
            "objects without mask, as others like them may be in the image.",
            f"Classes of COCO that are not there: {listed(self.missing) or 'none'}.",
            f"Names that are not unique: {listed(self.renamed) or 'none'}.",
        ]
        return "\n".join(lines)


def prepare_lvis(
    json_file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    concepts: str | os.PathLike[str] | None = None,
) -> LVISSummary:
    """Write LVIS as maskx reads it, with paths of images below the folder of COCO.

    Args:
        json_file: `lvis_v1_val.json` or `lvis_v1_train.json` as published.
        concepts: File for the concepts outside COCO, see above; None to write none.

    Raises:
        ValueError: It is no file of LVIS v1, or nothing is left for `concepts`.
    """
    json_file = Path(json_file)
    dataset = read_coco_json(json_file)
    for part, keys in _KEYS.items():
        for entry in dataset[part]:
            missing = [key for key in keys if key not in entry]
            if missing:
                raise ValueError(
                    f"{json_file}: the entry {entry['id']!r} of '{part}' has no "
                    f"{' and no '.join(missing)}. Give the annotations of LVIS v1 as published."
                )
    name_of, renamed = _names(dataset["categories"])
    whole = {
        **dataset,
        "images": [image | {"file_name": _path(image["coco_url"])} for image in dataset["images"]],
        "categories": [c | {"name": name_of[c["id"]]} for c in dataset["categories"]],
    }
    write_json(Path(output), whole, compact=True)
    synsets = {category["synset"] for category in dataset["categories"]}
    missing = [name for name, synset in COCO_SYNSETS.items() if synset not in synsets]
    kept = {"images": [], "annotations": []} if concepts is None else _concepts(whole)
    if concepts is not None:
        if not kept["annotations"]:
            raise ValueError(
                f"{json_file}: no image of COCO's val2017 has a category outside COCO. Give "
                "lvis_v1_val.json, whose images of train2017 are left out here."
            )
        write_json(Path(concepts), kept, compact=True)
    both = (whole, kept)
    return LVISSummary(
        num_images=tuple(len(each["images"]) for each in both),
        num_categories=tuple(len({a["category_id"] for a in e["annotations"]}) for e in both),
        missing=missing,
        not_exhaustive=sum("segmentation" not in a for a in kept["annotations"]),
        renamed=renamed,
    )


def _names(categories: list[dict[str, Any]]) -> tuple[dict[int, str], list[str]]:
    """Names by id, and which of them keep their brackets."""
    coco = {synset: name for name, synset in COCO_SYNSETS.items()}
    full = {c["id"]: coco.get(c["synset"], spelled(c["name"])) for c in categories}
    short = {id_: name.split(" (")[0] for id_, name in full.items()}
    taken = Counter(short.values())
    names = {id_: name if taken[name] == 1 else full[id_] for id_, name in short.items()}
    return names, sorted(name for name in names.values() if " (" in name)


def _path(url: str) -> str:
    """The last folder and the file: http://images.cocodataset.org/val2017/000000397133.jpg."""
    return "/".join(url.split("/")[-2:])


def _concepts(dataset: Mapping[str, Any]) -> dict[str, Any]:
    of_coco = set(COCO_SYNSETS.values())
    categories = [c for c in dataset["categories"] if c["synset"] not in of_coco]
    ids = {category["id"] for category in categories}
    partly = {
        image["id"]: set(image["not_exhaustive_category_ids"])
        for image in dataset["images"]
        if image["file_name"].startswith(_UNSEEN_IMAGES)
    }
    annotations = [
        {k: v for k, v in a.items() if k != "segmentation"}
        if a["category_id"] in partly[a["image_id"]]
        else a
        for a in dataset["annotations"]
        if a["image_id"] in partly and a["category_id"] in ids
    ]
    shown = {annotation["image_id"] for annotation in annotations}
    images = [
        # Without the lists of LVIS, which would make it a file of all its categories.
        {k: v for k, v in image.items() if not k.endswith("_category_ids")}
        for image in dataset["images"]
        if image["id"] in shown
    ]
    return {"images": images, "annotations": annotations, "categories": categories}
