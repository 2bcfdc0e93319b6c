"""PointRend's mask head, trained by partial supervision: weight transfer point by point.

"PointRend: Image Segmentation as Rendering" (Kirillov et al., CVPR 2020). Here the coarse mask is
class-agnostic, and the last layer of the point head, which has one row per class in PointRend, is a
mask predictor of maskx: only the logit of the class that a RoI needs is computed.

Shape legend:
    R: number of RoIs; C: channels that enter the predictor; N: number of points; S: resolution of
    the coarse mask; M: resolution of the masks.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from maskx.core.layers import msra_fill
from maskx.systems.maskx_rcnn.detectron2.heads import (
    add_masks,
    crop_gt_masks,
    gt_mask_weights,
    num_classes_from_config,
    transfer_arguments,
)
from maskx.systems.maskx_rcnn.mask_head import make_predictor, mask_loss
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights


class PointLayers(nn.Module):
    """Fully connected layers of the point head. Parameter names are those of PointRend's.

    Args:
        coarse_each_layer: append the coarse prediction to the output of each layer, not to the
            fine features only.
    """

    def __init__(
        self, in_channels: int, *, fc_dims: Sequence[int], coarse_each_layer: bool = True
    ) -> None:
        super().__init__()
        self.coarse_each_layer = coarse_each_layer
        self._names = [f"fc{index}" for index in range(1, len(fc_dims) + 1)]
        channels = in_channels + 1
        for name, fc_dim in zip(self._names, fc_dims, strict=True):
            layer = nn.Conv1d(channels, fc_dim, kernel_size=1)
            msra_fill(layer)
            self.add_module(name, layer)
            channels = fc_dim + coarse_each_layer
        self.out_channels = channels

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Compute (R, C, N) features from (R, D, N) fine features and (R, 1, N) coarse logits."""
        features = torch.cat([fine, coarse], dim=1)
        for name in self._names:
            features = F.relu(self.get_submodule(name)(features))
            if self.coarse_each_layer:
                features = torch.cat([features, coarse], dim=1)
        return features


