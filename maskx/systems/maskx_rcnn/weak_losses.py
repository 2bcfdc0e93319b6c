"""Losses of what has no mask: of boxes, of an averaged model in these, and of image labels.

- :class:`BoxMaskLoss` (BoxInst, Tian et al., CVPR 2021). A box says where a mask begins and ends
  along each axis, and neighbours of like colour mostly belong to the same object. Both are asked of
  the logits of a RoI, on its own grid, so that the losses work with sampled proposals as well as
  with ground-truth boxes.
- :class:`EMATeacher`, after BoxTeacher (Cheng et al., CVPR 2023). The averaged model predicts the
  mask in the box that is known, and where the mask is good, it teaches the model.
- :func:`tag_loss` (Detic, Zhou et al., ECCV 2022). An object is somewhere, and the largest proposal
  most likely covers it, if with much around it. So the labels of the image are those of this
  proposal ("max-size"), and train the classifier of the detector: no box, no background and no mask
  is learned from them.

Shape legend:
    R: number of RoIs; M: resolution of the masks; N: number of images with labels; K: number of
    foreground classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import roi_align

from maskx.core.global_mean import global_mean
from maskx.core.mask_quality import mask_quality
from maskx.systems.maskx_rcnn.mask_head import mask_loss

# The right, lower left, lower and lower right neighbour: with their mirror images, all eight.
_NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))

MAX_BOX_ROIS = 16  # RoIs of an image that teach by their boxes, unless the user says otherwise


def _check_ranges(what: str, section: str, *settings: tuple[str, float, str, bool]) -> None:
    """Refuse a setting that is out of range: its name, value, what is allowed and if it is."""
    for name, value, allowed, is_allowed in settings:
        if not is_allowed:
            raise ValueError(
                f"{name} of the {what} (MODEL.MASKX.{section}.{name.upper()}) is {value}. Allowed: "
                f"{allowed}."
            )


class BoxMaskLoss(nn.Module):
    """The losses of a training step.

    The pairwise term rises over the first steps: an empty mask has none of it either.

    Args:
        weight: of both terms.
        warm_up: steps over which the weight of the pairwise term rises linearly.
        dilation: see :func:`box_mask_losses`, like the next.
        min_similarity: likewise.
        pixel_mean: subtracted of the images, of each channel in their order, white being 1.
        pixel_std: by which they were divided then.
        is_bgr: whether their channels are BGR, not RGB.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        warm_up: int = 0,
        dilation: int = 1,
        min_similarity: float = 0.3,
        pixel_mean: Sequence[float] = (0, 0, 0),
        pixel_std: Sequence[float] = (1, 1, 1),
        is_bgr: bool = False,
    ) -> None:
        super().__init__()
        _check_ranges(
            "box loss",
            "BOX_LOSS",
            ("weight", weight, "0 or more", weight >= 0),
            ("warm_up", warm_up, "0 or more", warm_up >= 0),
            ("dilation", dilation, "1 or more", dilation >= 1),
            ("min_similarity", min_similarity, "0 or more", min_similarity >= 0),
        )
        self.weight, self.warm_up = weight, warm_up
        self.dilation, self.min_similarity = dilation, min_similarity
        self.pixel_mean, self.pixel_std, self.is_bgr = pixel_mean, pixel_std, is_bgr
        # In checkpoints, so that a resumed run goes on where it was.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self, mask_logits: Tensor, rois: Sequence[Tensor], boxes: Tensor, images: Tensor
    ) -> Tensor:
        """Compute the loss of a training step, a scalar.

        Args:
            mask_logits: (R, M, M), image by image.
            rois: per image (R_i, 4).
            boxes: (R, 4) ground-truth boxes.
            images: (N, 3, H, W), normalised.
        """
        mean, std = (
            images.new_tensor(values)[:, None, None] for values in (self.pixel_mean, self.pixel_std)
        )
        images = images * std + mean
        images = images.flip(1) if self.is_bgr else images
        losses = box_mask_losses(
            mask_logits,
            torch.cat(list(rois)),
            boxes,
            roi_colours(images, list(rois), mask_logits.shape[-1]),
            dilation=self.dilation,
            min_similarity=self.min_similarity,
        )
        self.steps += 1
        risen = (self.steps / max(self.warm_up, 1)).clamp(max=1)
        return self.weight * (losses["projection"] + risen * losses["pairwise"])


def check_max_box_rois(max_box_rois: int) -> None:
    """Refuse that no RoI without a mask may enter the mask branch, where such ones are to teach."""
    if max_box_rois < 1:
        raise ValueError(
            f"max_box_rois (MODEL.MASKX.MAX_BOX_ROIS) is {max_box_rois}. Allowed: 1 or more; to "
            "train on masks alone, switch box loss and EMA teacher off."
        )


