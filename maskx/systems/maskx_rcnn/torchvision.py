"""Mask^X R-CNN on torchvision's detectors: the model of samples, RoI heads, and builders."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign
from tqdm import tqdm

from maskx.core.backbone_choice import build_pyramid
from maskx.core.backbones import PyramidBackbone, SmallFPN
from maskx.core.images import scale_boxes, shrink_image
from maskx.data.images import read_image_sample
from maskx.data.masks import PastedMasks
from maskx.engine.predictor import rgb_sample
from maskx.engine.results import instances_prediction
from maskx.systems.maskx_rcnn.mask_head import MaskXHead, crop_mask_targets, mask_loss
from maskx.systems.maskx_rcnn.samples import given_boxes
from maskx.systems.maskx_rcnn.weak_losses import (
    MAX_BOX_ROIS,
    BoxMaskLoss,
    EMATeacher,
    check_max_box_rois,
    check_tag_loss_weight,
    largest_boxes,
    tag_loss,
)
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights, detector_weights

logger = logging.getLogger(__name__)

_LIGHT_CHANNELS = 64  # of the pyramid of a light detector, and of its mask head


class SampleDetector(nn.Module):
    """Drives a torchvision detector with samples, as Detectron2 drives its models.

    Args:
        detector: a detector of torchvision, whose label 0 is the background.
    """

    def __init__(self, detector: GeneralizedRCNN) -> None:
        super().__init__()
        self.detector = detector

    @property
    def sizes(self) -> tuple[int, int]:
        """The most that the sides of an image, the shorter and the longer, are resized to."""
        transform = self.detector.transform
        return max(transform.min_size), transform.max_size

    def shrink(self, image: Tensor) -> Tensor:
        """Make a (3, H, W) image as small as the detector would, if it is larger."""
        return shrink_image(image, self.sizes)

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """Make the sample of an (H, W, 3) uint8 RGB image, as small as the detector takes it."""
        return rgb_sample(image, self.shrink)

    def forward(self, samples: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Compute losses in training, detections in evaluation.

        Args:
            samples: each with ``image`` (3, H, W) uint8 RGB and, in training, ``instances`` as
                made by :class:`maskx.systems.maskx_rcnn.samples.InstanceMapper`, and perhaps
                ``tags``; in evaluation
                with ``height`` and ``width`` of the result, by default those of the image, and
                perhaps ``given_boxes``, see :func:`maskx.systems.maskx_rcnn.samples.given_boxes`.

        Returns:
            A dictionary of scalar losses, or per sample ``{"instances": {...}}`` with
            ``pred_boxes`` (R, 4) XYXY pixels, ``scores`` (R,), ``pred_classes`` (R,) class
            indices and ``pred_masks``, R masks of (height, width) in a
            :class:`maskx.data.masks.PastedMasks`. Given boxes have the score 1.
        """
        device = next(self.parameters()).device
        # An image is shrunk before it becomes float: a photograph would take gigabytes.
        images = [sample["image"] for sample in samples]
        if not self.training:  # a training sample is as small as its mapper made it
            images = [self.shrink(image) for image in images]
        images = [image.to(device).float() / 255 for image in images]
        if not self.training:
            return self._detect(samples, images)
        return self.detector(images, [_target(sample, device) for sample in samples])

    def _detect(
        self, samples: Sequence[dict[str, Any]], images: list[Tensor]
    ) -> list[dict[str, Any]]:
        # As the detector's own forward, but for the end, which pastes all masks.
        batch, _ = self.detector.transform(images)
        features = _by_name(self.detector.backbone(batch.tensors))
        heads, given = self.detector.roi_heads, given_boxes(samples)
        if given is None:
            proposals, _ = self.detector.rpn(batch, features)
            detections, _ = heads(features, proposals, batch.image_sizes)
        else:
            boxes = [
                scale_boxes(boxes, sample["image"].shape[-2:], size).to(images[0].device)
                for sample, (boxes, _), size in zip(samples, given, batch.image_sizes, strict=True)
            ]
            labels = [classes.to(images[0].device) + 1 for _, classes in given]
            detections = heads.with_masks(features, boxes, labels, batch.image_sizes)
        results = []
        for sample, detection, size in zip(samples, detections, batch.image_sizes, strict=True):
            height, width = sample["image"].shape[-2:]
            of_file = sample.get("height", height), sample.get("width", width)
            boxes = scale_boxes(detection["boxes"], size, of_file)
            instances = {
                "pred_boxes": boxes,
                "scores": detection["scores"],
                "pred_classes": detection["labels"] - 1,
            }
            if "masks" in detection:
                instances["pred_masks"] = PastedMasks(detection["masks"][:, 0], boxes, of_file)
            results.append({"instances": instances})
        return results


