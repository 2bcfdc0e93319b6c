"""Class patterns: the first principal component of a class' features (Luo & Yang, AAAI 2020).

The pixels of the images that contain a class differ most in whether they show it, so the first
principal component of their features separates the class from the rest. An eigenvector has no
sign; the class activation map of the classifier gives it one. No pattern exists for background.

Shape legend:
    K: number of classes without background; L: labels of one image; d: channels of the layer;
    h, w: size of its feature map.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from maskx.core.digests import network_hash
from maskx.core.image_classifier import ImageClassifier, LayerTaps
from maskx.core.tensor_files import read_content, read_tensors, write_tensors
from maskx.core.text import listed
from maskx.systems.class_patterns.pattern_moments import (
    PatternMoments,
    check_identity,
    check_labels,
    load_moments,
    save_moments,
)

_PATTERNS = "class patterns"
# From this ratio of the two largest eigenvalues on, the direction of the pattern is hardly
# determined: it may be any mixture of the two components.
_EQUAL_EIGENVALUES = 0.99


@dataclass(frozen=True)
class LayerPatterns:
    """The patterns of one layer.

    Attributes:
        mean: (K, d) float32 mean feature of each class (Eq. 2); 0 without images.
        direction: (K, d) float32 first principal component, of unit length, signed so that a
            positive projection means the class; NaN without a pattern.
        std: (K,) standard deviation of the projection, the root of the largest eigenvalue; NaN
            without a pattern.
        explained: (K,) share of the variance along the direction; NaN without a pattern.
        explained_second: (K,) share of the second component; where it equals ``explained``, the
            direction is not unique. NaN without a pattern.
        sign_margin: (K,) how sure the sign is, in [0, 1], see :func:`find_patterns`: where the
            class activation map counts everywhere, the magnitude of its correlation with the
            projection. NaN without a pattern or without maps.
        num_images: (K,) int64.
        num_pixels: (K,) int64, feature vectors.
        valid: (K,) bool whether the class has a pattern: it has not with fewer than two pixels or
            without variance.
    """

    mean: Tensor
    direction: Tensor
    std: Tensor
    explained: Tensor
    explained_second: Tensor
    sign_margin: Tensor
    num_images: Tensor
    num_pixels: Tensor
    valid: Tensor


@dataclass
class ClassPatterns:
    """The patterns of several layers of one classifier.

    Attributes:
        layers: by name of the layer.
        class_names: the K classes in the classifier's order.
        network: :func:`maskx.core.digests.network_hash` of the classifier.
        settings: plain values that say how the patterns were found.
    """

    layers: dict[str, LayerPatterns]
    class_names: tuple[str, ...]
    network: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, patterns in self.layers.items():
            if len(patterns.mean) != len(self.class_names):
                raise ValueError(
                    f"The patterns of layer '{layer}' are of {len(patterns.mean)} classes, but "
                    f"{len(self.class_names)} names are given. Give the classifier's class list."
                )

    def uncertain(self, min_margin: float = 0.1) -> dict[str, list[str]]:
        """Name the classes by layer whose sign has a smaller margin, or none."""
        found = {}
        for layer, of_layer in self.layers.items():
            is_unsure = of_layer.valid & ~(of_layer.sign_margin >= min_margin)  # also NaN
            found[layer] = [self.class_names[label] for label in is_unsure.nonzero()[:, 0]]
        return found


def find_patterns(moments: PatternMoments) -> LayerPatterns:
    """Find the signed first principal component of each class (Eq. 2).

    The sign is that of the covariance of the projection and the class activation map, at the pixels
    at which that counts. Its margin is the magnitude of that covariance over the standard
    deviations of the map, at the same pixels, and of the projection, over all pixels; at most 1.
    Where there were no maps, or they say nothing of a class (margin 0), the larger extreme of the
    projections of the kept sample is positive, for the pixels of an object are fewer and farther
    out than those around it.

    Args:
        moments: of one layer. The eigenvectors are computed where they lie.
    """
    num_classes, channels = moments.num_classes, moments.channels
    direction = torch.full((num_classes, channels), torch.nan)
    numbers = torch.full((4, num_classes), torch.nan)
    valid = torch.zeros(num_classes, dtype=torch.bool)
    for label in tqdm(sorted(moments.scatter), desc="class patterns", unit="class", leave=False):
        covariance = moments.covariance(label)
        total = float(covariance.trace())
        # Less than the rounding of float32 features of this size is no variance.
        noise = torch.finfo(torch.float32).eps * float(moments.mean[label].norm())
        if moments.num_pixels[label] < 2 or total <= noise**2:
            continue
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        largest = float(eigenvalues[-1])
        second = max(float(eigenvalues[-2]), 0.0) if channels > 1 else 0.0
        signed, margin = _fix_sign(eigenvectors[:, -1], largest, label, moments)
        direction[label] = signed
        numbers[:, label] = torch.tensor([largest**0.5, largest / total, second / total, margin])
        valid[label] = True
    counts = moments.num_images.clone(), moments.num_pixels.clone()
    return LayerPatterns(moments.mean.float().cpu(), direction, *numbers, *counts, valid)


def project(features: Tensor, patterns: LayerPatterns, labels: Sequence[int]) -> Tensor:
    """Project features on the patterns of the image's labels (Eq. 3).

    Args:
        features: (d, h, w), of the layer of the patterns.
        patterns: of one layer.
        labels: L class indices.

    Returns:
        (L, h, w) float32 projections, in the units of the features, positive on the class; NaN
        for a class without a pattern.
    """
    num_classes, channels = patterns.mean.shape
    check_labels(labels, num_classes, "an image")
    if features.ndim != 3 or len(features) != channels:
        raise ValueError(
            f"Features have the shape {tuple(features.shape)}, but the patterns are of a layer "
            f"with features ({channels}, h, w). Give the features of that layer."
        )
    index = torch.as_tensor(labels, dtype=torch.int64)
    direction, mean = (
        values[index.to(values.device)].to(features.device, torch.float64)
        for values in (patterns.direction, patterns.mean)
    )
    # The difference of two products, not the product with a difference: that would be a copy of
    # the features for each label. Float64 keeps it exact.
    projections = direction @ features.double().flatten(1) - (direction * mean).sum(1, True)
    return projections.float().unflatten(1, features.shape[1:])


def report_patterns(patterns: ClassPatterns, *, min_margin: float = 0.1) -> list[str]:
    """Say in a Markdown table what the patterns are worth, and below whose sign is uncertain.

    A remark of a row names what to look at, such as a margin of the sign below ``min_margin``.
    """
    rows = [
        "| class | layer | images | pixels | explained 1 | explained 2 | margin | remark |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layer, of_layer in patterns.layers.items():
        numbers = {key: v for key, v in vars(of_layer).items() if v.ndim == 1}
        for label, name in enumerate(patterns.class_names):
            row = {key: values[label].item() for key, values in numbers.items()}
            shares = [
                f"{100 * row[key]:.1f} %" if row["valid"] else "-"
                for key in ("explained", "explained_second")
            ]
            margin = "-" if math.isnan(row["sign_margin"]) else f"{row['sign_margin']:.2f}"
            cells = [name, layer, row["num_images"], row["num_pixels"], *shares, margin]
            cells.append(_remark(row, min_margin))
            rows.append(f"| {' | '.join(map(str, cells))} |")
    for layer, names in patterns.uncertain(min_margin).items():
        if names:
            rows.append(
                f"{layer}: the patterns of {listed(names)} may point away from the class, as no "
                "class activation map says where it is. Look at their projections."
            )
    return rows


def choose_images(
    image_labels: Sequence[Sequence[int]],
    num_classes: int,
    max_images_per_class: int,
    seed: int,
) -> list[list[int]]:
    """Choose at most so many random images of each class, as the paper does (800 or 2000).

    What is chosen for one class depends on the seed and its own images only.

    Returns:
        For each image the labels, ascending, for which it is used; often none.
    """
    if max_images_per_class < 1:
        raise ValueError(f"max_images_per_class must be at least 1, got {max_images_per_class}.")
    images_of_class: list[list[int]] = [[] for _ in range(num_classes)]
    for image, labels in enumerate(image_labels):
        check_labels(labels, num_classes, f"image number {image} (from 0)")
        for label in set(labels):
            images_of_class[label].append(image)
    used: list[list[int]] = [[] for _ in image_labels]
    for label, images in enumerate(images_of_class):
        if len(images) > max_images_per_class:
            images = random.Random(f"{seed}/{label}").sample(images, max_images_per_class)
        for image in images:
            used[image].append(label)
    return used


@torch.no_grad()
def accumulate_moments(
    model: ImageClassifier,
    images: Tensor,
    samples: Sequence[Mapping[str, Any]],
    layers: Sequence[str],
    moments: dict[str, PatternMoments],
) -> None:
    """Add one batch to the moments of all layers, with one forward pass.

    Args:
        model: the classifier, in evaluation mode.
        images: (N, 3, H, W) as the classifier takes them.
        samples: N dictionaries with ``image_id``, ``image_labels`` (all of the image) and
            ``labels_used`` of them, see :func:`choose_images`.
        layers: names of :class:`~maskx.core.image_classifier.LayerTaps`.
        moments: by layer; those that are not there yet are made.
    """
    with LayerTaps(model.backbone, layers) as taps:
        features = model.backbone(images)[model.in_feature]
    for layer in layers:
        if layer not in moments:
            channels, device = taps.features[layer].shape[1], features.device
            moments[layer] = PatternMoments(model.num_classes, channels, device=device)
    for index, sample in enumerate(samples):
        image_id, labels = sample["image_id"], list(sample["labels_used"])
        image_labels = list(sample["image_labels"])
        check_labels(image_labels, model.num_classes, f"image {image_id!r}")
        absent = sorted(set(labels) - set(image_labels))
        if absent:
            raise ValueError(
                f"labels_used of image {image_id!r} holds {absent[0]}, but its image_labels are "
                f"{image_labels}. Allowed: some of these."
            )
        if not labels:
            continue
        maps, counts = _sign_maps(model, features[index], labels, image_labels)
        for layer in layers:
            moments[layer].update(
                taps.features[layer][index], maps, labels, map_counts=counts, image_id=image_id
            )


def _sign_maps(
    model: ImageClassifier, features: Tensor, labels: list[int], image_labels: list[int]
) -> tuple[Tensor, Tensor]:
    """Return the maps that fix the signs of labels, and where they count.

    Of a map only what speaks for its label is looked at, as in ICD (Fan et al., CVPR 2020), and not
    at pixels at which that of another label of the image is larger. There the map of the label is
    often far below zero, while the pattern takes the other object for foreground: with the plain
    maps, 4 of 12 signs of C41 came out wrong on generated scenes, with these none.

    Returns:
        (L, h, w) maps of the labels, none below 0, and (L, h, w) bool.
    """
    maps = model.activation_maps(features[None], image_labels)[0]
    # Else it would be clamped to a number, and not be found.
    maps = maps.masked_fill(maps.isneginf(), float("nan")).clamp(min=0)
    rows = [image_labels.index(label) for label in labels]
    return maps[rows], maps[rows] >= maps.amax(dim=0)


def discover_class_patterns(
    model: ImageClassifier,
    read: Callable[[int], dict[str, Any]],
    layers: Sequence[str],
    *,
    preprocess: Callable[[list[dict]], Tensor],
    total: int,
    batch_size: int = 16,
    checkpoint: Path | None = None,
    save_every: int = 500,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, PatternMoments]:
    """Stream the moments of all layers over the images, in one pass that can be interrupted.

    A run that is called again with its checkpoint goes on from there and ends with exactly the
    moments of a run that was not interrupted. The checkpoint has the size of the moments, see
    :class:`PatternMoments`. To share the images out among processes, give each its own images and
    checkpoint, then :func:`~maskx.systems.class_patterns.pattern_moments.merge_moments`.

    Args:
        model: the trained classifier, on any device; the moments are kept on it. It is put into
            evaluation mode.
        read: makes the sample of a number from 0: what :func:`accumulate_moments` and
            ``preprocess`` need.
        layers: names of :class:`~maskx.core.image_classifier.LayerTaps`.
        preprocess: makes the (N, 3, H, W) images that the classifier takes from samples.
        total: number of images.
        checkpoint: file of the moments, written every so often and at the end.
        save_every: images between two checkpoints.
        identity: what else the run is defined by, as plain values; a resumed run must have the
            same.
    """
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"Layers must be named, each once; got {list(layers)}.")
    for key, value in (("total", total), ("save_every", save_every)):
        if value < 1:
            raise ValueError(f"{key} must be at least 1 image, got {value}.")
    device = next(model.parameters()).device
    run = {"network": network_hash(model), "layers": list(layers)}
    run |= {"num_classes": model.num_classes, "total": total}
    # As JSON has it, so that it compares equal to what is read from the checkpoint.
    run = json.loads(json.dumps(run | dict(identity or {})))
    moments: dict[str, PatternMoments] = {}
    done, images = 0, ""
    if checkpoint is not None and checkpoint.is_file():
        moments, content = load_moments(checkpoint, device=device)
        check_identity(f"'{checkpoint}'", content["identity"], run, "this run")
        done, images = content["done"], content["images"]
    model.eval()
    with tqdm(total=total, initial=done, desc="features", unit="image") as progress:
        for first in range(done, total, batch_size):
            samples = [read(index) for index in range(first, min(first + batch_size, total))]
            accumulate_moments(model, preprocess(samples).to(device), samples, layers, moments)
            for sample in samples:
                of_image = json.dumps([sample["image_id"], list(sample["labels_used"])])
                images = hashlib.sha256(f"{images}{of_image}".encode()).hexdigest()
            done = first + len(samples)
            progress.update(len(samples))
            is_due = done // save_every > first // save_every or done == total
            if checkpoint is not None and is_due:
                state = {"identity": run, "done": done, "total": total, "images": images}
                save_moments(checkpoint, moments, state)
    return moments


def save_patterns(path: Path, patterns: ClassPatterns) -> None:
    """Write patterns to one safetensors file, whole or not at all."""
    tensors = {
        f"{layer}/{name}": tensor
        for layer, of_layer in patterns.layers.items()
        for name, tensor in vars(of_layer).items()
    }
    content = vars(patterns) | {"layers": list(patterns.layers)}
    write_tensors(path, tensors, _PATTERNS, content)


def load_patterns(
    path: Path,
    *,
    network: str | None,
    class_names: Sequence[str] | None,
    layers: Sequence[str] | None = None,
) -> ClassPatterns:
    """Read patterns of :func:`save_patterns`.

    Args:
        path: the file.
        network: of the classifier that they are to be used with; None: any.
        class_names: classes in that classifier's order; None: any.
        layers: those to read; None: all.

    Raises:
        ValueError: the file is damaged, or of something else.
    """
    types = {"class_names": list, "network": str, "settings": dict, "layers": list}
    content = read_content(path, _PATTERNS, types)
    found = tuple(map(str, content["class_names"]))
    if network is not None and network != content["network"]:
        raise ValueError(
            f"The class patterns in '{path}' were found with the network {content['network']}, "
            f"but are to be used with {network}. Features of other weights do not fit them: load "
            "the weights they were found with, or find them anew."
        )
    expected = found if class_names is None else class_names
    for index, (here, there) in enumerate(zip_longest(found, expected)):
        if here != there:
            raise ValueError(
                f"The class patterns in '{path}' are of other classes: class {index} is {here!r} "
                f"in the file, but {there!r} is expected. Use the same list in the same order."
            )
    missing = [layer for layer in layers or () if layer not in content["layers"]]
    if missing:
        raise ValueError(
            f"'{path}' has no class patterns of layer '{missing[0]}'. Layers in the file: "
            f"{', '.join(content['layers'])}. Choose one of them, or find the patterns anew."
        )
    chosen = content["layers"] if layers is None else layers
    of_layers = {layer: _read_layer(path, layer, len(found)) for layer in chosen}
    return ClassPatterns(of_layers, found, content["network"], content["settings"])


def _fix_sign(
    direction: Tensor, variance: float, label: int, moments: PatternMoments
) -> tuple[Tensor, float]:
    """Return the signed direction and the margin of its sign, NaN without maps."""
    # Where nothing decides below, the result still does not depend on the eigensolver.
    direction = direction * direction[direction.abs().argmax()].sign()
    squares = variance * int(moments.map_pixels[label]) * float(moments.map_scatter[label])
    if squares > 0:
        evidence = float(direction @ moments.cross[label])
        margin = min(abs(evidence) / squares**0.5, 1.0)
    else:
        vectors = moments.sample[label][moments.sample_keys[label].isfinite()].double()
        projections = (vectors - moments.mean[label]) @ direction
        evidence = float(projections.max() + projections.min())
        margin = 0.0 if moments.uses_maps else float("nan")
    return (-direction if evidence < 0 else direction), margin


def _remark(row: Mapping[str, float], min_margin: float) -> str:
    if not row["valid"]:
        if row["num_images"] == 0:
            return "no pattern: no image"
        return f"no pattern: {'one pixel' if row['num_pixels'] < 2 else 'no variance'}"
    remarks = []
    if row["explained_second"] >= _EQUAL_EIGENVALUES * row["explained"]:
        remarks.append("two equal components, the direction is not unique")
    if math.isnan(row["sign_margin"]):
        remarks.append("sign from the extremes, no class activation maps")
    elif row["sign_margin"] == 0:
        remarks.append("sign from the extremes, the class activation maps say nothing")
    elif row["sign_margin"] < min_margin:
        remarks.append(f"sign uncertain, margin below {min_margin:g}")
    return "; ".join(remarks)


def _read_layer(path: Path, layer: str, num_classes: int) -> LayerPatterns:
    names = [field.name for field in fields(LayerPatterns)]
    tensors = read_tensors(path, [f"{layer}/{name}" for name in names])
    patterns = LayerPatterns(*(tensors[f"{layer}/{name}"] for name in names))
    types = {"num_images": torch.int64, "num_pixels": torch.int64, "valid": torch.bool}
    channels = patterns.mean.shape[1:2]
    for name, values in vars(patterns).items():
        size = (num_classes, *(channels if name in ("mean", "direction") else ()))
        allowed = types.get(name, torch.float32)
        if (tuple(values.shape), values.dtype) != (size, allowed):
            raise ValueError(
                f"'{path}' is damaged: {name} of layer '{layer}' is {tuple(values.shape)} of "
                f"{values.dtype}. Allowed: {size} of {allowed}. Make it again."
            )
    return patterns
