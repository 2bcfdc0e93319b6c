"""Detectors of Mask^X R-CNN in Detectron2: meta-architectures, region proposals, RoI heads."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    StandardROIHeads,
    detector_postprocess,
)
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from torch import Tensor, nn

from maskx.core.global_mean import global_mean
from maskx.core.images import resized_image, scale_boxes
from maskx.data.grabcut import grabcut_masks
from maskx.data.masks import PastedMasks
from maskx.systems.maskx_rcnn.detectron2.heads import MaskXTextOutputLayers
from maskx.systems.maskx_rcnn.mask_head import MaskXHead
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
from maskx.systems.maskx_rcnn.weight_transfer import (
    DETECTOR_INPUTS,
    DetectorWeights,
    WeightTransfer,
    class_agnostic_box_message,
    detector_weights,
)

_NO_TAGS = torch.zeros(0, dtype=torch.int64)


@META_ARCH_REGISTRY.register()
class MaskXRCNN(GeneralizedRCNN):
    """Detectron2's ``GeneralizedRCNN``, whose masks are pasted one at a time, when asked for.

    ``pred_masks`` of its results are :class:`maskx.data.masks.PastedMasks`. Samples may have
    ``given_boxes``, see :func:`maskx.systems.maskx_rcnn.samples.given_boxes`.

    Args:
        freeze_detector: train nothing but ``roi_heads.mask_head``: the second stage of stage-wise
            training (section 2.2 of the paper). The rest stays in evaluation mode, its losses are
            not computed, and proposals are made as at inference.
        ema_teacher: trains the mask branch on masks of objects without one that a moving average of
            this model makes; for RoI heads with a :class:`MaskXMaskHead`.
        **kwargs: arguments of ``GeneralizedRCNN``; ``roi_heads`` must have the same
            ``freeze_detector``.
    """

    @configurable
    def __init__(
        self,
        *,
        freeze_detector: bool = False,
        ema_teacher: EMATeacher | None = None,
        **kwargs: Any,
    ) -> None:
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
                    "mask branch that trains on a frozen detector. Set MODEL.ROI_HEADS.NAME "
                    "MaskXROIHeads (freeze_detector=True), or MODEL.MASKX.FREEZE_DETECTOR False."
                )
            self.requires_grad_(False)
            self.roi_heads.mask_head.requires_grad_(True)
            self.train()  # a new module is in training mode, with all that is in it
        if ema_teacher is not None:
            if not isinstance(self.roi_heads, MaskXROIHeadsMixin):
                raise ValueError(
                    f"{type(self.roi_heads).__name__} have no mask branch for an EMA teacher. Set "
                    "MODEL.ROI_HEADS.NAME MaskXROIHeads, or MODEL.MASKX.EMA_TEACHER.WEIGHT 0."
                )
            self.roi_heads.learn_from(ema_teacher, self.backbone)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        return super().from_config(cfg) | {
            "freeze_detector": cfg.MODEL.MASKX.FREEZE_DETECTOR,
            "ema_teacher": _ema_teacher_from_config(cfg),
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute losses, or detect; see ``GeneralizedRCNN``. Samples may have ``tags``."""
        if self.training and isinstance(self.roi_heads, MaskXROIHeadsMixin):
            self.roi_heads.tags = [
                sample.get("tags", _NO_TAGS).to(self.device) for sample in batched_inputs
            ]
        return super().forward(batched_inputs)

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """Detect, or segment given boxes; see ``GeneralizedRCNN.inference``."""
        given = given_boxes(batched_inputs) if detected_instances is None else None
        if given is not None:
            detected_instances = [
                Instances(
                    sample["image"].shape[-2:],
                    pred_boxes=Boxes(boxes),
                    pred_classes=classes,
                    scores=torch.ones(len(boxes)),
                )
                for sample, (boxes, classes) in zip(batched_inputs, given, strict=True)
            ]
        found = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return found
        return [
            {"instances": _in_pixels_of_the_file(sample, instances, keep_all=given is not None)}
            for sample, instances in zip(batched_inputs, found, strict=True)
        ]

    def train(self, mode: bool = True) -> nn.Module:
        """Set training mode; a frozen detector stays in evaluation mode."""
        super().train(mode and not self.freeze_detector)
        if self.freeze_detector:
            # Flags, not train(): their other modules are those of the detector.
            self.training = self.roi_heads.training = mode
            self.roi_heads.mask_head.train(mode)
        return self