@torch.inference_mode()
def detect(
    model: SampleDetector,
    records: Sequence[dict[str, Any]],
    category_ids: Sequence[int],
    *,
    batch_size: int = 8,
    description: str = "evaluation",
) -> list[dict[str, Any]]:
    """Run a model over records, in evaluation mode.

    Args:
        category_ids: id in the file by class index.

    Returns:
        Detections in COCO's results format.
    """
    model.eval()
    results = []
    with tqdm(total=len(records), desc=description, unit="img") as progress:
        for start in range(0, len(records), batch_size):
            samples = []
            for record in records[start : start + batch_size]:
                # One photograph at a time is in memory as large as it is.
                samples.append(read_image_sample(record, model.shrink))
            for sample, output in zip(samples, model(samples), strict=True):
                prediction = instances_prediction(output, [str(name) for name in category_ids])
                results += prediction.to_coco(sample["image_id"], category_ids)
            progress.update(len(samples))
    return results


def _target(sample: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    instances = sample["instances"]
    target = {
        "boxes": instances["gt_boxes"].to(device),
        "labels": instances["gt_classes"].to(device) + 1,
        "masks": instances["gt_masks"].to(device, torch.uint8),
        "has_masks": instances["gt_has_mask"].to(device),
        "mask_weights": instances["gt_mask_weight"].to(device),
    }
    if "gt_boxes_complete" in instances:
        target["boxes_complete"] = instances["gt_boxes_complete"].to(device)
    if "tags" in sample:
        target["tags"] = sample["tags"].to(device) + 1
    return target


def _is_complete(target: dict[str, Tensor]) -> bool:
    """Whether all objects of an image have a box, so that the rest of it is background."""
    return "boxes_complete" not in target


class MaskXRPN(RegionProposalNetwork):
    """Torchvision's RPN, whose losses leave images with incomplete boxes out.

    They are means over the anchors of the others, zero with graph without any.

    Args:
        rpn: of a torchvision detector, whose layers are taken over.
    """

    def __init__(self, rpn: RegionProposalNetwork) -> None:
        super().__init__(
            rpn.anchor_generator,
            rpn.head,
            rpn.proposal_matcher.high_threshold,
            rpn.proposal_matcher.low_threshold,
            rpn.fg_bg_sampler.batch_size_per_image,
            rpn.fg_bg_sampler.positive_fraction,
            rpn._pre_nms_top_n,
            rpn._post_nms_top_n,
            rpn.nms_thresh,
            rpn.score_thresh,
        )
        self._learns = True  # whether an image of the batch has complete boxes

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label anchors; those of incomplete images are ignored (-1)."""
        self._learns = any(map(_is_complete, targets))
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        pairs = zip(labels, targets, strict=True)
        return [x if _is_complete(t) else torch.full_like(x, -1) for x, t in pairs], boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of objectness and of boxes; see the class."""
        if not self._learns:
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)


