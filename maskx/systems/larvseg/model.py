"""LarvSeg, and the classifier that it starts from, driven with samples."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskx.core.image_classifier import ImageClassifier, multi_hot
from maskx.core.losses import multi_label_loss
from maskx.core.sample_models import Sample, SampleModel
from maskx.systems.larvseg.classifier import check_class_indices
from maskx.systems.larvseg.joint_sets import UNKNOWN
from maskx.systems.larvseg.network import LarvSeg
from maskx.systems.larvseg.samples import Record, read_sample
from maskx.systems.larvseg.windows import check_windows, predict_windows

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
        self._scored[name] = self._scored[name].to(self.device)
        images = torch.stack([self.normalise(sample) for sample in samples])
        return images, self._scored[name]


class SampleJointClassifier(_ScoringModel):
    """Learns image labels of data sets with different classes, each with its own.

    Args:
        classifier: of all classes of the table.
        size: side in pixels of the squares that images are warped to in evaluation.
        scored: by data set the table indices of its classes, see
            :class:`maskx.systems.larvseg.joint_sets.JointSets`.
    """

    def __init__(
        self, classifier: ImageClassifier, *, size: int, scored: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__(size, scored, classifier.num_classes)
        self.classifier = classifier

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """As of :class:`maskx.core.sample_models.SampleClassifier`, by table index."""
        if not self.training:
            prob = self.classifier(self.preprocess(samples)).sigmoid()
            return [{"image_labels_prob": row} for row in prob]
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
            :class:`maskx.systems.larvseg.joint_sets.JointSets`; needed in training only.
        test_classes: table indices that pixels are labelled with in evaluation; None for all.
        sliding: in evaluation resize the shorter side to ``size`` and average the logits of windows
            of this size, next to each other, instead of warping the whole image. Needs a backbone
            with ``feature_shapes``, the stride of which divides ``size``.

    Raises:
        ValueError: names, class indices or the size do not fit the network.
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
        every_class = range(network.num_classes)
        self._classes = check_class_indices(
            every_class if test_classes is None else test_classes, network.num_classes
        )
        self.sliding = sliding
        if sliding:
            self._feature_stride = network.backbone.feature_shapes[network.in_feature].stride
            check_windows(size, size, self._feature_stride)

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute losses in training, label maps in evaluation.

        Args:
            samples: in training a batch of
                :func:`maskx.systems.larvseg.samples.joint_batches`; in evaluation each with
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
            for label in map(int, label_maps.aminmax()):
                if not UNKNOWN <= label < len(scored):
                    raise ValueError(
                        f"Data set {samples[0]['data_set']!r} has the label {label} in a label "
                        f"map. Allowed: 0 to {len(scored) - 1}, positions among its classes, and "
                        f"{UNKNOWN} where nothing is known."
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
        classes = self._classes.to(self.device)
        classes = classes[self.network.classifier.trained[classes]]
        if len(classes) == 0:
            raise ValueError(
                f"None of the {len(self._classes)} classes to predict was in the training data: "
                f"{', '.join(self.class_names[i] for i in self._classes[:8].tolist())}"
                f"{' and more' if len(self._classes) > 8 else ''}. Choose other test_classes."
            )
        if self.sliding:
            labels, scores = predict_windows(
                self.network,
                self.normalise(sample),
                size,
                class_indices=classes,
                window=self.size,
                stride=self.size,
                feature_stride=self._feature_stride,
            )
        else:
            images = self.preprocess([sample])
            found = self.network.predict(images, size, class_indices=classes)
            labels, scores = (each[0] for each in found)
        return {"label_map": classes[labels[0]] + 1, "scores": scores[0]}


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
