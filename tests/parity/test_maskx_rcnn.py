"""Mask^X R-CNN: RoI heads with the same weights and samples give the same on both hosts.

The detectors around them are those of their hosts. What is compared begins at the feature maps and
the proposals: sampling, box branch, mask branch, losses and predictions.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from maskx.data.masks import decode_segmentation
from maskx.detectron2 import MaskXMaskHead, MaskXROIHeads
from maskx.systems.maskx_rcnn.mask_head import MaskXHead, crop_mask_targets
from maskx.systems.maskx_rcnn.torchvision import MaskXRoIHeads
from maskx.systems.maskx_rcnn.weak_losses import BoxMaskLoss, EMATeacher

K, D, C, P, SIDE = 4, 12, 6, 4, 64
STRIDES = {"p2": 4, "p3": 8}
LOSSES = {"loss_cls": "loss_classifier", "loss_box_reg": "loss_box_reg", "loss_mask": "loss_mask"}
BOX_LOSSES = {name: name for name in ("loss_mask_box", "loss_mask_ema")}
BATCHES = {
    "mixed": ([True, False, True], [False, True], []),
    "masked": ([True, True, True], [True, True], []),
    "box-only": ([False, False, False], [False, False], []),
    "no objects": ([], [], []),
}


def assert_equal(found, expected, tolerance=1e-6):
    """Equal to a share of the largest value."""
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def torchvision_heads(*, gt_boxes_only=False, **mask_head):
    torch.manual_seed(0)

    def pool(size):
        return MultiScaleRoIAlign(
            list(STRIDES), size, sampling_ratio=2, canonical_scale=24, canonical_level=3
        )

    box = RoIHeads(
        pool(3),
        TwoMLPHead(C * 9, D),
        FastRCNNPredictor(D, K + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=99,  # all that there are, as the hosts draw different ones
        positive_fraction=1.0,
        bbox_reg_weights=None,
        score_thresh=0.02,
        nms_thresh=0.6,
        detections_per_img=9,
    )
    head = MaskXHead(in_channels=C, pool_size=P, **mask_head)
    heads = MaskXRoIHeads(box, mask_roi_pool=pool(P), mask_head=head, gt_boxes_only=gt_boxes_only)
    for name, parameter in heads.named_parameters():
        # As initialised, masks hardly depend on anything; large boxes would all be clipped.
        torch.nn.init.normal_(parameter, std=0.05 if "bbox_pred" in name else 0.2)
    return heads


def detectron2_heads(*, gt_boxes_only=False, **mask_head):
    def pool(size):
        return ROIPooler(
            output_size=size,
            scales=[1 / stride for stride in STRIDES.values()],
            sampling_ratio=2,
            pooler_type="ROIAlign",  # torchvision's; ROIAlignV2 moves boxes by half a pixel
            canonical_box_size=24,
            canonical_level=3,
        )

    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=D),
        box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        num_classes=K,
        test_score_thresh=0.02,
        test_nms_thresh=0.6,
        test_topk_per_image=9,
        smooth_l1_beta=1 / 9,  # torchvision's, which cannot be set there
    )
    return MaskXROIHeads(
        num_classes=K,
        batch_size_per_image=99,
        positive_fraction=1.0,
        proposal_matcher=Matcher([0.5], [0, 1]),
        box_in_features=list(STRIDES),
        box_pooler=pool(3),
        box_head=FastRCNNConvFCHead(
            ShapeSpec(channels=C, height=3, width=3), conv_dims=[], fc_dims=[D, D]
        ),
        box_predictor=predictor,
        mask_in_features=list(STRIDES),
        mask_pooler=pool(P),
        mask_head=MaskXMaskHead(ShapeSpec(channels=C, height=P, width=P), **mask_head),
        gt_boxes_only=gt_boxes_only,
    )


def as_detectron2(tensors):
    """Rename what belongs to torchvision's parameters, with the background last."""
    result = {}
    for name, value in tensors.items():
        if name.startswith("box_predictor.cls_score."):
            value = value.roll(-1, dims=0)
        elif name.startswith("box_predictor.bbox_pred."):
            value = value[4:]  # there is a box of the background, which nothing trains
        result[name.replace("head.fc6.", "head.fc1.").replace("head.fc7.", "head.fc2.")] = value
    return result


