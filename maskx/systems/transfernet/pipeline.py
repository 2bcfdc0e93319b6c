"""TransferNet on the embedded host: from masks of some categories to masks of others.

Hong et al., "Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional
Neural Network" (CVPR 2016), in the steps of :class:`TransferChain`. Source images have masks,
target images tags; see :mod:`maskx.systems.transfernet.transfer_sets`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from maskx.core.backbone_choice import build_backbone, choose_feature
from maskx.core.backbones import VGG16, FeatureShape
from maskx.core.checks import check_choice
from maskx.core.digests import network_hash
from maskx.core.image_classifier import ImageClassifier, choose_labels, multi_hot
from maskx.core.sample_models import Sample, SampleClassifier, SampleModel
from maskx.core.seeds import step_seed
from maskx.data.coco import CocoData
from maskx.data.dense_crf import TRANSFERNET, check_crf, refine
from maskx.data.image_samples import ImageMapper
from maskx.data.label_maps import ignore_label
from maskx.engine.batches import MappedRecords, RecordMapper, SeededBatches, training_batches
from maskx.engine.prediction import predict_image_labels
from maskx.engine.training_chain import TrainingChain
from maskx.evaluation.figures import (
    contact_sheet,
    draw_heat_map,
    draw_label_map,
    plain_tile,
    save_png,
)
from maskx.evaluation.image_labels import evaluate_image_labels
from maskx.evaluation.mean_iou import MeanIoU
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.transfernet.attention import (
    FactoredAttention,
    FullyConnectedAttention,
    attention_entropy,
)
from maskx.systems.transfernet.baselines import BaselineNet, DecoupledNet
from maskx.systems.transfernet.decoder import TransposedDecoder, UnpoolingDecoder
from maskx.systems.transfernet.network import (
    DECODER_INPUTS,
    PairNetwork,
    TransferNet,
    foreground_prob,
    merge_label_masks,
    pair_target,
)
from maskx.systems.transfernet.transfer_sets import (
    TransferSets,
    check_fraction,
    label_pairs,
    source_subset,
    transfer_label_map,
    transfer_sets,
    visible_labels,
)

__all__ = [
    "METHODS",
    "SampleTransferNet",
    "TransferChain",
    "TransferMapper",
    "TransferMethod",
    "TransferSettings",
    "alternating_batches",
    "evaluate_transfer",
    "learn_to_transfer",
    "predict_transfer",
]

METHODS = ("transfernet", "baseline", "decoupled")
ATTENTIONS = ("factored", "fc")

# What a checkpoint belongs to, beside what the training loop keeps itself.
_IDENTITY = ("backbone", "pretrained", "image_size", "in_feature", "attention", "num_factors")
_IDENTITY += ("hidden_channels", "use_target_masks")

# Feature map that masks are learned from; of others the last.
_MASK_FEATURES = {"small": "layer3"}

# Peaks of Adam: the classifier from random weights and from ImageNet's, all else.
_CLASSIFIER_RATES = {"random": 2e-3, "imagenet": 1e-4}
_RATE = 1e-3

_FIGURE_ROWS, _TILE_SIDE = 6, 256
_MASK = Supervision.MASK.value
_LABEL_THRESHOLD = 0.6  # of the separate classifier, as in the reference

Record = Mapping[str, Any]


# --- samples


class TransferMapper:
    """Reads source images with their masks and target images with their tags.

    Args:
        num_classes: number of classes K of source and target, without the background.
        size: side in pixels of the squares that images and label maps are warped to.
        flip: mirror half of the samples.
    """

    def __init__(self, num_classes: int, *, size: int, flip: bool = True) -> None:
        shared = {"size": size, "flip": flip}
        self._tags = ImageMapper(num_classes, label_maps=False, **shared)
        self._masks = ImageMapper(
            num_classes,
            label_maps=True,
            read_label_map=functools.partial(transfer_label_map, num_classes=num_classes),
            **shared,
        )

    def __call__(self, record: Record, random_state: np.random.RandomState) -> Sample:
        """Make a training sample, as :class:`maskx.data.image_samples.ImageMapper` does.

        Returns:
            With ``sem_seg`` where the record has masks; ``image_labels`` are then the labels of
            at least one pixel of it. The label map of a record that only has tags is not made.
        """
        if record["supervision"] != _MASK:
            return self._tags(record, random_state)
        sample = self._masks(record, random_state)
        sample["image_labels"] = visible_labels(sample["image_labels"], sample["sem_seg"].numpy())
        return sample


def alternating_batches(
    source: Sequence[Record],
    target: Sequence[Record],
    mapper: RecordMapper,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    num_workers: int = 0,
) -> DataLoader:
    """Batches of the iterations ``start`` to ``stop``, half source and half target images.

    Each half is shuffled endlessly on its own. As with
    :func:`maskx.engine.batches.training_batches`, what an iteration sees depends on the seed and
    its number alone.

    Returns:
        An iterable of lists of ``batch_size`` samples, source first.

    Raises:
        ValueError: the batch size is odd.
    """
    _check_batch_size(batch_size)
    halves = [
        SeededBatches(len(records), batch_size // 2, step_seed(seed, side), start, stop)
        for side, records in enumerate((source, target))
    ]
    return DataLoader(
        MappedRecords([*source, *target], mapper),
        batch_sampler=_BothHalves(*halves, offset=len(source)),
        num_workers=num_workers,
        collate_fn=list,
    )


def _check_batch_size(batch_size: int) -> None:
    if batch_size % 2:
        raise ValueError(
            f"The batch size is {batch_size}. Allowed: even numbers, as half of a batch are source "
            "images and half target images."
        )


class _BothHalves(Sampler):
    def __init__(self, source: SeededBatches, target: SeededBatches, *, offset: int) -> None:
        self.source, self.target, self.offset = source, target, offset

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for source, target in zip(self.source, self.target, strict=True):
            yield source + [(index + self.offset, seed) for index, seed in target]


# --- models


class SampleTransferNet(SampleModel):
    """Drives TransferNet, or one of its baselines, with samples, as Detectron2 drives its models.

    Args:
        network: maps normalised images and pairs of an image and a label to masks.
        size: side in pixels of the squares that images are warped to.
        num_classes: K, source and target classes without the background.
    """

    def __init__(self, network: PairNetwork, *, size: int, num_classes: int) -> None:
        super().__init__(size)
        self.network = network
        self.num_classes = num_classes

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Compute losses in training, the masks of the image labels in evaluation.

        All labels of all samples go through the network together.

        Args:
            samples: each with ``image`` and ``image_labels``; in training as of
                :class:`TransferMapper`, where those with ``sem_seg`` train the masks.

        Returns:
            A dictionary of scalar losses; or per sample ``labels``, its L labels; ``prob``
            (L, H, W), probability of each in the size of the file, after the background's was
            halved; ``label_map`` (H, W) int64, the most probable of them; and, of TransferNet,
            ``attention`` and ``densified`` (L, h, w).

        Raises:
            ValueError: a label is no class index, or a label map has not this model's ``size``.
        """
        image_labels = [sample["image_labels"] for sample in samples]
        multi_hot(image_labels, self.num_classes)  # refuses labels outside the class list
        pair_images, pair_labels = (
            torch.from_numpy(indices).to(self.device) for indices in label_pairs(image_labels)
        )
        images = self.preprocess(samples)
        if self.training:
            return self._losses(samples, images, pair_images, pair_labels)
        outputs = self.network(images, pair_images, pair_labels)
        maps = {"prob": foreground_prob(outputs.mask_logits)}
        if hasattr(outputs, "attention"):
            maps |= {"attention": outputs.attention, "densified": outputs.densified}
        counts = torch.bincount(pair_images, minlength=len(samples)).tolist()
        of_samples = {name: values.split(counts) for name, values in maps.items()}
        return [
            self._result(sample, labels, {name: of_samples[name][i] for name in maps})
            for i, (sample, labels) in enumerate(
                zip(samples, pair_labels.split(counts), strict=True)
            )
        ]

    def _losses(
        self, samples: list[Sample], images: Tensor, pair_images: Tensor, pair_labels: Tensor
    ) -> dict[str, Tensor]:
        ignore = ignore_label(self.num_classes)
        label_maps = torch.full((len(samples), self.size, self.size), ignore)
        for row, sample in zip(label_maps, samples, strict=True):
            if "sem_seg" not in sample:
                continue
            found = tuple(sample["sem_seg"].shape)
            if found != row.shape:
                raise ValueError(
                    f"Image {sample.get('image_id')!r} came with a label map of {found}, but this "
                    f"model trains on {tuple(row.shape)}. Make samples with TransferMapper(..., "
                    f"size={self.size})."
                )
            row.copy_(sample["sem_seg"])
        has_masks = torch.tensor(["sem_seg" in sample for sample in samples], dtype=torch.bool)
        mask_pairs = has_masks.to(pair_images.device)[pair_images]
        outputs = self.network(images, pair_images, pair_labels, mask_pairs)
        targets = pair_target(
            label_maps.to(images.device),
            pair_images[mask_pairs],
            pair_labels[mask_pairs],
            ignore=ignore,
        )
        return self.network.losses(outputs, pair_images, pair_labels, targets)

    def _result(self, sample: Sample, labels: Tensor, maps: dict[str, Tensor]) -> dict[str, Any]:
        size = (sample["height"], sample["width"])
        prob = maps["prob"].float()
        if len(prob):
            prob = F.interpolate(prob[None], size, mode="bilinear", antialias=True)[0]
            prob = prob.clamp(0, 1)
        else:
            prob = prob.new_zeros(0, *size)
        label_map = merge_label_masks(prob, labels, halve_background=False)
        return maps | {"labels": labels.tolist(), "prob": prob, "label_map": label_map}


