"""How the segmentation network of class patterns is trained by Detectron2's engine."""

from maskx.detectron2.image_hooks import image_hooks
from maskx.detectron2.sem_seg_evaluation import MaskXSemSegEvaluator
from maskx.systems.class_patterns.detectron2.deeplab import MaskXDeepLab

HOOKS = image_hooks("class_patterns", MaskXSemSegEvaluator, learns_label_maps=True)
MaskXDeepLab.maskx_hooks = HOOKS
