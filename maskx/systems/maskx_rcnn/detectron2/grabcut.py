"""A detector whose masks are made by GrabCut in the boxes it finds."""

import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Instances
from detectron2.utils import comm

from maskx.core.images import resized_image
from maskx.data.grabcut import grabcut_masks

__all__ = ["MaskXGrabCutRCNN", "predicts_masks", "resized_image"]


@META_ARCH_REGISTRY.register()
class MaskXGrabCutRCNN(GeneralizedRCNN):
    """Detectron2's ``GeneralizedRCNN`` without a mask head; its masks are GrabCut's.

    The baseline "Faster R-CNN tested w/ GrabCut" of the Mask^X R-CNN paper. Training it is
    training Faster R-CNN, and weights of any Faster R-CNN load.

    Args:
        **kwargs: arguments of ``GeneralizedRCNN``.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Raises:
            ValueError: the configuration has a mask head.
        """
        if cfg.MODEL.MASK_ON:
            raise ValueError(
                "MODEL.MASK_ON is True, but the masks of MaskXGrabCutRCNN are made by GrabCut, not "
                "by a mask head. Set MODEL.MASK_ON False and MODEL.ROI_HEADS.NAME "
                "StandardROIHeads, or another MODEL.META_ARCHITECTURE."
            )
        return super().from_config(cfg)

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """Detect, then segment each box on the input image, at the size of the output.

        Args:
            batched_inputs: samples with ``image`` (3, H, W), from 0 to 255, and the output size
                ``height``, ``width``.
            detected_instances: known boxes; see ``GeneralizedRCNN.inference``.
            do_postprocess: False returns the instances of the network, without masks.

        Returns:
            Per sample ``{"instances": Instances}`` in pixels of the output, with ``pred_masks``
            (R, height, width) bool.
        """
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
