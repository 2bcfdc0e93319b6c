"""DeepLab-LargeFOV as a meta-architecture of Detectron2."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

from maskx.detectron2.evaluation import MaskXSemSegEvaluator
from maskx.detectron2.whole_images import (
    feature_arguments,
    image_hooks,
    known_class_names,
    pixel_arguments,
)
from maskx.systems.class_patterns.model import DeepLab, SampleSegmenter


@META_ARCH_REGISTRY.register()
class MaskXDeepLab(SampleSegmenter):
    """:class:`maskx.systems.class_patterns.model.SampleSegmenter` with any backbone of Detectron2.

    Best is a backbone of output stride 8. A checkpoint of
    :class:`maskx.detectron2.MaskXImageClassifier` as ``MODEL.WEIGHTS`` gives the backbone to start
    from.

    Args:
        **kwargs: arguments of ``SampleSegmenter``.
    """

    maskx_hooks = image_hooks("class_patterns", MaskXSemSegEvaluator, learns_label_maps=True)

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        head = {key.lower(): value for key, value in cfg.MODEL.MASKX.LARGE_FOV.items()}
        return {
            "network": DeepLab(**feature_arguments(cfg), **head),
            "class_names": known_class_names(cfg),
            "test_sizes": cfg.TEST.MASKX.SIZES,
            "crf": cfg.TEST.MASKX.CRF,
            **pixel_arguments(cfg),
        }
