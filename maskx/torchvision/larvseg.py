"""LarvSeg on the embedded host: masks of base classes, image labels of many more.

Yu et al., "LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic Segmentation
via Category-wise Attentive Classifier" (PRCV 2024), in the steps of :class:`LarvSegChain`. What is
trained on is made by :func:`maskx.data.joint_sets.joint_sets`.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from maskx.data.class_table import RowMatch, match_rows
from maskx.data.coco import CocoData, load_coco
from maskx.data.joint_sets import (
    JointBatches,
    JointDataSet,
    JointSets,
    joint_sets,
    things_and_stuff,
    things_and_stuff_label_map,
)
from maskx.data.json_files import write_json
from maskx.data.label_maps import ignore_label
from maskx.evaluation.figures import (
    contact_sheet,
    draw_heat_map,
    draw_instances,
    draw_label_map,
    save_png,
)
from maskx.evaluation.mean_iou import MeanIoU
from maskx.modeling.class_patterns import network_hash
from maskx.modeling.feature_maps import named_feature
from maskx.modeling.image_classifier import ImageClassifier, multi_hot, multi_label_loss
from maskx.modeling.large_vocabulary import predict_label_map
from maskx.modeling.larvseg import LarvSeg
from maskx.modeling.larvseg_attention import attention_maps, label_pairs
from maskx.modeling.larvseg_classifier import check_class_indices
from maskx.modeling.larvseg_grouping import group_pixels
from maskx.modeling.larvseg_losses import POOLINGS
from maskx.modeling.weight_transfer import check_choice
from maskx.supervision import CategorySplit, Supervision, resolve_split
from maskx.torchvision.backbones import build_backbone, choose_feature
from maskx.torchvision.data import InstanceMapper, step_seed
from maskx.torchvision.images import _warp_label_map, warp_image
from maskx.torchvision.semantic import Sample, _SampleModel
from maskx.torchvision.training import (
    CHECKPOINT_NAME,
    TrainingSettings,
    _load_model,
    _read_checkpoint,
    load_weights,
    select_device,
    train,
)

if TYPE_CHECKING:
    from maskx.torchvision.quickstart import QuickstartOptions

__all__ = [
    "BANKS",
    "METHODS",
    "JointMapper",
    "LabelledImages",
    "LarvSegChain",
    "LarvSegMethod",
    "LarvSegSettings",
    "SampleJointClassifier",
    "SampleLarvSeg",
    "evaluate_grouping",
    "evaluate_larvseg",
    "joint_batches",
    "labelled_images",
    "learn_larvseg",
    "load_matching_weights",
    "open_larvseg",
    "open_with_images",
    "predict_larvseg",
    "quickstart_larvseg",
    "quickstart_sets",
    "split_groups",
    "table_label_map",
]

logger = logging.getLogger(__name__)

METHODS = ("baseline", "larvseg")
BANKS = {"cross": "cross_image", "single": "single_image"}

_MODEL_NAME = "model.json"
_UNKNOWN = -1  # position of a pixel of which nothing is known
_BACKGROUND = "background"  # name of the class of label 0 in data without stuff

# What a checkpoint belongs to, beside what the training loop keeps itself.
_IDENTITY = ("backbone", "pretrained", "image_size", "logit_form", "bank_size", "top_tokens")
_IDENTITY += ("image_weight", "attentive_weight", "min_crop")

# Peaks of Adam: the classifier from random weights and from ImageNet's, the segmentation.
_CLASSIFIER_RATES = {"random": 2e-3, "imagenet": 1e-4}
_RATE = 1e-3

# Few classes on quiet ground; the ground is five classes of its own.
_SCENES, _SCENE_STYLE = 1500, {"style": "sparse", "num_categories": 12}
_COCO_SIZE = 256  # of the squares that photographs are warped to

_FIGURE_ROWS, _TILE_SIDE = 6, 256

Record = Mapping[str, Any]


# --- samples


class JointMapper:
    """Reads the records of joint sets, each with the supervision of its data set.

    Args:
        sets: data sets that are trained on together.
        flip: mirror half of the samples.
        min_crop: smallest side of a random crop as a share of the image's; 1 takes whole images.

    Raises:
        ValueError: the share is not in (0, 1].
    """

    def __init__(self, sets: JointSets, *, flip: bool = True, min_crop: float = 1.0) -> None:
        if not 0 < min_crop <= 1:
            raise ValueError(f"min_crop must be above 0 and at most 1, got {min_crop}.")
        self.sets, self.flip, self.min_crop = sets, flip, min_crop

    def __call__(self, record: Record, random_state: np.random.RandomState) -> Sample:
        """Make a training sample.

        Returns:
            ``image`` (3, S, S) uint8 RGB with S of the data set, ``height``, ``width``,
            ``image_id``, ``data_set``, ``single_label``; of "image" data sets ``image_labels``,
            positions among the classes that the data set scores; of "mask" data sets
            ``label_map`` (S, S) int64 positions, -1 where nothing is known.
        """
        data_set = self.sets.of_record(record)
        sample = _read_image(record)
        sample |= {"data_set": data_set.name, "single_label": data_set.single_label}
        is_mask = data_set.supervision == Supervision.MASK.value
        needs_pixels = is_mask or data_set.crop_level_labels
        maps = {"image": sample["image"]}
        if needs_pixels:
            maps["label_map"] = torch.from_numpy(self.sets.label_map(record))
        maps = self._cropped(maps, random_state)
        sample["image"] = warp_image(maps["image"], data_set.image_size)
        if needs_pixels:
            label_map = _warp_label_map(maps["label_map"], data_set.image_size)
        if is_mask:
            sample["label_map"] = label_map
        elif data_set.crop_level_labels:
            found = label_map.unique().tolist()
            sample["image_labels"] = [label for label in found if label != _UNKNOWN]
        else:
            sample["image_labels"] = self.sets.image_labels(record)
        if self.flip and random_state.randint(2):
            for key in sample.keys() & {"image", "label_map"}:
                sample[key] = sample[key].flip(-1)
        return sample

    def _cropped(
        self, maps: dict[str, Tensor], random_state: np.random.RandomState
    ) -> dict[str, Tensor]:
        if self.min_crop == 1:
            return maps
        share = random_state.uniform(self.min_crop, 1)
        sides = maps["image"].shape[-2:]
        lengths = [max(1, round(share * side)) for side in sides]
        top, left = (
            random_state.randint(side - length + 1)
            for side, length in zip(sides, lengths, strict=True)
        )
        height, width = lengths
        return {k: v[..., top : top + height, left : left + width] for k, v in maps.items()}


def joint_batches(
    sets: JointSets,
    mapper: JointMapper,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    num_workers: int = 0,
    rank: int = 0,
    num_processes: int = 1,
) -> DataLoader:
    """Batches of the iterations ``start`` to ``stop``, each of one data set.

    See :class:`maskx.data.joint_sets.JointBatches`; ``num_workers`` only read images, while
    ``num_processes`` train.

    Returns:
        An iterable of lists of ``batch_size`` samples.
    """
    return DataLoader(
        _MappedSets(sets, mapper),
        batch_sampler=JointBatches(
            [len(each.records) for each in sets.data_sets],
            [each.ratio for each in sets.data_sets],
            batch_size=batch_size,
            seed=seed,
            start=start,
            stop=stop,
            rank=rank,
            num_workers=num_processes,
        ),
        num_workers=num_workers,
        collate_fn=list,
    )


class _MappedSets(Dataset):
    def __init__(self, sets: JointSets, mapper: JointMapper) -> None:
        self.sets, self.mapper = sets, mapper

    def __len__(self) -> int:
        return sum(len(each.records) for each in self.sets.data_sets)

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        which, index, seed = key
        record = self.sets.data_sets[which].records[index]
        return self.mapper(record, np.random.RandomState(seed))


def _read_image(record: Record) -> Sample:
    """Read an image alone: its labels are of its own class list."""
    return InstanceMapper(()).read_image(record)


# --- models


class _ScoringModel(_SampleModel):
    """Knows which classes of the table each data set scores."""

    def __init__(self, size: int, scored: Mapping[str, Sequence[int]], num_classes: int) -> None:
        super().__init__(size)
        self.num_classes = num_classes
        self._scored = {
            name: check_class_indices(indices, num_classes) for name, indices in scored.items()
        }

    def _training_batch(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Return images (N, 3, S, S), as large as the samples, and the classes that are scored."""
        names = {sample["data_set"] for sample in samples}
        if len(names) != 1 or not names <= self._scored.keys():
            raise ValueError(
                f"A batch has samples of the data sets {sorted(names)}. Allowed: samples of one of "
                f"{', '.join(self._scored)}, as joint_batches makes them."
            )
        (name,) = names
        # Assigned once per device, not copied in every step.
        self._scored[name] = self._scored[name].to(self.mean.device)
        images = torch.stack([self.normalise(sample) for sample in samples])
        return images, self._scored[name]


