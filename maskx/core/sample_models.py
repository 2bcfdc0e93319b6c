"""Base of the whole-image models of both hosts, and the classifier of image labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskx.core.backbones import IMAGENET_MEAN, IMAGENET_STD
from maskx.core.extra_state import EXTRA_STATE, pack_state, same_class_names, unpack_state
from maskx.core.image_classifier import ImageClassifier, choose_labels, multi_hot
from maskx.core.images import warp_image
from maskx.core.losses import multi_label_loss

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ClassListModel",
    "Sample",
    "SampleClassifier",
    "SampleModel",
    "lacking_weights",
    "required",
    "take_classifier_backbone",
]

Sample = dict[str, Any]


class SampleModel(nn.Module):
    """Turns samples into normalised images.

    Args:
        size: side S in pixels of the squares of :meth:`preprocess`; None where a model has
            no use for them.
        pixel_mean: by channel, in [0, 255] and in the order of the images.
        pixel_std: by channel.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(
                f"size (INPUT.MASKX.SIZE) is {size}. Allowed: a side in pixels, at least 1."
            )
        self.size = size
        # Not in the weights: they are constants.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        """Where the model is; inputs are moved there."""
        return self.pixel_mean.device

    def normalise(self, sample: Sample) -> Tensor:
        """Return the image of a sample as (3, H, W) float, less the mean, over the deviation."""
        return self._normalise(sample["image"])

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.to(self.device) - self.pixel_mean) / self.pixel_std

    def preprocess(self, samples: Sequence[Sample]) -> Tensor:
        """Make a batch of images of any sizes.

        Args:
            samples: each with ``image`` (3, H, W) in [0, 255].

        Returns:
            (N, 3, S, S), warped and normalised.
        """
        size = self.size
        if not samples:
            return self.pixel_mean.new_zeros(0, len(self.pixel_mean), size, size)
        # Warped first: what is computed follows the square, not the photograph.
        images = [
            warp_image(s["image"].to(self.device, self.pixel_mean.dtype), size) for s in samples
        ]
        return self._normalise(torch.stack(images))

    def training_images(self, samples: Sequence[Sample]) -> Tensor:
        """Make a batch of the images of training samples, which are of one size.

        Args:
            samples: at least one, each with ``image`` (3, H, W) in [0, 255] and perhaps
                ``sem_seg`` (H, W).

        Returns:
            (N, 3, H, W), normalised.

        Raises:
            ValueError: the sizes differ.
        """
        sizes = {
            tuple(s[key].shape[-2:]) for s in samples for key in ("image", "sem_seg") if key in s
        }
        if len(sizes) > 1:
            raise ValueError(
                "The images and label maps of a training batch have different sizes: "
                f"{', '.join(map(str, sorted(sizes)))}. Use a mapper that warps images and label "
                "maps to one size."
            )
        return self._normalise(torch.stack([sample["image"] for sample in samples]))


class ClassListModel(SampleModel):
    """A :class:`SampleModel` whose checkpoints say its classes, and are refused by others.

    One without class names, such as that of a predictor, takes those of the checkpoint. A
    checkpoint that says nothing is taken as it is.

    Args:
        size: see :class:`SampleModel`.
        class_names: by class index; none by default.
        **pixel_stats: ``pixel_mean`` and ``pixel_std`` of :class:`SampleModel`.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        class_names: Sequence[str] = (),
        **pixel_stats: Sequence[float],
    ) -> None:
        super().__init__(size, **pixel_stats)
        self.class_names = tuple(class_names)

    def get_extra_state(self) -> Tensor:
        """Return what checkpoints hold beside weights."""
        return pack_state({"class_names": self.class_names}, version=1)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a checkpoint is of these classes."""
        found = unpack_state(state, version=1, what=type(self).__name__)["class_names"]
        remedy = "Set DATASETS.TRAIN, or the class list, as the model was trained, or train anew."
        self.class_names = same_class_names(found, self.class_names, remedy)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Without it, torch would call the extra state missing.
        state_dict.setdefault(f"{prefix}{EXTRA_STATE}", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)


