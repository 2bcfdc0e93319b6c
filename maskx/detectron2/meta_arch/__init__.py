"""Meta-architectures of maskx."""

from maskx.detectron2.meta_arch.concept_mask import MaskXConceptMask
from maskx.detectron2.meta_arch.deeplab import MaskXDeepLab
from maskx.detectron2.meta_arch.grabcut import MaskXGrabCutRCNN, predicts_masks
from maskx.detectron2.meta_arch.image_classifier import MaskXImageClassifier
from maskx.detectron2.meta_arch.larvseg import MaskXLarvSeg
from maskx.detectron2.meta_arch.rcnn import MaskXRCNN
from maskx.detectron2.meta_arch.transfernet import MaskXTransferClassifier, MaskXTransferNet

__all__ = [
    "MaskXConceptMask",
    "MaskXDeepLab",
    "MaskXGrabCutRCNN",
    "MaskXImageClassifier",
    "MaskXLarvSeg",
    "MaskXRCNN",
    "MaskXTransferClassifier",
    "MaskXTransferNet",
    "predicts_masks",
]
