"""Builders of Mask^X R-CNN in torchvision's style."""

import functools
from typing import Any

from torch import nn
from torchvision.models import get_model_weights, list_models
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from maskx.core.backbones import SmallFPN
from maskx.core.checks import check_choice
from maskx.systems.maskx_rcnn.mask_head import MaskXHead
from maskx.systems.maskx_rcnn.torchvision.roi_heads import MaskXRoIHeads


def add_mask_branch(
    detector: FasterRCNN,
    *,
    gt_boxes_only: bool = False,
    freeze_detector: bool = False,
    pool_size: int = 14,
    **mask_head: Any,
) -> FasterRCNN:
    """Give a torchvision Faster R-CNN the mask branch of Mask^X R-CNN, in place.

    Works with any backbone and with pretrained detectors, e.g.
    ``add_mask_branch(fasterrcnn_resnet50_fpn(weights="DEFAULT"))``: the box branch stays as it is,
    and mask weights of every class, seen with masks or not, come from its box predictor.

    Args:
        detector: a Faster R-CNN with torchvision's box predictor.
        gt_boxes_only: see :class:`MaskXRoIHeads`.
        freeze_detector: train nothing but the mask branch (the second stage of stage-wise
            training, section 2.2). The rest needs no gradient and stays in evaluation mode, and
            its losses are not computed.
        pool_size: P, resolution of the pooled features; masks have twice this resolution.
        **mask_head: arguments of :class:`maskx.systems.maskx_rcnn.mask_head.MaskXHead`.

    Returns:
        The same detector. In training it takes targets with ``masks`` and ``has_masks``, see
        :meth:`MaskXRoIHeads.forward`; at inference it returns ``masks`` as Mask R-CNN does.

    Raises:
        ValueError: the detector has no box branch, one with another box predictor, or further
            branches already; or an argument of the mask head is out of range.
    """
    box = getattr(detector, "roi_heads", None)
    if not isinstance(box, RoIHeads) or box.has_mask() or box.has_keypoint():
        raise ValueError(
            f"A mask branch can be added to a Faster R-CNN, got {type(detector).__name__}. Build "
            "the detector without masks or keypoints, e.g. with fasterrcnn_resnet50_fpn."
        )
    predictor = box.box_predictor
    if not (hasattr(predictor, "cls_score") and hasattr(predictor, "bbox_pred")):
        raise ValueError(
            f"A mask branch reads cls_score.weight and bbox_pred.weight of the box predictor, but "
            f"{type(predictor).__name__} has none. Use torchvision's FastRCNNPredictor, or name "
            "the layers of your own so."
        )
    num_rows, detector_channels = predictor.cls_score.weight.shape
    detector.roi_heads = MaskXRoIHeads(
        box,
        mask_roi_pool=MultiScaleRoIAlign(
            featmap_names=box.box_roi_pool.featmap_names,
            output_size=pool_size,
            sampling_ratio=box.box_roi_pool.sampling_ratio,
            canonical_scale=box.box_roi_pool.canonical_scale,
            canonical_level=box.box_roi_pool.canonical_level,
        ),
        mask_head=MaskXHead(
            in_channels=detector.backbone.out_channels,
            num_classes=num_rows - 1,
            pool_size=pool_size,
            detector_channels=detector_channels,
            **mask_head,
        ),
        gt_boxes_only=gt_boxes_only,
        freeze_detector=freeze_detector,
    )
    if freeze_detector:
        for part in (detector.backbone, detector.rpn, box.box_head, box.box_predictor):
            _freeze(part)
    return detector