def box_mask_losses(
    mask_logits: Tensor,
    rois: Tensor,
    boxes: Tensor,
    colours: Tensor,
    *,
    dilation: int = 2,
    min_similarity: float = 0.3,
) -> dict[str, Tensor]:
    """Compare masks with the boxes of their objects and with the colours of the image.

    Args:
        mask_logits: (R, M, M) logits of the class of each RoI.
        rois: (R, 4) XYXY, the boxes that the logits cover.
        boxes: (R, 4) XYXY, the ground-truth boxes of their objects.
        colours: (R, 3, M, M) CIE Lab, see :func:`roi_colours`.
        dilation: distance of the neighbours that are compared, in cells of the grid.
        min_similarity: neighbours are alike where exp(-distance of their colours / 2) is at least
            this.

    Returns:
        The scalars ``projection``, in [0, 2], and ``pairwise``. Zero, with a graph through
        ``mask_logits``, where there is nothing to compare.
    """
    if mask_logits.dtype != torch.float64:  # half precision has no room for these logarithms
        mask_logits = mask_logits.float()
    across, down = box_projections(rois, boxes, mask_logits.shape[-1])
    return {
        "projection": projection_loss(mask_logits, across, down),
        "pairwise": pairwise_loss(
            mask_logits,
            across[:, None, :] & down[:, :, None],
            colours,
            dilation=dilation,
            min_similarity=min_similarity,
        ),
    }


