"""Evaluation of TransferNet: mean IoU of target and source categories, and pictures."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskx.core.image_classifier import multi_hot
from maskx.core.images import positions_of_pixels
from maskx.core.sample_models import Sample
from maskx.data.images import ImageMapper
from maskx.evaluation.figures import (
    contact_sheet,
    draw_heat_map,
    draw_label_map,
    plain_tile,
    save_png,
    varied_records,
)
from maskx.evaluation.image_labels import evaluate_image_labels
from maskx.evaluation.mean_iou import MeanIoU
from maskx.supervision import CategorySplit
from maskx.systems.transfernet.model import TransferNetModel
from maskx.systems.transfernet.network import attention_entropy
from maskx.systems.transfernet.samples import transfer_label_map

_TILE_SIDE = 256

Record = Mapping[str, Any]


@torch.inference_mode()
def predict_transfer(
    model: TransferNetModel,
    records: Sequence[Record],
    *,
    gt_labels: bool = False,
    candidate_labels: Sequence[int] | None = None,
    batch_size: int = 16,
    description: str = "label maps",
) -> Iterator[tuple[Record, Sample, dict[str, Any]]]:
    """Predict the masks of the labels of images; the model is put into evaluation mode.

    Whose labels it takes otherwise stays as it was.

    Args:
        model: the model.
        records: as of :func:`maskx.data.coco.load_coco`.
        gt_labels: of the labels of the records (TransferNet-GT), instead of the classifier's.
        candidate_labels: class indices that the classifier may choose; None for all.
        batch_size: images at a time.
        description: of the progress bar.

    Yields:
        Record, sample, and result of the model.
    """
    model.eval()
    read_image = ImageMapper(model.num_classes, size=None, label_maps=False).read_image
    with tqdm(total=len(records), desc=description, unit="img") as progress:
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            samples = [read_image(record) for record in batch]
            if candidate_labels is not None:
                samples = [sample | {"candidate_labels": candidate_labels} for sample in samples]
            before, model.gt_labels = model.gt_labels, gt_labels
            try:
                results = model(samples)
            finally:
                model.gt_labels = before
            yield from zip(batch, samples, results, strict=True)
            progress.update(len(batch))


def evaluate_transfer(
    model: TransferNetModel,
    records: Sequence[Record],
    groups: Mapping[str, Sequence[int]],
    **options: Any,
) -> dict[str, Any]:
    """Compute the mean IoU of label maps; one batch of images is held at a time.

    Args:
        model: the model.
        records: with true masks.
        groups: class indices by name.
        options: of :func:`predict_transfer`.

    Returns:
        What `maskx.evaluation.mean_iou.MeanIoU.evaluate` returns, in percent. With labels of the
        classifier also ``tag_mAP`` by group; of TransferNet ``attention_entropy``, the mean over
        all attention maps, 1 where they are uniform.
    """
    counts = MeanIoU(model.num_classes)
    entropies, probs = [], []
    for record, _, result in predict_transfer(model, records, **options):
        truth = transfer_label_map(record, model.num_classes)
        counts.update(result["sem_seg"].cpu().numpy(), truth, record["image_id"])
        if "attention" in result:
            entropies.append(attention_entropy(result["attention"]))
        if "image_labels_prob" in result:
            probs.append(result["image_labels_prob"].float().cpu())
    results = counts.evaluate(groups)
    if entropies:
        results["attention_entropy"] = torch.cat(entropies).mean().item()
    if probs:
        prob = torch.stack(probs).numpy()
        truth = multi_hot([record["image_labels"] for record in records], model.num_classes).numpy()
        results["tag_mAP"] = {
            name: evaluate_image_labels(prob[:, list(indices)], truth[:, list(indices)])["mAP"]
            for name, indices in groups.items()
            if len(indices)
        }
    return results


@torch.inference_mode()
def gram_rows(model: TransferNetModel, sample: Sample, points: Sequence[tuple[int, int]]) -> Tensor:
    """Make the rows of the Gram matrix at pixels, as in the paper's figure 6 (Eq. 10).

    A row is the densified attention of a single position, by which the decoder sees more than that.

    Args:
        model: of either host, in evaluation mode.
        sample: with ``image``, of which `points` are pixels (x, y).

    Returns:
        (P, h, w) inner products of every feature with that of a pixel.
    """
    (features,) = model.network.encode(model.preprocess([sample]))[0].float()
    size = tuple(features.shape[-2:])
    places = torch.tensor(points).reshape(-1, 2)
    places = positions_of_pixels(places, tuple(sample["image"].shape[-2:]), size)
    features = features.flatten(1)
    return (features[:, places.to(features.device)].T @ features).unflatten(1, size)


WORDS: Mapping[str, str] = {
    "classifier": "image classifier",
    "transfernet": "TransferNet",
    "transfernet_gt": "TransferNet, true image labels",
    "baseline": "BaselineNet",
    "baseline_gt": "BaselineNet, true image labels",
    "baseline_source": "BaselineNet, first on the source",
    "decoupled": "DecoupledNet",
    "decoupled_gt": "DecoupledNet, true image labels",
    "decoupled_source": "DecoupledNet, first on the source",
    "mIoU_gt_labels": "mean IoU in percent, true image labels",
    "target": "target categories",
    "source": "source categories",
}
"""What stages, methods and measures are called where people read them."""


def format_transfer(metrics: Mapping[str, Any]) -> str:
    """Lay out the measures in a table."""
    lines = ["| mIoU in percent | target | source | all |", "|---|---|---|---|"]
    names = ("transfernet", "baseline", "decoupled")
    for kind, title in (("mIoU", "predicted labels"), ("mIoU_gt_labels", "true labels")):
        for method in (name for name in names if name in metrics[kind]["target"]):
            cells = [f"{metrics[kind][group][method]:.1f}" for group in ("target", "source", "all")]
            lines.append(f"| {WORDS[method]}, {title} | {' | '.join(cells)} |")
    tags = metrics["tag_mAP"]
    of_sides = ", ".join(
        f"{tags[side]:.1f} of {side}" for side in ("target", "source") if side in tags
    )
    lines.append(
        f"Image labels, mAP in percent: {of_sides} categories. Attention entropy: "
        f"{metrics['attention_entropy']:.2f}; 1 is uniform."
    )
    times = ", ".join(f"{name} {value:.0f}" for name, value in metrics["step_seconds"].items())
    return "\n".join([*lines, f"Seconds: {times}"])


def draw_transfer(
    path: Path, model: TransferNetModel, records: Sequence[Record], split: CategorySplit
) -> None:
    """Draw validation images from the image to the mask of a true label, a target one if any."""
    target = set(split.indices_without_masks)
    shown = varied_records(records, num_labels=2, shown=target)
    names = {"num_classes": model.num_classes, "names": split.class_names, "side": _TILE_SIDE}
    tiles, titles = [], []
    predicted = predict_transfer(model, shown, gt_labels=True, description="picture")
    for record, sample, result in predicted:
        image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
        labels = result["image_labels"].tolist()
        row = next((i for i, label in enumerate(labels) if label in target), 0)
        attention, densified = (
            result[name][row].float().cpu().numpy() for name in ("attention", "densified")
        )
        tiles += [
            plain_tile(image, _TILE_SIDE),
            draw_heat_map(image, attention, symmetric=False, side=_TILE_SIDE),
            draw_heat_map(image, densified - densified.mean(), symmetric=True, side=_TILE_SIDE),
            draw_label_map(image, result["sem_seg"].cpu().numpy(), **names),
            draw_label_map(image, transfer_label_map(record, model.num_classes), **names),
        ]
        side = "target" if labels[row] in target else "source"
        titles.append(f"attention for: {split.class_names[labels[row]]} ({side} category)")
    columns = ("image", "attention", "densified", "mask", "truth")
    legend = (
        ((253, 231, 37), "attention: most"),
        ((220, 30, 30), "densified: above its mean"),
        ((30, 60, 220), "below"),
    )
    sheet = contact_sheet(
        tiles, columns=len(columns), row_titles=titles, column_titles=columns, legend=legend
    )
    save_png(path, sheet)
