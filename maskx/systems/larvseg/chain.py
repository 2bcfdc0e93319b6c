"""The trainings of LarvSeg and its baseline, from one start."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskx.core.backbone_choice import build_backbone, choose_feature
from maskx.core.checks import check_choice
from maskx.core.digests import network_hash
from maskx.core.files import write_json
from maskx.core.image_classifier import ImageClassifier
from maskx.engine.training_chain import TrainingChain
from maskx.supervision import Supervision
from maskx.systems.larvseg.checkpoints import MODEL_NAME, build_larvseg
from maskx.systems.larvseg.joint_sets import JointSets
from maskx.systems.larvseg.losses import POOLINGS
from maskx.systems.larvseg.model import SampleJointClassifier, SampleLarvSeg
from maskx.systems.larvseg.samples import JointMapper, joint_batches

__all__ = [
    "BANKS",
    "METHODS",
    "LarvSegChain",
    "LarvSegMethod",
    "LarvSegSettings",
]

METHODS = ("baseline", "larvseg")
BANKS = {"cross": "cross_image", "single": "single_image"}

# What a checkpoint belongs to, beside what the training loop keeps itself.
_IDENTITY = ("backbone", "pretrained", "image_size", "logit_form", "bank_size", "top_tokens")
_IDENTITY += ("image_weight", "attentive_weight", "min_crop")

# Peaks of Adam: the classifier from random weights and from ImageNet's, the segmentation.
_CLASSIFIER_RATES = {"random": 2e-3, "imagenet": 1e-4}
_RATE = 1e-3


@dataclass(frozen=True)
class LarvSegSettings:
    """What a chain of trainings is defined by, whatever the method.

    Attributes:
        backbone: ``small``, ``vgg16`` or the name of a torchvision ResNet.
        pretrained: start from ImageNet weights, which torchvision downloads.
        image_size: of the squares that images are warped to in evaluation; in training each data
            set has its own.
        start_iterations: steps of the image classifier whose backbone both methods start from; 0
            starts from the backbone's initial weights.
        iterations: steps of each method.
        batch_size: images per step.
        seed: of weights and data order.
        logit_form: see :class:`maskx.systems.larvseg.classifier.CosineClassifier`.
        bank_size: images per class of the memory bank.
        top_tokens: tokens of an image that represent its class.
        image_weight: of the loss of image labels.
        attentive_weight: of the loss of image labels with attention. The paper's 0.1 is for 320,000
            steps; in a few hundred it moves novel classes little.
        min_crop: see :class:`maskx.systems.larvseg.samples.JointMapper`.
        workers: processes that read training images; 0 reads them in the process that trains.
    """

    backbone: str = "small"
    pretrained: bool = False
    image_size: int = 128
    start_iterations: int = 400
    iterations: int = 350
    batch_size: int = 16
    seed: int = 0
    logit_form: str = "temperature"
    bank_size: int = 20
    top_tokens: int = 20
    image_weight: float = 0.1
    attentive_weight: float = 10.0
    min_crop: float = 1.0
    workers: int = 0


@dataclass(frozen=True)
class LarvSegMethod:
    """What image labels are learned with.

    Attributes:
        method: ``baseline``, pixels and image labels alone, or ``larvseg``, with attention too.
        bank: of LarvSeg, what attention maps are made with: ``cross``, the images seen last, or
            ``single``, the image itself.
        pooling: of LarvSeg, ``weighted`` as in the paper, or ``normalised``, see
            :func:`maskx.systems.larvseg.losses.attentive_loss`.

    Raises:
        ValueError: a value is not allowed, or has no meaning for the baseline.
    """

    method: str = "larvseg"
    bank: str = "cross"
    pooling: str = "weighted"

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("bank", self.bank, tuple(BANKS))
        check_choice("pooling", self.pooling, POOLINGS)
        if self.method == "baseline" and (self.bank, self.pooling) != ("cross", "weighted"):
            raise ValueError(
                "Method 'baseline' has no attention, so bank and pooling have no meaning for it. "
                "Leave them out."
            )

    @property
    def name(self) -> str:
        """The method and what differs from the defaults, fit for a folder."""
        words = [self.method]
        if self.bank != "cross":
            words.append(f"{self.bank}_image")
        if self.pooling != "weighted":
            words.append(self.pooling)
        return "_".join(words)


class LarvSegChain(TrainingChain):
    """The trainings of one seed; all methods start from the same backbone.

    The steps: train a classifier of the image labels, whose backbone stands for the paper's
    ImageNet weights; train each :class:`LarvSegMethod` from it, in as many steps. Each leaves its
    checkpoint in a folder of its own and is made once.

    Args:
        sets: what is trained on.
        settings: what to do.
        output: folder of the checkpoints.
        resume: go on from the checkpoints that are there.
        identity: what else the run is defined by, see :func:`maskx.engine.training.train`.
        device: where to compute.

    Attributes:
        seconds: time of each step by its name.
    """

    def __init__(
        self,
        sets: JointSets,
        settings: LarvSegSettings,
        *,
        output: Path,
        resume: bool = False,
        identity: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sets = sets
        identity = dict(identity or {}) | {
            "classes": list(sets.table.names),
            "data sets": [
                [each.name, each.supervision, each.ratio, each.image_size, len(each.records)]
                for each in sets.data_sets
            ],
            "scored": {name: list(indices) for name, indices in sets.scored.items()},
            **{name.replace("_", " "): getattr(settings, name) for name in _IDENTITY},
        }
        super().__init__(settings, output=output, resume=resume, identity=identity, device=device)

    @functools.cached_property
    def backbone(self) -> nn.Module:
        """The backbone that all methods start from."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        backbone = build_backbone(
            settings.backbone, frozen_norm=settings.pretrained, pretrained=settings.pretrained
        )
        if settings.start_iterations == 0:
            return backbone
        tagged = tuple(
            each for each in self.sets.data_sets if each.supervision == Supervision.IMAGE.value
        )
        if not tagged:
            raise ValueError(
                "No data set has supervision 'image', so there are no image labels to train the "
                "backbone with. Give one, or set start_iterations to 0."
            )
        in_feature, shape = choose_feature(backbone)
        classifier = ImageClassifier(
            backbone,
            in_feature=in_feature,
            in_channels=shape.channels,
            num_classes=self.sets.num_classes,
        )
        model = SampleJointClassifier(classifier, size=settings.image_size, scored=self.sets.scored)
        sets = replace(self.sets, data_sets=tagged)
        rate = _CLASSIFIER_RATES["imagenet" if settings.pretrained else "random"]
        batches = self._batches(sets)
        self._train(model, "start", batches, {}, iterations=settings.start_iterations, rate=rate)
        return backbone.to("cpu")

    def train_method(self, method: LarvSegMethod) -> SampleLarvSeg:
        """Train a method from the shared backbone."""
        settings = self.settings
        backbone = self.backbone
        content = self._description(method)
        torch.manual_seed(settings.seed)
        model = build_larvseg(content, scored=self.sets.scored)
        model.network.backbone.load_state_dict(backbone.state_dict())
        model.network.classifier.set_trained(self.sets.trained)
        identity = {"method": method.name, "start": network_hash(backbone)}
        batches, iterations = self._batches(self.sets), settings.iterations
        self._train(model, method.name, batches, identity, iterations=iterations, rate=_RATE)
        write_json(self.output / method.name / MODEL_NAME, content)
        return model

    def _batches(self, sets: JointSets) -> functools.partial:
        mapper = JointMapper(sets, min_crop=self.settings.min_crop)
        return functools.partial(joint_batches, sets, mapper)

    def _description(self, method: LarvSegMethod) -> dict[str, Any]:
        """What `build_larvseg` needs to make the network again."""
        settings = self.settings
        is_baseline = method.method == "baseline"
        return {
            "backbone": settings.backbone,
            "frozen_norm": settings.pretrained,
            "image_size": settings.image_size,
            "class_names": list(self.sets.table.names),
            "network": {
                "logit_form": settings.logit_form,
                "memory": "none" if is_baseline else BANKS[method.bank],
                "bank_size": settings.bank_size,
                "top_tokens": settings.top_tokens,
                "pooling": method.pooling,
                "image_weight": settings.image_weight,
                "attentive_weight": settings.attentive_weight,
            },
        }
