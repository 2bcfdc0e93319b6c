"""A classifier of image labels with class activation maps."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone

from maskx.core.image_classifier import ImageClassifier
from maskx.core.sample_models import SampleClassifier
from maskx.detectron2.image_model import choose_feature, pixel_arguments

__all__ = ["MaskXImageClassifier"]


@META_ARCH_REGISTRY.register()
class MaskXImageClassifier(SampleClassifier):
    """:class:`maskx.core.sample_models.SampleClassifier` with any backbone of Detectron2.

    Args:
        **kwargs: arguments of ``SampleClassifier``.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        backbone = build_backbone(cfg)
        in_feature, in_channels = choose_feature(backbone, cfg.MODEL.MASKX.IN_FEATURE)
        classifier = ImageClassifier(
            backbone,
            in_feature=in_feature,
            in_channels=in_channels,
            num_classes=cfg.MODEL.MASKX.NUM_CLASSES,
        )
        return {
            "classifier": classifier,
            "size": cfg.INPUT.MASKX.SIZE,
            **pixel_arguments(cfg),
        }