class BoxRoIHeads(RoIHeads):
    """Torchvision's RoI heads, whose box branch learns nothing from images with incomplete boxes.

    But for their ``tags``, class labels in [1, K] of what is somewhere in the image.

    Args:
        roi_heads: of a torchvision detector, whose box branch is taken over.
        tag_loss_weight: of the loss of tags, see :mod:`maskx.systems.maskx_rcnn.weak_losses`.
    """

    def __init__(self, roi_heads: RoIHeads, *, tag_loss_weight: float = 0.0) -> None:
        check_tag_loss_weight(tag_loss_weight)
        super().__init__(
            roi_heads.box_roi_pool,
            roi_heads.box_head,
            roi_heads.box_predictor,
            roi_heads.proposal_matcher.high_threshold,
            roi_heads.proposal_matcher.low_threshold,
            roi_heads.fg_bg_sampler.batch_size_per_image,
            roi_heads.fg_bg_sampler.positive_fraction,
            roi_heads.box_coder.weights,
            roi_heads.score_thresh,
            roi_heads.nms_thresh,
            roi_heads.detections_per_img,
        )
        self.tag_loss_weight = tag_loss_weight
        self._training_samples: tuple[list[Tensor], ...] | None = None

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Sample as torchvision does, and keep the sample for a mask branch."""
        samples = super().select_training_samples(proposals, targets)
        self._training_samples = samples[:3]
        complete = [_is_complete(target) for target in targets]
        return tuple(
            [x if keep else x[:0] for x, keep in zip(part, complete, strict=True)]
            for part in samples
        )

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Run the box branch; its losses are zero with graph where no image is complete."""
        if not self.training or targets is None:
            return super().forward(features, proposals, image_shapes, targets)
        if any(map(_is_complete, targets)):
            _, losses = super().forward(features, proposals, image_shapes, targets)
        else:
            self.select_training_samples(proposals, targets)
            branch = (*self.box_head.parameters(), *self.box_predictor.parameters())
            zero = sum(parameter.sum() for parameter in branch) * 0
            losses = {"loss_classifier": zero, "loss_box_reg": zero}
        if self.tag_loss_weight:
            losses["loss_tags"] = self._tag_loss(features, proposals, image_shapes, targets)
        return [], losses

    def _tag_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        tags = [target.get("tags", target["labels"][:0]) for target in targets]
        boxes = largest_boxes(proposals, tags)
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        class_logits, _ = self.box_predictor(self.box_head(pooled))
        columns = [own for own, chosen in zip(tags, boxes, strict=True) if len(chosen)]
        return self.tag_loss_weight * tag_loss(class_logits, columns)


