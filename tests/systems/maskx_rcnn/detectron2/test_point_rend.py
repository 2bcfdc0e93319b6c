import sys

import pytest
import torch
from detectron2 import projects
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.projects import point_rend
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from settings import pairs
from torch import nn

from maskx.detectron2 import MaskXPointRendMaskHead, PointLayers, add_maskx_config
from maskx.systems.maskx_rcnn.mask_head import TransferPredictor
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights

K, D = 5, 6
SHAPES = {
    "p2": ShapeSpec(channels=6, stride=4),
    "p3": ShapeSpec(channels=6, stride=8),
    "p4": ShapeSpec(channels=6, stride=16),
}
POINT_REND = pairs(
    {
        "MODEL.ROI_MASK_HEAD.NAME": "MaskXPointRendMaskHead",
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "",
        "INPUT.MASK_FORMAT": "bitmask",
        "MODEL.MASKX.MLP": "none",
        "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True,
    }
)
CASCADE = pairs(
    {
        "MODEL.ROI_HEADS.NAME": "MaskXCascadeROIHeads",
        "MODEL.MASKX.TRANSFER.INPUTS": "cls",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    }
)
KINDS = {
    "masked": ([True, True, True], [True]),
    "mixed": ([True, False, False], [False, False]),
    "box-only": ([False, False], [False]),
    "one image without objects": ([True, False], []),
    "no objects": ([], []),
}


def small_cfg(*opts):
    """PointRend's configuration with small sizes, and our keys."""
    cfg = get_detectron2_cfg()
    point_rend.add_pointrend_config(cfg)
    add_maskx_config(cfg)
    cfg.merge_from_list(
        [
            *pairs(
                {
                    "MODEL.ROI_MASK_HEAD.CONV_DIM": 4,
                    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 6,
                    "MODEL.ROI_MASK_HEAD.FC_DIM": 9,
                    "MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION": 3,
                    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "",
                    "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON": True,
                    "MODEL.POINT_HEAD.FC_DIM": 7,
                    "MODEL.POINT_HEAD.NUM_FC": 2,
                    "MODEL.POINT_HEAD.IN_FEATURES": ("p2", "p3"),
                    "MODEL.POINT_HEAD.TRAIN_NUM_POINTS": 20,
                    "MODEL.POINT_HEAD.SUBDIVISION_STEPS": 3,
                    "MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS": 40,
                    "MODEL.ROI_HEADS.NUM_CLASSES": K,
                    "MODEL.ROI_BOX_HEAD.FC_DIM": D,
                    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
                    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
                    "INPUT.MASK_FORMAT": "bitmask",
                }
            ),
            *opts,
        ]
    )
    return cfg


def make_head(*opts):
    torch.manual_seed(0)
    head = MaskXPointRendMaskHead(small_cfg(*opts), SHAPES)
    for parameter in head.parameters():  # as initialised, masks hardly depend on anything
        nn.init.normal_(parameter, std=0.3)
    return head


def make_reference(head, weight, bias, *opts):
    """PointRend's own head for one class, with our weights and the given last layer."""
    one = ("MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.POINT_HEAD.NUM_CLASSES", 1)
    cfg = small_cfg(*one, *opts)
    reference = point_rend.PointRendMaskHead(cfg, SHAPES).train(head.training)
    own = {k: v for k, v in head.state_dict().items() if not k.startswith("predictor.")}
    predictor = {"point_head.predictor.weight": weight, "point_head.predictor.bias": bias}
    reference.load_state_dict(own | predictor)
    return reference


def make_features():
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(3, 6, 64 // shape.stride, 64 // shape.stride, generator=generator)
        for name, shape in SHAPES.items()
    }