def maskx_rcnn_resnet_fpn(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    weights_backbone: str | None = None,
    trainable_layers: int = 5,
    min_size: int | tuple[int, ...] = 800,
    max_size: int = 1333,
    detector: dict[str, Any] | None = None,
    **mask_branch: Any,
) -> FasterRCNN:
    """Mask^X R-CNN on a ResNet with feature pyramid.

    Args:
        num_classes: number of classes *with* background, as everywhere in torchvision.
        backbone: name of a torchvision ResNet.
        weights_backbone: name of ImageNet weights of torchvision, e.g. ``DEFAULT`` (a download);
            None starts from random weights, with normalisation layers that can learn.
        trainable_layers: number of backbone stages that learn, from the last; 3 is usual with
            pretrained weights.
        min_size: shorter side of the resized image in pixels; several are drawn from.
        max_size: longest side of the resized image in pixels.
        detector: further arguments of torchvision's ``FasterRCNN``.
        **mask_branch: arguments of :func:`add_mask_branch`.

    Raises:
        ValueError: there is no such ResNet.
    """
    resnets = list_models(include=["resnet*", "resnext*", "wide_resnet*"], exclude=["*quant*"])
    check_choice("ResNet backbone", backbone, tuple(name for name in resnets if "." not in name))
    # Frozen statistics only make sense with pretrained weights: from scratch they would stay
    # at mean 0 and variance 1.
    norm = {} if weights_backbone else {"norm_layer": nn.BatchNorm2d}
    weights = get_model_weights(backbone)[weights_backbone] if weights_backbone else None
    features = resnet_fpn_backbone(
        backbone_name=backbone, weights=weights, trainable_layers=trainable_layers, **norm
    )
    model = FasterRCNN(
        features, num_classes, min_size=min_size, max_size=max_size, **(detector or {})
    )
    _init_box_predictor(model)
    return add_mask_branch(model, **mask_branch)


def maskx_rcnn_small(
    num_classes: int, *, min_size: int | tuple[int, ...] = 128, **mask_branch: Any
) -> FasterRCNN:
    """Mask^X R-CNN that learns small scenes from scratch in minutes on a CPU.

    Args:
        num_classes: number of classes *with* background, as everywhere in torchvision.
        min_size: shorter side of the resized image in pixels; several are drawn from.
        **mask_branch: arguments of :func:`add_mask_branch`.
    """
    model = faster_rcnn_small(num_classes, min_size=min_size)
    # The other trunks take their convolutions in pairs.
    num_convs = 3 if mask_branch.get("trunk", "conv") == "conv" else 2
    return add_mask_branch(model, **({"channels": 64, "num_convs": num_convs} | mask_branch))


def faster_rcnn_small(num_classes: int, *, min_size: int | tuple[int, ...] = 128) -> FasterRCNN:
    """The detector of :func:`maskx_rcnn_small`, without its mask branch."""
    backbone = SmallFPN()
    levels = list(backbone.strides)
    anchors = tuple((4 * stride, 6 * stride) for stride in backbone.strides.values())
    ratios = ((0.5, 1.0, 2.0),) * len(levels)
    largest = min_size if isinstance(min_size, int) else max(min_size)
    # Objects of under 56 pixels are pooled from stride 4, as those of under 112 pixels are at the
    # image size of the paper. One sample per bin: the backward pass of RoIAlign, which runs on one
    # core, takes 36 % of a step with the usual four.
    box_pool = MultiScaleRoIAlign(
        featmap_names=levels, output_size=7, sampling_ratio=1, canonical_scale=112
    )
    model = FasterRCNN(
        backbone,
        min_size=min_size,
        max_size=2 * largest,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        rpn_anchor_generator=AnchorGenerator(anchors, ratios),
        rpn_pre_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=64,
        box_roi_pool=box_pool,
        box_head=TwoMLPHead(backbone.out_channels * 7**2, 256),
        box_predictor=FastRCNNPredictor(256, num_classes),
        box_batch_size_per_image=64,
        box_detections_per_img=50,
    )
    _init_box_predictor(model)
    return model


def _init_box_predictor(detector: FasterRCNN) -> None:
    """Initialise the box predictor as Faster R-CNN does, with small weights.

    Torchvision leaves PyTorch's default, whose random rows stay larger than what training adds to
    them. Weight transfer reads these rows: with the default it learns each class by its noise, and
    the masks of categories without masks come out empty.
    """
    predictor = detector.roi_heads.box_predictor
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def _freeze(module: nn.Module) -> None:
    """Keep a module as it is, also when the model around it is put into training mode."""
    module.requires_grad_(False).eval()
    module.train = functools.partial(_stay_in_evaluation_mode, module)


def _stay_in_evaluation_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
