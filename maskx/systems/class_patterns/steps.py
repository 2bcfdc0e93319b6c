"""From tagged images to proxy masks by class patterns, step by step, for both hosts.

Luo and Yang, "Learning Saliency-Free Model with Generic Features for Weakly-Supervised Semantic
Segmentation" (AAAI 2020). A host trains an image classifier and hands it over as
:class:`ClassifierSource`; :func:`discover` finds the patterns of its layers, :func:`project` writes
the projections of every image on them, :func:`make_masks` makes label maps of the projections.
Every step leaves files and goes on from them when it is called again after an interruption.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maskx.core.digests import digest_of, network_hash
from maskx.core.image_classifier import ImageClassifier, LayerTaps
from maskx.core.processes import run_jobs
from maskx.core.sample_models import SampleClassifier
from maskx.data.label_maps import write_label_map
from maskx.systems.class_patterns.evaluation import evaluate_proxy_masks
from maskx.systems.class_patterns.model import SampleSegmenter, predict_label_maps
from maskx.systems.class_patterns.pattern_moments import check_identity, check_labels, merge_moments
from maskx.systems.class_patterns.patterns import (
    ClassPatterns,
    LayerPatterns,
    choose_images,
    discover_class_patterns,
    find_patterns,
    load_patterns,
    report_patterns,
    save_patterns,
)
from maskx.systems.class_patterns.patterns import project as project_features
from maskx.systems.class_patterns.projections import (
    projections_path,
    read_projections,
    start_projections,
    write_projections,
)
from maskx.systems.class_patterns.proxy_masks import (
    ProxyMaskSettings,
    ProxyMaskSummary,
    make_proxy_masks,
    mask_path,
    read_label_map_if_good,
    write_proxy_json,
)

PATTERNS_NAME = "patterns.safetensors"
"""Name of the file of :func:`discover`."""

Record = Mapping[str, Any]
Report = Callable[[str], None]


@dataclass
class ClassifierSource:
    """A trained image classifier and how its host feeds it.

    Attributes:
        read_image: makes a sample from a record of :func:`maskx.data.coco.load_coco`.
        name: what messages call it, such as its folder.
        settings: plain values that change the features beside the weights, such as the size of
            the images; patterns and projections are only used with the same.
    """

    model: SampleClassifier
    read_image: Callable[[Record], dict[str, Any]]
    name: str
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def classifier(self) -> ImageClassifier:
        """The plain network, whose features are read."""
        return self.model.classifier


@dataclass(frozen=True)
class LayerMasks:
    """The proxy masks of one layer.

    Attributes:
        json_file: COCO-format file with the masks as label maps, to train on.
        evaluation: of :func:`maskx.systems.class_patterns.evaluation.evaluate_proxy_masks`; None
            if no record has a true mask.
    """

    json_file: Path
    summary: ProxyMaskSummary
    evaluation: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """Where the masks are."""
        return self.json_file.parent / "masks" / self.json_file.stem

    @property
    def mean_iou(self) -> float:
        """In percent, where an undecided pixel is missed."""
        return self.evaluation["undecided_missed"]["mIoU"]["all"]


# --- patterns


def discover(
    source: ClassifierSource,
    records: Sequence[Record],
    class_names: Sequence[str],
    layers: Sequence[str],
    *,
    output: Path,
    max_images_per_class: int = 800,
    seed: int = 0,
    batch_size: int = 16,
    save_every: int = 500,
    workers: int = 1,
    shard: tuple[int, int] | None = None,
    merge: bool = False,
    report: Report = print,
) -> ClassPatterns | None:
    """Find the class patterns of several layers in one pass over the images.

    The same call goes on with an interrupted pass. To share the images out among machines, call it
    with each ``shard`` and the same ``output``, then with ``merge``.

    Args:
        source: the classifier.
        records: the tagged images, as of :func:`maskx.data.coco.load_coco`; only their image and
            ``image_labels`` are looked at.
        class_names: in the classifier's order.
        layers: names of :class:`maskx.core.image_classifier.LayerTaps`.
        output: folder of the result, :data:`PATTERNS_NAME`; result and settings that are there
            already must be the same.
        max_images_per_class: random images used of a class: 800 (VOC) or 2000 (COCO) in the paper.
        seed: of their choice.
        batch_size: images per forward pass.
        save_every: images between two checkpoints.
        workers: processes that share the images out on this machine; the classifier must be on
            the CPU for more than one.
        shard: index, from 0, and number of the share of the images to do; then nothing is merged.
        merge: merge finished shards, without a pass.

    Returns:
        The patterns; None for a shard.
    """
    _check(source, records, class_names, batch_size)
    LayerTaps(source.classifier.backbone, layers)  # refuses layers that are not there
    index, count = shard or (0, workers)
    if not 0 <= index < count:
        raise ValueError(
            f"Shard {index} of {count} does not exist. Allowed: workers of at least 1, and shards "
            "0/N to N-1/N."
        )
    if workers > 1 and source.model.device.type != "cpu":
        raise ValueError(
            f"workers is {workers}, but the classifier is on {source.model.device}, which one "
            "process keeps busy. Use one worker, or shards on several machines."
        )
    chosen = choose_images(
        [r["image_labels"] for r in records], len(class_names), max_images_per_class, seed
    )
    used = [(record, labels) for record, labels in zip(records, chosen, strict=True) if labels]
    if not used:
        raise ValueError(f"None of the {len(records)} images has an image label, to learn from.")
    settings = dict(source.settings) | {
        "max_images_per_class": max_images_per_class,
        "seed": seed,
        "images": digest_of([[str(record["image_id"]), labels] for record, labels in used]),
        "layers": list(layers),
    }
    network = network_hash(source.classifier)
    path = Path(output) / PATTERNS_NAME
    if path.is_file():
        patterns = load_patterns(path, network=network, class_names=class_names)
        check_identity(f"'{path}'", patterns.settings, settings, "this run")
        report(f"'{path}' is there already, made with the same settings.")
        return None if shard else patterns

    # The name says what the moments are of: those of other runs are never mixed in.
    stem = f"moments-{digest_of([network, settings])[:12]}"
    if not merge:
        run_pass = functools.partial(
            _run_pass,
            source=source,
            layers=tuple(layers),
            identity=settings,
            batch_size=batch_size,
            save_every=save_every,
            threads=max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None,
        )
        jobs = [
            (used[number::count], path.with_name(f"{stem}-{number}-of-{count}.safetensors"))
            for number in (range(count) if shard is None else [index])
            if number < len(used)  # there may be more shards than images
        ]
        for _ in run_jobs(run_pass, jobs, workers):
            pass
        if shard is not None:
            report(f"Wrote shard {index} of {count}, {len(used[index::count])} images.")
            return None
    parts = _find_shards(path.parent, stem, count=None if merge else count, num_images=len(used))
    moments = merge_moments(parts)
    patterns = ClassPatterns(
        layers={layer: find_patterns(moments[layer]) for layer in layers},
        class_names=tuple(class_names),
        network=network,
        settings=settings,
    )
    save_patterns(path, patterns)
    for part in parts:  # large, and of no use any more
        part.unlink()
    report(
        f"{len(used)} of {len(records)} images were used, at most {max_images_per_class} of a "
        "class.\n" + "\n".join(report_patterns(patterns))
    )
    return patterns


def _run_pass(
    job: tuple[Sequence[tuple[Record, list[int]]], Path],
    *,
    source: ClassifierSource,
    threads: int | None,
    **options: Any,
) -> None:
    """Stream the images that a process uses into its checkpoint."""
    used, checkpoint = job
    if threads is not None:
        torch.set_num_threads(threads)

    def read(index: int) -> dict[str, Any]:
        record, labels = used[index]
        labels = {"image_labels": record["image_labels"], "labels_used": labels}
        return source.read_image(record) | labels

    discover_class_patterns(
        source.classifier,
        read,
        preprocess=source.model.preprocess,
        total=len(used),
        checkpoint=checkpoint,
        **options,
    )


def _find_shards(folder: Path, stem: str, *, count: int | None, num_images: int) -> list[Path]:
    """Find the moments of all shards; `count` None: as many as the names of the files say."""
    counts = {count}
    if count is None:
        found = folder.glob(f"{stem}-*-of-*.safetensors")
        counts = {int(path.stem.rpartition("-")[2]) for path in found}
    if len(counts) != 1:
        raise ValueError(
            f"'{folder}' holds shards of {sorted(counts) or 'no'} runs with this classifier, these "
            "images, layers and settings. Allowed: all shards of one number, made with the same "
            "arguments."
        )
    (count,) = counts
    parts = [folder / f"{stem}-{i}-of-{count}.safetensors" for i in range(min(count, num_images))]
    missing = [i for i, part in enumerate(parts) if not part.is_file()]
    if missing:
        raise ValueError(
            f"'{folder}' lacks the shards {missing} of {count}. Make them, with the same "
            "arguments, then merge."
        )
    return parts


# --- projections


@torch.no_grad()
def project(
    source: ClassifierSource,
    records: Sequence[Record],
    patterns: ClassPatterns,
    layers: Sequence[str],
    folder: Path,
    *,
    batch_size: int = 16,
    report: Report = print,
) -> None:
    """Write the projections of all images with labels, with one forward pass for all layers.

    Files that are there and complete are kept. Nothing but the image and ``image_labels`` of a
    record is looked at.

    Args:
        source: the classifier.
        records: as of :func:`maskx.data.coco.load_coco`.
        patterns: found with this classifier.
        layers: of the patterns.
        folder: gets one folder per layer, see :func:`projections_folder`.
        batch_size: images per forward pass.
    """
    class_names = patterns.class_names
    _check(source, records, class_names, batch_size)
    ours = {"network": network_hash(source.classifier), **source.settings}
    found = {key: patterns.settings.get(key) for key in ours} | {"network": patterns.network}
    check_identity("The set of class patterns", found, ours, source.name)
    folders = {layer: projections_folder(folder, layer) for layer in layers}
    for layer, of_layer in folders.items():
        if layer not in patterns.layers:
            raise ValueError(
                f"There are no class patterns of layer {layer!r}. Allowed: "
                f"{', '.join(patterns.layers)}."
            )
        start_projections(
            of_layer,
            class_names=class_names,
            patterns=_patterns_hash(patterns.layers[layer]),
            layer=layer,
            **source.settings,
        )
    labelled = [record for record in records if record["image_labels"]]
    todo, num_damaged = [], 0
    for record in labelled:
        states = {_state_of_projections(of_layer, record) for of_layer in folders.values()}
        if states != {"complete"}:
            todo.append(record)
        num_damaged += "damaged" in states

    classifier = source.classifier.eval()
    with tqdm(
        total=len(labelled), initial=len(labelled) - len(todo), desc="projections", unit="img"
    ) as progress:
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            images = source.model.preprocess([source.read_image(record) for record in batch])
            with LayerTaps(classifier.backbone, layers) as taps:
                classifier.backbone(images)
            for index, record in enumerate(batch):
                labels = list(record["image_labels"])
                for layer, of_layer in folders.items():
                    features = taps.features[layer][index]
                    # All NaN would mean a class without a pattern.
                    if not features.isfinite().all():
                        raise ValueError(
                            f"Features of layer {layer} of image {record['image_id']!r} hold NaN "
                            "or infinite values. Look at the image and at the classifier's "
                            "weights; leave the image out or repair it."
                        )
                    q = project_features(features, patterns.layers[layer], labels)
                    write_projections(of_layer, record["image_id"], labels, q.cpu().numpy())
            progress.update(len(batch))
    report(
        f"Projections of {len(labelled)} images: {len(todo)} written ({num_damaged} of them were "
        f"there, but damaged), {len(labelled) - len(todo)} kept; {len(records) - len(labelled)} "
        "images have no labels and need none."
    )


def projections_folder(folder: Path, layer: str) -> Path:
    """Return the folder into which :func:`project` writes those of a layer."""
    return Path(folder) / "projections" / layer


def masks_folder(folder: Path, layer: str, settings: ProxyMaskSettings) -> Path:
    """Return the folder into which :func:`make_masks` writes those of a layer."""
    return Path(folder) / "masks" / f"{layer}-{settings.name}"


def _state_of_projections(folder: Path, record: Record) -> str:
    if not projections_path(folder, record["image_id"]).is_file():
        return "missing"
    try:
        labels, _ = read_projections(folder, record["image_id"])
    except ValueError:
        return "damaged"
    return "complete" if sorted(labels) == sorted(record["image_labels"]) else "of other labels"


# --- masks


def make_masks(
    records: Sequence[Record],
    patterns: ClassPatterns,
    layers: Sequence[str],
    folder: Path,
    *,
    image_root: Path,
    category_ids: Sequence[int] | None = None,
    settings: ProxyMaskSettings | None = None,
    made_with: Mapping[str, Any] | None = None,
    workers: int = 1,
    report: Report = print,
) -> dict[str, LayerMasks]:
    """Make the proxy masks of all images from the projections of :func:`project`.

    Masks that are there, complete and not older than their projections are kept, others made. True
    masks of the records, where they have them, are read by the evaluation alone, after all masks
    are made.

    Args:
        records: as of :func:`maskx.data.coco.load_coco`.
        patterns: that the projections were made with.
        layers: whose masks to make.
        folder: that :func:`project` wrote to; gets ``masks/`` and a JSON file per layer.
        image_root: see :func:`write_proxy_json`, as for ``category_ids`` and ``made_with``.
        settings: how masks are made; None for the paper's.

    Returns:
        What was made, by layer.
    """
    settings = settings or ProxyMaskSettings()
    folder = Path(folder)
    class_names = patterns.class_names
    known = [r for r in records if r["supervision"] == "mask"]
    made = {}
    for layer in layers:
        masks = masks_folder(folder, layer, settings)
        summary = make_proxy_masks(
            records,
            projections_folder(folder, layer),
            masks,
            class_names=class_names,
            stds=patterns.layers[layer].std.numpy(),
            settings=settings,
            workers=workers,
            progress=True,
        )
        json_file = folder / f"{masks.name}.json"
        write_proxy_json(
            json_file,
            records,
            masks,
            image_root=image_root,
            class_names=class_names,
            category_ids=category_ids,
            made_with=made_with,
        )
        evaluation = None
        if known:
            evaluation = evaluate_proxy_masks(known, masks, len(class_names), progress=True)
        made[layer] = LayerMasks(json_file, summary, evaluation)
    report(format_masks(made))
    return made


def format_masks(made: Mapping[str, LayerMasks]) -> str:
    """Lay out in a table how good the masks of each layer are, in percent."""
    lines = [
        "| layer | mIoU, undecided pixels missed | mIoU of decided pixels | undecided "
        "| background |",
        "|---|---|---|---|---|",
    ]
    for layer, masks in made.items():
        summary, evaluation = masks.summary, masks.evaluation
        scores = ["-", "-"]
        if evaluation is not None:
            keys = ("undecided_missed", "decided_only")
            scores = [f"{evaluation[key]['mIoU']['all']:.1f}" for key in keys]
        shares = [summary.undecided_pixels, summary.background_pixels]
        shares = [f"{100 * number / max(1, summary.pixels):.1f}" for number in shares]
        lines.append(f"| {' | '.join([layer, *scores, *shares])} |")
    first = next(iter(made.values())).summary
    lines.append(
        f"{first.num_images} images, {first.num_refined} of them refined by the CRF, "
        f"{first.num_without_labels} without labels (all background)"
    )
    for layer, masks in made.items():
        number = masks.summary.num_without_pattern
        if number:
            lines.append(f"{layer}: {number} images have a label without a pattern: no background")
        if masks.summary.num_redone:
            lines.append(
                f"{layer}: {masks.summary.num_redone} damaged or outdated masks were made again"
            )
    return "\n".join(lines)


def predict_masks(
    model: SampleSegmenter,
    records: Sequence[Record],
    folder: Path,
    *,
    read_image: Callable[[Record], dict[str, Any]] | None = None,
) -> None:
    """Predict label maps of training images, of nothing but the labels of each, to train on.

    Those that are there, at :func:`mask_path` of the folder, and readable are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_classes = model.num_classes
    missing = [
        record
        for record in records
        if read_label_map_if_good(mask_path(folder, record["image_id"]), record, num_classes)
        is None
    ]
    found = predict_label_maps(
        model,
        missing,
        read_image=read_image,
        only_image_labels=True,
        description="training images",
    )
    for image_id, label_map in found:
        write_label_map(mask_path(folder, image_id), label_map, num_classes=num_classes)


# --- checks


def _check(
    source: ClassifierSource,
    records: Sequence[Record],
    class_names: Sequence[str],
    batch_size: int,
) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 image, got {batch_size}.")
    num_classes = source.classifier.num_classes
    if len(class_names) != num_classes:
        raise ValueError(
            f"The data have {len(class_names)} classes, but {source.name} has {num_classes}. Give "
            "the class list that the classifier was trained with."
        )
    for record in records:
        check_labels(record["image_labels"], num_classes, f"image {record['image_id']!r}")


def _patterns_hash(patterns: LayerPatterns) -> str:
    both = torch.stack([patterns.mean, patterns.direction])
    return hashlib.sha256(both.numpy().tobytes()).hexdigest()
