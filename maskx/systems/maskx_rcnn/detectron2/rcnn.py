"""Meta-architectures and region proposals of Mask^X R-CNN in Detectron2."""

import os
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    GeneralizedRCNN,
    detector_postprocess,
)
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from torch import Tensor, nn

from maskx.core.global_mean import global_mean
from maskx.core.images import resized_image, scale_boxes
from maskx.data.grabcut import grabcut_masks
from maskx.data.masks import PastedMasks
from maskx.systems.maskx_rcnn.samples import given_boxes


@META_ARCH_REGISTRY.register()
class MaskXRCNN(GeneralizedRCNN):
    """Detectron2's ``GeneralizedRCNN``, whose masks are pasted one at a time, when asked for.

    ``pred_masks`` of its results are :class:`maskx.data.masks.PastedMasks`. Samples may have
    ``given_boxes``, see :func:`maskx.systems.maskx_rcnn.samples.given_boxes`.

    Args:
        freeze_detector: train nothing but ``roi_heads.mask_head``: the second stage of stage-wise
            training (section 2.2 of the paper). The rest stays in evaluation mode, its losses are
            not computed, and proposals are made as at inference.
        **kwargs: arguments of ``GeneralizedRCNN``; ``roi_heads`` must have the same
            ``freeze_detector``.
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
                    "mask branch that trains on a frozen detector. Set MODEL.ROI_HEADS.NAME "
                    "MaskXROIHeads (freeze_detector=True), or MODEL.MASKX.FREEZE_DETECTOR False."
                )
            self.requires_grad_(False)
            self.roi_heads.mask_head.requires_grad_(True)
            self.train()  # a new module is in training mode, with all that is in it

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        return super().from_config(cfg) | {"freeze_detector": cfg.MODEL.MASKX.FREEZE_DETECTOR}

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


def check_can_freeze(cfg: CfgNode) -> None:
    """Refuse to freeze the detector of a meta-architecture that would train it all the same."""
    name = cfg.MODEL.META_ARCHITECTURE
    if cfg.MODEL.MASKX.FREEZE_DETECTOR and not issubclass(META_ARCH_REGISTRY.get(name), MaskXRCNN):
        raise ValueError(
            f"MODEL.MASKX.FREEZE_DETECTOR is True, but MODEL.META_ARCHITECTURE {name} would train "
            "the detector all the same. Set MODEL.META_ARCHITECTURE MaskXRCNN."
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