def _in_pixels_of_the_file(
    sample: dict[str, Any], instances: Instances, *, keep_all: bool
) -> Instances:
    """Do what ``detector_postprocess`` does, without pasting all masks."""
    sides = zip(("height", "width"), instances.image_size, strict=True)
    size = tuple(sample.get(key, side) for key, side in sides)
    fields = dict(instances.get_fields())
    masks = fields.pop("pred_masks", None)
    if masks is not None:
        fields["mask_prob"] = masks[:, 0]
    if keep_all:
        boxes = scale_boxes(instances.pred_boxes.tensor, instances.image_size, size)
        found = Instances(size, **fields | {"pred_boxes": Boxes(boxes)})
    else:
        found = detector_postprocess(Instances(instances.image_size, **fields), *size)
    if masks is not None:
        found.pred_masks = PastedMasks(found.mask_prob, found.pred_boxes.tensor, size)
        found.remove("mask_prob")
    return found


def check_architecture(cfg: CfgNode) -> None:
    """Refuse a meta-architecture that would not do what is asked of the whole model."""
    name, maskx = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASKX
    if issubclass(META_ARCH_REGISTRY.get(name), MaskXRCNN):
        return
    for key, is_on, does in (
        ("FREEZE_DETECTOR", maskx.FREEZE_DETECTOR, "would train the detector all the same"),
        ("EMA_TEACHER.WEIGHT", maskx.EMA_TEACHER.WEIGHT, "makes no average of the model"),
        ("TAG_LOSS_WEIGHT", maskx.TAG_LOSS_WEIGHT, "gives no tags to the RoI heads"),
    ):
        if is_on:
            raise ValueError(
                f"MODEL.MASKX.{key} is {is_on}, but MODEL.META_ARCHITECTURE {name} {does}. Set "
                "MODEL.META_ARCHITECTURE MaskXRCNN."
            )


