"""Subsets of COCO that papers train on, as files of their own.

COCO-60 is the source set of TransferNet (CVPR 2016): the images of COCO that contain none of the 20
classes of PASCAL VOC, with the annotations of the other 60. The paper has 17443 images of it and
does not say from which release; the training set of its time was train2014.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskx.core.files import write_json
from maskx.data.coco import read_coco_json
from maskx.data.vocabularies import VOC_CLASSES_IN_COCO

__all__ = [
    "COCO60_IMAGES",
    "Coco60Summary",
    "select_coco60",
    "write_coco60",
]

COCO60_IMAGES = 17443
"""Images of COCO-60 in the TransferNet paper."""

_TRAIN2014_IMAGES = 82783


@dataclass(frozen=True)
class Coco60Summary:
    """What `write_coco60` wrote; as text, beside the number of the paper.

    Attributes:
        num_read: Images of the file read.
        num_with_voc: Images left out because they contain a class of VOC.
        num_without_annotation: Images left out because nothing is annotated in them.
        num_images: Images written; the three add up to `num_read`.
        annotations: Number of annotations written by class name.
    """

    num_read: int
    num_with_voc: int
    num_without_annotation: int
    num_images: int
    annotations: Counter[str]

    def __str__(self) -> str:
        expected = f"The TransferNet paper has {COCO60_IMAGES}"
        if self.num_read != _TRAIN2014_IMAGES:
            verdict = (
                f"{expected}, probably from train2014; that has {_TRAIN2014_IMAGES} images, this "
            )
            verdict += f"file {self.num_read}, so the numbers need not agree."
        elif self.num_images == COCO60_IMAGES:
            verdict = f"{expected}, and so has this file."
        else:
            difference = self.num_images - COCO60_IMAGES
            verdict = f"{expected}; this file, of as many images as train2014, has {difference:+d}."
        frequent = ", ".join(f"{name} ({n})" for name, n in self.annotations.most_common(5))
        return (
            f"{self.num_images} of {self.num_read} images contain no class of VOC and have "
            f"annotations: {self.annotations.total()} of {len(self.annotations)} classes.\n"
            f"{verdict}\n"
            f"Left out: {self.num_with_voc} images with a class of VOC, "
            f"{self.num_without_annotation} in which nothing is annotated.\n"
            f"Most annotations: {frequent}."
        )


def write_coco60(
    json_file: str | os.PathLike[str], output: str | os.PathLike[str]
) -> Coco60Summary:
    """Write the COCO-60 part of a COCO file.

    Args:
        json_file: Annotation file with the categories of COCO, such as `instances_train2014.json`.
        output: File to write; a file of an earlier run is replaced.

    Raises:
        ValueError: It is no COCO file, it is the output, or `select_coco60` refuses it.
    """
    json_file, output = Path(json_file), Path(output)
    if output.resolve() == json_file.resolve():
        raise ValueError(
            f"{output} is the file to read as well. Name another output, so that it is kept."
        )
    dataset = read_coco_json(json_file)
    try:
        chosen = select_coco60(dataset)
    except ValueError as error:
        raise ValueError(f"{json_file}: {error}") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, chosen, compact=True)

    num_annotated = len({annotation["image_id"] for annotation in dataset["annotations"]})
    names = {category["id"]: category["name"] for category in chosen["categories"]}
    return Coco60Summary(
        num_read=len(dataset["images"]),
        num_with_voc=num_annotated - len(chosen["images"]),
        num_without_annotation=len(dataset["images"]) - num_annotated,
        num_images=len(chosen["images"]),
        annotations=Counter(names[a["category_id"]] for a in chosen["annotations"]),
    )


def select_coco60(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the images without any class of PASCAL VOC, and the categories that are not of VOC.

    A crowd region of a VOC class counts as containing it. Images in which nothing is annotated are
    left out: without a label there is nothing to learn from them.

    Args:
        dataset: COCO dict with the category names of COCO.

    Returns:
        COCO dict with all other keys of `dataset`; images and annotations are not copied.

    Raises:
        ValueError: A class of VOC is missing, an image names a label map, or no image is left.
    """
    names = {category["name"] for category in dataset["categories"]}
    missing = [name for name in VOC_CLASSES_IN_COCO if name not in names]
    if missing:
        raise ValueError(
            f"{len(missing)} of the 20 classes of VOC are not among its {len(names)} categories: "
            f"{', '.join(missing)}. Images that contain them would be kept. Give an instances "
            "file of COCO, with its 80 categories."
        )
    for image in dataset["images"]:
        if "label_map_file_name" in image:
            raise ValueError(
                f"image {image['id']!r} has label_map_file_name, a map of the labels of all "
                f"{len(names)} categories, which would be wrong for the others alone. Remove this "
                "key from the images; the instances files of COCO do not have it."
            )
    of_voc = {c["id"] for c in dataset["categories"] if c["name"] in VOC_CLASSES_IN_COCO}
    annotations = dataset["annotations"]
    with_voc = {a["image_id"] for a in annotations if a["category_id"] in of_voc}
    kept = {annotation["image_id"] for annotation in annotations} - with_voc
    if not kept:
        raise ValueError(
            f"all {len(with_voc)} annotated images contain a class of VOC, so none is left. Give "
            "an instances file of COCO."
        )
    return {
        **dataset,
        "images": [image for image in dataset["images"] if image["id"] in kept],
        "annotations": [a for a in annotations if a["image_id"] in kept],
        "categories": [c for c in dataset["categories"] if c["id"] not in of_voc],
    }
