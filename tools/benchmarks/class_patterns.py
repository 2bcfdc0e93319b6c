"""What tools/benchmark.py measures of class patterns: the pass over the images."""

import itertools
from collections.abc import Callable, Iterator

import torch

from benchmarks.measure import Case, num_parameters
from maskx.core.image_classifier import ImageClassifier
from maskx.core.timm_backbones import TimmBackbone
from maskx.systems.class_patterns.patterns import PatternMoments, accumulate_moments

_NUM_CLASSES = 20


def discovery_cases(
    *,
    depth: int,
    image_size: int,
    num_images: int,
    labels: tuple[int, ...] = (1, 3),
    device: torch.device,
) -> Iterator[Case]:
    """Make steps of one batch; the reference is the forward pass of the classifier alone.

    The layers are all blocks of the last stage, at output stride 8. What is held per class of an
    image, over all layers, is in the settings as ``bytes_per_class``.

    Args:
        depth: of the ResNet; 18 and 34 have d = 512, 50 and 101 d = 2048.
        image_size: height and width in pixels; 328 in the paper.
        num_images: of the batch.
        labels: numbers of labels per image to measure.
        device: where to run.
    """
    torch.manual_seed(0)
    backbone = TimmBackbone(f"resnet{depth}", output_stride=8)
    in_feature = "layer4"
    model = ImageClassifier(
        backbone,
        in_feature=in_feature,
        in_channels=backbone.feature_shapes[in_feature].channels,
        num_classes=_NUM_CLASSES,
    )
    model.to(device).eval()
    images = torch.randn(num_images, 3, image_size, image_size, device=device)
    layers = sorted(backbone.layer_aliases)
    settings = {"depth": depth, "image_size": image_size, "num_images": num_images}
    settings |= {"layers": layers}
    forward = torch.no_grad()(lambda: model(images))
    yield Case("forward pass alone", forward, num_parameters(model), settings)

    for count in labels:
        moments: dict[str, PatternMoments] = {}
        chosen = {"image_labels": range(count), "labels_used": range(count)}
        step = _discovery_step(model, images, chosen, layers, moments)
        step()  # takes the memory of the classes, so that what is held is known
        held = sum(m.num_bytes for m in moments.values())
        empty = sum(PatternMoments(_NUM_CLASSES, m.channels).num_bytes for m in moments.values())
        per_class = (held - empty) // count
        name = f"with moments, {count} label{'s' * (count > 1)}, {per_class / 1e6:.1f} MB per class"
        details = {"labels": count, "bytes_per_class": per_class, "bytes_held": held}
        yield Case(name, step, num_parameters(model), settings | details)


def _discovery_step(
    model: ImageClassifier,
    images: torch.Tensor,
    labels: dict[str, range],
    layers: list[str],
    moments: dict[str, PatternMoments],
) -> Callable[[], None]:
    image_ids = itertools.count()

    def step() -> None:  # of new images each time, as the sample that is kept goes by their ids
        samples = [{"image_id": next(image_ids), **labels} for _ in images]
        accumulate_moments(model, images, samples, layers, moments)

    return step
