"""The Detectron2 host: heads in its registries, mapper, evaluator, trainer and configuration.

Importing it registers model components, all named ``MaskX...``, and nothing else; data sets are
registered by :func:`register_all` and :func:`register_coco`.
"""

import importlib.util

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "maskx.detectron2 needs Detectron2. How to install it: "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html . Everything else in "
        "maskx works without it."
    )

from maskx.detectron2.backbones import MaskXSmallResNet, MaskXTimm, MaskXTimmFPN, MaskXVGG16
from maskx.detectron2.config import add_maskx_config, get_cfg
from maskx.detectron2.datasets import (
    register_coco,
    register_from_config,
    register_tag_list,
)
from maskx.detectron2.evaluation import (
    MaskXCOCOEvaluator,
    MaskXImageLabelEvaluator,
    MaskXSemSegEvaluator,
)
from maskx.detectron2.hooks import Detectron2Hooks
from maskx.detectron2.known_datasets import register_all
from maskx.detectron2.model_zoo import get_config_file
from maskx.detectron2.runs import to_instances
from maskx.detectron2.solver import build_lr_scheduler, build_optimizer
from maskx.detectron2.trainer import Trainer, check_num_gpus, evaluate, setup
from maskx.detectron2.whole_images import MaskXImageClassifier
from maskx.systems.class_patterns.detectron2 import MaskXDeepLab
from maskx.systems.concept_mask.detectron2.data import MaskXConceptEvaluator
from maskx.systems.concept_mask.detectron2.model import (
    ConceptPredictor,
    MaskXConceptEmbedding,
    MaskXConceptRefinement,
    MaskXConceptSegmentation,
)
from maskx.systems.larvseg.detectron2 import MaskXLargeVocabularyEvaluator, MaskXLarvSeg
from maskx.systems.maskx_rcnn.detectron2.data import MaskXDatasetMapper
from maskx.systems.maskx_rcnn.detectron2.heads import (
    MaskHeadProtocol,
    MaskXMaskHead,
    MaskXTextOutputLayers,
)
from maskx.systems.maskx_rcnn.detectron2.model import (
    MaskXCascadeROIHeads,
    MaskXGrabCutRCNN,
    MaskXRCNN,
    MaskXROIHeads,
    MaskXROIHeadsMixin,
    MaskXRPN,
)
from maskx.systems.maskx_rcnn.detectron2.point_rend import MaskXPointRendMaskHead, PointLayers
from maskx.systems.maskx_rcnn.weak_losses import BoxMaskLoss, EMATeacher
from maskx.systems.transfernet.detectron2 import (
    MaskXTransferClassifier,
    MaskXTransferLabelEvaluator,
    MaskXTransferNet,
    MaskXTransferSemSegEvaluator,
)

__all__ = [
    "BoxMaskLoss",
    "ConceptPredictor",
    "Detectron2Hooks",
    "EMATeacher",
    "MaskHeadProtocol",
    "MaskXCOCOEvaluator",
    "MaskXCascadeROIHeads",
    "MaskXConceptEmbedding",
    "MaskXConceptEvaluator",
    "MaskXConceptRefinement",
    "MaskXConceptSegmentation",
    "MaskXDatasetMapper",
    "MaskXDeepLab",
    "MaskXGrabCutRCNN",
    "MaskXImageClassifier",
    "MaskXImageLabelEvaluator",
    "MaskXLargeVocabularyEvaluator",
    "MaskXLarvSeg",
    "MaskXMaskHead",
    "MaskXPointRendMaskHead",
    "MaskXRCNN",
    "MaskXROIHeads",
    "MaskXROIHeadsMixin",
    "MaskXRPN",
    "MaskXSemSegEvaluator",
    "MaskXSmallResNet",
    "MaskXTextOutputLayers",
    "MaskXTimm",
    "MaskXTimmFPN",
    "MaskXTransferClassifier",
    "MaskXTransferLabelEvaluator",
    "MaskXTransferNet",
    "MaskXTransferSemSegEvaluator",
    "MaskXVGG16",
    "PointLayers",
    "Trainer",
    "add_maskx_config",
    "build_lr_scheduler",
    "build_optimizer",
    "check_num_gpus",
    "evaluate",
    "get_cfg",
    "get_config_file",
    "register_all",
    "register_coco",
    "register_from_config",
    "register_tag_list",
    "setup",
    "to_instances",
]
