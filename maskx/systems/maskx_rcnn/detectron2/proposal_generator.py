"""Region proposals that learn from images with complete boxes only."""

import torch
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

__all__ = ["MaskXRPN", "has_complete_boxes"]


def has_complete_boxes(targets: Instances) -> bool:
    """Whether an image is annotated with the boxes of all classes of the class list.

    Where it is not, as on COCO images in a model of 3,000 classes, an object without a box is no
    background, so the image must not train the detector; its masks train the mask branch.

    Args:
        targets: instances of one image. :class:`MaskXDatasetMapper` gives those of an incomplete
            image the field ``gt_boxes_complete``.
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
            scale = len(gt_instances) / max(num_complete, 1)
            losses = {name: loss * scale for name, loss in losses.items()}
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
        nothing = self._nothing_to_learn(anchors)
        pairs = [next(per_image) if keep else nothing for keep in complete]
        labels, boxes = zip(*pairs, strict=True)
        return list(labels), list(boxes)

    @staticmethod
    def _nothing_to_learn(anchors: list[Boxes]) -> tuple[Tensor, Tensor]:
        boxes = torch.cat([x.tensor for x in anchors])
        return boxes.new_full((len(boxes),), -1, dtype=torch.int8), torch.zeros_like(boxes)