def box_projections(rois: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Project boxes onto the axes of the grids of RoIs.

    Returns:
        For the columns and for the rows, (R, M) bool: whether the centre of the cell is in the box.
    """
    centres = (torch.arange(size, device=rois.device, dtype=rois.dtype) + 0.5) / size
    sides = []
    for axis in (0, 1):
        low, high = rois[:, axis, None], rois[:, axis + 2, None]
        at = low + (high - low) * centres
        sides.append((at >= boxes[:, axis, None]) & (at <= boxes[:, axis + 2, None]))
    return sides[0], sides[1]


def projection_loss(mask_logits: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Dice loss between the projections of masks and of boxes, summed over the two axes.

    L = Dice(max over rows of p, box across) + Dice(max over columns of p, box down).

    Args:
        mask_logits: (R, M, M).
        across: (R, M) bool, columns that the box covers.
        down: (R, M) bool, rows.

    Returns:
        Mean over RoIs, in [0, 2].
    """
    # The sigmoid rises, so the maximum may be taken before it.
    losses = _dice(mask_logits.amax(1).sigmoid(), across) + _dice(
        mask_logits.amax(2).sigmoid(), down
    )
    return global_mean(losses.sum(), len(losses))


def _dice(prob: Tensor, target: Tensor) -> Tensor:
    target = target.to(prob.dtype)
    overlap = (prob * target).sum(1)
    return 1 - 2 * overlap / (prob.square().sum(1) + target.square().sum(1) + 1e-5)


def pairwise_loss(
    mask_logits: Tensor,
    inside: Tensor,
    colours: Tensor,
    *,
    dilation: int = 2,
    min_similarity: float = 0.3,
) -> Tensor:
    """Ask neighbours of like colour for the same label.

    L = -log(p_i p_j + (1 - p_i)(1 - p_j)), mean over the pairs of alike neighbours in the box.

    Args:
        mask_logits: (R, M, M).
        inside: (R, M, M) bool, cells in the box; both of a pair must be.
        colours: (R, 3, M, M) CIE Lab.
        dilation: see :func:`box_mask_losses`, like the next.
        min_similarity: likewise.
    """
    same, different = F.logsigmoid(mask_logits), F.logsigmoid(-mask_logits)
    total, pairs = mask_logits.sum() * 0, mask_logits.new_zeros(())
    for row, column in _NEIGHBOURS:
        row, column = row * dilation, column * dilation
        distance = (_near(colours, row, column) - _far(colours, row, column)).norm(dim=1)
        alike = torch.exp(-distance / 2) >= min_similarity
        used = alike & _near(inside, row, column) & _far(inside, row, column)
        log_prob = torch.logaddexp(
            _near(same, row, column) + _far(same, row, column),
            _near(different, row, column) + _far(different, row, column),
        )
        total = total - (log_prob * used).sum()
        pairs = pairs + used.sum()
    return global_mean(total, pairs.long())


def _near(grid: Tensor, row: int, column: int) -> Tensor:
    """Cut (..., M, M) to the cells whose neighbour at (row >= 0, column) is in the grid."""
    size = grid.shape[-1]
    return grid[..., : max(size - row, 0), max(-column, 0) : max(size - max(column, 0), 0)]


def _far(grid: Tensor, row: int, column: int) -> Tensor:
    """Cut (..., M, M) to these neighbours."""
    size = grid.shape[-1]
    return grid[..., row:, max(column, 0) : max(size + min(column, 0), 0)]


def roi_colours(images: Tensor, boxes: list[Tensor], size: int) -> Tensor:
    """Cut the colours of RoIs out of a batch of images.

    Args:
        images: (N, 3, H, W) RGB in [0, 1].
        boxes: per image (R_i, 4) XYXY pixels.
        size: M.

    Returns:
        (R, 3, M, M) CIE Lab: lightness in [0, 100], a and b about in [-128, 127].
    """
    boxes = [boxes_of_image.to(images.dtype) for boxes_of_image in boxes]
    return rgb_to_lab(roi_align(images, boxes, (size, size), 1.0, 1, aligned=True).clamp(0, 1))


def rgb_to_lab(colours: Tensor) -> Tensor:
    """Turn sRGB colours (N, 3, ...) in [0, 1] into CIE Lab, under the white of D65."""
    linear = torch.where(
        colours <= 0.04045, colours / 12.92, ((colours.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    )
    to_xyz = colours.new_tensor(
        [
            [0.412453, 0.357580, 0.180423],
            [0.212671, 0.715160, 0.072169],
            [0.019334, 0.119193, 0.950227],
        ]
    )
    to_xyz = to_xyz / to_xyz.sum(1, keepdim=True)  # white is (1, 1, 1)
    xyz = torch.einsum("ij,nj...->ni...", to_xyz, linear)
    root = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


# --- an averaged model


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
        _check_ranges(
            "EMA teacher",
            "EMA_TEACHER",
            ("weight", weight, "0 or more", weight >= 0),
            ("decay", decay, "from 0 to below 1", 0 <= decay < 1),
            ("min_quality", min_quality, "0 to 1", 0 <= min_quality <= 1),
            ("warm_up", warm_up, "0 or more", warm_up >= 0),
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


# --- image labels


def check_tag_loss_weight(weight: float, *, freeze_detector: bool = False) -> None:
    """Refuse a weight that is out of range, or where the classifier does not learn."""
    if not weight >= 0:
        raise ValueError(
            f"The weight of the tag loss (MODEL.MASKX.TAG_LOSS_WEIGHT) is {weight}. Allowed: 0, "
            "which is off, or more; 0.1 in Detic."
        )
    if weight and freeze_detector:
        raise ValueError(
            f"The weight of the tag loss (MODEL.MASKX.TAG_LOSS_WEIGHT) is {weight}, but tags teach "
            "the detector, which is frozen. Set it to 0, or FREEZE_DETECTOR False."
        )


def largest_boxes(boxes: Sequence[Tensor], tags: Sequence[Tensor]) -> list[Tensor]:
    """Choose the largest proposal of each image that has tags.

    Args:
        boxes: per image (R_i, 4) XYXY, the proposals.
        tags: per image the labels, none of an image that is not to be looked at.

    Returns:
        Per image (1, 4), or (0, 4) without tags or proposals.
    """
    found = []
    for own, labels in zip(boxes, tags, strict=True):
        if len(own) and len(labels):
            areas = (own[:, 2:] - own[:, :2]).prod(dim=1)
            found.append(own[areas.argmax()][None])
        else:
            found.append(own[:0])
    return found


def tag_loss(
    class_logits: Tensor, columns: Sequence[Tensor], *, is_sigmoid: bool = False
) -> Tensor:
    """Ask a box of each image for the labels of the image.

    Args:
        class_logits: (N, K + 1) with the background, of a softmax classifier; (N, K) of one whose
            classes are independent.
        columns: per image the columns of its labels, at least one.
        is_sigmoid: whether it is of the second kind.

    Returns:
        Mean over the images: of -log p, averaged over the labels; of the second kind, of the binary
        cross-entropy, summed over the classes. Zero with graph without images.
    """
    if class_logits.dtype != torch.float64:
        class_logits = class_logits.float()
    targets = torch.zeros_like(class_logits)
    for row, own in zip(targets, columns, strict=True):
        row[own] = 1
    if is_sigmoid:
        total = F.binary_cross_entropy_with_logits(class_logits, targets, reduction="sum")
    else:
        shares = targets / targets.sum(dim=1, keepdim=True)
        total = -(shares * class_logits.log_softmax(dim=1)).sum()
    return global_mean(total, len(class_logits))
