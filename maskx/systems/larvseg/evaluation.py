"""How good the label maps and the features of LarvSeg are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maskx.core.checks import check_choice
from maskx.core.feature_maps import named_feature
from maskx.core.seeds import step_seed
from maskx.data.coco import load_coco
from maskx.data.label_maps import ignore_label
from maskx.data.splits import resolve_split
from maskx.evaluation.mean_iou import MeanIoU
from maskx.systems.larvseg.checkpoints import open_larvseg
from maskx.systems.larvseg.grouping import group_pixels
from maskx.systems.larvseg.model import SampleLarvSeg, predict_larvseg
from maskx.systems.larvseg.samples import (
    LabelledImages,
    labelled_images,
    read_sample,
    split_groups,
    table_label_map,
)

__all__ = [
    "evaluate_grouping",
    "evaluate_larvseg",
    "open_with_images",
]


def evaluate_larvseg(
    model: SampleLarvSeg,
    test: LabelledImages,
    groups: Mapping[str, Sequence[int]],
    *,
    description: str = "label maps",
) -> dict[str, Any]:
    """Compute the mean IoU of label maps; one image is held at a time.

    Args:
        model: the model.
        test: what to predict and to compare with.
        groups: table indices by name.
        description: label of the progress bar.

    Returns:
        What `maskx.evaluation.mean_iou.MeanIoU.evaluate` returns, in percent. No pixel has label 0,
        so that "all" are the classes alone, among them a background that is one.
    """
    counts = MeanIoU(model.num_classes)
    for record, label_map in predict_larvseg(model, test.records, description=description):
        truth = table_label_map(test, record, model.class_names)
        counts.update(label_map, truth, record["image_id"])
    return counts.evaluate(groups)


@torch.inference_mode()
def evaluate_grouping(
    model: SampleLarvSeg,
    test: LabelledImages,
    groups: Mapping[str, Sequence[int]],
    *,
    seed: int = 0,
    features: str = "tokens",
) -> dict[str, Any]:
    """Measure how well features group the pixels of a class (Eq. 2): the exploratory experiment.

    One random true pixel of each class present is given; every pixel takes the class of the most
    similar of them. See :func:`maskx.systems.larvseg.grouping.group_pixels`.

    Args:
        model: the model; it is put into evaluation mode.
        test: images with true label maps.
        groups: table indices by name.
        seed: of the random pixels.
        features: ``tokens``, those of the classifier, or ``backbone``, the feature map before.

    Returns:
        As of :func:`evaluate_larvseg`.
    """
    check_choice("features", features, ("tokens", "backbone"))
    model.eval()
    network = model.network
    ignore = ignore_label(model.num_classes)
    counts = MeanIoU(model.num_classes)
    for number, record in enumerate(tqdm(test.records, desc="pixel grouping", unit="img")):
        images = model.preprocess([read_sample(record)])
        if features == "tokens":
            (maps,) = network(images)
        else:
            found = network.backbone(images)
            (maps,) = named_feature(found, network.in_feature, network.backbone)
        truth = torch.from_numpy(table_label_map(test, record, model.class_names))
        generator = torch.Generator().manual_seed(step_seed(seed, number))
        grouped = group_pixels(maps.cpu(), truth, generator, ignore=ignore)
        # An image without a known pixel counts nowhere.
        if (truth != ignore).any():
            counts.update(grouped.numpy(), truth.numpy(), record["image_id"])
    return counts.evaluate(groups)


def open_with_images(
    folder: str | Path,
    json_file: str | Path,
    image_root: str | Path,
    *,
    masks_for: str | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> tuple[SampleLarvSeg, LabelledImages, dict[str, tuple[int, ...]]]:
    """Open a trained model and images to evaluate it on.

    Args:
        folder: of the model, see :func:`maskx.systems.larvseg.checkpoints.open_larvseg`.
        json_file: COCO-format file with masks.
        image_root: folder of its images.
        masks_for: category split of the file; None has no groups but "all".
        device: where to compute.
        strict: see :func:`maskx.data.coco.load_coco`.

    Returns:
        The model, the images, and table indices by group.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is bad, or the model has none of its classes.
    """
    model = open_larvseg(folder, device)
    data = load_coco(json_file, image_root, strict=strict)
    test = labelled_images(data)
    if not set(test.class_names) & set(model.class_names):
        raise ValueError(
            f"'{json_file}' has none of the {len(model.class_names)} classes of '{folder}', such "
            f"as {', '.join(model.class_names[:8])}. Give images of its classes."
        )
    groups = {}
    if masks_for is not None:
        split = resolve_split(masks_for, data.class_names)
        groups = split_groups(test, split, model.class_names)
    return model, test, groups