class MaskXRoIHeads(BoxRoIHeads):
    """Torchvision's RoI heads with the mask branch of Mask^X R-CNN.

    The K-channel mask branch of torchvision stays off: here only RoIs that have a mask enter the
    branch in training, and only the logits of the class that a RoI needs are computed.

    Args:
        mask_roi_pool: pools (R, C, P, P) features for the mask branch.
        gt_boxes_only: train the mask branch on the ground-truth boxes instead of the sampled
            proposals (found to help unseen categories by Deep-MAC, Birodkar et al., ICCV 2021).
        box_loss: trains the mask branch on objects without a mask, by their boxes and the colours
            of the image; it needs :attr:`images`.
        ema_teacher: trains it on masks of these objects that an average of the model makes; it
            needs :attr:`images` too, and must have been told what to follow.
        max_box_rois: RoIs without a mask that the two train on, per image.

    Attributes:
        images: in training, the normalised batch (N, 3, H, W) that the features are of.
    """

    def __init__(
        self,
        roi_heads: RoIHeads,
        *,
        mask_roi_pool: MultiScaleRoIAlign,
        mask_head: MaskXHead,
        gt_boxes_only: bool = False,
        freeze_detector: bool = False,
        box_loss: BoxMaskLoss | None = None,
        ema_teacher: EMATeacher | None = None,
        max_box_rois: int = MAX_BOX_ROIS,
        tag_loss_weight: float = 0.0,
    ) -> None:
        super().__init__(roi_heads, tag_loss_weight=tag_loss_weight)
        check_tag_loss_weight(tag_loss_weight, freeze_detector=freeze_detector)
        check_max_box_rois(max_box_rois)
        # Without a mask_predictor has_mask() is false, so the base class runs no mask branch.
        self.mask_roi_pool = mask_roi_pool
        self.mask_head = mask_head
        self.gt_boxes_only = gt_boxes_only
        self.freeze_detector = freeze_detector
        self.box_loss = box_loss
        self.ema_teacher = ema_teacher
        self.max_box_rois = max_box_rois
        self.images: Tensor | None = None

    @property
    def learns_from_boxes(self) -> bool:
        """Whether objects without a mask train the mask branch."""
        return self.box_loss is not None or self.ema_teacher is not None

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Run the box branch, then the mask branch.

        Args:
            features: as of the base class, like the next two.
            proposals: per image.
            image_shapes: likewise.
            targets: in training, per image ``boxes`` (N, 4), ``labels`` (N,) in [1, K] and, where
                there are masks, ``masks`` (N, H, W) and ``has_masks`` (N,) bool. A row of
                ``masks`` counts where ``has_masks`` is true, by ``mask_weights`` (N,) if they are
                there. One with ``boxes_complete`` (N,), all
                False, trains the mask branch alone, and the classifier by ``tags`` (L,) if it has
                them.

        Returns:
            Detections with ``boxes``, ``labels``, ``scores`` and, as probabilities, ``masks``
            (R, 1, M, M) at inference; losses, with ``loss_mask``, in training.
        """
        if not self.training:
            found, losses = super().forward(features, proposals, image_shapes, targets)
            boxes, labels = ([d[key] for d in found] for key in ("boxes", "labels"))
            pasted = self.with_masks(features, boxes, labels, image_shapes)
            return [d | {"masks": x["masks"]} for d, x in zip(found, pasted, strict=True)], losses
        num_classes = len(self.box_predictor.cls_score.weight) - 1
        for image, target in enumerate(targets or []):  # the base class refuses None
            _check_target(image, target, num_classes)
        if self.freeze_detector:
            if not self.learns_from_boxes:
                # Objects without a mask would only take places in the sample.
                targets = [_only_masked(target) for target in targets]
            self.select_training_samples(proposals, targets)
            detections, losses = [], {}
        else:
            detections, losses = super().forward(features, proposals, image_shapes, targets)
        samples = list(zip(*(self._training_samples or ()), strict=True))
        self._training_samples = None
        if self.gt_boxes_only:
            samples = [
                (t["boxes"], torch.arange(len(t["boxes"]), device=t["boxes"].device), t["labels"])
                for t in targets
            ]
        losses["loss_mask"] = self._mask_loss(features, image_shapes, targets, samples)
        if self.learns_from_boxes:
            losses |= self._box_mask_losses(features, image_shapes, targets, samples)
        return detections, losses

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
        samples: list[tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        boxes, class_indices, mask_targets, weights = [], [], [], []
        for target, (proposals, matched, labels) in zip(targets, samples, strict=True):
            masked = _masked(target, matched, labels)
            boxes.append(proposals[masked])
            class_indices.append(labels[masked] - 1)
            if "masks" in target:
                size = self.mask_head.mask_size
                rows = matched[masked]
                mask_targets.append(crop_mask_targets(target["masks"], boxes[-1], rows, size))
                given = target.get("mask_weights", torch.ones_like(target["boxes"][:, 0]))
                weights.append(given[rows])
        mask_logits = self._mask_logits(features, boxes, class_indices, image_shapes)
        if not mask_targets:
            return mask_loss(mask_logits, mask_logits)
        return mask_loss(mask_logits, torch.cat(mask_targets), torch.cat(weights))

    def _box_mask_losses(
        self,
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
        samples: list[tuple[Tensor, Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        if self.images is None:
            raise ValueError(
                "Objects without a mask teach by the images, which the RoI heads were not given. "
                "Make the detector by add_mask_branch, or set roi_heads.images before each step."
            )
        images, self.images = self.images, None
        rois, class_indices, boxes = [], [], []
        for target, (proposals, matched, labels) in zip(targets, samples, strict=True):
            others = (labels > 0) & ~_masked(target, matched, labels)
            rows = others.nonzero()[: self.max_box_rois, 0]
            rois.append(proposals[rows])
            class_indices.append(labels[rows] - 1)
            boxes.append(target["boxes"][matched[rows]])
        mask_logits, losses = self._mask_logits(features, rois, class_indices, image_shapes), {}
        if self.box_loss is not None:
            losses["loss_mask_box"] = self.box_loss(mask_logits, rois, torch.cat(boxes), images)
        if self.ema_teacher is not None:
            with torch.no_grad():
                teacher = self.ema_teacher.updated()
                if "backbone" in teacher:
                    features = _by_name(teacher["backbone"](images))
                teacher_logits = self._mask_logits(
                    features, boxes, class_indices, image_shapes, teacher
                )
            losses["loss_mask_ema"] = self.ema_teacher(
                mask_logits, teacher_logits, torch.cat(rois), torch.cat(boxes)
            )
        return losses

    def with_masks(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        labels: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Predict the masks of given boxes, in the form of :meth:`forward` with the score 1."""
        class_indices = [x - 1 for x in labels]
        mask_prob = self._mask_logits(features, boxes, class_indices, image_shapes).sigmoid()
        per_image = mask_prob[:, None].split([len(b) for b in boxes])
        return [
            {"boxes": b, "labels": x, "scores": torch.ones_like(b[:, 0]), "masks": masks}
            for b, x, masks in zip(boxes, labels, per_image, strict=True)
        ]

    def _mask_logits(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        class_indices: list[Tensor],
        image_shapes: list[tuple[int, int]],
        others: Mapping[str, nn.Module] | None = None,
    ) -> Tensor:
        """Predict (R, M, M), by ``others`` in the place of parts of this model."""
        parts = {"mask_head": self.mask_head, "box_predictor": self.box_predictor, **(others or {})}
        roi_features = self.mask_roi_pool(features, boxes, image_shapes)
        rows = _detector_weights(parts["box_predictor"])
        return parts["mask_head"](roi_features, torch.cat(class_indices), rows)

    def detector_weights(self) -> DetectorWeights:
        """Foreground rows of the live box predictor; background is row 0 in torchvision."""
        return _detector_weights(self.box_predictor)


