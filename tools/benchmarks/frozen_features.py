"""What tools/benchmark.py measures of frozen backbones: a step with and without kept features."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Case, num_parameters
from maskx.core.image_classifier import multi_hot
from maskx.core.losses import multi_label_loss
from maskx.systems.class_patterns.pipeline import build_model
from maskx.systems.maskx_rcnn.pipeline import MASK_BRANCHES, build_detector
from maskx.systems.maskx_rcnn.torchvision import SampleDetector

_NUM_CLASSES = 7
_WAYS = ("trained", "frozen", "kept in memory", "kept in files")


def detector_cases(
    *, backbone: str, image_size: int, num_images: int, folder: Path, device: torch.device
) -> Iterator[Case]:
    """Make training steps of the light detector of Mask^X; the reference trains its backbone.

    Every image has two objects with masks, and its features are there before the first step that is
    measured.

    Args:
        backbone: of timm; its weights stay at random.
        image_size: height and width in pixels.
        num_images: of a step.
        folder: where features are kept.
        device: where to run.
    """
    samples = _samples(num_images, image_size)
    for way in _WAYS:
        torch.manual_seed(0)
        settings = {"backbone": backbone, "frozen_norm": True, "frozen": way != "trained"}
        settings |= {"light": True, "image_size": image_size, "mask_branch": MASK_BRANCHES["maskx"]}
        names = [f"class {index}" for index in range(_NUM_CLASSES)]
        model: SampleDetector = build_detector(settings, names).to(device).train()
        _keep(model.detector.backbone.backbone, way, folder / "detector")
        step = _training_step(lambda model=model: sum(model(samples).values()))
        yield _case(way, step, model, backbone, image_size, num_images)


def classifier_cases(
    *, backbone: str, image_size: int, num_images: int, folder: Path, device: torch.device
) -> Iterator[Case]:
    """Make training steps of a classifier of image labels; see :func:`detector_cases`."""
    images = torch.randn(num_images, 3, image_size, image_size, device=device)
    targets = multi_hot([[0]] * num_images, _NUM_CLASSES, device)
    for way in _WAYS:
        torch.manual_seed(0)
        content = {"part": "classifier", "backbone": backbone, "image_size": image_size}
        content |= {"frozen_norm": True, "frozen": way != "trained"}
        model = build_model(content, [f"class {index}" for index in range(_NUM_CLASSES)])
        classifier = model.to(device).train().classifier
        _keep(classifier.backbone, way, folder / "classifier")
        step = _training_step(
            lambda classifier=classifier: multi_label_loss(classifier(images), targets)
        )
        yield _case(way, step, classifier, backbone, image_size, num_images)


def _samples(count: int, size: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    half, third = size // 2, size // 3
    boxes = torch.tensor([[0, 0, half, half], [third, third, size, size]]).float()
    masks = torch.zeros(2, size, size, dtype=torch.bool)
    masks[0, :half, :half] = masks[1, third:, third:] = True
    return [
        {
            "image": torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8),
            "instances": {
                "gt_boxes": boxes,
                "gt_classes": torch.tensor([0, 1]),
                "gt_has_mask": torch.ones(2, dtype=torch.bool),
                "gt_mask_weight": torch.ones(2),
                "gt_masks": masks,
            },
        }
        for _ in range(count)
    ]


def _keep(backbone: Any, way: str, folder: Path) -> None:
    if way.startswith("kept"):
        backbone.keep_features(folder=folder if way.endswith("files") else None)


def _training_step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    return lambda: loss().backward()


def _case(
    way: str,
    step: Callable[[], None],
    model: torch.nn.Module,
    backbone: str,
    image_size: int,
    num_images: int,
) -> Case:
    settings = {"backbone": backbone, "image_size": image_size, "num_images": num_images}
    name = f"features {way}" if way.startswith("kept") else f"backbone {way}"
    return Case(name, step, num_parameters(model), settings)
