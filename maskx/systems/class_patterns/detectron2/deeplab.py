"""DeepLab-LargeFOV, with inference at several sizes and a dense CRF."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor

from maskx.core.images import resized_image
from maskx.core.losses import pixel_loss
from maskx.core.sample_models import SampleModel, required, take_classifier_backbone
from maskx.data import dense_crf
from maskx.data.label_maps import ignore_label
from maskx.detectron2.image_model import choose_feature, pixel_arguments
from maskx.systems.class_patterns.deeplab import DeepLab, multi_scale_scores, restrict_to_labels

__all__ = ["MaskXDeepLab"]

_MAPPER = "Use MaskXImageMapper with label maps, which warps images and label maps to one size."


@META_ARCH_REGISTRY.register()
class MaskXDeepLab(SampleModel):
    """Semantic segmentation by any backbone and a DeepLab-LargeFOV head.

    A checkpoint of :class:`maskx.detectron2.MaskXImageClassifier` as ``MODEL.WEIGHTS`` gives the
    backbone to start from.

    Args:
        backbone: any of Detectron2, best of output stride 8.
        in_feature: name of the feature map that the head reads; "" for the last.
        num_classes: K, without the background.
        hidden_channels: channels of the hidden layers of the head.
        dilation: of the first layer of the head.
        test_sizes: sides in pixels of the squares to which an image is warped to predict it.
        crf: whether a dense CRF refines what is predicted.
        pixel_mean: by channel, in the order of the images.
        pixel_std: by channel.

    Attributes:
        network: the plain network, :class:`maskx.systems.class_patterns.deeplab.DeepLab`.

    Raises:
        ImportError: there is no library for the CRF.
        ValueError: there is no such feature map, or a size is not above 0.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_feature: str = "",
        num_classes: int,
        hidden_channels: int = 1024,
        dilation: int = 12,
        test_sizes: Sequence[int] = (328,),
        crf: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        if not test_sizes or not all(isinstance(s, int) and s > 0 for s in test_sizes):
            raise ValueError(
                f"TEST.MASKX.SIZES (test_sizes) is {test_sizes}. Allowed: one or more sides of a "
                "square in pixels, such as (241, 328, 401)."
            )
        if crf:
            dense_crf.check_crf()
        in_feature, in_channels = choose_feature(backbone, in_feature)
        self.test_sizes = tuple(test_sizes)
        self.crf = crf
        self.ignore = ignore_label(num_classes)
        self.network = DeepLab(
            backbone,
            in_feature=in_feature,
            in_channels=in_channels,
            num_classes=num_classes,
            hidden_channels=hidden_channels,
            dilation=dilation,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        return {
            "backbone": build_backbone(cfg),
            "in_feature": cfg.MODEL.MASKX.IN_FEATURE,
            "num_classes": cfg.MODEL.MASKX.NUM_CLASSES,
            **pixel_arguments(cfg),
            "hidden_channels": cfg.MODEL.MASKX.LARGE_FOV.CHANNELS,
            "dilation": cfg.MODEL.MASKX.LARGE_FOV.DILATION,
            "test_sizes": cfg.TEST.MASKX.SIZES,
            "crf": cfg.TEST.MASKX.CRF,
        }

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Take the backbone of a checkpoint of an image classifier."""
        take_classifier_backbone(self.network.backbone, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Segment images.

        Args:
            batched_inputs: samples with ``image`` (3, H, W) from 0 to 255 and, in training,
                ``sem_seg``, the label map (H, W), all of one size; in evaluation see
                :meth:`predict`.

        Returns:
            In training ``{"loss_pixels": scalar}``, zero where no pixel is known. Otherwise per
            sample ``{"sem_seg": (K + 1, height, width)}``, probabilities, background first.

        Raises:
            ValueError: in training, a sample has no label map, or the sizes differ.
        """
        if not self.training:
            return [{"sem_seg": self.predict(sample)} for sample in batched_inputs]
        label_maps = [required(sample, "sem_seg", _MAPPER) for sample in batched_inputs]
        logits = self.network(self.training_images(batched_inputs))
        targets = torch.stack(label_maps).to(self.device)
        return {"loss_pixels": pixel_loss(logits, targets, ignore=self.ignore)}

    def predict(self, sample: dict[str, Any], labels: Sequence[int] | None = None) -> Tensor:
        """Predict the label map of one image, in evaluation mode.

        Args:
            sample: with ``image`` (3, H, W) from 0 to 255, and the size of the output, ``height``
                and ``width``; without them it is that of the image.
            labels: class indices known to be present: all others get probability 0; None if they
                are not known.

        Returns:
            (K + 1, height, width) probabilities, background first.

        Raises:
            ValueError: a label is no class index.
        """
        image = sample["image"]
        size = (sample.get("height", image.shape[1]), sample.get("width", image.shape[2]))
        prob = multi_scale_scores(
            self.network, self.normalise({"image": image}), sizes=self.test_sizes, output_size=size
        )
        if labels is not None:
            prob = restrict_to_labels(prob, labels)
        return self._refine(prob, image, labels) if self.crf else prob

    def _refine(self, prob: Tensor, image: Tensor, labels: Sequence[int] | None) -> Tensor:
        pixels = resized_image(image, *prob.shape[1:])
        if labels is None:
            kept = list(range(len(prob)))
        else:  # the CRF takes time for every label, also for those that were ruled out
            kept = [0, *(index + 1 for index in sorted(set(labels)))]
        refined = dense_crf.refine(pixels, prob[kept].float().cpu().numpy())
        result = torch.zeros_like(prob)
        result[kept] = torch.from_numpy(refined).to(prob)
        return result