class SampleClassifier(ClassListModel):
    """A classifier of image labels that takes samples.

    Args:
        classifier: maps normalised images to logits of K classes.
        size: side in pixels of the squares that images are warped to.
        **options: of :class:`ClassListModel`.
    """

    def __init__(
        self, classifier: ImageClassifier, *, size: int = 328, **options: Sequence[Any]
    ) -> None:
        super().__init__(size, **options)
        self.classifier = classifier
        self.num_classes = classifier.num_classes

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute the loss in training, labels in evaluation.

        Args:
            samples: each with ``image`` (3, H, W) in [0, 255] and, in training, ``image_labels``,
                the class indices that are present; all others are absent.

        Returns:
            In training ``{"loss_labels": scalar}``. Otherwise per sample

            - ``image_labels_prob``: (K,) probabilities;
            - ``image_labels``: (L,) class indices, those chosen by
              :func:`maskx.core.image_classifier.choose_labels`;
            - ``activation_maps``: (L, h, w), of the chosen labels, in the order of
              ``image_labels``: what each position of the feature map adds to the logit.

        Raises:
            ValueError: in training, a sample has no labels, or labels that are no class index.
        """
        if not self.training:
            return self._inference(samples) if samples else []
        labels = [required(s, "image_labels", "Give class indices.") for s in samples]
        targets = multi_hot(labels, self.num_classes, self.device)
        return {"loss_labels": multi_label_loss(self.classifier(self.preprocess(samples)), targets)}

    def _inference(self, samples: list[Sample]) -> list[dict[str, Tensor]]:
        classifier = self.classifier
        features = classifier.backbone(self.preprocess(samples))[classifier.in_feature]
        probs = classifier.classifier(features.mean(dim=(2, 3))).sigmoid()
        results = []
        for prob, feature, chosen in zip(probs, features, choose_labels(probs), strict=True):
            labels = chosen.nonzero()[:, 0]
            maps = classifier.activation_maps(feature[None], labels)[0]
            results.append(
                {"image_labels_prob": prob, "image_labels": labels, "activation_maps": maps}
            )
        return results


def required(sample: Mapping[str, Any], key: str, remedy: str) -> Any:
    """Return what a training sample must have.

    Raises:
        ValueError: it does not have it.
    """
    if key not in sample:
        raise ValueError(
            f"The training sample of image {sample.get('image_id', 'without id')!r} has no '{key}'."
            f" {remedy}"
        )
    return sample[key]


def lacking_weights(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Names of the weights of a module that a checkpoint lacks or holds in another shape.

    Args:
        state: of a checkpoint.
    """
    lacking = []
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):  # frozen batch norm has none
            continue
        found = state.get(prefix + name)
        if found is None or found.shape != value.shape:
            lacking.append(prefix + name)
    return lacking


def take_classifier_backbone(
    backbone: nn.Module, state: dict[str, Any], prefix: str = "", own: str = "network.backbone."
) -> None:
    """Turn the weights of a :class:`SampleClassifier` into those of the backbone it gives.

    Nothing is done to other weights.

    Args:
        backbone: of the network that starts from it.
        state: of a checkpoint; changed in place.
        prefix: of all its names.
        own: what names of the backbone's weights begin with in the network.

    Raises:
        ValueError: it is another backbone.
    """
    start = f"{prefix}classifier."
    if f"{start}classifier.weight" not in state:
        return
    lacking = lacking_weights(backbone, state, f"{start}backbone.")
    if lacking:
        raise ValueError(
            f"The image classifier that the segmentation network is to start from lacks "
            f"{len(lacking)} of the weights of its backbone {type(backbone).__name__}, or holds "
            f"them in another shape, such as {lacking[0]}. Choose the same backbone for both "
            "(MODEL.BACKBONE.NAME, MODEL.MASKX.BACKBONE), or start the segmentation network from "
            "other weights: MODEL.WEIGHTS, or MODEL.MASKX.BACKBONE.PRETRAINED True."
        )
    state.pop(prefix + EXTRA_STATE, None)  # of the classifier, whose classes may be others
    for name in [name for name in state if name.startswith(start)]:
        value = state.pop(name)
        if name.startswith(f"{start}backbone."):
            state[prefix + own + name.removeprefix(f"{start}backbone.")] = value
