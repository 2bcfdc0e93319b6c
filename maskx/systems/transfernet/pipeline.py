"""TransferNet on pip alone: from masks of some categories to masks of others.

Hong et al., "Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional
Neural Network" (CVPR 2016), in the steps of :class:`TransferChain`. Source images have masks,
target images tags; see :mod:`maskx.systems.transfernet.samples`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskx.core.backbone_choice import build_backbone, choose_feature
from maskx.core.backbones import VGG16
from maskx.core.checks import check_choice
from maskx.core.digests import network_hash
from maskx.core.image_classifier import ImageClassifier
from maskx.core.pretrained import Pretrained
from maskx.core.sample_models import SampleClassifier
from maskx.data.coco import CocoData
from maskx.data.dense_crf import check_crf
from maskx.engine.batches import RecordMapper, training_batches
from maskx.engine.options import QuickstartOptions
from maskx.engine.runs import Origin, Run, link_run, origins_of_data
from maskx.engine.training import load_weights
from maskx.engine.training_chain import TrainingChain, start_of
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.transfernet.evaluation import draw_transfer, evaluate_transfer, format_transfer
from maskx.systems.transfernet.model import ATTENTIONS, METHODS, TransferNetModel, build_network
from maskx.systems.transfernet.network import DECODER_INPUTS
from maskx.systems.transfernet.samples import (
    TransferMapper,
    TransferSets,
    alternating_batches,
    check_batch_size,
    check_fraction,
    classes_of_stage,
    source_subset,
    transfer_sets,
)

# What a checkpoint belongs to, beside what the training loop keeps itself.
_MODEL_SETTINGS = ("backbone", "pretrained", "image_size", "in_feature", "attention", "num_factors")
_MODEL_SETTINGS += ("hidden_channels", "use_target_masks", "frozen")

# Feature map that masks are learned from; of others the last.
_MASK_FEATURES = {"small": "layer3"}

# Peaks of Adam: the classifier from random weights and from ImageNet's, all else.
_CLASSIFIER_RATES = {"random": 2e-3, "imagenet": 1e-4}
_RATE = 1e-3

Record = Mapping[str, Any]


@dataclass(frozen=True)
class TransferSettings:
    """What a chain of trainings is defined by, whatever the method.

    Attributes:
        backbone: ``small``, ``vgg16`` (with the unpooling decoder of the paper) or another of
            :func:`maskx.core.backbone_choice.build_backbone`.
        frozen: keep the backbone as it is; like ``feature_cache`` as
            :class:`maskx.engine.options.QuickstartOptions` has it.
        in_feature: feature map of the encoder that masks are learned from; None is ``layer3`` of
            ``small``, else the last. The separate classifier uses the last.
        attention: ``factored``, or ``fc`` as published, for this image size only.
        num_factors: of the attention, d.
        hidden_channels: of the classifiers inside the networks.
        iterations: steps of the separate classifier, whose backbone becomes the encoder.
        attention_iterations: steps of the first stage, Eq. 6.
        joint_iterations: steps of the second stage, Eq. 9. A baseline trains on the source for as
            long as both stages, and on the target for as long as the classifier.
        batch_size: images per step, half source and half target.
        seed: of weights, data order and the choice of source images.
        use_target_masks: see :func:`maskx.systems.transfernet.samples.transfer_sets`.
    """

    backbone: str = "small"
    pretrained: Pretrained = False
    frozen: bool = False
    feature_cache: float = QuickstartOptions.feature_cache
    image_size: int = 128
    in_feature: str | None = None
    attention: str = "factored"
    num_factors: int = 1024
    hidden_channels: int = 512
    iterations: int = 400
    attention_iterations: int = 200
    joint_iterations: int = 400
    batch_size: int = 16
    seed: int = 0
    use_target_masks: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        check_choice("attention of TransferNet", self.attention, ATTENTIONS)
        check_batch_size(self.batch_size)


@dataclass(frozen=True)
class TransferMethod:
    """How masks are learned on the shared encoder.

    Attributes:
        method: ``transfernet``, ``baseline`` (BaselineNet) or ``decoupled`` (DecoupledNet).
        decoder_input: of TransferNet, ``densified`` or ``attention``.
        freeze_attention: of TransferNet, keep the attention of the first stage.
        source_fraction: share of the source images that the masks are learned from, see
            :func:`maskx.systems.transfernet.samples.source_subset`; the classifier and the
            first stage, which need no masks, learn from the labels of all of them.
    """

    method: str = "transfernet"
    decoder_input: str = "densified"
    freeze_attention: bool = False
    source_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("decoder_input", self.decoder_input, DECODER_INPUTS)
        check_fraction(self.source_fraction)
        of_transfernet = (self.decoder_input, self.freeze_attention)
        if self.method != "transfernet" and of_transfernet != ("densified", False):
            raise ValueError(
                f"Method {self.method!r} has no attention, so decoder_input and freeze_attention "
                "have no meaning for it. Leave them out."
            )

    @property
    def name(self) -> str:
        """The method and what differs from the defaults, fit for a folder."""
        words = [self.method]
        if self.decoder_input != "densified":
            words.append(f"{self.decoder_input}_input")
        if self.freeze_attention:
            words.append("frozen_attention")
        if self.source_fraction != 1:
            words.append(f"source_{self.source_fraction:g}")
        return "_".join(words)


class TransferChain(TrainingChain):
    """The trainings of one seed; methods share its classifier, encoder and first stage.

    The steps: train a classifier of the tags of source and target images, whose backbone becomes
    the frozen encoder; train attention (Eq. 6); train attention and decoder (Eq. 9), for each
    :class:`TransferMethod`. Each leaves its checkpoint in a folder of its own and is made once.

    Args:
        sets: training images.
        split: A the source, B the target categories.
        settings: what to do.
        output: folder of the checkpoints.
        resume: go on from the checkpoints that are there.
        started_from: see :class:`maskx.engine.runs.Run`.
    """

    def __init__(
        self,
        sets: TransferSets,
        split: CategorySplit,
        settings: TransferSettings,
        *,
        output: Path,
        resume: bool = False,
        started_from: Mapping[str, Origin] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sets, self.split = sets, split
        run = Run(
            system="transfernet",
            host="pip",
            class_names=split.class_names,
            split=split,
            settings={
                "source images": len(sets.source),
                "target images": len(sets.target),
                "model": {name: getattr(settings, name) for name in _MODEL_SETTINGS},
            },
            started_from=started_from or {},
        )
        super().__init__(settings, output=output, resume=resume, run=run, device=device)
        with torch.device("meta"):  # what does not fit is refused before anything is trained
            build_transfer_model(replace(settings, pretrained=False), split, TransferMethod())

    @functools.cached_property
    def classifier(self) -> SampleClassifier:
        """The separate classifier of inference, whose backbone is the encoder of all methods.

        It learns the tags of source and target images. What source categories a target image shows
        is not known, and taken as absent. Where these labels were left out of the loss instead,
        source categories were predicted on target images: on scenes of seed 0 their precision was
        0.44 instead of 0.84, and the mIoU of TransferNet on target categories 19 instead of 34.
        """
        torch.manual_seed(self.settings.seed)
        settings = self.settings
        classifier = _build_classifier(
            settings, len(self.split.class_names), pretrained=settings.pretrained
        )
        self._keep_features(classifier.backbone)
        model = SampleClassifier(
            classifier,
            size=settings.image_size,
            class_names=self.split.class_names,
            pixel_mean=classifier.backbone.pixel_mean,
            pixel_std=classifier.backbone.pixel_std,
        )
        records = [*self.sets.source, *self.sets.target]
        self._train(
            model,
            "classifier",
            functools.partial(training_batches, records, mapper=self._mapper(masks=False)),
            {},
            iterations=settings.iterations,
            rate=_CLASSIFIER_RATES[start_of(settings.pretrained, settings.frozen)],
        )
        return model

    @functools.cached_property
    def attention(self) -> TransferNetModel:
        """TransferNet after its first stage, Eq. 6: it reads no masks, and predicts none yet."""
        model = self.build(TransferMethod(), stage="attention")
        self._train(
            model,
            "attention",
            self._batches(self.sets.source, self._mapper(masks=False)),
            {},
            model_settings={"method": asdict(TransferMethod()), "stage": "attention"},
            started_from={"encoder": self._encoder_hash},
            iterations=self.settings.attention_iterations,
            rate=_RATE,
        )
        return model

    def train_masks(self, method: TransferMethod) -> TransferNetModel:
        """Train the masks of a method.

        TransferNet starts from the shared encoder and first stage. A baseline learns on its own, in
        the two stages of :mod:`maskx.systems.transfernet.baselines`.
        """
        settings = self.settings
        source = source_subset(self.sets.source, method.source_fraction, settings.seed)
        if method.method == "transfernet":
            model = self.build(method)
            model.load_state_dict(self.attention.state_dict())
            self._train(
                model,
                method.name,
                self._batches(source, self._mapper()),
                {},
                model_settings={"method": asdict(method), "stage": "joint"},
                started_from={
                    "encoder": self._encoder_hash,
                    "first stage": network_hash(self.attention.network),
                },
                iterations=settings.joint_iterations,
                rate=_RATE,
            )
            return model
        return self._train_baseline(method, source)

    def _train_baseline(self, method: TransferMethod, source: Sequence[Record]) -> TransferNetModel:
        settings = self.settings
        start = {"classifier": self._encoder_hash}
        # All of the network is new but for an encoder with weights of ImageNet.
        encoder_factor = _CLASSIFIER_RATES["imagenet"] / _RATE if settings.pretrained else 1.0
        steps_of_source = settings.attention_iterations + settings.joint_iterations
        first = None
        for stage, name, records, iterations in (
            ("source", f"{method.name}_source", source, steps_of_source),
            ("target", method.name, self.sets.target, settings.iterations),
        ):
            model = self.build(method, stage)
            if first is not None:
                model.load_state_dict(first.state_dict())
                start |= {"first stage": network_hash(first.network)}
            self._train(
                model,
                name,
                functools.partial(training_batches, records, mapper=self._mapper()),
                {},
                model_settings={"method": asdict(method), "stage": stage},
                started_from=start,
                iterations=iterations,
                rate=_RATE,
                lr_multipliers={"network.encoder.": encoder_factor},
            )
            first = model
        return model

    @functools.cached_property
    def _encoder_hash(self) -> str:
        return network_hash(self.classifier.classifier.backbone)

    def _batches(self, source: Sequence[Record], mapper: RecordMapper) -> functools.partial:
        return functools.partial(alternating_batches, source, self.sets.target, mapper=mapper)

    def _mapper(self, **options: bool) -> TransferMapper:
        return TransferMapper(len(self.split.class_names), size=self.settings.image_size, **options)

    def build(self, method: TransferMethod, stage: str = "joint") -> TransferNetModel:
        """Make a model on the trained classifier, before its own training."""
        torch.manual_seed(self.settings.seed)
        model = build_transfer_model(self.settings, self.split, method, stage)
        model.start_from(self.classifier.state_dict(), "The classifier")
        self._keep_features(model.network.encoder, model.classifier.backbone)
        return model


def build_transfer_model(
    settings: TransferSettings,
    split: CategorySplit,
    method: TransferMethod,
    stage: str = "joint",
    *,
    initial: bool = True,
) -> TransferNetModel:
    """Make a model before any training.

    Args:
        settings: its ``pretrained`` is of the encoder of a baseline, which starts from no
            classifier.
        split: A the source, B the target categories.
        method: how masks are learned.
        stage: see :func:`maskx.systems.transfernet.model.build_network`.
        initial: with ImageNet weights, where it is to have them; not where others are loaded.
    """
    is_baseline = method.method != "transfernet"
    encoder = _backbone(
        settings, pretrained=settings.pretrained if is_baseline and initial else False
    )
    wanted = settings.in_feature or _MASK_FEATURES.get(settings.backbone)
    in_feature, shape = choose_feature(encoder, wanted)
    # What comes after it is not computed.
    names = list(encoder.feature_shapes)
    for name in names[names.index(in_feature) + 1 :]:
        del encoder.feature_shapes[name]
    network = build_network(
        encoder,
        in_feature=in_feature,
        in_channels=shape.channels,
        stride=shape.stride,
        size=settings.image_size,
        num_classes=len(split.class_names),
        stage_classes=classes_of_stage(split, stage),
        method=method.method,
        stage=stage,
        freeze_encoder=not is_baseline,
        attention=settings.attention,
        num_factors=settings.num_factors,
        hidden_channels=settings.hidden_channels,
        decoder="unpooling" if isinstance(encoder, VGG16) else "transposed",
        decoder_input=method.decoder_input,
        freeze_attention=method.freeze_attention,
    )
    return TransferNetModel(
        network,
        _build_classifier(settings, len(split.class_names)),
        size=settings.image_size,
        class_names=split.class_names,
        pixel_mean=encoder.pixel_mean,
        pixel_std=encoder.pixel_std,
    )


def open_transfer_model(run: Run, device: torch.device | str) -> TransferNetModel:
    """Open a model that :class:`TransferChain` trained, with its classifier."""
    if "method" not in run.settings:
        raise ValueError(
            f"The run in '{run.folder}' is the classifier of TransferNet, which predicts no masks. "
            "Give the folder of the quick start, or that of a method in it."
        )
    method = TransferMethod(**run.settings["method"])
    settings = TransferSettings(**run.settings["model"])
    stage = run.settings["stage"]
    model = build_transfer_model(settings, run.split, method, stage, initial=False)
    load_weights(model, run.weights_file)
    return model.to(device)


def _build_classifier(
    settings: TransferSettings, num_classes: int, *, pretrained: Pretrained = False
) -> ImageClassifier:
    backbone = _backbone(settings, pretrained=pretrained)
    in_feature, shape = choose_feature(backbone)
    return ImageClassifier(
        backbone, in_feature=in_feature, in_channels=shape.channels, num_classes=num_classes
    )


def _backbone(settings: TransferSettings, *, pretrained: Pretrained) -> nn.Module:
    return build_backbone(
        settings.backbone,
        frozen_norm=bool(settings.pretrained),
        frozen_stages="all" if settings.frozen else 0,
        pretrained=pretrained,
    )


def learn_to_transfer(
    train_data: CocoData,
    val_data: CocoData,
    split: CategorySplit,
    settings: TransferSettings,
    *,
    in_val: Sequence[int] | None = None,
    output: Path,
    compare: bool = False,
    crf: bool = False,
    resume: bool = False,
    device: torch.device,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Learn TransferNet and BaselineNet and evaluate both.

    No mask of a target image is read, but for ``use_target_masks``.

    Args:
        train_data: images of which :func:`maskx.systems.transfernet.samples.transfer_sets`
            makes the source and the target.
        val_data: images with true masks, in the class list of the split.
        split: A the source, B the target categories.
        settings: what to do.
        in_val: class indices that the validation images may show, which alone are predicted; None
            for all.
        compare: train DecoupledNet as well.
        crf: refine masks by a dense CRF.

    Returns:
        Measures in percent. ``mIoU`` of ``target``, ``source`` and ``all`` categories (``all`` with
        the background), each by method, of predicted labels; ``transfernet_gt`` is TransferNet with
        the true labels, and ``mIoU_gt_labels`` has all methods with these. ``IoU`` by method and
        category, ``tag_mAP``, ``attention_entropy``, ``num_images``, ``step_seconds``.
    """
    if crf:
        check_crf()
    is_mask = Supervision.MASK.value
    if not any(r["image_labels"] and r["supervision"] == is_mask for r in val_data.records):
        raise ValueError(
            f"None of the {len(val_data.records)} validation images of '{val_data.json_file}' has "
            "a mask, so there is nothing to evaluate. Give a file with masks of all categories."
        )
    sets = transfer_sets(train_data.records, split, use_target_masks=settings.use_target_masks)
    report(sets.counted())
    link_run(output, TransferMethod().name)
    chain = TransferChain(
        sets,
        split,
        settings,
        output=output,
        resume=resume,
        started_from=origins_of_data(train_data, output / "run"),
        device=device,
    )
    records, names = val_data.records, split.class_names
    metrics: dict[str, Any] = {"mIoU": {}, "mIoU_gt_labels": {}, "IoU": {}}
    in_val = list(range(len(names)) if in_val is None else in_val)
    groups = {
        "target": [index for index in split.indices_without_masks if index in in_val],
        "source": [index for index in split.indices_with_masks if index in in_val],
        "all": in_val,
    }
    for method in METHODS if compare else METHODS[:2]:
        model = chain.train_masks(TransferMethod(method))
        model.crf = crf
        for suffix, kind in (("", "mIoU"), ("_gt", "mIoU_gt_labels")):
            key = f"{method}{suffix}"
            with chain.timed("evaluation"):
                found = evaluate_transfer(
                    model,
                    records,
                    groups,
                    candidate_labels=in_val,
                    gt_labels=bool(suffix),
                    description=key,
                )
            for group in groups:
                value = found["mIoU"][group]
                metrics[kind].setdefault(group, {})[method] = value
                if key == "transfernet_gt":
                    metrics["mIoU"][group][key] = value
            metrics["IoU"][key] = dict(zip(names, found["per_class"], strict=True))
            if method == "transfernet":
                metrics["attention_entropy"] = found["attention_entropy"]
            metrics["tag_mAP"] = found.get("tag_mAP", metrics.get("tag_mAP"))
        if method == "transfernet":
            draw_transfer(output / "predictions.png", model, records, split)
    metrics["num_images"] = {
        "source": len(sets.source),
        "target": len(sets.target),
        "unlabelled": sets.num_unlabelled,
    }
    metrics["step_seconds"] = {name: round(value, 1) for name, value in chain.seconds.items()}
    report("\n" + format_transfer(metrics))
    return metrics