def make_instances(classes, prefix):
    """Boxes of given classes on images of 64 x 64, with masks."""
    generator = torch.Generator().manual_seed(2)
    result = []
    for classes_of_image in classes:
        count = len(classes_of_image)
        corner = torch.rand(count, 2, generator=generator) * 30
        extent = 10 + torch.rand(count, 2, generator=generator) * 20
        boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances = Instances((64, 64))
        instances.set("proposal_boxes" if prefix == "gt" else "pred_boxes", boxes)
        instances.set(f"{prefix}_classes", torch.tensor(classes_of_image).long())
        if prefix == "gt" and count:
            instances.gt_masks = BitMasks(torch.rand(count, 64, 64, generator=generator) > 0.5)
        result.append(instances)
    return result


def make_detector():
    generator = torch.Generator().manual_seed(3)
    return DetectorWeights(
        torch.randn(K, D, generator=generator), torch.randn(K, 4 * D, generator=generator)
    )


def run(call):
    torch.manual_seed(4)  # points are sampled at random
    with EventStorage():
        return call()


@pytest.mark.parametrize("coarse_each_layer", [True, False])
def test_the_class_agnostic_form_is_the_head_of_pointrend(coarse_each_layer):
    opts = ("MODEL.POINT_HEAD.COARSE_PRED_EACH_LAYER", coarse_each_layer)
    head = make_head("MODEL.MASKX.PREDICTOR", "class_agnostic", *opts)
    weight, bias = head.predictor.weight[..., 0].detach(), head.predictor.bias.detach()
    reference = make_reference(head, weight, bias, *opts)
    features, rois = make_features(), make_instances([[3, 0], [], [4, 4, 1]], "gt")

    losses = run(lambda: head(features, rois, make_detector()))
    for instances in rois:  # the one class that the reference knows
        instances.gt_classes.zero_()
    expected = run(lambda: reference(features, rois))
    assert losses.keys() == expected.keys() == {"loss_mask", "loss_mask_point"}
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    gradients = {name: p.grad for name, p in head.named_parameters()}
    for name, parameter in reference.named_parameters():
        own = gradients[name.removeprefix("point_head.") if "predictor" in name else name]
        assert own.abs().sum() > 0
        torch.testing.assert_close(own.reshape(parameter.grad.shape), parameter.grad)


def test_masks_by_weight_transfer_are_those_of_pointrend_class_by_class():
    head, detector, features = make_head().eval(), make_detector(), make_features()
    classes = [[3, 0], [], [4, 3, 1]]
    with torch.no_grad():
        results = head(features, make_instances(classes, "pred"), detector)
        w_seg = head.predictor.layers(torch.cat(detector, dim=1))
    assert [tuple(x.pred_masks.shape) for x in results] == [
        (2, 1, 24, 24),
        (0, 1, 24, 24),
        (3, 1, 24, 24),
    ]
    for k in {3, 0, 4, 1}:
        reference = make_reference(head, w_seg[k][None, :, None], torch.zeros(1))
        instances = make_instances(classes, "pred")
        for x in instances:
            x.pred_classes.zero_()
        with torch.no_grad():
            expected = reference(features, instances)
        for own, other, classes_of_image in zip(results, expected, classes, strict=True):
            for index in [i for i, found in enumerate(classes_of_image) if found == k]:
                torch.testing.assert_close(own.pred_masks[index], other.pred_masks[index])


def test_the_losses_by_weight_transfer_are_those_of_pointrend():
    head, detector, features = make_head(), make_detector(), make_features()
    rois = make_instances([[2], [], [2, 2]], "gt")
    w_seg = head.predictor.layers(torch.cat(detector, dim=1)).detach()
    reference = make_reference(head, w_seg[2][None, :, None], torch.zeros(1))
    losses = run(lambda: head(features, rois, detector))
    for instances in rois:
        instances.gt_classes.zero_()
    expected = run(lambda: reference(features, rois))
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)


def test_every_parameter_learns():
    head, full = make_head("MODEL.MASKX.LOSS_WEIGHT", 0.5), make_head()
    rois = make_instances([[3, 0], [], [4, 4, 1]], "gt")
    losses = run(lambda: head(make_features(), rois, make_detector()))
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    whole = run(lambda: full(make_features(), rois, make_detector()))
    for name, loss in whole.items():
        torch.testing.assert_close(losses[name], loss * 0.5)
    for instances in rois:
        instances.gt_mask_weight = torch.full((len(instances),), 0.5)
    weighted = run(lambda: full(make_features(), rois, make_detector()))
    for name, loss in losses.items():
        torch.testing.assert_close(weighted[name], loss)