def both_heads(**arguments):
    """RoI heads of torchvision and of Detectron2 with the same weights, in float64."""
    arguments = {
        **{"num_classes": K, "channels": C, "num_convs": 2, "detector_channels": D},
        **{"mlp": "bottleneck"},
        **arguments,
    }
    ours, theirs = torchvision_heads(**arguments), detectron2_heads(**arguments)
    theirs.load_state_dict(as_detectron2(ours.state_dict()))
    return ours.double(), theirs.double()


def feature_maps():
    generator = torch.Generator().manual_seed(1)
    sizes = {name: SIDE // stride for name, stride in STRIDES.items()}
    return {
        name: torch.randn(3, C, n, n, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, n in sizes.items()
    }


def circle(box):
    """Corners of a polygon of 16 sides in a box."""
    angles = torch.arange(16) / 8 * torch.pi
    unit = torch.stack([angles.cos(), angles.sin()], dim=1) / 2 + 0.5
    return (box[:2] + unit * (box[2:] - box[:2])).flatten().numpy().astype(np.float64)


def make_batch(flags):
    """Targets of three images in torchvision's form, with a polygon per box, and proposals."""
    generator = torch.Generator().manual_seed(2)
    targets, polygons, proposals = [], [], []
    for has_masks in flags:
        count = len(has_masks)
        corners = torch.rand(count, 2, generator=generator) * 30
        sides = 14 + torch.rand(count, 2, generator=generator) * 18
        boxes = torch.cat([corners, corners + sides], dim=1)
        shapes = [[circle(box)] for box in boxes]
        masks = [decode_segmentation([s.tolist() for s in shape], SIDE, SIDE) for shape in shapes]
        masks = torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, SIDE, SIDE))
        flags_of_image = torch.tensor(has_masks, dtype=torch.bool)
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.randint(1, K + 1, (count,), generator=generator),
                "masks": masks & flags_of_image[:, None, None],
                "has_masks": flags_of_image,
                "mask_weights": torch.rand(count, generator=torch.Generator().manual_seed(count)),
            }
        )
        polygons.append(shapes)
        moved = boxes.repeat(3, 1) + torch.randn(3 * count, 4, generator=generator) * 1.5
        corners = torch.rand(5, 2, generator=generator) * 30
        others = torch.cat([corners, corners + 10 + corners.flip(1) / 2], dim=1)
        proposals.append(torch.cat([moved, others]))
    return targets, polygons, proposals


def detectron2_targets(targets):
    result = []
    for target in targets:
        instances = Instances((SIDE, SIDE), gt_boxes=Boxes(target["boxes"]))
        instances.gt_classes = target["labels"] - 1
        instances.gt_masks = BitMasks(target["masks"])
        instances.gt_has_mask = target["has_masks"]
        instances.gt_mask_weight = target["mask_weights"]
        result.append(instances)
    return result


def detectron2_proposals(proposals):
    return [
        Instances(
            (SIDE, SIDE), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes))
        )
        for boxes in proposals
    ]


def losses_of_both(ours, theirs, flags, tags=()):
    """Feature maps and losses of each host, those of torchvision under Detectron2's names.

    Args:
        tags: labels by image; those images have these alone.
    """
    targets, _, proposals = make_batch(flags)
    maps, other_maps = feature_maps(), feature_maps()
    doubles = [{**target, "boxes": target["boxes"].double()} for target in targets]
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).double()
    ours.images = images
    instances = detectron2_targets(targets)
    theirs.tags = [torch.tensor(dict(tags).get(i, ()), dtype=torch.int64) for i in range(3)]
    for image, labels in dict(tags).items():
        doubles[image] |= {"tags": torch.tensor(labels) + 1, "boxes_complete": False}
        instances[image].gt_boxes_complete = torch.zeros(len(instances[image]), dtype=torch.bool)
    _, losses = ours.train()(
        maps, [p.double() for p in proposals], [(SIDE, SIDE)] * len(targets), doubles
    )
    with EventStorage():
        _, others = theirs.train()(
            ImageList(images, [(SIDE, SIDE)] * 3),
            other_maps,
            detectron2_proposals(proposals),
            instances,
        )
    names = LOSSES | (BOX_LOSSES if ours.learns_from_boxes else {})
    names |= {"loss_tags": "loss_tags"} if ours.tag_loss_weight else {}
    assert losses.keys() == set(names.values())
    return maps, {name: losses[names[name]] for name in others}, other_maps, others