def _keep_images(heads: MaskXRoIHeads, transform: nn.Module, _: object, outputs: tuple) -> None:
    """After a detector's transform, give its batch of images to the RoI heads."""
    if heads.training:
        heads.images = outputs[0].tensors


def _by_name(features: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """Name feature maps as torchvision does where a backbone gives one alone."""
    return {"0": features} if isinstance(features, Tensor) else features


def _detector_weights(predictor: nn.Module) -> DetectorWeights:
    return detector_weights(
        predictor.cls_score.weight, predictor.bbox_pred.weight, background_row=0
    )


def _masked(target: dict[str, Tensor], matched: Tensor, labels: Tensor) -> Tensor:
    """Which samples are of an object that has a mask."""
    has_masks = _has_masks(target)
    # Without any row all samples are background, and match none.
    return (labels > 0) & has_masks[matched] if len(has_masks) else labels > 0


def _only_masked(target: dict[str, Tensor]) -> dict[str, Tensor]:
    has_masks = _has_masks(target)
    keys = target.keys() & {
        "boxes",
        "labels",
        "masks",
        "has_masks",
        "mask_weights",
        "boxes_complete",
    }
    return {key: target[key][has_masks] for key in keys}


def _has_masks(target: dict[str, Tensor]) -> Tensor:
    if "has_masks" not in target:
        return torch.zeros_like(target["labels"], dtype=torch.bool)
    return target["has_masks"].bool()


def _check_target(image: int, target: dict[str, Tensor], num_classes: int) -> None:
    labels, where = target["labels"], f"Target {image} of the batch has"
    for key in {"masks", "has_masks", "mask_weights"} & set(target):
        if len(target[key]) != len(target["boxes"]):
            raise ValueError(
                f"{where} {len(target['boxes'])} boxes but {len(target[key])} rows of '{key}'. "
                "There must be one row per box, any with has_masks false where there is no mask."
            )
    if "masks" in target and "has_masks" not in target:
        raise ValueError(
            f"{where} masks but no has_masks: masks that are to be withheld, or do not exist, "
            "would train the model. Set has_masks, a bool per box."
        )
    if "masks" not in target and _has_masks(target).any():
        raise ValueError(
            f"{where} has_masks {target['has_masks'].tolist()} but no masks. Add masks (N, H, W), "
            "or set has_masks false."
        )
    if ((labels < 1) | (labels > num_classes)).any():
        raise ValueError(
            f"{where} the labels {labels.tolist()}. Allowed: 1 to {num_classes}; 0 is the "
            "background."
        )


def add_mask_branch(
    detector: FasterRCNN,
    *,
    gt_boxes_only: bool = False,
    freeze_detector: bool = False,
    pool_size: int = 14,
    box_loss: Mapping[str, Any] | None = None,
    ema_teacher: Mapping[str, Any] | None = None,
    max_box_rois: int = MAX_BOX_ROIS,
    tag_loss_weight: float = 0.0,
    **mask_head: Any,
) -> FasterRCNN:
    """Give a torchvision Faster R-CNN the mask branch of Mask^X R-CNN, in place.

    Works with any backbone and with pretrained detectors, e.g.
    ``add_mask_branch(fasterrcnn_resnet50_fpn(weights="DEFAULT"))``: the box branch stays as it is.

    Args:
        detector: with torchvision's box predictor. A new one, such as after a change of the
            number of classes, needs :func:`init_box_predictor` first.
        gt_boxes_only: see :class:`MaskXRoIHeads`.
        freeze_detector: train nothing but the mask branch (the second stage of stage-wise
            training, section 2.2). The rest stays in evaluation mode, without losses.
        pool_size: P, resolution of the pooled features; masks have twice this resolution.
        box_loss: arguments of :class:`maskx.systems.maskx_rcnn.weak_losses.BoxMaskLoss`, to train
            the mask branch on objects without a mask too; None trains on masks alone.
        ema_teacher: arguments of :class:`maskx.systems.maskx_rcnn.weak_losses.EMATeacher`, to train
            it on masks of these objects that a moving average of the detector makes. Parts that are
            replaced afterwards are not averaged.
        max_box_rois: see :class:`MaskXRoIHeads`.
        tag_loss_weight: above 0: images with ``tags`` alone train the classifier of the detector,
            see :class:`BoxRoIHeads`.
        **mask_head: arguments of :class:`maskx.systems.maskx_rcnn.mask_head.MaskXHead`.

    Returns:
        The same detector. In training it takes targets with ``masks`` and ``has_masks``, see
        :meth:`MaskXRoIHeads.forward`; at inference it returns ``masks`` as Mask R-CNN does.
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
            f"{type(predictor).__name__} has none. Use torchvision's FastRCNNPredictor."
        )
    _warn_of_default_weights(predictor.cls_score)
    detector.rpn = MaskXRPN(detector.rpn)
    num_rows, detector_channels = predictor.cls_score.weight.shape
    box_mask_loss = None
    if box_loss is not None:
        transform = detector.transform
        pixels = {"pixel_mean": transform.image_mean, "pixel_std": transform.image_std}
        box_mask_loss = BoxMaskLoss(**box_loss, **pixels)
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
        box_loss=box_mask_loss,
        ema_teacher=None if ema_teacher is None else EMATeacher(**ema_teacher),
        max_box_rois=max_box_rois,
        tag_loss_weight=tag_loss_weight,
    )
    heads = detector.roi_heads
    if heads.ema_teacher is not None:
        learned = {"backbone": detector.backbone, "box_predictor": heads.box_predictor}
        heads.ema_teacher.follow(mask_head=heads.mask_head, **({} if freeze_detector else learned))
    if heads.learns_from_boxes:
        detector.transform.register_forward_hook(functools.partial(_keep_images, heads))
    if freeze_detector:
        for part in (detector.backbone, detector.rpn, box.box_head, box.box_predictor):
            part.requires_grad_(False).eval()
            # Also when the model around it is put into training mode.
            part.train = functools.partial(_stay_in_evaluation_mode, part)
    return detector


def faster_rcnn(
    num_classes: int,
    *,
    backbone: str = "small",
    pretrained: bool = False,
    frozen_norm: bool | None = None,
    frozen: bool = False,
    light: bool | None = None,
    min_size: int | tuple[int, ...] | None = None,
    max_size: int | None = None,
    **detector: Any,
) -> FasterRCNN:
    """A Faster R-CNN with a feature pyramid, for a mask branch or as it is.

    Args:
        backbone: ``small``, which learns small scenes from scratch in minutes on a CPU, or a model
            of timm, see :func:`maskx.core.backbone_choice.build_backbone`.
        pretrained: start from ImageNet weights; then the layers up to the first feature map stay
            as they are.
        frozen_norm: fix the batch norms of the backbone; None fixes those of pretrained weights.
        frozen: keep all of the backbone as it is.
        light: few channels and few samples in pyramid and heads, for a CPU; None: for ``small``
            alone.
        min_size: shorter side of the resized image in pixels; several are drawn from. None: 128
            for ``small``, else 800.
        max_size: longest side of the resized image in pixels. None: 1333 for 800 pixels, else
            twice the shorter side.
    """
    small = backbone == "small"
    light = small if light is None else light
    features = build_pyramid(
        backbone,
        out_channels=_LIGHT_CHANNELS if light else None,
        pretrained=pretrained,
        frozen_norm=bool(pretrained) if frozen_norm is None else frozen_norm,
        frozen_stages="all" if frozen else 2 if pretrained else 0,
    )
    min_size = min_size or (128 if small else 800)
    largest = min_size if isinstance(min_size, int) else max(min_size)
    pixels = [[0.5] * 3, [0.25] * 3]
    if not small:
        pixels = [[v / 255 for v in values] for values in (features.pixel_mean, features.pixel_std)]
    arguments = {
        "min_size": min_size,
        "max_size": max_size or (1333 if largest == 800 else 2 * largest),
        "image_mean": pixels[0],
        "image_std": pixels[1],
        **_anchors_and_pooling(features, light=light),
        **(_light_heads(features, num_classes) if light else {}),
        **detector,
    }
    has_predictor = arguments.get("box_predictor") is not None
    model = FasterRCNN(features, None if has_predictor else num_classes, **arguments)
    model.rpn, model.roi_heads = MaskXRPN(model.rpn), BoxRoIHeads(model.roi_heads)
    init_box_predictor(model)
    return model


def maskx_rcnn(
    num_classes: int,
    *,
    backbone: str = "small",
    detector: Mapping[str, Any] | None = None,
    **mask_branch: Any,
) -> FasterRCNN:
    """Mask^X R-CNN with a feature pyramid.

    Args:
        num_classes: *with* background.
        backbone: see :func:`faster_rcnn`.
        detector: further arguments of it. Where the detector is light, so is the mask head, unless
            ``mask_branch`` says otherwise.
    """
    model = faster_rcnn(num_classes, backbone=backbone, **(detector or {}))
    if model.backbone.out_channels == _LIGHT_CHANNELS:
        # The other trunks take their convolutions in pairs.
        num_convs = 3 if mask_branch.get("trunk", "conv") == "conv" else 2
        mask_branch = {"channels": _LIGHT_CHANNELS, "num_convs": num_convs} | mask_branch
    return add_mask_branch(model, **mask_branch)


def _anchors_and_pooling(features: PyramidBackbone | SmallFPN, *, light: bool) -> dict[str, Any]:
    # One sample per bin: the backward pass of RoIAlign, which runs on one core, takes 36 % of a
    # step of a light detector with the usual four.
    sampling = {"output_size": 7, "sampling_ratio": 1 if light else 2}
    if isinstance(features, PyramidBackbone):
        # Anchors of 8 strides on each level, as in Faster R-CNN on a feature pyramid.
        anchors = tuple((8 * shape.stride,) for shape in features.feature_shapes.values())
        pooled = [name for name in features.feature_shapes if name != "pool"]
        pool = MultiScaleRoIAlign(pooled, **sampling)
    else:
        anchors = tuple((4 * stride, 6 * stride) for stride in features.strides.values())
        # Objects of under 56 pixels are pooled from stride 4, as those of under 112 pixels are at
        # the image size of the paper.
        pool = MultiScaleRoIAlign(list(features.strides), canonical_scale=112, **sampling)
    ratios = ((0.5, 1.0, 2.0),) * len(anchors)
    return {"rpn_anchor_generator": AnchorGenerator(anchors, ratios), "box_roi_pool": pool}


def _light_heads(features: PyramidBackbone | SmallFPN, num_classes: int) -> dict[str, Any]:
    return {
        "rpn_pre_nms_top_n_train": 300,
        "rpn_pre_nms_top_n_test": 300,
        "rpn_post_nms_top_n_train": 200,
        "rpn_post_nms_top_n_test": 100,
        "rpn_batch_size_per_image": 64,
        "box_head": TwoMLPHead(features.out_channels * 7**2, 256),
        "box_predictor": FastRCNNPredictor(256, num_classes),
        "box_batch_size_per_image": 64,
        "box_detections_per_img": 50,
    }


def init_box_predictor(detector: FasterRCNN) -> None:
    """Initialise the box predictor as Faster R-CNN does, with small weights; for new detectors.

    Torchvision leaves PyTorch's default, whose random rows stay larger than what training adds to
    them. Weight transfer reads these rows: with the default it learns each class by its noise, and
    the masks of categories without masks come out empty. The builders here do it themselves.
    """
    predictor = detector.roi_heads.box_predictor
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def _warn_of_default_weights(layer: nn.Linear) -> None:
    """Say where a box predictor is as PyTorch makes it: uniform, in a range that follows D."""
    weight = layer.weight.detach()
    bound = weight.shape[1] ** -0.5
    if weight.numel() > 99 and 0.95 * bound < weight.abs().max() <= bound * 1.001:
        logger.warning(
            "The box predictor has PyTorch's initial weights, from which weight transfer learns "
            "little: the masks of categories without masks come out empty. Call "
            "maskx.torchvision.init_box_predictor(detector) before training."
        )


def _stay_in_evaluation_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
