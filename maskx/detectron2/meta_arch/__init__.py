"""Meta-architectures of maskx."""

from maskx.detectron2.meta_arch.rcnn import MaskXRCNN

__all__ = ["MaskXRCNN"]
