"""LarvSeg on the embedded host: masks of base classes, image labels of many more.

Yu et al., "LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic Segmentation
via Category-wise Attentive Classifier" (PRCV 2024), in the steps of
:class:`maskx.systems.larvseg.chain.LarvSegChain`, from data to measures and a picture.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskx.core.label_pairs import label_pairs
from maskx.core.sample_models import Sample
from maskx.data.coco import CocoData
from maskx.evaluation.figures import (
    contact_sheet,
    draw_heat_map,
    draw_label_map,
    plain_tile,
    save_png,
)
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.larvseg.attention import attention_maps
from maskx.systems.larvseg.chain import LarvSegChain, LarvSegMethod, LarvSegSettings
from maskx.systems.larvseg.evaluation import evaluate_larvseg
from maskx.systems.larvseg.model import SampleLarvSeg, predict_larvseg
from maskx.systems.larvseg.samples import (
    LabelledImages,
    Record,
    labelled_images,
    read_sample,
    sets_of_one_file,
    split_groups,
    table_label_map,
)

__all__ = [
    "attention_of",
    "draw_larvseg",
    "format_larvseg",
    "learn_larvseg",
]

_FIGURE_ROWS, _TILE_SIDE = 6, 256
_MASK = Supervision.MASK.value


def learn_larvseg(
    train_data: CocoData,
    val_data: CocoData,
    split: CategorySplit,
    settings: LarvSegSettings,
    *,
    methods: Sequence[LarvSegMethod] = (LarvSegMethod("baseline"), LarvSegMethod("larvseg")),
    output: Path,
    resume: bool = False,
    device: torch.device,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Learn the baseline and LarvSeg from one start and evaluate both.

    Args:
        train_data: images with masks, of which those of novel classes are not read, and images
            with image labels; see :func:`maskx.systems.larvseg.samples.sets_of_one_file`.
        val_data: images with true masks, of the same classes.
        split: A the base classes, B the novel ones.
        settings: what to do.
        methods: what to compare.
        output: folder of the results.
        resume: go on with an interrupted run.
        device: where to compute.
        report: receives the lines for the reader.

    Returns:
        Measures in percent: ``mIoU`` of each method, of ``base``, ``novel`` and ``all`` classes;
        ``IoU`` by method and class; ``num_images`` by data set; ``step_seconds``.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: data, split or settings cannot be used, or a checkpoint is of another run.
    """
    if not split.without_masks:
        raise ValueError(
            f"Category split '{split.name}' leaves no novel class: all {len(split.class_names)} "
            "have masks. Name a split in which some have image labels only."
        )
    test = labelled_images(val_data)
    has_masks = (r["image_labels"] and r["supervision"] == _MASK for r in val_data.records)
    if test.background and not any(has_masks):
        raise ValueError(
            f"None of the {len(val_data.records)} validation images of '{val_data.json_file}' has "
            "a mask, so there is nothing to evaluate. Give a file with masks of all categories."
        )
    sets = sets_of_one_file(train_data, split, image_size=settings.image_size)
    groups = split_groups(test, split, sets.table.names)
    num_images = {each.name: len(each.records) for each in sets.data_sets}
    report(
        f"{num_images['masks']} training images with masks of {len(groups['base'])} base classes, "
        f"{num_images['image labels']} with image labels of {len(sets.scored['image labels'])} "
        f"classes, {len(groups['novel'])} of them novel"
    )
    chain = LarvSegChain(
        sets,
        settings,
        output=output,
        resume=resume,
        identity={"annotation file": train_data.json_file.name, "split": list(split.with_masks)},
        device=device,
    )
    metrics: dict[str, Any] = {"mIoU": {}, "IoU": {}}
    models = {}
    for method in methods:
        models[method.name] = model = chain.train_method(method)
        with chain.timed("evaluation"):
            found = evaluate_larvseg(model, test, groups, description=f"{method.name}: evaluation")
        metrics["mIoU"][method.name] = {
            group: found["mIoU"][group] for group in ("base", "novel", "all")
        }
        metrics["IoU"][method.name] = dict(zip(sets.table.names, found["per_class"], strict=True))
    with chain.timed("picture"):
        draw_larvseg(output / "predictions.png", models, test, groups["novel"])
    metrics["num_images"] = num_images
    metrics["step_seconds"] = {name: round(value, 1) for name, value in chain.seconds.items()}
    report("\n" + format_larvseg(metrics))
    return metrics


