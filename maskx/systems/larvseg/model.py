"""LarvSeg, and the classifier that it starts from, driven with samples; of both hosts."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.extra_state import EXTRA_STATE, pack_state, unpack_state
from maskx.core.image_classifier import ImageClassifier, multi_hot
from maskx.core.images import warp_images
from maskx.core.losses import multi_label_loss
from maskx.core.sample_models import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Sample,
    SampleModel,
    required,
    take_classifier_backbone,
)
from maskx.core.text import listed
from maskx.data.label_maps import ignore_label
from maskx.engine.model_export import Exportable, export_label_maps
from maskx.systems.larvseg.large_vocabulary import predict_label_map
from maskx.systems.larvseg.network import LarvSeg, LogitFactors, check_class_indices
from maskx.systems.larvseg.samples import match_rows, take_rows

logger = logging.getLogger(__name__)

_SAMPLES = "Training samples are those of maskx.systems.larvseg.samples.JointMapper."
_VERSION = 1  # of what a checkpoint says of its model
# Tensors of the network with a row for each class.
_TRAINED = "classifier.trained"
_CLASS_ROWS = ("classifier.class_embeddings", _TRAINED, "bank.means", "bank.counts")
# Of a label that a data set does not score: it is not in its samples.
_UNKNOWN, _NOT_SCORED = -1, -2


class _ScoringModel(SampleModel):
    """Knows which classes of the class table each data set scores."""

    def __init__(
        self,
        image_size: int,
        scored: Mapping[str, Sequence[int]] | None,
        num_classes: int,
        **pixels: Sequence[float],
    ) -> None:
        super().__init__(image_size, **pixels)
        self.num_classes = num_classes
        self._ignore = ignore_label(num_classes)
        self._scored, self._positions = {}, {}
        for name, indices in (scored or {}).items():
            classes = check_class_indices(indices, num_classes)
            # Positions among the classes that are scored, by label of a label map.
            positions = torch.full((self._ignore + 1,), _NOT_SCORED, device="cpu")
            positions[[0, self._ignore]] = _UNKNOWN
            positions[classes + 1] = torch.arange(len(classes), device="cpu")
            self._scored[name], self._positions[name] = classes, positions

    def _data_set_of(self, samples: Sequence[Sample]) -> tuple[str, Tensor]:
        """Return the data set of a batch, and the classes that it scores."""
        names = {required(sample, "data_set", _SAMPLES) for sample in samples}
        if len(names) != 1 or not names <= self._scored.keys():
            raise ValueError(
                f"A training batch has samples of the data sets {sorted(names)}. Allowed: samples "
                f"of one of {', '.join(self._scored) or 'the training data, which are not known'}."
                f" {_SAMPLES}"
            )
        (name,) = names
        # Assigned once per device, not copied in every step.
        self._scored[name] = self._scored[name].to(self.device)
        return name, self._scored[name]

    def _positions_of(self, sample: Sample, key: str, name: str) -> Tensor:
        """Map what a sample says of its classes to positions among those that are scored."""
        labels = torch.as_tensor(required(sample, key, _SAMPLES), dtype=torch.int64).cpu()
        shift = int(key == "image_labels")  # class indices; a label map has these + 1
        labels = labels + shift
        is_label = (labels >= 0) & (labels <= self._ignore)
        positions = self._positions[name][torch.where(is_label, labels, 0)]
        is_bad = ~is_label | (positions == _NOT_SCORED)
        if is_bad.any():
            raise ValueError(
                f"Image {sample.get('image_id', 'without id')!r} of data set '{name}' has the "
                f"label {labels[is_bad][0].item() - shift} in {key}, which the data set does not "
                "score. Allowed in image_labels: its class indices; in sem_seg: these + 1, 0 and "
                f"{self._ignore} (unknown). {_SAMPLES}"
            )
        return positions


class JointClassifier(_ScoringModel):
    """Learns image labels of data sets with different classes, each with its own.

    Args:
        classifier: of all classes of the table.
        image_size: side in pixels of the squares that images are warped to in evaluation.
        scored: see :class:`LarvSegModel`.
        **pixels: ``pixel_mean`` and ``pixel_std``, see
            :class:`maskx.core.sample_models.SampleModel`.
    """

    def __init__(
        self,
        classifier: ImageClassifier,
        *,
        image_size: int,
        scored: Mapping[str, Sequence[int]],
        **pixels: Sequence[float],
    ) -> None:
        super().__init__(image_size, scored, classifier.num_classes, **pixels)
        self.classifier = classifier

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """As of :class:`maskx.core.sample_models.SampleClassifier`."""
        if not self.training:
            prob = self.classifier(self.preprocess(samples)).sigmoid()
            return [{"image_labels_prob": row} for row in prob]
        name, scored = self._data_set_of(samples)
        logits = self.classifier(self.training_images(samples))[:, scored]
        positions = [self._positions_of(s, "image_labels", name).tolist() for s in samples]
        labels = multi_hot(positions, len(scored), logits.device)
        return {"loss_labels": multi_label_loss(logits, labels)}


class LarvSegModel(_ScoringModel):
    """Segmentation over the classes of several data sets, by name, that supervise it differently.

    Yu et al., "LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic
    Segmentation via Category-wise Attentive Classifier" (PRCV 2024).

    Checkpoints hold the memory bank and the names of the classes. In training mode one with other
    classes may be loaded: rows of classes are taken by name, classes that it lacks keep their
    initial rows, and what either training showed counts as trained.

    Args:
        network: of all classes of the class table.
        class_names: of the class table.
        scored: by training data set the class indices that it scores, see
            :class:`maskx.systems.larvseg.samples.JointSets`; needed in training only.
        test_classes: class indices to predict where a sample does not say; None for all.
        image_size: side in pixels of the squares to which whole images are warped in evaluation.
        window: side of the windows that images are predicted by instead; 0 for whole images.
        stride: from window to window; 0 for that of their side.
        top_k: classes per pixel that are returned.
        architecture: plain values from which somebody can make the network again; kept in
            checkpoints.
        pixel_mean: see :class:`maskx.core.sample_models.SampleModel`.
        pixel_std: likewise.
    """

    def __init__(
        self,
        network: LarvSeg,
        *,
        class_names: Sequence[str],
        scored: Mapping[str, Sequence[int]] | None = None,
        test_classes: Sequence[int] | None = None,
        image_size: int,
        window: int = 0,
        stride: int = 0,
        top_k: int = 1,
        architecture: Mapping[str, Any] | None = None,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if top_k < 1 or min(window, stride) < 0:
            raise ValueError(
                f"top_k (TEST.MASKX.TOP_K) is {top_k}, window (TEST.MASKX.WINDOW) {window} and "
                f"stride (TEST.MASKX.STRIDE) {stride}. Allowed: the first from 1, the others from "
                "0."
            )
        super().__init__(
            image_size, scored, network.num_classes, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        if len(class_names) != network.num_classes:
            raise ValueError(
                f"class_names has {len(class_names)} names, the network {network.num_classes} "
                "classes. They must be as many."
            )
        self.network, self.class_names = network, tuple(class_names)
        every_class = range(len(class_names))
        self.test_classes = self._checked(every_class if test_classes is None else test_classes)
        self.window, self.stride, self.top_k = window, stride or window, top_k
        self.architecture = dict(architecture or {})
        backbone = network.backbone
        self._divisor = getattr(backbone, "size_divisibility", 0) or 1
        if window:
            shapes = getattr(backbone, "feature_shapes", None) or backbone.output_shape()
            self._feature_stride = shapes[network.in_feature].stride
            check_windows(window, self.stride, max(self._feature_stride, self._divisor))
        elif image_size % self._divisor:
            raise ValueError(
                f"image_size (INPUT.MASKX.SIZE) is {image_size}, but {type(backbone).__name__} "
                f"takes multiples of {self._divisor}. Set it to "
                f"{max(image_size // self._divisor, 1) * self._divisor}."
            )
        self._reported_untrained: set[int] = set()

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Learn from a batch of one data set, or segment images.

        Args:
            samples: with ``image`` (3, H, W) from 0 to 255. In training all of one size, of one
                ``data_set``, its name, and all with ``sem_seg`` (H, W) int64, class index + 1, 0
                and ``ignore_label`` where nothing is known, or with ``image_labels``, class
                indices; ``single_label`` and ``attention`` as of
                :class:`maskx.systems.larvseg.samples.JointDataSet`. In evaluation ``height`` and
                ``width``, the size of the result, are those of the image, and ``class_indices``,
                the classes to choose from, ``test_classes`` where they are not given.

        Returns:
            In training ``loss_pixels``, ``loss_labels`` and, unless the network has no memory,
            ``loss_attention``, weighted; one without supervision is zero. Otherwise per sample

            - ``sem_seg``: (height, width) int64, 1 + position among ``class_indices``, which is
              class index + 1 where all are chosen from; never 0;
            - ``top_classes``: (k, height, width) positions of the k best, the best first;
            - ``top_scores``: (k, height, width) their logits;
            - ``class_indices``: (L,) the classes chosen from.

        Raises:
            ValueError: training samples do not fit together or their data set; in evaluation, none
                of the classes was trained.
        """
        if not self.training:
            return [self._predict(sample) for sample in samples]
        name, scored = self._data_set_of(samples)
        images = self.training_images(samples)
        if any(side % self._divisor for side in images.shape[-2:]):
            raise ValueError(
                f"The training images of data set '{name}' have sides of "
                f"{' x '.join(map(str, images.shape[-2:]))} pixels, but "
                f"{type(self.network.backbone).__name__} takes multiples of {self._divisor}. Set "
                "image_size of the data set (DATASETS.MASKX.JOINT.SIZES) so."
            )
        label_maps = image_labels = None
        if any("sem_seg" in sample for sample in samples):
            maps = [self._positions_of(sample, "sem_seg", name) for sample in samples]
            label_maps = torch.stack(maps).to(self.device)
        else:
            image_labels = [self._positions_of(s, "image_labels", name).tolist() for s in samples]
        return self.network.losses(
            self.network(images),
            class_indices=scored,
            label_maps=label_maps,
            image_labels=image_labels,
            single_label=samples[0].get("single_label", False),
            attention=samples[0].get("attention", True),
            ignore=_UNKNOWN,
        )

    @torch.no_grad()
    def _predict(self, sample: Sample) -> dict[str, Tensor]:
        classes = self.test_classes
        if "class_indices" in sample:
            classes = self._checked(sample["class_indices"])
        classes = classes.to(self.device)
        positions = self._positions_to_predict(classes)
        factors = self._factors(sample, self.network.classifier.class_vectors(classes[positions]))
        height, width = sample["image"].shape[-2:]
        size = sample.get("height", height), sample.get("width", width)
        found, scores = predict_label_map(
            factors.tokens[0], factors.vectors, size, top_k=self.top_k
        )
        found = positions[found]
        return {
            "sem_seg": found[0] + 1,
            "top_classes": found,
            "top_scores": scores + factors.shift,
            "class_indices": classes,
        }

    def _factors(self, sample: Sample, vectors: Tensor) -> LogitFactors:
        """Factors of the logits of the whole image, or of their mean over windows.

        Logits are linear in the scaled tokens, so that it is tokens that are averaged where windows
        overlap. Windows begin at multiples of the stride of the feature map: their tokens lie on
        each other, and the mean of the tokens gives the mean of the logits exactly.
        """
        network = self.network
        if not self.window:
            return network.classifier.factors(network(self.preprocess([sample])), vectors)
        window, stride = self.window, self._feature_stride
        image = sample["image"].to(self.device, self.pixel_mean.dtype)[None]
        scale = window / min(image.shape[-2:])
        # The shorter side is as long as a window.
        height, width = (
            max(window, round(scale * side / stride) * stride) for side in image.shape[-2:]
        )
        image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
        image = self.normalise({"image": image})
        total = image.new_zeros(1, network.classifier.channels, height // stride, width // stride)
        count = image.new_zeros(height // stride, width // stride)
        for top in (*range(0, height - window, self.stride), height - window):
            for left in (*range(0, width - window, self.stride), width - window):
                tokens = network(image[:, :, top : top + window, left : left + window])
                factors = network.classifier.factors(tokens, vectors)
                rows, columns = (
                    slice(start // stride, (start + window) // stride) for start in (top, left)
                )
                total[:, :, rows, columns] += factors.tokens
                count[rows, columns] += 1
        return factors._replace(tokens=total / count)

    def _checked(self, class_indices: Sequence[int]) -> Tensor:
        """Class indices to choose from; of several labels with one class the first is predicted."""
        indices = torch.as_tensor(class_indices, dtype=torch.int64, device="cpu")
        is_bad = (indices < 0) | (indices >= self.num_classes)
        if len(indices) == 0 or is_bad.any():
            raise ValueError(
                f"The classes to predict (class_indices) have {indices[is_bad].tolist()}. Allowed: "
                f"at least one of 0 to {self.num_classes - 1}."
            )
        return indices

    def _positions_to_predict(self, classes: Tensor) -> Tensor:
        """Return the positions of the classes that training showed; name the others once."""
        is_trained = self.network.classifier.trained[classes]
        never = set(classes[~is_trained].tolist()) - self._reported_untrained
        if never:
            self._reported_untrained |= never
            logger.warning(
                "%d classes were in no image of the training, so they are never predicted: %s.",
                len(never),
                listed([self.class_names[index] for index in sorted(never)]),
            )
        if not is_trained.any():
            raise ValueError(
                f"None of the {len(classes)} classes to predict was in the training data: "
                f"{listed([self.class_names[index] for index in classes.tolist()])}. Choose "
                "others (test_classes, TEST.MASKX.CLASSES_OF), or train on data that show them."
            )
        ordered, order = classes.sort(stable=True)
        is_first = torch.empty_like(is_trained)
        is_first[order] = F.pad(ordered.diff() != 0, (1, 0), value=True)
        return (is_trained & is_first).nonzero()[:, 0]

    def get_extra_state(self) -> Tensor:
        """Return what checkpoints say of the model beside its weights."""
        content = {"class_names": self.class_names, "architecture": self.architecture}
        return pack_state(content, version=_VERSION)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the class list is read before the rows of classes are loaded."""

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, *args: Any
    ) -> None:
        """Take rows of classes by name, or the backbone alone of an image classifier."""
        take_classifier_backbone(self.network.backbone, state_dict, prefix)
        if prefix + EXTRA_STATE in state_dict:
            self._take_class_rows(state_dict, prefix)
        elif f"{prefix}network.{_CLASS_ROWS[0]}" in state_dict:
            raise ValueError(
                "The weights do not say which classes their rows are of, so they cannot be matched "
                "by name. Give a checkpoint of LarvSegModel, or load the weights of a plain "
                "LarvSeg into its attribute 'network'."
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def _take_class_rows(self, state: dict[str, Tensor], prefix: str) -> None:
        names = read_extra_state(state, prefix)["class_names"]
        if not self.training and names != self.class_names:
            pairs = enumerate(zip(names, self.class_names, strict=False))
            first = [f": class {i} is {a!r} there, but {b!r} here" for i, (a, b) in pairs if a != b]
            raise ValueError(
                f"The checkpoint has {len(names)} classes, which are not the "
                f"{len(self.class_names)} of the model{first[0] if first else ''}. Set "
                "DATASETS.TRAIN, or MODEL.MASKX.LARVSEG.CLASSES_OF, as the model was trained. Only "
                "the start of a training takes weights of other classes, by name."
            )
        match = match_rows(names, self.class_names)
        if not match.new_rows:
            raise ValueError(
                f"The checkpoint has none of the {len(self.class_names)} classes of the model. It "
                f"has {listed(names)}."
            )
        own = self.state_dict(prefix=prefix)
        keys = [key for row in _CLASS_ROWS if (key := f"{prefix}network.{row}") in state]
        for key in keys:
            if key not in own:  # the bank of a baseline, which is reported
                continue
            rows = take_rows(own[key], state[key], match, what=key.removeprefix(prefix))
            # What this training shows counts as trained, beside what the other one showed.
            is_trained = key.endswith(_TRAINED) and self.training
            state[key] = rows | own[key] if is_trained else rows
        for left, what in (
            (match.only_new, "are not in the checkpoint and keep their initial weights"),
            (match.only_old, "of the checkpoint are not wanted"),
        ):
            if left and keys:
                logger.warning("%d classes %s: %s.", len(left), what, listed(left))

    def lacks_class_rows(self, missing: Sequence[str]) -> bool:
        """Whether rows of classes are among the names of the weights that were not loaded.

        Detectron2's checkpointer leaves out what has another shape, so also those of a longer or
        shorter class list.
        """
        return f"network.{_CLASS_ROWS[0]}" in missing


class _LabelMaps(nn.Module):
    """What is exported of a model: an image (1, 3, H, W) in, label map and scores out.

    The classes are gone through in chunks, so that memory does not grow with their number.
    """

    def __init__(self, model: LarvSegModel, chunk: int = 64) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk
        classes = model.test_classes.to(model.device)
        positions = model._positions_to_predict(classes)
        self.register_buffer("positions", positions)
        with torch.no_grad():
            vectors = model.network.classifier.class_vectors(classes[positions])
        self.register_buffer("vectors", vectors)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        squares = model.normalise({"image": warp_images(image, model.size)})
        factors = model.network.classifier.factors(model.network(squares), self.vectors)
        best = image.new_full(image.shape[-2:], float("-inf"))
        label_map = torch.zeros_like(best, dtype=torch.int64)
        chunks = zip(
            factors.vectors.split(self.chunk), self.positions.split(self.chunk), strict=True
        )
        for vectors, positions in chunks:
            logits = F.conv2d(factors.tokens, vectors[:, :, None, None])
            scores, found = F.interpolate(logits, image.shape[-2:], mode="bilinear")[0].max(dim=0)
            label_map = torch.where(scores > best, positions[found] + 1, label_map)
            best = torch.maximum(scores, best)
        return label_map, best + factors.shift


def exportable(model: LarvSegModel, class_names: Sequence[str]) -> Exportable:
    """Describe a trained model for :func:`maskx.engine.model_export.export_model`.

    Raises:
        ValueError: it predicts by sliding windows.
    """
    if model.window:
        raise ValueError(
            f"The model cannot be exported: it predicts by sliding windows of {model.window} "
            "pixels, whose number follows from the image. Set window to 0."
        )
    names = [class_names[index] for index in model.test_classes.tolist()]
    return export_label_maps(_LabelMaps(model), names, "logit of the class")


def read_extra_state(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Return ``class_names`` and ``architecture``, which the weights of a model say of it.

    Raises:
        ValueError: they are of something else, or of another version.
    """
    if prefix + EXTRA_STATE not in state:
        raise ValueError("The weights are not those of a LarvSegModel: they name no classes.")
    content = unpack_state(state[prefix + EXTRA_STATE], version=_VERSION, what="LarvSegModel")
    return content | {"class_names": tuple(content["class_names"])}


def check_windows(window: int, stride: int, feature_stride: int) -> None:
    """Refuse windows whose tokens would not lie on each other, or that leave pixels out."""
    sizes_fit = window % feature_stride == 0 and stride % feature_stride == 0
    if not sizes_fit or not 0 < stride <= window:
        raise ValueError(
            f"Sliding windows of {window} pixels with stride {stride} do not fit: both must be "
            f"multiples of {feature_stride}, by the stride of the feature map, and the stride at "
            "least that and no larger than the window."
        )
