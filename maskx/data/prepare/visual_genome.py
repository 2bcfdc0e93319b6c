"""Visual Genome with the 3000 classes of the Mask^X R-CNN paper (technical report, chapter 4).

The boxes of Visual Genome 1.4 (`objects.json`, `image_data.json`) become COCO-format files. Its
classes are WordNet synsets such as `bag.n.01`; 80 of them stand for the classes of COCO, which
have masks there, and bear their names.

- Objects may have several synsets; each entry of their lists counts for its frequency. Only objects
  with exactly one become annotations.
- A class of COCO takes the most frequent synset of its name (`traffic_light.n.01` for
  "traffic light"); 18 have none, or another is meant, and are mapped by hand (`COCO_SYNSETS`).
- All other classes keep their synset as name: without the sense number names are not unique.
- The 80 classes of COCO come first, in COCO's order, then the others in alphabetical order.

The paper has exactly 3000 classes, 80 of COCO and 2920 others; its published code has 3001, because
one of the 18 synsets is not among the 3000 most frequent. `choose_classes` follows the paper and
has the other list on request. Boxes of such a rare synset are kept here; the published code has
none, as it filters by frequency first.

For ConceptMask its objects become concepts, whose names other lists are to share: a synset such as
`bag.n.01` becomes "bag"; of several synsets of one word the one with most boxes, as for the classes
of COCO. The others keep the synset as their name, and so does one whose word is a class of COCO:
`orange.n.02` is not COCO's "orange".
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from maskx.core.files import write_json
from maskx.core.word_table import spelled
from maskx.data.coco import AnnotationProblem, read_box, read_coco_json
from maskx.data.json_files import read_json
from maskx.data.tag_lists import write_tag_lines
from maskx.data.vocabularies import COCO_THING_CLASSES

__all__ = [
    "CATEGORIES_FILE",
    "COCO_SYNSETS",
    "SPLITS",
    "Summary",
    "VisualGenomeConceptSummary",
    "align_with_coco",
    "choose_classes",
    "prepare_visual_genome",
    "prepare_visual_genome_concepts",
    "read_class_names",
    "split_images",
    "word_names",
]

SPLITS = ("train", "val", "test")
CATEGORIES_FILE = "vg3k_categories.json"

COCO_SYNSETS = {
    "cell phone": "cellular_telephone.n.01",
    "couch": "sofa.n.01",
    "dining table": "dinner_table.n.01",
    "donut": "doughnut.n.02",
    "fire hydrant": "water_faucet.n.01",  # what Visual Genome calls hydrants
    "hair drier": "hand_blower.n.01",
    "handbag": "bag.n.04",
    "hot dog": "hotdog.n.01",
    "orange": "orange.n.01",
    "potted plant": "plant.n.01",
    "remote": "remote_control.n.01",
    "skis": "ski.n.01",
    "sports ball": "ball.n.01",
    "stop sign": "sign.n.02",
    "suitcase": "bag.n.06",  # what Visual Genome calls suitcases
    "teddy bear": "teddy.n.01",
    "tv": "television.n.01",
    "wine glass": "wineglass.n.01",
}
"""Synsets of the COCO classes that are not found by their name."""

_VERSION = "Take objects.json and image_data.json of Visual Genome version 1.4"
_IMAGE_KEYS = {"image_id": int, "url": str, "width": int, "height": int, "coco_id": int | None}
_OBJECT_KEYS = {"object_id": int, **dict.fromkeys("xywh", object), "synsets": list}
_SYNSET = re.compile(r"(.+)\.[a-z]\.\d+")
_NUM_FREQUENT = 10  # classes listed in a summary


@dataclass(frozen=True)
class Summary:
    """What `prepare_visual_genome` wrote.

    Attributes:
        num_classes: Length of the class list, `MODEL.ROI_HEADS.NUM_CLASSES` of a model.
        infrequent: COCO classes whose synset is not among the most frequent: name to synset and
            its frequency.
        splits: For each of `SPLITS` the number of images, boxes, and classes with a box.
        left_out: Number of objects without annotation, by reason.
        clipped: Number of boxes cut off at the border of their image; the file has them cut.
        renumbered: Number of annotations with a new id because their object id is repeated.
    """

    num_classes: int
    infrequent: dict[str, tuple[str, int]]
    splits: dict[str, tuple[int, int, int]]
    most_frequent: list[tuple[str, int]]
    left_out: Counter[str]
    clipped: int
    renumbered: int

    def __str__(self) -> str:
        lines = [
            f"{self.num_classes} classes: {len(COCO_THING_CLASSES)} of COCO and "
            f"{self.num_classes - len(COCO_THING_CLASSES)} others."
        ]
        for name, (synset, count) in self.infrequent.items():
            lines.append(
                f"'{name}' of COCO is {synset}, which is not among the most frequent (count "
                f"{count})."
            )
        lines.append(f"{'split':<8}{'images':>10}{'boxes':>10}{'classes with boxes':>20}")
        for name, (num_images, num_boxes, num_classes) in self.splits.items():
            lines.append(f"{name:<8}{num_images:>10}{num_boxes:>10}{num_classes:>20}")
        frequent = ", ".join(f"{name} ({number})" for name, number in self.most_frequent)
        lines.append(f"Most boxes: {frequent}.")
        left_out = ", ".join(f"{number} {reason}" for reason, number in self.left_out.most_common())
        lines.append(f"Objects left out: {left_out or 'none'}.")
        lines.append(
            f"Boxes cut off at the border of their image: {self.clipped}. "
            f"Annotations with a new id because their object id is repeated: {self.renumbered}."
        )
        return "\n".join(lines)


def prepare_visual_genome(
    objects_json: str | os.PathLike[str],
    image_data_json: str | os.PathLike[str],
    coco_val_json: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    num_classes: int = 3000,
    reference_classes: bool = False,
    num_test_images: int = 5000,
) -> Summary:
    """Write `instances_vg3k_{train,val,test}.json` and `vg3k_categories.json`.

    An annotation has the id of its object and the box as Visual Genome has it, in pixels. One that
    reaches over the border of its image by more than the reader allows is cut off there; objects
    with an empty box, or one that lies outside, are left out and counted.

    `objects.json` is read into memory at once. Measured on made-up files of about its size (108077
    images, 2.5 million objects, 362 MB): 3.3 GB and 27 s of one core.

    Args:
        coco_val_json: COCO's `instances_val2017.json`; only the image ids are used.
        output: Folder to write to; it is created, files of an earlier run are replaced.

    Raises:
        ValueError: A file is not what it should be, or there are too few synsets.
    """
    val_ids = _read_image_ids(Path(coco_val_json))
    images = _read_images(Path(image_data_json))
    entries = _read(Path(objects_json), list)
    image_of = {image["id"]: image for image in images}
    counts = _count_synsets(entries, image_of, Path(objects_json))
    categories = choose_classes(counts, num_classes, reference=reference_classes)
    annotations, left_out, clipped = _annotate(entries, image_of, categories)
    renumbered = _renumber(annotations)

    parts = split_images(images, val_ids, num_test_images)
    if not parts["val"]:
        raise ValueError(
            f"{coco_val_json}: none of its {len(val_ids)} images is in Visual Genome, so there "
            "would be no validation images. Give instances_val2017.json of COCO."
        )
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    # The categories tell that the rest is there, so they go first and come back last.
    (output / CATEGORIES_FILE).unlink(missing_ok=True)
    splits = {
        name: _write_split(output / f"instances_vg3k_{name}.json", part, annotations, categories)
        for name, part in parts.items()
    }
    write_json(output / CATEGORIES_FILE, categories)

    frequent = {synset for synset, _ in counts.most_common(num_classes)}
    boxes = Counter(categories[a["category_id"] - 1]["name"] for a in annotations)
    return Summary(
        num_classes=len(categories),
        infrequent={
            name: (synset, counts[synset])
            for name, synset in align_with_coco(counts).items()
            if synset not in frequent
        },
        splits=splits,
        most_frequent=boxes.most_common(_NUM_FREQUENT),
        left_out=left_out,
        clipped=clipped,
        renumbered=renumbered,
    )


def align_with_coco(counts: Mapping[str, int]) -> dict[str, str]:
    """Find the synset of each COCO class.

    Args:
        counts: Frequencies by synset. Of equally frequent synsets the first one counts as the more
            frequent, here and in `choose_classes`.

    Returns:
        Synsets by COCO name, in COCO's order.

    Raises:
        ValueError: A class has no synset in `counts`.
    """
    by_name: dict[str, str] = {}
    for synset, _ in Counter(counts).most_common():
        by_name.setdefault(synset[:-5].replace("_", " "), synset)  # "truck.n.01" is "truck"
    aligned = {}
    for name in COCO_THING_CLASSES:
        synset = COCO_SYNSETS.get(name, by_name.get(name))
        if synset not in counts:
            looked_for = repr(synset) if synset else f"one named '{name.replace(' ', '_')}'"
            raise ValueError(
                f"The COCO class '{name}' has no synset in Visual Genome: none of its objects has "
                f"{looked_for}. {_VERSION}; a part of it must have all 80 classes of COCO."
            )
        aligned[name] = synset
    return aligned


def choose_classes(
    counts: Mapping[str, int], num_classes: int = 3000, *, reference: bool = False
) -> list[dict[str, Any]]:
    """Choose the classes of a data set from the synsets of its objects.

    The paper speaks of "the 3000 most frequent synsets", which cover "all the 80 classes in COCO",
    and of "the remaining 2920". Both cannot hold where the synset of a COCO class is rarer than
    that. The number of classes is what a model is built with, so it is what is kept: the 80 of
    COCO, and the most frequent others up to `num_classes` in all.

    Args:
        counts: Frequencies by synset; see `align_with_coco`.
        num_classes: Number of classes, at least 80.
        reference: Return the `num_classes` most frequent synsets and those of COCO that are not
            among them, so more than `num_classes` if there are such. This is the rule of the
            published code; of equally frequent synsets at the end of the list its models, with
            3001 classes, may have others.

    Returns:
        Categories with `id` (from 1, in the order of the list), `name`, `synset` and, for those of
        COCO, `coco`, their name there.

    Raises:
        ValueError: `num_classes` is out of its range, or a COCO class has no synset.
    """
    aligned = align_with_coco(counts)
    if not len(aligned) <= num_classes <= len(counts):
        raise ValueError(
            f"{num_classes} classes are asked for. Allowed: from {len(aligned)}, the classes of "
            f"COCO, to {len(counts)}, the synsets that occur."
        )
    of_coco = set(aligned.values())
    ranked = [synset for synset, _ in Counter(counts).most_common()]
    if reference:
        others = [synset for synset in ranked[:num_classes] if synset not in of_coco]
    else:
        others = [synset for synset in ranked if synset not in of_coco]
        others = others[: num_classes - len(aligned)]
    classes = [{"name": name, "synset": synset, "coco": name} for name, synset in aligned.items()]
    classes += [{"name": synset, "synset": synset} for synset in sorted(others)]
    return [{"id": number, **category} for number, category in enumerate(classes, start=1)]


def split_images(
    images: Sequence[Mapping[str, Any]], coco_val_ids: Collection[int], num_test_images: int = 5000
) -> dict[str, list[Mapping[str, Any]]]:
    """Divide the images among `SPLITS`.

    - `val`: those in COCO's val2017.
    - `test`: the last `num_test_images` of those without a `coco_id`. The paper has no test images,
      its published code has 5000; with 0 the training images are those of the paper.
    - `train`: all others, also those whose `coco_id` is -1.

    Args:
        images: With `coco_id`, the id in COCO or None.
        coco_val_ids: Ids of the images of val2017.
        num_test_images: Number of test images; fewer if there are not as many.

    Raises:
        ValueError: `num_test_images` is negative.
    """
    if num_test_images < 0:
        raise ValueError(f"{num_test_images} test images are asked for. Allowed: 0 or more.")
    val = [image for image in images if image["coco_id"] in coco_val_ids]
    outside = [image for image in images if image["coco_id"] is None]
    test = outside[max(len(outside) - num_test_images, 0) :]
    held_out = {image["id"] for image in [*val, *test]}
    train = [image for image in images if image["id"] not in held_out]
    return dict(zip(SPLITS, (train, val, test), strict=True))


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """Read `vg3k_categories.json`.

    Returns:
        Names by class index.

    Raises:
        ValueError: It is not what `prepare_visual_genome` writes.
    """
    path = Path(path)
    categories = _read(path, list)
    is_whole = all(isinstance(c, dict) and {"id", "name"} <= c.keys() for c in categories)
    if not is_whole or [c["id"] for c in categories] != [*range(1, len(categories) + 1)]:
        _fail(
            path,
            "is no list of categories with id, counted from 1, and name",
            "Write it again with datasets/prepare.py visual_genome",
        )
    return [category["name"] for category in categories]


def _read_image_ids(path: Path) -> set[int]:
    images = _read(path, dict).get("images")
    if not isinstance(images, list) or not all(isinstance(i, dict) and "id" in i for i in images):
        _fail(path, "has no list 'images' with ids", "Give instances_val2017.json of COCO")
    return {image["id"] for image in images}


def _read_images(path: Path) -> list[dict[str, Any]]:
    """Read `image_data.json` as images of a COCO file, in its order."""
    images = []
    for position, entry in enumerate(_read(path, list)):
        where = _checked(path, f"[{position}]", entry, _IMAGE_KEYS)
        for key in ("width", "height"):
            if entry[key] <= 0:
                _fail(path, f"{where} has {key} {entry[key]!r}", "Allowed: pixels, above 0")
        folders = entry["url"].split("/")
        if len(folders) < 2 or not all(folders[-2:]):
            _fail(path, f"{where} has url {entry['url']!r}", "Allowed: one that ends folder/file")
        images.append(
            {
                "id": entry["image_id"],
                "width": entry["width"],
                "height": entry["height"],
                "file_name": "/".join(folders[-2:]),  # VG_100K/1.jpg or VG_100K_2/1.jpg
                "coco_id": entry["coco_id"],
            }
        )
    repeated = [id_ for id_, n in Counter(image["id"] for image in images).items() if n > 1]
    if repeated:
        _fail(path, f"repeats the image_id {repeated[0]} ({len(repeated)} are repeated)", _VERSION)
    return images


def _count_synsets(
    entries: Sequence[Any], known_images: Collection[int], path: Path
) -> Counter[str]:
    """Check `objects.json` and count every synset of every object."""
    counts: Counter[str] = Counter()
    for position, entry in enumerate(tqdm(entries, "synsets", disable=None, unit="img")):
        where = _checked(path, f"[{position}]", entry, {"image_id": int, "objects": list})
        if entry["image_id"] not in known_images:
            _fail(
                path,
                f"{where} is an image that image_data.json lacks",
                f"{_VERSION}, both of the same",
            )
        for number, item in enumerate(entry["objects"]):
            of_item = _checked(path, f"{where}, objects[{number}]", item, _OBJECT_KEYS)
            if not all(isinstance(synset, str) for synset in item["synsets"]):
                _fail(path, f"{of_item} has synsets {item['synsets']!r:.80}", "Allowed: strings")
            counts.update(item["synsets"])
    return counts


def _annotate(
    entries: Sequence[Mapping[str, Any]],
    image_of: Mapping[int, Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], Counter[str], int]:
    """Make annotations; return them, objects left out by reason, and the number clipped."""
    id_of = {category["synset"]: category["id"] for category in categories}
    annotations, left_out, clipped = [], Counter(), 0
    for entry in tqdm(entries, "annotations", disable=None, unit="img"):
        image = image_of[entry["image_id"]]
        for item in entry["objects"]:
            synsets = item["synsets"]
            if len(synsets) != 1:
                left_out["with several synsets" if synsets else "without a synset"] += 1
                continue
            if synsets[0] not in id_of:
                left_out["of other synsets"] += 1
                continue
            raw = [item["x"], item["y"], item["w"], item["h"]]
            try:
                box = _usable_box(raw, image["height"], image["width"])
            except AnnotationProblem as problem:
                left_out[f"with {problem.kind}"] += 1
                continue
            clipped += box != raw
            annotations.append(
                {
                    "id": item["object_id"],
                    "image_id": image["id"],
                    "category_id": id_of[synsets[0]],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return annotations, left_out, clipped


def _usable_box(bbox: list[Any], height: int, width: int) -> list[Any]:
    """Return a box [x, y, width, height] as it is, or clipped if the reader would refuse it."""
    try:
        read_box(bbox, height, width)
    except AnnotationProblem as problem:
        if problem.kind != "box_outside":
            raise
        x, y, box_width, box_height = bbox
        x1, y1 = max(x, 0), max(y, 0)
        x2, y2 = min(x + box_width, width), min(y + box_height, height)
        if x1 >= x2 or y1 >= y2:
            raise
        return [x1, y1, x2 - x1, y2 - y1]
    return bbox


def _renumber(annotations: list[dict[str, Any]]) -> int:
    """Give all but the first annotation of an id a new one, as ids of a COCO file are unique."""
    seen: set[int] = set()
    repeated = []
    for annotation in annotations:
        if annotation["id"] in seen:
            repeated.append(annotation)
        seen.add(annotation["id"])
    for number, annotation in enumerate(repeated, start=max(seen, default=0) + 1):
        annotation["id"] = number
    return len(repeated)


def _write_split(
    path: Path,
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
) -> tuple[int, int, int]:
    """Write the annotation file of some images; return its images, boxes and classes with boxes."""
    ids = {image["id"] for image in images}
    chosen = [annotation for annotation in annotations if annotation["image_id"] in ids]
    content = {"images": images, "annotations": chosen, "categories": categories}
    write_json(path, content, compact=True)
    return len(images), len(chosen), len({annotation["category_id"] for annotation in chosen})


def _read(path: Path, kind: type) -> Any:
    content = read_json(path, what="file of Visual Genome or COCO")
    if not isinstance(content, kind):
        _fail(path, f"holds a {type(content).__name__}", f"Allowed is a {kind.__name__}")
    return content


def _checked(path: Path, where: str, entry: Any, kinds: Mapping[str, Any]) -> str:
    """Check the keys of an entry and their types; return where it is, with its image."""
    if not isinstance(entry, dict):
        _fail(path, f"{where} is {entry!r:.80}", f"Allowed: a dict with {', '.join(kinds)}")
    if "image_id" in entry:
        where += f" (image_id {entry['image_id']!r})"
    for key, kind in kinds.items():
        if key not in entry:
            _fail(path, f"{where} lacks the key '{key}'", _VERSION)
        if not isinstance(entry[key], kind):
            name = getattr(kind, "__name__", kind)
            _fail(path, f"{where} has {key} {entry[key]!r:.80}", f"Allowed: {name}")
    return where


def _fail(path: Path, found: str, remedy: str) -> NoReturn:
    raise ValueError(f"{path}: {found}. {remedy}.")


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
                self.kept_synsets.most_common(_NUM_FREQUENT),
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
    data = {split: _read_split(folder / f"instances_vg3k_{split}.json") for split in SPLITS}
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
    splits = {
        split: _write_concepts(folder, split, content, categories)
        for split, content in data.items()
    }
    ranked = Counter({names[id_]: number for id_, number in counts.items()})
    return VisualGenomeConceptSummary(
        splits=splits,
        kept_synsets=Counter({n: ranked[n] for n in ranked if _SYNSET.fullmatch(n)}),
        most_frequent=ranked.most_common(_NUM_FREQUENT),
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


def _read_split(path: Path) -> dict[str, Any]:
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


def _write_concepts(
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
