"""Meta-architectures of maskx."""

from maskx.detectron2.meta_arch.grabcut import MaskXGrabCutRCNN, predicts_masks
from maskx.detectron2.meta_arch.rcnn import MaskXRCNN

__all__ = ["MaskXGrabCutRCNN", "MaskXRCNN", "predicts_masks"]
