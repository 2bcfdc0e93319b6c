"""LarvSeg, and the classifier that it starts from, driven with samples."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from maskx.modeling.image_classifier import ImageClassifier, multi_hot, multi_label_loss
from maskx.modeling.large_vocabulary import predict_label_map
from maskx.modeling.larvseg import LarvSeg
from maskx.modeling.larvseg_classifier import check_class_indices
from maskx.torchvision.larvseg_samples import UNKNOWN, Record, read_sample
from maskx.torchvision.semantic import Sample, SampleModel

__all__ = [
    "SampleJointClassifier",
    "SampleLarvSeg",
    "predict_larvseg",
]


class _ScoringModel(SampleModel):
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
            samples: in training a batch of
                :func:`maskx.torchvision.larvseg_samples.joint_batches`; in evaluation each with
                ``image``, ``height`` and ``width``.

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
            ignore=UNKNOWN,
        )
        names = {"loss_seg": "loss_pixels", "loss_cls": "loss_labels", "loss_aux": "loss_attention"}
        return {names[name]: loss for name, loss in losses.items()}

    @torch.no_grad()
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
        yield record, model([read_sample(record)])[0]["label_map"].cpu().numpy()