@ROI_MASK_HEAD_REGISTRY.register()
class MaskXPointRendMaskHead(nn.Module):
    """PointRend's mask head for partial supervision; follows :class:`MaskHeadProtocol`.

    It takes feature maps: RoI heads need no mask pooler. It needs Detectron2's project PointRend.

    Args:
        input_shape: shapes of the feature maps by name.
        predictor: predicts one logit per point from ``point_layers.out_channels`` channels: a
            predictor of :mod:`maskx.systems.maskx_rcnn.mask_head`, such as ``TransferPredictor``.
        coarse_head: predicts (R, 1, S, S) logits from features on a regular grid of each box;
            PointRend's ``ConvFCHead``.
        num_points: N in training.
        oversample_ratio: k of the paper: N points are chosen from k * N.
        importance_sample_ratio: beta of the paper: share of uncertain points among the N.
        coarsest_size: resolution of the mask that subdivision starts from.
        subdivision_steps: number of times that the mask is doubled, M = coarsest_size * 2**steps.
        subdivision_num_points: points that are predicted anew after each doubling.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        predictor: nn.Module,
        point_layers: PointLayers,
        coarse_head: nn.Module,
        point_in_features: Sequence[str] = ("p2",),
        coarse_in_features: Sequence[str] = ("p2",),
        coarse_pool_size: int = 14,
        num_points: int = 14 * 14,
        oversample_ratio: float = 3,
        importance_sample_ratio: float = 0.75,
        coarsest_size: int = 7,
        subdivision_steps: int = 5,
        subdivision_num_points: int = 28 * 28,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        _point_features()  # say now that the project is missing, not in the first step
        self.coarse_head = coarse_head
        self.point_head = point_layers
        self.predictor = predictor
        self.point_in_features = tuple(point_in_features)
        self.coarse_in_features = tuple(coarse_in_features)
        self.feature_scales = {name: 1.0 / shape.stride for name, shape in input_shape.items()}
        self.coarse_pool_size = coarse_pool_size
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        # While a step would predict every point of its grid anew, start from that grid.
        while subdivision_steps > 0 and 4 * coarsest_size**2 <= subdivision_num_points:
            coarsest_size, subdivision_steps = 2 * coarsest_size, subdivision_steps - 1
        self.coarsest_size = coarsest_size
        self.subdivision_steps = subdivision_steps
        self.subdivision_num_points = subdivision_num_points
        self.mask_size = coarsest_size * 2**subdivision_steps
        self.loss_weight = loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the arguments from a configuration.

        PointRend's own keys, which its ``add_pointrend_config`` adds, are read where they are
        there; else their defaults hold, which are those of the paper.
        """
        _check_config(cfg)
        keys = cfg
        if "POINT_HEAD" not in cfg.MODEL:
            keys = get_detectron2_cfg()
            _point_rend().add_pointrend_config(keys)
        coarse, point = keys.MODEL.ROI_MASK_HEAD, keys.MODEL.POINT_HEAD
        pool_size = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        coarse_shape = ShapeSpec(
            channels=_channels(input_shape, coarse.IN_FEATURES), height=pool_size, width=pool_size
        )
        point_layers = PointLayers(
            _channels(input_shape, point.IN_FEATURES),
            fc_dims=[point.FC_DIM] * point.NUM_FC,
            coarse_each_layer=point.COARSE_PRED_EACH_LAYER,
        )
        in_channels = next(iter(input_shape.values())).channels
        return {
            "input_shape": input_shape,
            "predictor": make_predictor(
                cfg.MODEL.MASKX.PREDICTOR,
                point_layers.out_channels,
                num_classes_from_config(cfg),
                **transfer_arguments(cfg, in_channels),
            ),
            "point_layers": point_layers,
            "point_in_features": point.IN_FEATURES,
            "coarse_head": _point_rend().mask_head.ConvFCHead(
                coarse_shape,
                conv_dim=cfg.MODEL.ROI_MASK_HEAD.CONV_DIM,
                fc_dims=[coarse.FC_DIM] * coarse.NUM_FC,
                output_shape=(1, coarse.OUTPUT_SIDE_RESOLUTION, coarse.OUTPUT_SIDE_RESOLUTION),
            ),
            "coarse_in_features": coarse.IN_FEATURES,
            "coarse_pool_size": pool_size,
            "num_points": point.TRAIN_NUM_POINTS,
            "oversample_ratio": point.OVERSAMPLE_RATIO,
            "importance_sample_ratio": point.IMPORTANCE_SAMPLE_RATIO,
            "coarsest_size": coarse.OUTPUT_SIDE_RESOLUTION,
            "subdivision_steps": point.SUBDIVISION_STEPS,
            "subdivision_num_points": point.SUBDIVISION_NUM_POINTS,
            "loss_weight": cfg.MODEL.MASKX.LOSS_WEIGHT,
        }

    def forward(
        self,
        features: dict[str, Tensor],
        instances: list[Instances],
        detector: DetectorWeights,
    ) -> dict[str, Tensor] | list[Instances]:
        """Compute losses of coarse masks and points, or masks; see :class:`MaskHeadProtocol`."""
        if self.training:
            return self._losses(features, instances, detector)
        return add_masks(instances, self._render(features, instances, detector).sigmoid())

    def _losses(
        self, features: dict[str, Tensor], rois: list[Instances], detector: DetectorWeights
    ) -> dict[str, Tensor]:
        boxes = [x.proposal_boxes for x in rois]
        class_indices = torch.cat([x.gt_classes for x in rois])
        coarse_logits = self._coarse_logits(features, boxes)
        coords, labels = self._training_points(coarse_logits, rois, boxes)
        head = (coarse_logits, class_indices, detector)
        point_logits = self._point_logits(features, boxes, coords, *head)
        get_event_storage().put_scalar("maskx/num_mask_rois", len(class_indices))
        size, device = coarse_logits.shape[-1], coarse_logits.device
        weights = gt_mask_weights(rois)
        losses = {
            "loss_mask": mask_loss(coarse_logits[:, 0], crop_gt_masks(rois, size, device), weights),
            "loss_mask_point": mask_loss(point_logits, labels, weights),
        }
        return {name: loss * self.loss_weight for name, loss in losses.items()}

    @torch.no_grad()
    def _training_points(
        self, coarse_logits: Tensor, rois: list[Instances], boxes: list[Boxes]
    ) -> tuple[Tensor, Tensor]:
        """Choose (R, N, 2) points, in [0, 1] of each box, and look up their (R, N) labels."""
        if len(coarse_logits) == 0:  # PointRend's functions need a RoI
            coords = coarse_logits.new_empty(0, self.num_points, 2)
            return coords, coords[..., 0]
        _check_bitmasks(rois)
        points = _point_features()
        coords = points.get_uncertain_point_coords_with_randomness(
            coarse_logits,
            _uncertainty,
            self.num_points,
            self.oversample_ratio,
            self.importance_sample_ratio,
        )
        in_image = points.get_point_coords_wrt_image(Boxes.cat(boxes).tensor, coords)
        return coords, points.sample_point_labels(rois, in_image)

    def _render(
        self, features: dict[str, Tensor], instances: list[Instances], detector: DetectorWeights
    ) -> Tensor:
        """Predict (R, M, M) logits of the predicted classes by adaptive subdivision."""
        points = _point_features()
        boxes = [x.pred_boxes for x in instances]
        class_indices = torch.cat([x.pred_classes for x in instances])
        count = len(class_indices)
        if count == 0:
            return boxes[0].tensor.new_empty(0, self.mask_size, self.mask_size)
        coarse_logits = self._coarse_logits(features, boxes)
        head = (coarse_logits, class_indices, detector)
        size = self.coarsest_size
        coords = points.generate_regular_grid_point_coords(count, size, boxes[0].device)
        mask_logits = self._point_logits(features, boxes, coords, *head).reshape(-1, size, size)
        for _ in range(self.subdivision_steps):
            mask_logits = F.interpolate(
                mask_logits[:, None], scale_factor=2, mode="bilinear", align_corners=False
            )
            indices, coords = points.get_uncertain_point_coords_on_grid(
                _uncertainty(mask_logits), self.subdivision_num_points
            )
            point_logits = self._point_logits(features, boxes, coords, *head)
            size = mask_logits.shape[-1]
            mask_logits = mask_logits.flatten(1).scatter(1, indices, point_logits)
            mask_logits = mask_logits.reshape(count, size, size)
        return mask_logits

    def _coarse_logits(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Predict the (R, 1, S, S) logits of the coarse masks."""
        count, size = sum(map(len, boxes)), self.coarse_pool_size
        coords = _point_features().generate_regular_grid_point_coords(count, size, boxes[0].device)
        pooled = self._sample(features, self.coarse_in_features, boxes, coords)
        return self.coarse_head(pooled.reshape(*pooled.shape[:2], size, size))

    def _point_logits(
        self,
        features: dict[str, Tensor],
        boxes: list[Boxes],
        coords: Tensor,
        coarse_logits: Tensor,
        class_indices: Tensor,
        detector: DetectorWeights,
    ) -> Tensor:
        """Predict (R, N) logits of the given classes at (R, N, 2) points of the boxes."""
        fine = self._sample(features, self.point_in_features, boxes, coords)
        coarse = _point_features().point_sample(coarse_logits, coords, align_corners=False)
        channels = self.point_head(fine, coarse)
        return self.predictor(channels[..., None], class_indices, detector)[..., 0]

    def _sample(
        self,
        features: dict[str, Tensor],
        names: Sequence[str],
        boxes: list[Boxes],
        coords: Tensor,
    ) -> Tensor:
        """Sample (R, D, N) features at (R, N, 2) points, in [0, 1] of each box."""
        sampled, _ = _point_features().point_sample_fine_grained_features(
            [features[name] for name in names],
            [self.feature_scales[name] for name in names],
            boxes,
            coords,
        )
        return sampled


def _uncertainty(logits: Tensor) -> Tensor:
    return -logits.abs()


def _point_rend() -> ModuleType:
    """Import Detectron2's project, which registers its own heads, only when it is needed."""
    try:
        from detectron2.projects import point_rend
    except ImportError as error:
        raise ImportError(
            "MaskXPointRendMaskHead needs detectron2.projects.point_rend, which this installation "
            "lacks. Install Detectron2 from its source repository, or set MODEL.ROI_MASK_HEAD.NAME "
            "MaskXMaskHead."
        ) from error
    return point_rend


def _point_features() -> ModuleType:
    return _point_rend().point_features


def _channels(shapes: dict[str, ShapeSpec], names: Sequence[str]) -> int:
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(
            f"The PointRend head reads the feature maps {', '.join(missing)}, but "
            f"MODEL.ROI_HEADS.IN_FEATURES has {', '.join(shapes)}. Add them there, or change "
            "IN_FEATURES of MODEL.ROI_MASK_HEAD and MODEL.POINT_HEAD."
        )
    return sum(shapes[name].channels for name in names)


def _check_config(cfg: CfgNode) -> None:
    head, maskx = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.MASKX
    point = cfg.MODEL.get("POINT_HEAD", {})
    checks = [
        ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", head.POOLER_TYPE, ""),
        ("INPUT.MASK_FORMAT", cfg.INPUT.MASK_FORMAT, "bitmask"),
        ("MODEL.MASKX.MLP", maskx.MLP, "none"),
        ("MODEL.MASKX.TRUNK", maskx.TRUNK, "conv"),
        ("MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", head.get("POINT_HEAD_ON", True), True),
        ("MODEL.POINT_HEAD.NAME", point.get("NAME", "StandardPointHead"), "StandardPointHead"),
        # The key of maskx is MODEL.MASKX.PREDICTOR class_agnostic.
        ("MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK", point.get("CLS_AGNOSTIC_MASK", False), False),
    ]
    for key, found, needed in checks:
        if found != needed:
            raise ValueError(
                f"{key} is {found!r}, but MaskXPointRendMaskHead needs {needed!r}. Set it so; "
                "MODEL.MASKX.PREDICTOR chooses the predictor of the points."
            )


def _check_bitmasks(rois: list[Instances]) -> None:
    for image, instances in enumerate(rois):
        if len(instances) > 0 and not isinstance(instances.gt_masks, BitMasks):
            raise ValueError(
                f"Image {image} of the batch has {type(instances.gt_masks).__name__}, but "
                "PointRend needs BitMasks. Set INPUT.MASK_FORMAT bitmask."
            )