@META_ARCH_REGISTRY.register()
class MaskXGrabCutRCNN(GeneralizedRCNN):
    """The baseline "Faster R-CNN tested w/ GrabCut" of the paper: its masks are GrabCut's.

    Training it is training Faster R-CNN, and weights of any Faster R-CNN load.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration, which must have no mask head."""
        if cfg.MODEL.MASK_ON:
            raise ValueError(
                "MODEL.MASK_ON is True, but the masks of MaskXGrabCutRCNN are made by GrabCut. Set "
                "MODEL.MASK_ON False and MODEL.ROI_HEADS.NAME StandardROIHeads."
            )
        return super().from_config(cfg)

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """Detect, then cut out each box; ``pred_masks`` are (R, height, width) bool."""
        outputs = super().inference(batched_inputs, detected_instances, do_postprocess)
        if do_postprocess:
            for sample, output in zip(batched_inputs, outputs, strict=True):
                instances = output["instances"]
                image = resized_image(sample["image"], *instances.image_size)
                boxes = instances.pred_boxes.tensor
                # All processes of a machine cut at the same time.
                workers = max(1, (os.cpu_count() or 1) // comm.get_local_size())
                masks = grabcut_masks(image, boxes.tolist(), workers=workers)
                instances.pred_masks = torch.from_numpy(masks).to(boxes.device)
        return outputs


def predicts_masks(cfg: CfgNode) -> bool:
    """Whether the model of a configuration predicts masks: by a mask head, or by GrabCut."""
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return cfg.MODEL.MASK_ON or issubclass(architecture, MaskXGrabCutRCNN)


def has_complete_boxes(targets: Instances) -> bool:
    """Whether an image is annotated with the boxes of all classes of the class list.

    Where it is not, as on COCO images in a model of 3,000 classes, an object without a box is no
    background, so the image must not train the detector; its masks train the mask branch.
    """
    return not targets.has("gt_boxes_complete")


@PROPOSAL_GENERATOR_REGISTRY.register()
class MaskXRPN(RPN):
    """Detectron2's RPN, whose losses leave images with incomplete boxes out.

    Parameters and proposals are those of ``RPN``.
    """

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Propose regions; see :class:`RPN`.

        The losses are means over the images with complete boxes, zero with graph without any.
        """
        proposals, losses = super().forward(images, features, gt_instances)
        if losses:
            # The base class divides by the number of all images.
            num_complete = sum(map(has_complete_boxes, gt_instances))
            losses = {
                name: global_mean(loss * len(gt_instances), num_complete)
                for name, loss in losses.items()
            }
        return proposals, losses

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label anchors; see :class:`RPN`. Those of incomplete images are ignored (-1)."""
        complete = [has_complete_boxes(x) for x in gt_instances]
        sampled = super().label_and_sample_anchors(
            anchors, [x for x, keep in zip(gt_instances, complete, strict=True) if keep]
        )
        per_image = zip(*sampled, strict=True)
        all_anchors = torch.cat([x.tensor for x in anchors])
        ignored = all_anchors.new_full((len(all_anchors),), -1, dtype=torch.int8)
        nothing = ignored, torch.zeros_like(all_anchors)
        pairs = [next(per_image) if keep else nothing for keep in complete]
        labels, boxes = zip(*pairs, strict=True)
        return list(labels), list(boxes)


class MaskXROIHeadsMixin:
    """Gives the mask branch of Mask^X R-CNN to RoI heads that derive from ``StandardROIHeads``.

    Put it before the class that brings the box branch::

        @ROI_HEADS_REGISTRY.register()
        class MyMaskXROIHeads(MaskXROIHeadsMixin, MyROIHeads):
            pass

    The other class must take explicit arguments (``@configurable``); its own mask branch stays off.
    Here only RoIs that have a mask enter the branch in training. Images with incomplete boxes (see
    :func:`has_complete_boxes`) train the mask branch and no other.

    Args:
        mask_head: the mask head; see :class:`MaskHeadProtocol`.
        mask_pooler: pools (R, C, P, P) features; None for a mask head that takes feature maps.
        gt_boxes_only: train the mask branch on the ground-truth boxes instead of the sampled
            proposals.
        freeze_detector: compute the mask loss only; see :class:`MaskXRCNN`. The mask branch then
            trains on proposals, also with ``train_on_pred_boxes``.
        box_loss: trains the mask branch on objects without a mask too, by their boxes and the
            colours of the image; for a :class:`MaskXMaskHead`.
        max_box_rois: RoIs without a mask that it, or an EMA teacher, trains on, per image.
        tag_loss_weight: of the loss of images with tags alone, see
            :mod:`maskx.systems.maskx_rcnn.weak_losses`.
        **kwargs: arguments of the other class.

    Attributes:
        tags: in training, class indices of what is somewhere in each image of the batch.
    """

    @configurable
    def __init__(
        self,
        *,
        mask_in_features: list[str],
        mask_head: nn.Module,
        mask_pooler: ROIPooler | None = None,
        gt_boxes_only: bool = False,
        freeze_detector: bool = False,
        box_loss: BoxMaskLoss | None = None,
        max_box_rois: int = MAX_BOX_ROIS,
        tag_loss_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_max_box_rois(max_box_rois)
        check_tag_loss_weight(tag_loss_weight, freeze_detector=freeze_detector)
        self.tag_loss_weight = tag_loss_weight
        self.tags: list[Tensor] = []
        if "detector" not in inspect.signature(mask_head.forward).parameters:
            raise ValueError(
                f"The mask head {type(mask_head).__name__} takes no weights of the box predictor. "
                "Set MODEL.ROI_MASK_HEAD.NAME MaskXMaskHead or MaskXPointRendMaskHead, or see "
                "maskx.detectron2.MaskHeadProtocol for what a head of your own must do."
            )
        self.mask_in_features = mask_in_features
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head
        self.gt_boxes_only = gt_boxes_only
        self.freeze_detector = freeze_detector
        self.box_loss, self.max_box_rois = box_loss, max_box_rois
        self.ema_teacher: EMATeacher | None = None
        if box_loss is not None:
            self._check_can_learn_from_boxes("BOX_LOSS")
        self._sampled: list[Instances] = []
        self._check_transfer()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        _check_config(cfg, cascade=issubclass(cls, CascadeROIHeads))
        ret = super().from_config(cfg, input_shape)
        if cfg.MODEL.MASKX.TEXT_CLASSIFIER.VECTORS:
            ret |= _text_predictors(cfg, ret)
        ret["gt_boxes_only"] = cfg.MODEL.MASKX.GT_BOXES_ONLY
        ret["freeze_detector"] = cfg.MODEL.MASKX.FREEZE_DETECTOR
        ret["box_loss"] = _box_loss_from_config(cfg)
        ret["max_box_rois"] = cfg.MODEL.MASKX.MAX_BOX_ROIS
        ret["tag_loss_weight"] = cfg.MODEL.MASKX.TAG_LOSS_WEIGHT
        return ret

    def learn_from(self, teacher: EMATeacher, backbone: nn.Module) -> None:
        """Train on masks that an average of this model makes of objects without one.

        Args:
            teacher: gets told what to follow.
            backbone: of the model.
        """
        self._check_can_learn_from_boxes("EMA_TEACHER")
        learned = {"backbone": backbone, "box_predictor": self._last_box_predictor()}
        teacher.follow(mask_head=self.mask_head, **({} if self.freeze_detector else learned))
        self.ema_teacher = teacher

    @property
    def learns_from_boxes(self) -> bool:
        """Whether objects without a mask train the mask branch."""
        return self.box_loss is not None or self.ema_teacher is not None

    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Sample as the other class does, and keep the sample for the mask branch.

        Of images with incomplete boxes nothing is left to train the box branch.
        """
        self._sampled = super().label_and_sample_proposals(proposals, targets)
        return [
            x if has_complete_boxes(target) else x[:0]
            for x, target in zip(self._sampled, targets, strict=True)
        ]

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
        **kwargs: Any,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Run the box branch, then the mask branch.

        Arguments and results are those of :meth:`StandardROIHeads.forward`. Where there are masks,
        targets have ``gt_masks`` and ``gt_has_mask`` (bool); a mask counts where it is true.
        """
        if not self.training:
            # The base class calls forward_with_given_boxes, which adds the masks.
            return super().forward(images, features, proposals, targets, **kwargs)
        _check_targets(targets)
        if self.freeze_detector:
            if not self.learns_from_boxes:
                # Objects without a mask would only take places in the sample.
                targets = [
                    x[x.gt_has_mask.bool()] if x.has("gt_has_mask") else x[:0] for x in targets
                ]
            instances, losses = self.label_and_sample_proposals(proposals, targets), {}
        else:
            instances, losses = super().forward(images, features, proposals, targets, **kwargs)
            if self.tag_loss_weight:
                losses["loss_tags"] = self._tag_loss(features, proposals)
        # The other class need not sample: images with tags only, for example, have no boxes.
        sampled, self._sampled = self._sampled or proposals, []
        if self.gt_boxes_only:
            sampled = [
                Instances(x.image_size, **x.get_fields(), proposal_boxes=x.gt_boxes)
                for x in targets
            ]
        losses.update(self._mask_losses(images, features, sampled))
        return instances, losses

    def _tag_loss(self, features: dict[str, Tensor], proposals: list[Instances]) -> Tensor:
        tags = self.tags or [_NO_TAGS] * len(proposals)
        boxes = largest_boxes([x.proposal_boxes.tensor for x in proposals], tags)
        columns = [own for own, chosen in zip(tags, boxes, strict=True) if len(chosen)]
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, [Boxes(x) for x in boxes])
        losses = []
        for head, predictor in zip(*map(_stages, (self.box_head, self.box_predictor)), strict=True):
            class_logits = predictor(head(pooled))[0]
            is_sigmoid = getattr(predictor, "use_sigmoid_ce", False)
            logits = class_logits[:, :-1] if is_sigmoid else class_logits
            losses.append(tag_loss(logits, columns, is_sigmoid=is_sigmoid))
        return self.tag_loss_weight * sum(losses) / len(losses)

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Predict what belongs to given boxes; see :meth:`StandardROIHeads`."""
        instances = super().forward_with_given_boxes(features, instances)
        return self._run_mask_head(features, instances, [x.pred_boxes for x in instances])

    def detector_weights(self) -> DetectorWeights:
        """Describe the classes to the weight transfer, by the live box predictor.

        By its own ``detector_weights()``, if it has one, as :class:`MaskXTextOutputLayers` does;
        else by the foreground rows of its ``cls_score`` and ``bbox_pred``, None without them. Of a
        cascade, by the last stage.
        """
        return _detector_weights(self._last_box_predictor())

    def _last_box_predictor(self) -> nn.Module:
        predictor = self.box_predictor
        return predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor

    def _check_transfer(self) -> None:
        """Refuse a weight transfer that does not fit the box predictor before the first step."""
        for module in self.mask_head.modules():
            if isinstance(module, WeightTransfer) and module.inputs in DETECTOR_INPUTS:
                _check_rows(
                    module, self.detector_weights(), self.num_classes, self._last_box_predictor()
                )

    def _mask_losses(
        self, images: ImageList, features: dict[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        # RoIs without a mask are left out before pooling, so that they cost nothing.
        rois = [self._select(x, with_masks=True) for x in proposals]
        losses = self._run_mask_head(features, rois, [x.proposal_boxes for x in rois])
        if self.learns_from_boxes:
            rois = [self._select(x, with_masks=False)[: self.max_box_rois] for x in proposals]
            losses = losses | self._box_mask_losses(images.tensor, features, rois)
        return losses

    def _box_mask_losses(
        self, images: Tensor, features: dict[str, Tensor], rois: list[Instances]
    ) -> dict[str, Tensor]:
        boxes = [x.gt_boxes if len(x) else x.proposal_boxes for x in rois]
        class_indices = torch.cat([x.gt_classes for x in rois])
        own_boxes = torch.cat([x.tensor for x in boxes])
        roi_boxes, losses = [x.proposal_boxes for x in rois], {}
        mask_logits = self._mask_logits(features, roi_boxes, class_indices)
        if self.box_loss is not None:
            losses["loss_mask_box"] = self.box_loss(
                mask_logits, [x.tensor for x in roi_boxes], own_boxes, images
            )
        if self.ema_teacher is not None:
            with torch.no_grad():
                teacher = self.ema_teacher.updated()
                if "backbone" in teacher:
                    features = teacher["backbone"](images)
                teacher_logits = self._mask_logits(features, boxes, class_indices, teacher)
            losses["loss_mask_ema"] = self.ema_teacher(
                mask_logits, teacher_logits, torch.cat([x.tensor for x in roi_boxes]), own_boxes
            )
        return losses

    def _mask_logits(
        self,
        features: dict[str, Tensor],
        boxes: list[Boxes],
        class_indices: Tensor,
        others: Mapping[str, nn.Module] | None = None,
    ) -> Tensor:
        """Predict (R, M, M), by ``others`` in the place of parts of this model."""
        own = {"mask_head": self.mask_head, "box_predictor": self._last_box_predictor()}
        parts = {**own, **(others or {})}
        pooled = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        # Not the forward of the host's head, which computes losses of masks.
        return MaskXHead.forward(
            parts["mask_head"], pooled, class_indices, _detector_weights(parts["box_predictor"])
        )

    def _check_can_learn_from_boxes(self, key: str) -> None:
        if not isinstance(self.mask_head, MaskXHead):
            raise ValueError(
                f"The mask head {type(self.mask_head).__name__} learns from masks alone. Set "
                f"MODEL.MASKX.{key}.WEIGHT 0, or MODEL.ROI_MASK_HEAD.NAME MaskXMaskHead."
            )

    def _run_mask_head(
        self, features: dict[str, Tensor], instances: list[Instances], boxes: list[Boxes]
    ) -> dict[str, Tensor] | list[Instances]:
        features = {name: features[name] for name in self.mask_in_features}
        if self.mask_pooler is not None:
            features = self.mask_pooler(list(features.values()), boxes)
        return self.mask_head(features, instances, detector=self.detector_weights())

    def _select(self, proposals: Instances, *, with_masks: bool) -> Instances:
        """Select the foreground proposals that have a mask, or those that have none."""
        if not proposals.has("gt_has_mask"):
            # Sampled in an image without annotations, which have no gt_* but gt_classes, or not
            # sampled at all. None is foreground.
            none = proposals[:0]
            if not none.has("gt_classes"):
                none.gt_classes = none.proposal_boxes.tensor.new_empty(0, dtype=torch.long)
            return none
        classes = proposals.gt_classes
        foreground = (classes >= 0) & (classes != self.num_classes)
        return proposals[foreground & (proposals.gt_has_mask.bool() == with_masks)]


@ROI_HEADS_REGISTRY.register()
class MaskXROIHeads(MaskXROIHeadsMixin, StandardROIHeads):
    """Detectron2's RoI heads with the mask branch of Mask^X R-CNN."""


@ROI_HEADS_REGISTRY.register()
class MaskXCascadeROIHeads(MaskXROIHeadsMixin, CascadeROIHeads):
    """Cascade R-CNN's RoI heads with the mask branch of Mask^X R-CNN.

    Its box regression is class-agnostic, so weights transfer from ``cls`` (or fixed vectors).
    """


def _stages(module: nn.Module) -> list[nn.Module]:
    """The modules of a cascade's stages; of other heads the module alone."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _detector_weights(predictor: nn.Module) -> DetectorWeights:
    if hasattr(predictor, "detector_weights"):
        return predictor.detector_weights()
    cls_weight, box_weight = (
        getattr(getattr(predictor, layer, None), "weight", None)
        for layer in ("cls_score", "bbox_pred")
    )
    if cls_weight is None:
        return DetectorWeights(None, None)
    # Background is the last row in Detectron2.
    return detector_weights(cls_weight, box_weight, background_row=-1)


def _check_targets(targets: list[Instances] | None) -> None:
    if targets is None:
        raise ValueError(
            "The training batch has no instances. Build the training loader with "
            "maskx.detectron2.MaskXDatasetMapper(cfg, is_train=True)."
        )
    for image, instances in enumerate(targets):
        if instances.has("gt_masks") and not instances.has("gt_has_mask"):
            raise ValueError(
                f"Image {image} of the batch has gt_masks but no gt_has_mask: masks that are to be "
                "withheld, or do not exist, would train the model. Build the training loader with "
                "maskx.detectron2.MaskXDatasetMapper, or set gt_has_mask, a bool per instance."
            )


def _check_rows(
    transfer: WeightTransfer, detector: DetectorWeights, num_classes: int, predictor: nn.Module
) -> None:
    name, cls = type(predictor).__name__, detector.cls
    if cls is None:
        raise ValueError(
            f"The box predictor {name} has no cls_score.weight. Give it a method "
            "detector_weights() that returns a DetectorWeights with one row per foreground class, "
            "and set MODEL.MASKX.TRANSFER.DETECTOR_CHANNELS to the length of a row."
        )
    if len(cls) != num_classes:
        raise ValueError(
            f"The box predictor {name} gives the weights of {len(cls)} classes, but there are "
            f"{num_classes} (MODEL.ROI_HEADS.NUM_CLASSES)."
        )
    first = torch.zeros(1, dtype=torch.long, device=cls.device)
    found = transfer.class_inputs(first, detector).shape[1]
    expected = transfer.layers[0].in_features
    if found != expected:
        raise ValueError(
            f"The weight transfer from '{transfer.inputs}' expects {expected} numbers per class, "
            f"but the box predictor {name} gives {found}: its classifier rows have {cls.shape[1]}. "
            f"Set MODEL.MASKX.TRANSFER.DETECTOR_CHANNELS {cls.shape[1]} (detector_channels without "
            "a configuration)."
        )


def _box_loss_from_config(cfg: CfgNode) -> BoxMaskLoss | None:
    options = cfg.MODEL.MASKX.BOX_LOSS
    if not options.WEIGHT:
        return None
    return BoxMaskLoss(
        weight=options.WEIGHT,
        warm_up=options.WARM_UP,
        dilation=options.DILATION,
        min_similarity=options.MIN_SIMILARITY,
        pixel_mean=[value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        pixel_std=[value / 255 for value in cfg.MODEL.PIXEL_STD],
        is_bgr=cfg.INPUT.FORMAT == "BGR",
    )


def _ema_teacher_from_config(cfg: CfgNode) -> EMATeacher | None:
    options = cfg.MODEL.MASKX.EMA_TEACHER
    if not options.WEIGHT:
        return None
    return EMATeacher(
        weight=options.WEIGHT,
        decay=options.DECAY,
        min_quality=options.MIN_QUALITY,
        warm_up=options.WARM_UP,
    )


def _text_predictors(cfg: CfgNode, built: dict[str, Any]) -> dict[str, Any]:
    """Make the text classifiers that replace the box predictors of the other class."""
    if "box_predictors" in built:  # a cascade, whose stages code boxes by other weights
        stages = zip(built["box_heads"], built["box_predictors"], strict=True)
        predictors = [
            MaskXTextOutputLayers(
                cfg, head.output_shape, box2box_transform=predictor.box2box_transform
            )
            for head, predictor in stages
        ]
        return {"box_predictors": predictors}
    if "box_predictor" in built:
        return {"box_predictor": MaskXTextOutputLayers(cfg, built["box_head"].output_shape)}
    raise ValueError(
        f"MODEL.MASKX.TEXT_CLASSIFIER.VECTORS is set, but {cfg.MODEL.ROI_HEADS.NAME} do not make "
        "their box predictor in from_config. Set VECTORS '', or make a "
        "maskx.detectron2.MaskXTextOutputLayers there."
    )


def _check_config(cfg: CfgNode, *, cascade: bool) -> None:
    if "MASKX" not in cfg.MODEL:
        raise ValueError(
            "The configuration has no MODEL.MASKX. Call maskx.detectron2.add_maskx_config(cfg) "
            "after get_cfg() and before merging a file, or take maskx.detectron2.get_cfg()."
        )
    if not cfg.MODEL.MASK_ON:
        raise ValueError(
            f"MODEL.MASK_ON is False, but {cfg.MODEL.ROI_HEADS.NAME} have a mask branch. Set "
            "MODEL.MASK_ON True, or MODEL.ROI_HEADS.NAME StandardROIHeads for a detector without "
            "masks."
        )
    check_architecture(cfg)
    maskx, agnostic = cfg.MODEL.MASKX, cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG
    inputs = maskx.TRANSFER.INPUTS
    needs_box = maskx.PREDICTOR == "transfer" and inputs in DETECTOR_INPUTS and inputs != "cls"
    if cascade and (needs_box or not agnostic):
        raise ValueError(
            "Box regression of a cascade is class-agnostic, so no class has box regression "
            "weights. Set MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True (now "
            f"{agnostic}) and MODEL.MASKX.TRANSFER.INPUTS cls (now '{inputs}')."
        )
    if needs_box and agnostic:
        raise ValueError(
            f"{class_agnostic_box_message(inputs)} The keys are "
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG (now True) and MODEL.MASKX.TRANSFER.INPUTS."
        )