@torch.inference_mode()
def predict_transfer(
    model: SampleTransferNet,
    records: Sequence[Record],
    *,
    image_labels: Sequence[Sequence[int]] | None = None,
    crf: bool = False,
    batch_size: int = 16,
    description: str = "label maps",
) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Predict the masks of the labels of images.

    Args:
        model: the model; it is put into evaluation mode.
        records: as of :func:`maskx.data.coco.load_coco`.
        image_labels: of each record, such as :meth:`TransferChain.predict_labels` gives them; None
            takes the record's own (TransferNet-GT).
        crf: refine the mask of each label by a dense CRF.
        batch_size: images at a time.
        description: label of the progress bar.

    Yields:
        Record and result of :class:`SampleTransferNet`, with ``label_map`` as (H, W) numpy array.

    Raises:
        ImportError: the CRF is asked for, but not installed.
        ValueError: there are not as many label lists as records.
    """
    if crf:
        check_crf()
    if image_labels is None:
        image_labels = [record["image_labels"] for record in records]
    if len(image_labels) != len(records):
        raise ValueError(
            f"There are image labels of {len(image_labels)} images, but {len(records)} records. "
            "Give a list for each record, in their order."
        )
    model.eval()
    read_image = ImageMapper(model.num_classes, size=None, label_maps=False).read_image
    pairs = list(zip(records, image_labels, strict=True))
    with tqdm(total=len(records), desc=description, unit="img") as progress:
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            samples = [read_image(record) | {"image_labels": labels} for record, labels in batch]
            for (record, _), sample, result in zip(batch, samples, model(samples), strict=True):
                label_map = _crf_label_map(sample, result) if crf else result["label_map"]
                yield record, result | {"label_map": np.asarray(label_map.cpu())}
            progress.update(len(batch))


def _crf_label_map(sample: Sample, result: Mapping[str, Any]) -> Tensor:
    """Merge the masks as the reference does: the CRF says where, the network which label."""
    image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
    score = result["prob"].cpu().clone()
    for prob in score:
        background, foreground = refine(image, torch.stack([1 - prob, prob]).numpy(), TRANSFERNET)
        prob *= torch.from_numpy(foreground > background)
    if not len(score):
        return result["label_map"]
    best, which = score.max(dim=0)
    return torch.where(best > 0, torch.tensor(result["labels"])[which] + 1, 0)


def evaluate_transfer(
    model: SampleTransferNet,
    records: Sequence[Record],
    groups: Mapping[str, Sequence[int]],
    **options: Any,
) -> dict[str, Any]:
    """Compute the mean IoU of label maps; one batch of images is held at a time.

    Args:
        model: the model.
        records: with true masks; of one file, or of
            :func:`maskx.systems.transfernet.transfer_sets.records_in_union`.
        groups: class indices by name.
        options: of :func:`predict_transfer`.

    Returns:
        What `maskx.evaluation.mean_iou.MeanIoU.evaluate` returns, in percent; of TransferNet also
        ``attention_entropy``, the mean over all attention maps, 1 where they are uniform.
    """
    counts = MeanIoU(model.num_classes)
    entropies = []
    for record, result in predict_transfer(model, records, **options):
        truth = transfer_label_map(record, model.num_classes)
        counts.update(result["label_map"], truth, record["image_id"])
        if "attention" in result:
            entropies.append(attention_entropy(result["attention"]))
    results = counts.evaluate(groups)
    if entropies:
        results["attention_entropy"] = torch.cat(entropies).mean().item()
    return results


# --- training


@dataclass(frozen=True)
class TransferSettings:
    """What a chain of trainings is defined by, whatever the method.

    Attributes:
        backbone: ``small``, ``vgg16`` (with the unpooling decoder of the paper) or the name of a
            torchvision ResNet.
        pretrained: start from ImageNet weights, which torchvision downloads.
        image_size: side of the squares that images are warped to.
        in_feature: feature map of the encoder that masks are learned from; None is ``layer3`` of
            ``small``, else the last. The separate classifier uses the last.
        attention: ``factored``, or ``fc`` as published, for this image size only.
        num_factors: of the attention, d.
        hidden_channels: of the classifiers inside the networks.
        iterations: steps of the separate classifier, whose backbone becomes the encoder.
        attention_iterations: steps of the first stage, Eq. 6.
        joint_iterations: steps of the second stage, Eq. 9. A baseline trains for both together.
        batch_size: images per step, half source and half target.
        seed: of weights, data order and the choice of source images.
        use_target_masks: see :func:`maskx.systems.transfernet.transfer_sets.transfer_sets`.
        workers: processes that read training images; 0 reads them in the process that trains.

    Raises:
        ValueError: there is no such attention, or the batch size is odd.
    """

    backbone: str = "small"
    pretrained: bool = False
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
        _check_batch_size(self.batch_size)


@dataclass(frozen=True)
class TransferMethod:
    """How masks are learned on the shared encoder.

    Attributes:
        method: ``transfernet``, ``baseline`` (BaselineNet) or ``decoupled`` (DecoupledNet).
        decoder_input: of TransferNet, ``densified`` or ``attention``.
        freeze_attention: of TransferNet, keep the attention of the first stage.
        source_fraction: share of the source images that the masks are learned from, see
            :func:`maskx.systems.transfernet.transfer_sets.source_subset`; the classifier and the
            first stage, which need no masks, learn from the labels of all of them.

    Raises:
        ValueError: a value is not allowed, or has no meaning for a baseline.
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
        identity: what else the run is defined by, see :func:`maskx.engine.training.train`.
        device: where to compute.

    Attributes:
        seconds: time of each step by its name.

    Raises:
        ValueError: backbone, feature map, attention and image size do not fit each other.
    """

    def __init__(
        self,
        sets: TransferSets,
        split: CategorySplit,
        settings: TransferSettings,
        *,
        output: Path,
        resume: bool = False,
        identity: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sets, self.split = sets, split
        identity = dict(identity or {}) | {
            "source categories": list(split.with_masks),
            "source images": len(sets.source),
            "target images": len(sets.target),
            **{name.replace("_", " "): getattr(settings, name) for name in _IDENTITY},
        }
        super().__init__(settings, output=output, resume=resume, identity=identity, device=device)
        with torch.device("meta"):  # what does not fit is refused before anything is trained
            self._mask_feature(self._backbone())

    @property
    def num_classes(self) -> int:
        """K of source and target."""
        return len(self.split.class_names)

    @functools.cached_property
    def classifier(self) -> SampleClassifier:
        """The separate classifier of inference, whose backbone is the encoder of all methods.

        It learns the tags of source and target images. What source categories a target image shows
        is not known, and taken as absent. Where these labels were left out of the loss instead,
        source categories were predicted on target images: on scenes of seed 0 their precision was
        0.44 instead of 0.84, and the mIoU of TransferNet on target categories 19 instead of 34.
        """
        torch.manual_seed(self.settings.seed)
        backbone = self._backbone(pretrained=self.settings.pretrained)
        in_feature, shape = choose_feature(backbone)
        model = SampleClassifier(
            ImageClassifier(
                backbone,
                in_feature=in_feature,
                in_channels=shape.channels,
                num_classes=self.num_classes,
            ),
            size=self.settings.image_size,
        )
        records = [*self.sets.source, *self.sets.target]
        self._train(
            model,
            "classifier",
            functools.partial(training_batches, records, mapper=self._tags_mapper()),
            {},
            iterations=self.settings.iterations,
            rate=_CLASSIFIER_RATES["imagenet" if self.settings.pretrained else "random"],
        )
        return model

    @functools.cached_property
    def attention(self) -> SampleTransferNet:
        """TransferNet after its first stage, Eq. 6: it reads no masks, and predicts none yet."""
        model = self._build(TransferMethod(), train_stage="attention")
        self._train(
            model,
            "attention",
            self._batches(self.sets.source, self._tags_mapper()),
            {"encoder": self._encoder_hash},
            iterations=self.settings.attention_iterations,
            rate=_RATE,
        )
        return model

    def train_masks(self, method: TransferMethod) -> SampleTransferNet:
        """Train the masks of a method on the shared encoder and first stage."""
        settings = self.settings
        identity = {"encoder": self._encoder_hash, "method": method.name}
        iterations = settings.joint_iterations
        model = self._build(method)
        if method.method == "transfernet":
            model.load_state_dict(self.attention.state_dict())
            identity |= {"first stage": network_hash(self.attention.network)}
        else:
            iterations += settings.attention_iterations
        source = source_subset(self.sets.source, method.source_fraction, settings.seed)
        batches = self._batches(source, TransferMapper(self.num_classes, size=settings.image_size))
        self._train(model, method.name, batches, identity, iterations=iterations, rate=_RATE)
        return model

    def _batches(self, source: Sequence[Record], mapper: RecordMapper) -> functools.partial:
        return functools.partial(alternating_batches, source, self.sets.target, mapper=mapper)

    def predict_labels(self, records: Sequence[Record]) -> tuple[list[list[int]], np.ndarray]:
        """Predict the labels of images by the separate classifier.

        Returns:
            Class indices of probability 0.6 or more, else the most probable one, by image; and the
            (number of records, K) probabilities.
        """
        prob = predict_image_labels(self.classifier, records)
        chosen = choose_labels(torch.from_numpy(prob), _LABEL_THRESHOLD)
        return [row.nonzero()[:, 0].tolist() for row in chosen], prob

    @functools.cached_property
    def _encoder_hash(self) -> str:
        return network_hash(self.classifier.classifier.backbone)

    def _backbone(self, *, pretrained: bool = False) -> nn.Module:
        frozen_norm = self.settings.pretrained
        return build_backbone(
            self.settings.backbone, frozen_norm=frozen_norm, pretrained=pretrained
        )

    def _mask_feature(self, encoder: nn.Module) -> tuple[str, FeatureShape]:
        settings = self.settings
        wanted = settings.in_feature or _MASK_FEATURES.get(settings.backbone)
        name, shape = choose_feature(encoder, wanted)
        if isinstance(encoder, VGG16):
            last = choose_feature(encoder)[0]
            if name != last:
                raise ValueError(
                    f"in_feature is {name!r}, but backbone 'vgg16' comes with the unpooling decoder"
                    f", which starts from {last!r}. Leave in_feature out, or name another backbone."
                )
            if settings.image_size < shape.stride:
                raise ValueError(
                    f"image_size is {settings.image_size}, of which the pools of 'vgg16' leave "
                    f"nothing. Allowed: at least {shape.stride}."
                )
        if settings.attention == "fc" and settings.image_size % shape.stride:
            raise ValueError(
                f"attention 'fc' is made for one feature map, but an image size of "
                f"{settings.image_size} is no multiple of the stride {shape.stride}. Choose one "
                "that is, or attention 'factored'."
            )
        return name, shape

    def _tags_mapper(self) -> ImageMapper:
        return ImageMapper(self.num_classes, size=self.settings.image_size, label_maps=False)

    def _build(self, method: TransferMethod, train_stage: str = "joint") -> SampleTransferNet:
        settings = self.settings
        encoder = self._backbone()
        encoder.load_state_dict(self.classifier.classifier.backbone.state_dict())
        in_feature, shape = self._mask_feature(encoder)
        # What comes after it is not computed.
        names = list(encoder.feature_shapes)
        for name in names[names.index(in_feature) + 1 :]:
            del encoder.feature_shapes[name]
        torch.manual_seed(settings.seed)
        uses_switches = isinstance(encoder, VGG16)
        decoder = UnpoolingDecoder() if uses_switches else TransposedDecoder(stride=shape.stride)
        feature_size = None
        if settings.attention == "fc":
            feature_size = (settings.image_size // shape.stride,) * 2
        shared = {
            "in_feature": in_feature,
            "in_channels": shape.channels,
            "num_classes": self.num_classes,
            "decoder": decoder,
        }
        if method.method == "baseline":
            network = BaselineNet(
                encoder,
                feature_size=feature_size,
                classifier_channels=settings.hidden_channels,
                **shared,
            )
        elif method.method == "decoupled":
            network = DecoupledNet(encoder, classifier_channels=settings.hidden_channels, **shared)
        else:
            form = {
                "in_channels": shape.channels,
                "num_classes": self.num_classes,
                "num_factors": settings.num_factors,
            }
            attention = (
                FactoredAttention(**form)
                if feature_size is None
                else FullyConnectedAttention(feature_size=feature_size, **form)
            )
            network = TransferNet(
                encoder,
                attention=attention,
                hidden_channels=settings.hidden_channels,
                decoder_input=method.decoder_input,
                freeze_attention=method.freeze_attention,
                train_stage=train_stage,
                **shared,
            )
        return SampleTransferNet(network, size=settings.image_size, num_classes=self.num_classes)


# --- from data to results


def learn_to_transfer(
    train_data: CocoData,
    val_data: CocoData,
    split: CategorySplit,
    settings: TransferSettings,
    *,
    output: Path,
    compare: bool = False,
    crf: bool = False,
    resume: bool = False,
    device: torch.device,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Learn TransferNet and BaselineNet and evaluate both.

    Args:
        train_data: images of which :func:`maskx.systems.transfernet.transfer_sets.transfer_sets`
        makes the source
            and the target; of target images no mask is read, but for ``use_target_masks``.
        val_data: images with true masks, of the same classes.
        split: A the source, B the target categories.
        settings: what to do.
        output: folder of the results.
        compare: train DecoupledNet as well.
        crf: refine masks by a dense CRF.
        resume: go on with an interrupted run.
        device: where to compute.
        report: receives the lines for the reader.

    Returns:
        Measures in percent. ``mIoU`` of ``target``, ``source`` and ``all`` categories (``all`` with
        the background), each by method, of predicted labels; ``transfernet_gt`` is TransferNet with
        the true labels, and ``mIoU_gt_labels`` has all methods with these. ``IoU`` by method and
        category, ``tag_mAP``, ``attention_entropy``, ``num_images``, ``step_seconds``.

    Raises:
        FileNotFoundError: an image is missing.
        ImportError: the CRF is asked for, but not installed.
        ValueError: data, split or settings cannot be used, or a checkpoint is of another run.
    """
    if crf:
        check_crf()
    if not any(r["image_labels"] and r["supervision"] == _MASK for r in val_data.records):
        raise ValueError(
            f"None of the {len(val_data.records)} validation images of '{val_data.json_file}' has "
            "a mask, so there is nothing to evaluate. Give a file with masks of all categories."
        )
    sets = transfer_sets(train_data.records, split, use_target_masks=settings.use_target_masks)
    report(
        f"{len(sets.source)} source images with masks, {len(sets.target)} target images with tags, "
        f"{sets.num_unlabelled} without a label left out"
    )
    chain = TransferChain(
        sets,
        split,
        settings,
        output=output,
        resume=resume,
        identity={"annotation file": train_data.json_file.name},
        device=device,
    )
    records, names = val_data.records, split.class_names
    predicted, prob = chain.predict_labels(records)
    metrics: dict[str, Any] = {"mIoU": {}, "mIoU_gt_labels": {}, "IoU": {}}
    groups = {
        "target": split.indices_without_masks,
        "source": split.indices_with_masks,
        "all": range(len(names)),
    }
    for method in METHODS if compare else METHODS[:2]:
        model = chain.train_masks(TransferMethod(method))
        for labels, key in ((predicted, method), (None, f"{method}_gt")):
            with chain.timed("evaluation"):
                found = evaluate_transfer(
                    model, records, groups, image_labels=labels, crf=crf, description=key
                )
            of_labels = "mIoU" if labels is not None else "mIoU_gt_labels"
            for group in groups:
                value = found["mIoU"][group]
                metrics[of_labels].setdefault(group, {})[method] = value
                if key == "transfernet_gt":
                    metrics["mIoU"][group][key] = value
            metrics["IoU"][key] = dict(zip(names, found["per_class"], strict=True))
            if key == "transfernet_gt":
                metrics["attention_entropy"] = found["attention_entropy"]
        if method == "transfernet":
            draw_transfer(output / "predictions.png", model, records, split)
    metrics["tag_mAP"] = _tag_mean_ap(prob, records, groups)
    metrics["num_images"] = {
        "source": len(sets.source),
        "target": len(sets.target),
        "unlabelled": sets.num_unlabelled,
    }
    metrics["step_seconds"] = {name: round(value, 1) for name, value in chain.seconds.items()}
    report("\n" + format_transfer(metrics))
    return metrics