@pytest.mark.parametrize("predictor", ["transfer", "class_agnostic", "class_specific"])
def test_without_masks_the_losses_are_zero_with_a_graph(predictor):
    head = make_head("MODEL.MASKX.PREDICTOR", predictor)
    rois = make_instances([[], [], []], "gt")
    losses = run(lambda: head(make_features(), rois, make_detector()))
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_without_detections_there_are_no_masks():
    head = make_head().eval()
    results = head(make_features(), make_instances([[], [], []], "pred"), make_detector())
    assert all(x.pred_masks.shape == (0, 1, 24, 24) for x in results)


def test_the_defaults_are_those_of_pointrend(make_cfg):
    """Without PointRend's keys in the configuration; 7 x 7 doubled five times are 224 x 224."""
    cfg = make_cfg(*POINT_REND)
    assert "POINT_HEAD" not in cfg.MODEL
    head = MaskXPointRendMaskHead(cfg, SHAPES)
    assert (head.num_points, head.oversample_ratio, head.importance_sample_ratio) == (196, 3, 0.75)
    assert (head.coarsest_size, head.subdivision_steps, head.mask_size) == (28, 3, 224)
    assert [m.out_channels for m in head.point_head.children()] == [256, 256, 256]
    assert [head.coarse_head.fc1.out_features, head.coarse_head.fc2.out_features] == [1024, 1024]
    assert head.coarse_head.output_shape == (1, 7, 7)
    assert head.predictor.layers[-1].out_features == 257


def test_the_keys_of_pointrend_reach_the_head():
    head = MaskXPointRendMaskHead(
        small_cfg(
            *pairs(
                {
                    "MODEL.ROI_MASK_HEAD.IN_FEATURES": ("p3", "p4"),
                    "MODEL.MASKX.LOSS_WEIGHT": 0.5,
                    "MODEL.POINT_HEAD.OVERSAMPLE_RATIO": 2,
                    "MODEL.POINT_HEAD.IMPORTANCE_SAMPLE_RATIO": 0.5,
                }
            )
        ),
        SHAPES,
    )
    assert (head.coarse_in_features, head.point_in_features) == (("p3", "p4"), ("p2", "p3"))
    assert (head.coarse_pool_size, head.num_points, head.subdivision_num_points) == (6, 20, 40)
    assert (head.oversample_ratio, head.importance_sample_ratio) == (2, 0.5)
    assert (head.coarsest_size, head.subdivision_steps) == (6, 2)  # 36 points are all predicted
    assert [m.out_channels for m in head.point_head.children()] == [7, 7]
    assert head.loss_weight == 0.5


def test_it_can_be_built_without_a_configuration():
    layers = PointLayers(6, fc_dims=[8])
    coarse = point_rend.mask_head.ConvFCHead(
        ShapeSpec(channels=6, height=14, width=14),
        **{"conv_dim": 4, "fc_dims": [8], "output_shape": (1, 7, 7)},
    )
    head = MaskXPointRendMaskHead(
        SHAPES,
        predictor=TransferPredictor(
            inputs="cls", out_channels=layers.out_channels, detector_channels=D
        ),
        point_layers=layers,
        coarse_head=coarse,
        subdivision_steps=2,
    ).eval()
    (result, *_) = head(make_features(), make_instances([[0], [], []], "pred"), make_detector())
    assert result.pred_masks.shape == (1, 1, 28, 28)


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains_on_every_batch(make_model, make_sample, kind, cascade):
    model = make_model(*POINT_REND, *(CASCADE if cascade else ()))
    batch = [make_sample(has_mask) for has_mask in KINDS[kind]]
    losses = run(lambda: model(batch))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    has_masks = any(map(any, KINDS[kind]))
    assert (losses["loss_mask"] > 0) == (losses["loss_mask_point"] > 0) == has_masks


