"""RoI heads of torchvision with a mask branch that learns from partial supervision."""

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from maskx.systems.maskx_rcnn.mask_head import MaskXHead, crop_mask_targets, mask_loss
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights, detector_weights


class MaskXRoIHeads(RoIHeads):
    """Torchvision's RoI heads with the mask branch of Mask^X R-CNN.

    The box branch is torchvision's own. The K-channel mask branch of the base class stays off:
    here only RoIs that have a mask enter the branch in training, and only the logits of the class
    that a RoI needs are computed.

    Args:
        roi_heads: the RoI heads of a torchvision detector, whose box branch is taken over.
        mask_roi_pool: pools (R, C, P, P) features for the mask branch.
        mask_head: the shared mask head.
        gt_boxes_only: train the mask branch on the ground-truth boxes instead of the sampled
            proposals (found to help unseen categories by Deep-MAC, Birodkar et al., ICCV 2021).
        freeze_detector: compute the mask loss only; the rest is frozen by
            :func:`~maskx.systems.maskx_rcnn.torchvision.models.add_mask_branch`.
    """

    def __init__(
        self,
        roi_heads: RoIHeads,
        *,
        mask_roi_pool: MultiScaleRoIAlign,
        mask_head: MaskXHead,
        gt_boxes_only: bool = False,
        freeze_detector: bool = False,
    ) -> None:
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
        # Without a mask_predictor has_mask() is false, so the base class runs no mask branch.
        self.mask_roi_pool = mask_roi_pool
        self.mask_head = mask_head
        self.gt_boxes_only = gt_boxes_only
        self.freeze_detector = freeze_detector
        self._training_samples: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Sample as torchvision does, and keep the sample for the mask branch."""
        samples = super().select_training_samples(proposals, targets)
        self._training_samples = samples[:3]
        return samples

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Run the box branch, then the mask branch.

        Args:
            features: feature maps by name.
            proposals: per image (R, 4) proposals, XYXY in pixels of the resized image.
            image_shapes: (H, W) of the resized images.
            targets: in training, per image ``boxes`` (N, 4), ``labels`` (N,) in [1, K] and
                optionally ``masks`` (N, H, W) and ``has_masks`` (N,) bool. Rows of ``masks`` count
                where ``has_masks`` is true; without ``has_masks`` all of them count.

        Returns:
            Detections with ``boxes``, ``labels``, ``scores`` and, as probabilities, ``masks``
            (R, 1, M, M) at inference; losses, with ``loss_mask``, in training.

        Raises:
            ValueError: there is not one row of ``masks`` and ``has_masks`` per box.
        """
        if not self.training:
            detections, losses = super().forward(features, proposals, image_shapes, targets)
            self._add_masks(features, image_shapes, detections)
            return detections, losses
        _check_targets(targets or [])  # the base class refuses None
        if self.freeze_detector:
            # Objects without a mask would only take places in the sample.
            targets = [_only_masked(target) for target in targets]
            self.select_training_samples(proposals, targets)
            detections, losses = [], {}
        else:
            detections, losses = super().forward(features, proposals, image_shapes, targets)
        losses["loss_mask"] = self._mask_loss(features, image_shapes, targets)
        return detections, losses

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        boxes, class_indices, mask_targets = [], [], []
        for target, *sample in zip(targets, *self._mask_samples(targets), strict=True):
            proposals, matched, labels = sample
            has_masks = _has_masks(target)
            masked = labels > 0
            if len(has_masks):  # else all samples are background, and match no row
                masked = masked & has_masks[matched]
            boxes.append(proposals[masked])
            class_indices.append(labels[masked] - 1)
            if "masks" in target:
                mask_targets.append(
                    crop_mask_targets(
                        target["masks"], boxes[-1], matched[masked], self.mask_head.mask_size
                    )
                )
        mask_logits = self._mask_logits(features, boxes, class_indices, image_shapes)
        if not mask_targets:
            return mask_loss(mask_logits, mask_logits)
        return mask_loss(mask_logits, torch.cat(mask_targets))

    def _mask_samples(
        self, targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per image: boxes that may train the branch, the target each belongs to, its label."""
        samples, self._training_samples = self._training_samples, None
        if self.gt_boxes_only:
            boxes = [target["boxes"] for target in targets]
            indices = [torch.arange(len(b), device=b.device) for b in boxes]
            return boxes, indices, [target["labels"] for target in targets]
        return samples

    def _add_masks(
        self,
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
        detections: list[dict[str, Tensor]],
    ) -> None:
        boxes = [detection["boxes"] for detection in detections]
        class_indices = [detection["labels"] - 1 for detection in detections]
        mask_prob = self._mask_logits(features, boxes, class_indices, image_shapes).sigmoid()
        per_image = mask_prob[:, None].split([len(b) for b in boxes])
        for detection, masks in zip(detections, per_image, strict=True):
            detection["masks"] = masks

    def _mask_logits(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        class_indices: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        roi_features = self.mask_roi_pool(features, boxes, image_shapes)
        return self.mask_head(roi_features, torch.cat(class_indices), self.detector_weights())

    def detector_weights(self) -> DetectorWeights:
        """Foreground rows of the live box predictor; background is row 0 in torchvision."""
        predictor = self.box_predictor
        return detector_weights(
            predictor.cls_score.weight, predictor.bbox_pred.weight, background_row=0
        )


def _only_masked(target: dict[str, Tensor]) -> dict[str, Tensor]:
    has_masks = _has_masks(target)
    return {key: target[key][has_masks] for key in ("boxes", "labels", "masks") if key in target}


def _has_masks(target: dict[str, Tensor]) -> Tensor:
    labels = target["labels"]
    if "masks" not in target:
        return torch.zeros_like(labels, dtype=torch.bool)
    if "has_masks" not in target:
        return torch.ones_like(labels, dtype=torch.bool)
    return target["has_masks"].bool()


def _check_targets(targets: list[dict[str, Tensor]]) -> None:
    for image, target in enumerate(targets):
        for key in {"masks", "has_masks"} & set(target):
            if len(target[key]) != len(target["boxes"]):
                raise ValueError(
                    f"Target {image} of the batch has {len(target['boxes'])} boxes but "
                    f"{len(target[key])} rows of '{key}'. There must be one row per box; where a "
                    "box has no mask, any row with has_masks false."
                )