def format_transfer(metrics: Mapping[str, Any]) -> str:
    """Lay out the measures in a table."""
    lines = ["| mIoU in percent | target | source | all |", "|---|---|---|---|"]
    names = {"transfernet": "TransferNet", "baseline": "BaselineNet", "decoupled": "DecoupledNet"}
    for kind, title in (("mIoU", "predicted labels"), ("mIoU_gt_labels", "true labels")):
        for method in (name for name in names if name in metrics[kind]["target"]):
            cells = [f"{metrics[kind][group][method]:.1f}" for group in ("target", "source", "all")]
            lines.append(f"| {names[method]}, {title} | {' | '.join(cells)} |")
    tags = metrics["tag_mAP"]
    lines.append(
        f"Image labels: mAP {tags['target']:.1f} percent of target, {tags['source']:.1f} of source "
        f"categories. Attention entropy: {metrics['attention_entropy']:.2f}; 1 is uniform."
    )
    times = ", ".join(f"{name} {value:.0f}" for name, value in metrics["step_seconds"].items())
    return "\n".join([*lines, f"Seconds: {times}"])


def draw_transfer(
    path: Path, model: SampleTransferNet, records: Sequence[Record], split: CategorySplit
) -> None:
    """Draw validation images from the image to the mask, one label in a row.

    Args:
        path: PNG file to write.
        model: TransferNet.
        records: as of :func:`maskx.data.coco.load_coco`; the true labels are used.
        split: target categories are shown first.
    """
    target = set(split.indices_without_masks)
    shown = _varied(records, target)
    read_image = ImageMapper(model.num_classes, size=None, label_maps=False).read_image
    names = {"num_classes": model.num_classes, "names": split.class_names, "side": _TILE_SIDE}
    tiles, titles = [], []
    for record, result in predict_transfer(model, shown, description="picture"):
        image = np.ascontiguousarray(read_image(record)["image"].permute(1, 2, 0).numpy())
        labels = result["labels"]
        row = next((i for i, label in enumerate(labels) if label in target), 0)
        attention, densified = (
            result[name][row].float().cpu().numpy() for name in ("attention", "densified")
        )
        tiles += [
            plain_tile(image, _TILE_SIDE),
            draw_heat_map(image, attention, symmetric=False, side=_TILE_SIDE),
            draw_heat_map(image, densified - densified.mean(), symmetric=True, side=_TILE_SIDE),
            draw_label_map(image, result["label_map"], **names),
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


def _tag_mean_ap(
    prob: np.ndarray, records: Sequence[Record], groups: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    truth = multi_hot([record["image_labels"] for record in records], prob.shape[1]).numpy()
    return {
        name: evaluate_image_labels(prob[:, list(indices)], truth[:, list(indices)])["mAP"]
        for name, indices in groups.items()
    }


def _varied(records: Sequence[Record], target: set[int]) -> list[Record]:
    """Choose images whose target labels are not shown yet, those with two labels first."""
    chosen: list[Record] = []
    shown: set[int] = set()
    rest = sorted(
        (record for record in records if record["image_labels"]),
        key=lambda record: abs(2 - len(record["image_labels"])),
    )
    while rest and len(chosen) < _FIGURE_ROWS:
        best = max(rest, key=lambda record: len(target & set(record["image_labels"]) - shown))
        rest.remove(best)
        chosen.append(best)
        shown |= set(best["image_labels"])
    return chosen