def format_larvseg(metrics: Mapping[str, Any]) -> str:
    """Lay out the measures in a table."""
    lines = ["| mIoU in percent | novel | base | all |", "|---|---|---|---|"]
    for name, found in metrics["mIoU"].items():
        cells = [f"{found[group]:.1f}" for group in ("novel", "base", "all")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    times = ", ".join(f"{name} {value:.0f}" for name, value in metrics["step_seconds"].items())
    return "\n".join([*lines, f"Seconds: {times}"])


@torch.inference_mode()
def attention_of(model: SampleLarvSeg, sample: Sample, labels: Sequence[int]) -> np.ndarray:
    """Make the attention maps that the auxiliary loss has for the labels of an image.

    Args:
        model: with a memory bank.
        sample: with ``image``.
        labels: table indices, all that the image is known to show: each is background to the
            others.

    Returns:
        (labels, h, w) in (0, 1); NaN for a class of which the bank has no image.
    """
    network = model.network
    tokens = network(model.preprocess([sample]))
    distinct = sorted(set(labels))
    pairs = label_pairs([distinct], model.num_classes, tokens.device)
    known = network.bank.seen(pairs.classes)
    maps = attention_maps(tokens, pairs, network.bank.class_means(pairs.classes), known)
    maps[~known] = torch.nan
    rows = [distinct.index(label) for label in labels]
    return maps[rows].unflatten(1, tokens.shape[-2:]).float().cpu().numpy()


def draw_larvseg(
    path: Path,
    models: Mapping[str, SampleLarvSeg],
    test: LabelledImages,
    novel: Sequence[int],
) -> None:
    """Draw validation images: attention of one label, the label maps of the models, the truth.

    Args:
        path: PNG file to write.
        models: by name; attention maps are those of the first with a memory bank, if there is one.
        test: images with true label maps.
        novel: table indices of the novel classes, which are shown first.
    """
    names = next(iter(models.values())).class_names
    attentive = next((m for m in models.values() if m.network.bank is not None), None)
    place = {name: index for index, name in enumerate(names)}
    ground = [place[test.background]] if test.background in place else []
    labels_of = {
        record["image_id"]: [
            place[test.class_names[label]]
            for label in record["image_labels"]
            if test.class_names[label] in place
        ]
        for record in test.records
    }
    records = _varied(test.records, labels_of, set(novel))
    predicted = {
        name: [label_map for _, label_map in predict_larvseg(model, records, description="picture")]
        for name, model in models.items()
    }
    style = {"num_classes": len(names), "names": names, "side": _TILE_SIDE}
    tiles, titles, drawn = [], [], []
    for row, record in enumerate(records):
        sample = read_sample(record)
        image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
        labels = labels_of[record["image_id"]]
        # A novel class if there is one, rather one that no row above has.
        shown = min(labels, key=lambda label: (label not in set(novel), label in drawn))
        drawn.append(shown)
        tiles.append(plain_tile(image, _TILE_SIDE))
        if attentive is not None:
            attention = attention_of(attentive, sample, [*labels, *ground])[labels.index(shown)]
            tiles.append(draw_heat_map(image, attention, symmetric=False, side=_TILE_SIDE))
        maps = [found[row] for found in predicted.values()]
        maps.append(table_label_map(test, record, names))
        tiles += [draw_label_map(image, label_map, **style) for label_map in maps]
        side = "novel" if shown in set(novel) else "base"
        titles.append(f"attention for: {names[shown]} ({side} class)")
    columns = ["image", *predicted, "truth"]
    if attentive is not None:
        columns.insert(1, "attention")
    sheet = contact_sheet(
        tiles,
        columns=len(columns),
        row_titles=titles if attentive is not None else (),
        column_titles=columns,
        legend=(((253, 231, 37), "attention: most"), ((150, 150, 150), "hatched: unknown")),
    )
    save_png(path, sheet)


def _varied(
    records: Sequence[Record], labels_of: Mapping[Any, Sequence[int]], novel: set[int]
) -> list[Record]:
    """Choose images whose novel classes are not shown yet."""
    chosen: list[Record] = []
    shown: set[int] = set()
    rest = [record for record in records if labels_of[record["image_id"]]]
    while rest and len(chosen) < _FIGURE_ROWS:
        best = max(rest, key=lambda r: len(novel & set(labels_of[r["image_id"]]) - shown))
        rest.remove(best)
        chosen.append(best)
        shown |= set(labels_of[best["image_id"]])
    return chosen