def test_a_model_predicts_masks(make_model, make_sample):
    model = make_model(*POINT_REND).eval()
    with torch.no_grad():
        (result,) = model([make_sample([]) | {"height": 32, "width": 48}])
        (raw,) = model.inference([make_sample([])], do_postprocess=False)
    assert 0 < len(result["instances"]) <= 5
    assert result["instances"].pred_masks.shape[1:] == (32, 48)
    assert raw.pred_masks.shape[1:] == (1, 224, 224)


def test_a_frozen_detector_trains_this_head_only(make_model, make_sample):
    frozen = ("MODEL.META_ARCHITECTURE", "MaskXRCNN", "MODEL.MASKX.FREEZE_DETECTOR", True)
    model = make_model(*POINT_REND, *frozen)
    losses = run(lambda: model([make_sample([True, False])]))
    assert losses.keys() == {"loss_mask", "loss_mask_point"}
    sum(losses.values()).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if "mask_head" in n}


def test_the_example_of_the_configs_is_this_head(make_cfg):
    cfg = make_cfg(file="other_heads/pointrend_clsbox_2_layer_R_50_FPN.yaml")
    heads = build_model(cfg).roi_heads
    assert isinstance(heads.mask_head, MaskXPointRendMaskHead)
    assert heads.train_on_pred_boxes
    assert heads.mask_pooler is None
    assert heads.mask_head.predictor.inputs == "cls+box"


def test_autocast_trains_in_bfloat16(make_model, make_sample):
    model = make_model(*POINT_REND)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = run(lambda: model([make_sample([True, False]), make_sample([True])]))
        assert all(torch.isfinite(loss) for loss in losses.values())
        with torch.no_grad():
            model.eval()([make_sample([])])


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign"), "POOLER_TYPE is 'ROIAlign', .* needs ''"),
        (("INPUT.MASK_FORMAT", "polygon"), "INPUT.MASK_FORMAT is 'polygon', .* needs 'bitmask'"),
        (("MODEL.MASKX.MLP", "bottleneck"), "MODEL.MASKX.MLP is 'bottleneck'"),
        (("MODEL.MASKX.TRUNK", "residual"), "MODEL.MASKX.TRUNK is 'residual'"),
        (("MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", False), "POINT_HEAD_ON is False"),
        (("MODEL.POINT_HEAD.NAME", "ImplicitPointHead"), "POINT_HEAD.NAME is 'ImplicitPointHead'"),
        (("MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK", True), "MODEL.MASKX.PREDICTOR chooses"),
        (("MODEL.MASKX.PREDICTOR", "fcn"), "mask predictor must be one of"),
        (("MODEL.POINT_HEAD.IN_FEATURES", ("p2", "p9")), "feature maps p9, but .* has p2, p3, p4"),
    ],
)
def test_bad_configurations_are_named(opts, words):
    with pytest.raises(ValueError, match=words):
        make_head(*opts)


def test_polygons_are_refused():
    rois = make_instances([[0], [], []], "gt")
    rois[0].gt_masks = PolygonMasks([[torch.rand(10) * 32]])
    with pytest.raises(ValueError, match=r"Image 0 .* has PolygonMasks.*INPUT.MASK_FORMAT bitmask"):
        run(lambda: make_head()(make_features(), rois, make_detector()))


def test_without_the_project_only_this_head_is_missing(monkeypatch, make_model):
    cfg = small_cfg()
    monkeypatch.delattr(projects, "point_rend")
    monkeypatch.setitem(sys.modules, "detectron2.projects.point_rend", None)
    with pytest.raises(ImportError, match=r"needs detectron2\.projects\.point_rend") as caught:
        MaskXPointRendMaskHead(cfg, SHAPES)
    assert "MODEL.ROI_MASK_HEAD.NAME MaskXMaskHead" in str(caught.value)
    make_model()
