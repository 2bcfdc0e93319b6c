"""Masks of objects of which only the box is known, from a moving average of the model.

After BoxTeacher (Cheng et al., CVPR 2023): the averaged model predicts the mask in the box that is
known, and where the mask is good, it teaches the model.

Shape legend:
    R: number of RoIs; M: resolution of the masks.
"""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import roi_align

from maskx.core.mask_quality import mask_quality
from maskx.systems.maskx_rcnn.box_loss import box_projections
from maskx.systems.maskx_rcnn.mask_head import mask_loss


class EMATeacher(nn.Module):
    """An exponential moving average of a model, and the loss of what it teaches.

    The average is taken at the beginning of a training step, of the weights that the step before
    left. It is part of a checkpoint, so that a resumed run goes on with the same; of a checkpoint
    in which a part of it is missing or of another shape, it begins anew with the model's weights.

    Args:
        weight: of the loss.
        decay: share of the average that a step keeps.
        min_quality: masks of a lower quality, see :func:`maskx.core.mask_quality.mask_quality`,
            teach nothing.
        warm_up: steps over which the weight of the loss rises linearly.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        decay: float = 0.999,
        min_quality: float = 0.7,
        warm_up: int = 0,
    ) -> None:
        super().__init__()
        for name, value, allowed, is_allowed in (
            ("weight", weight, "0 or more", weight >= 0),
            ("decay", decay, "from 0 to below 1", 0 <= decay < 1),
            ("min_quality", min_quality, "0 to 1", 0 <= min_quality <= 1),
            ("warm_up", warm_up, "0 or more", warm_up >= 0),
        ):
            if not is_allowed:
                raise ValueError(
                    f"{name} of the EMA teacher (MODEL.MASKX.EMA_TEACHER.{name.upper()}) is "
                    f"{value}. Allowed: {allowed}."
                )
        self.weight, self.decay = weight, decay
        self.min_quality, self.warm_up = min_quality, warm_up

    def follow(self, **parts: nn.Module) -> None:
        """Average these parts of the model from now on.

        Args:
            **parts: what makes masks of images and learns, by a name of their own.
        """
        student = nn.ModuleDict(parts)
        self._student = (student,)  # in no module of its own, so that the teacher does not own it
        self.average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self.average.requires_grad_(False)

    def updated(self) -> nn.ModuleDict:
        """Take the weights of the model into the average.

        Returns:
            The averaged parts by name, in evaluation mode.
        """
        self.average.update_parameters(*self._student)
        return self.average.module.eval()

    def forward(
        self, mask_logits: Tensor, teacher_logits: Tensor, rois: Tensor, boxes: Tensor
    ) -> Tensor:
        """Compute the loss of a training step, a scalar.

        Args:
            mask_logits: (R, M, M) of the model, in the RoIs.
            teacher_logits: (R, M, M) of the averaged model, in the boxes of the objects.
            rois: (R, 4) XYXY in pixels.
            boxes: (R, 4) likewise, the ground-truth boxes.

        Returns:
            The mean binary cross-entropy with the teacher's masks that are good enough, weighted by
            their quality; zero with graph without any.
        """
        with torch.no_grad():
            dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
            teacher_prob = teacher_logits.to(dtype).sigmoid()
            quality = mask_quality(teacher_prob, boxes)
            targets = masks_in_rois(teacher_prob, boxes, rois)
            kept = quality >= self.min_quality
        risen = (self.average.n_averaged / max(self.warm_up, 1)).clamp(max=1)
        return self.weight * risen * mask_loss(mask_logits[kept], targets[kept], quality[kept])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if not self.state_dict(prefix=prefix).keys() <= state_dict.keys():
            state_dict[f"{prefix}average.n_averaged"] = torch.zeros_like(self.average.n_averaged)
        super()._load_from_state_dict(state_dict, prefix, *args)


def masks_in_rois(mask_prob: Tensor, boxes: Tensor, rois: Tensor) -> Tensor:
    """Look at masks on the grids of other boxes.

    Args:
        mask_prob: (R, M, M) on the grids of ``boxes``.
        boxes: (R, 4) XYXY.
        rois: (R, 4) XYXY.

    Returns:
        (R, M, M) bool on the grids of ``rois``: whether the probability is at least 0.5 at the
        centre of a cell, between cells by bilinear interpolation; false outside of the boxes.
    """
    size = mask_prob.shape[-1]
    low, cell = boxes[:, :2].repeat(1, 2), (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) / size
    indices = torch.arange(len(rois), dtype=rois.dtype, device=rois.device)
    on_grid = torch.cat([indices[:, None], (rois - low) / cell], dim=1).to(mask_prob)
    found = roi_align(mask_prob[:, None], on_grid, (size, size), 1.0, 1, aligned=True)[:, 0]
    across, down = box_projections(rois, boxes, size)
    return (found >= 0.5) & across[:, None, :] & down[:, :, None]
