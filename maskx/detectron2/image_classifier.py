"""A classifier of image labels with class activation maps."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor

from maskx.core.image_classifier import ImageClassifier, choose_labels, multi_hot
from maskx.core.losses import multi_label_loss
from maskx.detectron2.image_model import ImageModel, choose_feature, required

__all__ = ["MaskXImageClassifier"]


@META_ARCH_REGISTRY.register()
class MaskXImageClassifier(ImageModel):
    """Multi-label image classifier: any backbone, global average pooling and a linear layer.

    Args:
        backbone: any of Detectron2.
        in_feature: name of the feature map that is classified; "" for the last.
        num_classes: K.
        image_size: side S in pixels; images of other sizes are warped to S x S.
        pixel_mean: by channel, in the order of the images.
        pixel_std: by channel.

    Attributes:
        classifier: the plain network, :class:`maskx.core.image_classifier.ImageClassifier`.

    Raises:
        ValueError: there is no such feature map, or a number is below 1.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_feature: str = "",
        num_classes: int,
        image_size: int = 328,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        if image_size < 1:
            raise ValueError(
                f"INPUT.MASKX.SIZE (image_size) is {image_size}. Allowed: a side in pixels."
            )
        in_feature, in_channels = choose_feature(backbone, in_feature)
        self.image_size = image_size
        self.classifier = ImageClassifier(
            backbone, in_feature=in_feature, in_channels=in_channels, num_classes=num_classes
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        return super().from_config(cfg) | {"image_size": cfg.INPUT.MASKX.SIZE}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Classify images.

        Args:
            batched_inputs: samples with ``image`` (3, H, W) from 0 to 255 and, in training,
                ``image_labels``, the class indices that are present; all others are absent.

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
            return self.inference(batched_inputs) if batched_inputs else []
        labels = [
            required(s, "image_labels", "Use MaskXImageMapper, or give class indices.")
            for s in batched_inputs
        ]
        targets = multi_hot(labels, self.classifier.num_classes, self.device)
        logits = self.classifier(self.preprocess(batched_inputs))
        return {"loss_labels": multi_label_loss(logits, targets)}

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        """Return what ``classifier`` takes: (N, 3, S, S), normalised.

        Args:
            batched_inputs: samples with ``image`` (3, H, W) from 0 to 255.
        """
        size = self.image_size
        return torch.stack([self.normalised_square(s["image"], size) for s in batched_inputs])

    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Classify at least one image; see :meth:`forward`."""
        classifier = self.classifier
        features = classifier.backbone(self.preprocess(batched_inputs))[classifier.in_feature]
        probs = classifier.classifier(features.mean(dim=(2, 3))).sigmoid()
        results = []
        for prob, feature, chosen in zip(probs, features, choose_labels(probs), strict=True):
            labels = chosen.nonzero()[:, 0]
            maps = classifier.activation_maps(feature[None], labels)[0]
            results.append(
                {"image_labels_prob": prob, "image_labels": labels, "activation_maps": maps}
            )
        return results