class SampleJointClassifier(_ScoringModel):
    """Learns image labels of data sets with different classes, each with its own.

    Args:
        classifier: of all classes of the table.
        size: side in pixels of the squares that images are warped to in evaluation.
        scored: by data set the table indices of its classes, see
            :class:`maskx.data.joint_sets.JointSets`.
    """

    def __init__(
        self, classifier: ImageClassifier, *, size: int, scored: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__(size, scored, classifier.num_classes)
        self.classifier = classifier

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """As of :class:`maskx.torchvision.semantic.SampleClassifier`, by table index."""
        if not self.training:
            return [{"logits": row} for row in self.classifier(self.preprocess(samples))]
        images, scored = self._training_batch(samples)
        logits = self.classifier(images)[:, scored]
        labels = multi_hot([s["image_labels"] for s in samples], len(scored), logits.device)
        return {"loss_labels": multi_label_loss(logits, labels)}


class SampleLarvSeg(_ScoringModel):
    """Drives LarvSeg with samples, as Detectron2 drives its models.

    Args:
        network: of all classes of the table.
        size: side in pixels of the squares that images are warped to in evaluation, or of the
            windows.
        class_names: names of the table.
        scored: by data set the table indices of its classes, see
            :class:`maskx.data.joint_sets.JointSets`; needed in training only.
        test_classes: table indices that pixels are labelled with in evaluation; None for all.
        sliding: in evaluation resize the shorter side to ``size`` and average the logits of windows
            of this size, next to each other, instead of warping the whole image.
    """

    def __init__(
        self,
        network: LarvSeg,
        *,
        size: int,
        class_names: Sequence[str],
        scored: Mapping[str, Sequence[int]] | None = None,
        test_classes: Sequence[int] | None = None,
        sliding: bool = False,
    ) -> None:
        super().__init__(size, scored or {}, network.num_classes)
        if len(class_names) != network.num_classes:
            raise ValueError(
                f"class_names has {len(class_names)} names, the network {network.num_classes} "
                "classes. They must be as many."
            )
        self.network = network
        self.class_names = tuple(class_names)
        self.test_classes = test_classes
        self.sliding = sliding

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute losses in training, label maps in evaluation.

        Args:
            samples: in training a batch of one data set, of :class:`JointMapper`; in evaluation
                each with ``image``, ``height`` and ``width``.

        Returns:
            ``{"loss_pixels", "loss_labels", "loss_attention"}``, weighted, the last unless the
            network has no memory; or per sample ``label_map`` (H, W) int64, table index + 1 (no
            pixel is 0), and ``scores`` (H, W), the logit of that class, in the size of the file.

        Raises:
            ValueError: a batch is of several data sets, or a label is not among their classes.
        """
        if not self.training:
            return [self._predict(sample) for sample in samples]
        images, scored = self._training_batch(samples)
        has_maps = ["label_map" in sample for sample in samples]
        label_maps = image_labels = None
        if all(has_maps):
            label_maps = torch.stack([sample["label_map"] for sample in samples])
            if label_maps.max() >= len(scored):
                raise ValueError(
                    f"Data set {samples[0]['data_set']!r} has the label {int(label_maps.max())} in "
                    f"a label map. Allowed: 0 to {len(scored) - 1}, positions among its classes, "
                    "and -1 where nothing is known."
                )
            label_maps = label_maps.to(images.device)
        else:
            image_labels = [sample["image_labels"] for sample in samples]
        losses = self.network.losses(
            self.network(images),
            class_indices=scored,
            label_maps=label_maps,
            image_labels=image_labels,
            single_label=samples[0].get("single_label", False),
            ignore=_UNKNOWN,
        )
        names = {"loss_seg": "loss_pixels", "loss_cls": "loss_labels", "loss_aux": "loss_attention"}
        return {names[name]: loss for name, loss in losses.items()}

    def _predict(self, sample: Sample) -> dict[str, Tensor]:
        size = (sample["height"], sample["width"])
        classes = torch.arange(self.num_classes, device=self.mean.device)
        if self.test_classes is not None:
            classes = check_class_indices(self.test_classes, self.num_classes).to(classes.device)
        if not self.sliding:
            images = self.preprocess([sample])
            found = self.network.predict(images, size, class_indices=classes)
            labels, scores = (values[0, 0] for values in found)
            return {"label_map": classes[labels] + 1, "scores": scores}
        classes = classes[self.network.classifier.trained[classes]]
        tokens, vectors, shift = self._window_tokens(sample, classes)
        labels, scores = predict_label_map(tokens, vectors, size)
        return {"label_map": classes[labels[0]] + 1, "scores": scores[0] + shift}

    def _window_tokens(self, sample: Sample, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors of the mean logits of the windows: tokens (d, h, w), vectors, shift.

        Logits are linear in the tokens, so it is tokens that are averaged, and never logits of all
        classes. Windows begin at multiples of the stride, so that tokens lie on each other.
        """
        classifier = self.network.classifier
        vectors = classifier.class_vectors(classes)
        image = self.normalise(sample)
        stride = self._stride(image)
        scale = self.size / min(image.shape[-2:])
        height, width = (
            max(self.size, round(scale * side / stride) * stride) for side in image.shape[-2:]
        )
        image = nn.functional.interpolate(
            image[None], (height, width), mode="bilinear", antialias=True
        )
        total = count = None
        for top in _window_starts(height, self.size):
            for left in _window_starts(width, self.size):
                window = image[:, :, top : top + self.size, left : left + self.size]
                factors = classifier.factors(self.network(window), vectors)
                if total is None:
                    shape = (factors.tokens.shape[1], height // stride, width // stride)
                    total, count = image.new_zeros(shape), image.new_zeros(shape[1:])
                rows = slice(top // stride, (top + self.size) // stride)
                columns = slice(left // stride, (left + self.size) // stride)
                total[:, rows, columns] += factors.tokens[0]
                count[rows, columns] += 1
        return total / count, factors.vectors, factors.shift

    def _stride(self, image: Tensor) -> int:
        shape = getattr(self.network.backbone, "feature_shapes", {}).get(self.network.in_feature)
        if shape is None or self.size % shape.stride:
            raise ValueError(
                f"Sliding windows of {self.size} pixels need a size that is a multiple of the "
                f"stride of the feature map {self.network.in_feature!r}, "
                f"{'which is not known' if shape is None else shape.stride}."
            )
        return shape.stride


def _window_starts(length: int, size: int) -> list[int]:
    return [*range(0, length - size, size), length - size]


def load_matching_weights(model: SampleLarvSeg, checkpoint: Path) -> RowMatch:
    """Load a checkpoint of another vocabulary: rows of classes go by name.

    The rows of the class embeddings and of the memory bank that the checkpoint has under the same
    name are taken, all other weights as they are. Classes that the checkpoint does not have keep
    their initial rows and count as not trained, so that they are never predicted.

    Args:
        model: the model to fill.
        checkpoint: of :class:`LarvSegChain`.

    Returns:
        Which rows were taken; the names without a partner, on either side, are logged as well.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of LarvSeg, of another network, or shares no class.
    """
    model.eval()
    content = _read_checkpoint(checkpoint, "cpu")
    old_names = content["run"].get("classes")
    if old_names is None:
        raise ValueError(
            f"'{checkpoint}' does not say which classes it has. Give a checkpoint of LarvSeg."
        )
    match = match_rows(old_names, model.class_names)
    if not match.new_rows:
        raise ValueError(
            f"'{checkpoint}' has none of the {len(model.class_names)} classes. It has "
            f"{', '.join(old_names[:8])}{' and more' if len(old_names) > 8 else ''}."
        )
    new_rows, old_rows = list(match.new_rows), list(match.old_rows)
    weights, own = content["model"], model.state_dict()
    for name in ("classifier.class_embeddings", "classifier.trained", "bank.means", "bank.counts"):
        key = f"network.{name}"
        if key not in own:  # a bank that this model has no use for
            weights.pop(key, None)
            continue
        rows = own[key].clone().cpu()
        if name == "classifier.trained":
            rows[:] = False
        if key in weights:
            rows[new_rows] = weights[key][old_rows]
        weights[key] = rows
    _load_model(model, weights, checkpoint)
    for names, what in (
        (match.only_new, "are not in the checkpoint and will not be predicted until trained"),
        (match.only_old, "of the checkpoint are not wanted"),
    ):
        if names:
            shown = ", ".join(names[:8]) + (" and more" if len(names) > 8 else "")
            logger.warning("%s: %d classes %s: %s.", checkpoint, len(names), what, shown)
    return match


@torch.inference_mode()
def predict_larvseg(
    model: SampleLarvSeg, records: Sequence[Record], *, description: str = "label maps"
) -> Iterator[tuple[Record, np.ndarray]]:
    """Predict label maps, one image at a time.

    Args:
        model: the model; it is put into evaluation mode.
        records: as of :func:`maskx.data.coco.load_coco`.
        description: label of the progress bar.

    Yields:
        Record and (H, W) int64 label map, table index + 1.
    """
    model.eval()
    for record in tqdm(records, desc=description, unit="img"):
        yield record, model([_read_image(record)])[0]["label_map"].cpu().numpy()


@dataclass(frozen=True)
class LabelledImages:
    """Images to evaluate on.

    Attributes:
        records: with true label maps.
        class_names: of their class list.
        background: name of the class that label 0 is; None where it does not occur.
    """

    records: Sequence[Record]
    class_names: tuple[str, ...]
    background: str | None = None


def labelled_images(data: CocoData) -> LabelledImages:
    """Take the stuff of a file as classes if it has any; else its background is one class."""
    if all("sem_seg_file_name" in record for record in data.records):
        return LabelledImages(*things_and_stuff(data))
    return LabelledImages(data.records, data.class_names, _BACKGROUND)


def table_label_map(test: LabelledImages, record: Record, table_names: Sequence[str]) -> np.ndarray:
    """Read or draw the true label map of a record in the labels of a class table.

    Returns:
        (H, W), table index + 1, and `ignore_label` where nothing is known or the table lacks the
        class. No pixel is 0.
    """
    return _table_labels(test, tuple(table_names))[
        things_and_stuff_label_map(record, len(test.class_names))
    ]


def _table_labels(test: LabelledImages, table_names: tuple[str, ...]) -> np.ndarray:
    """Labels in the table by label of the test data."""
    place = {name: index + 1 for index, name in enumerate(table_names)}
    ignore = ignore_label(len(table_names))
    labels = np.full(ignore_label(len(test.class_names)) + 1, ignore, np.int64)
    labels[: len(test.class_names) + 1] = [
        place.get(name, ignore) for name in (test.background, *test.class_names)
    ]
    return labels


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
    similar of them. See :func:`maskx.modeling.larvseg_grouping.group_pixels`.

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
        images = model.preprocess([_read_image(record)])
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


# --- training


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
        decay: of the learning rate, ``cosine`` or ``poly``.
        logit_form: see :class:`maskx.modeling.larvseg_classifier.CosineClassifier`.
        bank_size: images per class of the memory bank.
        top_tokens: tokens of an image that represent its class.
        image_weight: of the loss of image labels. The paper's 0.1 is for 320,000 steps; in a few
            hundred it moves novel classes little.
        attentive_weight: of the loss of image labels with attention, 0.1 in the paper.
        min_crop: see :class:`JointMapper`.
        sliding: see :class:`SampleLarvSeg`.
        workers: processes that read training images; 0 reads them in the process that trains.
    """

    backbone: str = "small"
    pretrained: bool = False
    image_size: int = 128
    start_iterations: int = 400
    iterations: int = 350
    batch_size: int = 16
    seed: int = 0
    decay: str = "cosine"
    logit_form: str = "temperature"
    bank_size: int = 20
    top_tokens: int = 20
    image_weight: float = 1.0
    attentive_weight: float = 1.0
    min_crop: float = 1.0
    sliding: bool = False
    workers: int = 0


@dataclass(frozen=True)
class LarvSegMethod:
    """What image labels are learned with.

    Attributes:
        method: ``baseline``, pixels and image labels alone, or ``larvseg``, with attention too.
        bank: of LarvSeg, what attention maps are made with: ``cross``, the images seen last, or
            ``single``, the image itself.
        pooling: of LarvSeg, ``weighted`` as in the paper, or ``normalised``, see
            :func:`maskx.modeling.larvseg_losses.attentive_loss`.

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


class LarvSegChain:
    """The trainings of one seed; all methods start from the same backbone.

    The steps: train a classifier of the image labels, whose backbone stands for the paper's
    ImageNet weights; train each :class:`LarvSegMethod` from it, in as many steps. Each leaves its
    checkpoint in a folder of its own and is made once.

    Args:
        sets: what is trained on.
        settings: what to do.
        output: folder of the checkpoints.
        resume: go on from the checkpoints that are there.
        identity: what else the run is defined by, see :func:`maskx.torchvision.training.train`.
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
        self.sets, self.settings = sets, settings
        self.output, self.resume, self.device = output, resume, torch.device(device)
        self.identity = dict(identity or {}) | {
            "classes": list(sets.table.names),
            "data sets": [
                [each.name, each.supervision, each.ratio, each.image_size, len(each.records)]
                for each in sets.data_sets
            ],
            "scored": {name: list(indices) for name, indices in sets.scored.items()},
            **{name.replace("_", " "): getattr(settings, name) for name in _IDENTITY},
        }
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add what runs inside to `seconds`."""
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started

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
        mapper = JointMapper(sets, min_crop=settings.min_crop)
        self._train(model, "start", settings.start_iterations, rate, sets, mapper, {})
        return backbone.to("cpu")

    def train_method(self, method: LarvSegMethod) -> SampleLarvSeg:
        """Train a method from the shared backbone."""
        settings = self.settings
        backbone = self.backbone
        content = self._description(method)
        torch.manual_seed(settings.seed)
        model = _build_larvseg(content, scored=self.sets.scored, sliding=settings.sliding)
        model.network.backbone.load_state_dict(backbone.state_dict())
        model.network.classifier.set_trained(self.sets.trained)
        identity = {"method": method.name, "start": network_hash(backbone)}
        mapper = JointMapper(self.sets, min_crop=settings.min_crop)
        self._train(model, method.name, settings.iterations, _RATE, self.sets, mapper, identity)
        write_json(self.output / method.name / _MODEL_NAME, content)
        return model

    def _description(self, method: LarvSegMethod) -> dict[str, Any]:
        """What :func:`open_larvseg` needs to build the network again."""
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

    def _train(
        self,
        model: nn.Module,
        name: str,
        iterations: int,
        rate: float,
        sets: JointSets,
        mapper: JointMapper,
        identity: Mapping[str, Any],
    ) -> None:
        settings = self.settings
        training = TrainingSettings(
            iterations=iterations,
            batch_size=settings.batch_size,
            learning_rate=rate,
            weight_decay=0.0,
            seed=settings.seed,
            checkpoint_every=max(50, iterations // 20),
            optimizer="adam",
            decay=settings.decay,
        )
        batches = functools.partial(
            joint_batches,
            sets,
            mapper,
            batch_size=settings.batch_size,
            seed=settings.seed,
            num_workers=settings.workers,
        )
        with self.timed(name):
            train(
                model,
                batches,
                training,
                output_dir=self.output / name,
                resume=self.resume,
                identity=self.identity | dict(identity),
                device=self.device,
                description=f"{name}: training",
            )
        model.eval()


def open_larvseg(
    folder: str | Path, device: torch.device | str = "cpu", *, sliding: bool = False
) -> SampleLarvSeg:
    """Open a model that :class:`LarvSegChain` trained.

    Args:
        folder: its folder, such as ``larvseg`` in that of the run.
        device: where to compute.
        sliding: see :class:`SampleLarvSeg`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another kind.
    """
    folder = Path(folder)
    path = folder / _MODEL_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file '{path}', which says what network the model is. Give the folder "
            "'larvseg' or 'baseline' of a finished run: tools/quickstart.py --system larvseg."
        )
    try:
        model = _build_larvseg(json.loads(path.read_bytes()), sliding=sliding)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' is damaged ({type(error).__name__}: {error}). Train the model again."
        ) from error
    load_weights(model, folder / CHECKPOINT_NAME)
    return model.to(device)


def _build_larvseg(
    content: Mapping[str, Any],
    *,
    scored: Mapping[str, Sequence[int]] | None = None,
    sliding: bool = False,
) -> SampleLarvSeg:
    backbone = build_backbone(
        content["backbone"], frozen_norm=content["frozen_norm"], pretrained=False
    )
    in_feature, shape = choose_feature(backbone)
    network = LarvSeg(
        backbone,
        in_feature=in_feature,
        in_channels=shape.channels,
        num_classes=len(content["class_names"]),
        **content["network"],
    )
    return SampleLarvSeg(
        network,
        size=content["image_size"],
        class_names=content["class_names"],
        scored=scored,
        sliding=sliding,
    )


def open_with_images(
    folder: str | Path,
    json_file: str | Path,
    image_root: str | Path,
    *,
    masks_for: str | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> tuple[SampleLarvSeg, LabelledImages, dict[str, tuple[int, ...]]]:
    """Open a model of :func:`open_larvseg` and images to evaluate it on.

    Args:
        folder: of the model.
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


# --- from data to results


def quickstart_sets(train_data: CocoData, split: CategorySplit, *, image_size: int) -> JointSets:
    """Make two data sets of one file: masks of base classes, and image labels.

    Images with masks teach those of the base classes, and the ground: the stuff if the file has
    any, else the background. Images with image labels alone teach these, and so do those with
    masks; image labels say nothing of the ground. If the file has no images with image labels
    alone, every second image keeps its masks and the others only their image labels.

    Args:
        train_data: the file.
        split: A the base classes, B the novel ones.
        image_size: of both data sets.

    Raises:
        ValueError: there is nothing to learn masks or image labels from.
    """
    images = labelled_images(train_data)
    is_mask = [r["supervision"] == Supervision.MASK.value for r in train_data.records]
    masks = [r for r, has_mask in zip(images.records, is_mask, strict=True) if has_mask]
    tagged = [r for r in train_data.records if r["supervision"] == Supervision.IMAGE.value]
    of_masks = [r for r, has_mask in zip(train_data.records, is_mask, strict=True) if has_mask]
    masks, tagged = (masks, tagged + of_masks) if tagged else (masks[::2], of_masks[1::2])
    novel = set(split.without_masks)
    return joint_sets(
        [
            JointDataSet(
                "masks",
                masks,
                images.class_names,
                supervision="mask",
                image_size=image_size,
                with_masks=[name for name in images.class_names if name not in novel],
                background=images.background,
            ),
            JointDataSet(
                "image labels",
                tagged,
                train_data.class_names,
                supervision="image",
                image_size=image_size,
            ),
        ]
    )


def split_groups(
    images: LabelledImages, split: CategorySplit, table_names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Table indices of the base and of the novel classes; a background is in neither."""
    novel = set(split.without_masks)
    known = set(images.class_names)
    sides: dict[str, list[int]] = {"base": [], "novel": []}
    for index, name in enumerate(table_names):
        if name in known:
            sides["novel" if name in novel else "base"].append(index)
    return {side: tuple(indices) for side, indices in sides.items()}


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
            with image labels; see :func:`quickstart_sets`.
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
    sets = quickstart_sets(train_data, split, image_size=settings.image_size)
    test = labelled_images(val_data)
    groups = split_groups(test, split, sets.table.names)
    num_images = {each.name: len(each.records) for each in sets.data_sets}
    report(
        f"{num_images['masks']} training images with masks of {len(groups['base'])} base classes, "
        f"{num_images['image labels']} with image labels of {len(split.class_names)} classes, "
        f"{len(groups['novel'])} of them novel"
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


def quickstart_larvseg(
    options: "QuickstartOptions", report: Callable[[str], None]
) -> dict[str, Any]:
    """Learn LarvSeg and its baseline, from data to ``metrics.json`` and ``predictions.png``.

    Base classes are those that ``masks_for`` names, novel ones all others; of these only image
    labels are used. See :func:`learn_larvseg`.

    Args:
        options: what to do.
        report: receives the lines for the reader.

    Returns:
        The content of ``metrics.json``.

    Raises:
        ValueError: an option, an annotation or a checkpoint cannot be used; the message says why.
    """
    # That module has the table of all systems, so it imports this one.
    from maskx.torchvision.quickstart import _refuse_options_of_others, load_data, nan_to_null

    started = time.perf_counter()
    _refuse_options_of_others("larvseg", options)
    device = select_device(options.device)
    image_size = options.image_size or (_COCO_SIZE if options.coco_train else None)
    chosen = {
        "batch_size": options.batch_size,
        "image_size": image_size,
        "start_iterations": options.iterations,
        "iterations": options.iterations,
    }
    settings = LarvSegSettings(
        backbone=options.backbone,
        pretrained=options.pretrained,
        seed=options.seed,
        workers=options.workers,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    options.output.mkdir(parents=True, exist_ok=True)
    train_data, val_data = load_data(options, _SCENES, **_SCENE_STYLE)
    split = resolve_split(options.masks_for or "scenes_half", train_data.class_names)
    report(
        f"{len(train_data.records)} training and {len(val_data.records)} validation images, on "
        f"{device}"
    )
    metrics: dict[str, Any] = {"system": "larvseg"}
    metrics |= learn_larvseg(
        train_data,
        val_data,
        split,
        settings,
        output=options.output,
        resume=options.resume,
        device=device,
        report=report,
    )
    metrics["split"] = {"name": split.name, "A": split.with_masks, "B": split.without_masks}
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    path = options.output / "metrics.json"
    write_json(path, nan_to_null(metrics))
    report(f"\nWrote {path}, {options.output / 'predictions.png'}")
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
        sample = _read_image(record)
        image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
        labels = labels_of[record["image_id"]]
        # A novel class if there is one, rather one that no row above has.
        shown = min(labels, key=lambda label: (label not in set(novel), label in drawn))
        drawn.append(shown)
        tiles.append(_plain_tile(image))
        if attentive is not None:
            attention = attention_of(attentive, sample, labels)[labels.index(shown)]
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


def _plain_tile(image: np.ndarray) -> np.ndarray:
    nothing = {"boxes": np.zeros((0, 4)), "masks": np.zeros((0, *image.shape[:2]), bool)}
    return draw_instances(image, **nothing, labels=(), with_masks=(), side=_TILE_SIDE)


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
