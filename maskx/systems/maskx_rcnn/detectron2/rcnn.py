"""Generalized R-CNN whose detector can stay frozen while the mask branch learns."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from torch import nn

__all__ = ["MaskXRCNN", "check_can_freeze"]


@META_ARCH_REGISTRY.register()
class MaskXRCNN(GeneralizedRCNN):
    """Detectron2's ``GeneralizedRCNN``, for both stages of stage-wise training.

    "Learning to Segment Every Thing" (Hu et al., CVPR 2018), section 2.2: stage-wise training
    first trains a detector on the boxes of all categories, then only the mask branch.

    Args:
        freeze_detector: train nothing but ``roi_heads.mask_head``. The rest needs no gradient and
            stays in evaluation mode, so that its normalisation statistics do not change; its
            losses are not computed, and proposals are made as at inference.
        **kwargs: arguments of ``GeneralizedRCNN``; ``roi_heads`` must be built with the same
            ``freeze_detector``, so that they skip the box branch where it is frozen, and only
            there.

    Raises:
        ValueError: with ``freeze_detector``, there is no mask branch that could train; or without,
            the RoI heads would not train the box branch.
    """

    @configurable
    def __init__(self, *, freeze_detector: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.freeze_detector = freeze_detector
        heads_freeze = getattr(self.roi_heads, "freeze_detector", False)
        if heads_freeze and not freeze_detector:
            raise ValueError(
                "The RoI heads were built with freeze_detector=True, so nothing would train the "
                "box branch, but the model was not. Give both the same freeze_detector."
            )
        if freeze_detector:
            if not heads_freeze:
                raise ValueError(
                    f"The detector is to be frozen, but {type(self.roi_heads).__name__} have no "
                    "mask branch of maskx that trains on a frozen detector: nothing would be left "
                    "to train. Set MODEL.ROI_HEADS.NAME MaskXROIHeads (freeze_detector=True "
                    "without a configuration), or MODEL.MASKX.FREEZE_DETECTOR False."
                )
            self.requires_grad_(False)
            self.roi_heads.mask_head.requires_grad_(True)
            self.train()  # a new module is in training mode, with all that is in it

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        return super().from_config(cfg) | {"freeze_detector": cfg.MODEL.MASKX.FREEZE_DETECTOR}

    def train(self, mode: bool = True) -> nn.Module:
        """Set training mode; a frozen detector stays in evaluation mode."""
        super().train(mode and not self.freeze_detector)
        if self.freeze_detector:
            # Flags, not train(): their other modules are those of the detector.
            self.training = self.roi_heads.training = mode
            self.roi_heads.mask_head.train(mode)
        return self


def check_can_freeze(cfg: CfgNode) -> None:
    """Refuse to freeze the detector of a meta-architecture that would train it all the same.

    Raises:
        ValueError: ``MODEL.MASKX.FREEZE_DETECTOR`` is set for another meta-architecture.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if cfg.MODEL.MASKX.FREEZE_DETECTOR and not issubclass(META_ARCH_REGISTRY.get(name), MaskXRCNN):
        raise ValueError(
            f"MODEL.MASKX.FREEZE_DETECTOR is True, but MODEL.META_ARCHITECTURE {name} would train "
            "the detector all the same. Set MODEL.META_ARCHITECTURE MaskXRCNN."
        )