def gradients(loss, heads, maps):
    """Gradients by name; zero where a parameter has none."""
    named = {n: p for n, p in heads.named_parameters() if p.requires_grad} | maps
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(named.items(), found, strict=True)
    }


def assert_same_training(ours, theirs, flags, tags=()):
    maps, losses, other_maps, others = losses_of_both(ours, theirs, flags, tags)
    for name, loss in others.items():
        assert_equal(losses[name], loss)
    # Detectron2 computes the targets of box regression in float32, torchvision in the precision of
    # the model.
    for chosen, tolerance in ((["loss_mask"], 1e-6), (list(others), 1e-5)):
        found = gradients(sum(losses[name] for name in chosen), ours, maps)
        assert not found["box_predictor.bbox_pred.weight"][:4].any()  # the background's
        found = as_detectron2(found)
        expected = gradients(sum(others[name] for name in chosen), theirs, other_maps)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_equal(found[name], gradient, tolerance)
    return others, expected


@pytest.mark.parametrize("gt_boxes_only", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_losses_and_gradients_are_the_same(kind, gt_boxes_only):
    ours, theirs = both_heads(gt_boxes_only=gt_boxes_only)
    losses, found = assert_same_training(ours, theirs, BATCHES[kind])
    masks = [name for name in found if name.startswith("mask_head.")]
    if kind in ("mixed", "masked"):
        assert losses["loss_mask"] > 0
        assert all(found[name].any() for name in masks)
    else:
        assert losses["loss_mask"] == 0
        assert not any(found[name].any() for name in masks)


@pytest.mark.parametrize(
    "arguments",
    [
        {"stop_gradient": False},
        {"transfer_inputs": "cls", "transfer_layers": 1, "mlp": "none"},
        {"transfer_inputs": "box", "transfer_activation": "relu", "mlp": "single_fc"},
        {"transfer_mix": 0.05},
        {"transfer_normalise": True},
        {"predictor": "class_agnostic"},
        {"predictor": "class_specific", "trunk": "residual"},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_every_form_of_the_branch_trains_the_same(arguments):
    ours, theirs = both_heads(**arguments)
    assert_same_training(ours, theirs, BATCHES["mixed"])


class Maps(nn.Module):
    """A backbone of feature maps like those of the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.ModuleDict({n: nn.Conv2d(3, C, s, stride=s) for n, s in STRIDES.items()})

    def forward(self, images):
        return {name: 5 * layer(images) for name, layer in self.layers.items()}


@pytest.mark.parametrize("gt_boxes_only", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_objects_without_a_mask_teach_the_same(kind, gt_boxes_only):
    ours, theirs = both_heads(gt_boxes_only=gt_boxes_only)
    ours.box_loss, theirs.box_loss = BoxMaskLoss(warm_up=3), BoxMaskLoss(warm_up=3)
    ours.max_box_rois = theirs.max_box_rois = 99  # as the hosts draw them in another order
    ours.ema_teacher, teacher = (EMATeacher(min_quality=0.3, warm_up=2) for _ in range(2))
    backbone = Maps().double()
    ours.ema_teacher.follow(
        backbone=backbone, mask_head=ours.mask_head, box_predictor=ours.box_predictor
    )
    theirs.learn_from(teacher, backbone)
    for _ in range(2):
        losses, _ = assert_same_training(ours, theirs, BATCHES[kind])
        taught = [losses[name].item() for name in BOX_LOSSES]
        assert all(taught) if kind in ("mixed", "box-only") else not any(taught)
        with torch.no_grad():  # as a step does; both have weights of their own
            for heads in (ours, theirs):
                for parameter in heads.mask_head.parameters():
                    parameter *= 1.1
            for parameter in backbone.parameters():
                parameter *= 0.9


@pytest.mark.parametrize("tags", [{2: [0, 2]}, {2: [1]}, {}], ids=["two", "one", "none"])
def test_images_with_tags_alone_teach_the_same(tags):
    ours, theirs = both_heads()
    ours.tag_loss_weight = theirs.tag_loss_weight = 0.3
    losses, _ = assert_same_training(ours, theirs, BATCHES["mixed"], tags)
    assert (losses["loss_tags"] > 0) == bool(tags)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_the_mask_loss_reaches_the_box_predictor_on_neither_host_or_on_both(stop_gradient):
    ours, theirs = both_heads(stop_gradient=stop_gradient)
    maps, losses, other_maps, others = losses_of_both(ours, theirs, BATCHES["mixed"])
    for heads, loss, m in ((ours, losses, maps), (theirs, others, other_maps)):
        found = gradients(loss["loss_mask"], heads, m)
        for layer in ("cls_score", "bbox_pred"):
            assert found[f"box_predictor.{layer}.weight"].any() == (not stop_gradient)


def test_predictions_are_the_same():
    """Boxes, scores, classes, and masks of the size of the head, before each host pastes them."""
    ours, theirs = (
        heads.float().eval() for heads in both_heads()
    )  # Detectron2's boxes are float32
    maps = {name: value.detach().float() for name, value in feature_maps().items()}
    _, _, proposals = make_batch(BATCHES["mixed"])
    with torch.no_grad():
        found, _ = ours(maps, proposals, [(SIDE, SIDE)] * len(proposals))
        expected, _ = theirs(None, maps, detectron2_proposals(proposals))
    for ours_of_image, instances in zip(found, expected, strict=True):
        assert len(instances) > 2
        assert torch.equal(ours_of_image["labels"] - 1, instances.pred_classes)
        assert_equal(ours_of_image["scores"], instances.scores)
        assert_equal(ours_of_image["boxes"], instances.pred_boxes.tensor)
        assert_equal(ours_of_image["masks"], instances.pred_masks)
    assert len(torch.cat([x.pred_classes for x in expected]).unique()) > 1


@pytest.mark.parametrize("mix", [0.0, 0.05])
def test_masks_of_given_boxes_are_the_same(mix):
    ours, theirs = (heads.mask_head for heads in both_heads(transfer_mix=mix))
    weights, other_weights = (heads.detector_weights() for heads in both_heads())
    features = torch.randn(K, C, P, P, dtype=torch.float64)
    classes = torch.arange(K)
    if mix:  # both were taught the first two classes
        rois = Instances((9, 9), gt_classes=classes[:2], proposal_boxes=Boxes(torch.rand(2, 4)))
        rois.gt_masks = BitMasks(torch.ones(2, 9, 9, dtype=torch.bool))
        ours.train()(features[:2], classes[:2], weights)
        with EventStorage():
            theirs.train()(features[:2], [rois], other_weights)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        found = ours(features, classes, weights).sigmoid()
        (given,) = theirs(features, [Instances((9, 9), pred_classes=classes)], other_weights)
    assert_equal(found, given.pred_masks[:, 0])
    assert len(found.unique(dim=0)) == K


def test_targets_of_bit_masks_are_the_same_and_those_of_polygons_differ_at_the_border():
    """Detectron2's default form is polygons, which it draws at the size of the target."""
    targets, polygons, _ = make_batch(BATCHES["masked"])
    differing = total = 0
    for target, shapes in zip(targets[:2], polygons[:2], strict=True):
        boxes, rows = target["boxes"], torch.arange(len(target["boxes"]))
        found = crop_mask_targets(target["masks"], boxes, rows, 28)
        assert torch.equal(found, BitMasks(target["masks"]).crop_and_resize(boxes, 28))
        drawn = PolygonMasks(shapes).crop_and_resize(boxes, 28)
        # A pixel of an image is up to two of these targets, as no side of a box is below 14.
        padded = F.pad(found, (2, 2, 2, 2))  # an object ends at its box
        near = [F.max_pool2d(x.float(), 5, stride=1) > 0 for x in (padded, ~padded)]
        differs = found != drawn
        assert not (differs & ~(near[0] & near[1])).any()
        differing, total = differing + differs.sum().item(), total + differs.numel()
    assert 0 < differing < 0.05 * total
