import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from settings import pairs
from torch import nn
from torch.func import functional_call

from maskx.detectron2 import MaskXMaskHead
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights

K, D, C, P, CHANNELS = 5, 6, 8, 4, 3
SHAPE = ShapeSpec(channels=CHANNELS, height=P, width=P)


def make_head(**changes):
    torch.manual_seed(0)
    arguments = {"num_classes": K, "channels": C, "num_convs": 2, "detector_channels": D}
    head = MaskXMaskHead(SHAPE, **(arguments | changes))
    for parameter in head.parameters():  # as initialised, masks hardly depend on anything
        nn.init.normal_(parameter, std=0.2)
    return head


def make_detector():
    return DetectorWeights(torch.randn(K, D), torch.randn(K, 4 * D))


def make_rois(mask_type, counts=(4, 0, 3)):
    """Foreground proposals of three images, the second without any."""
    rois = []
    for count in counts:
        boxes = torch.rand(count, 4) * 12 + torch.tensor([0.0, 0.0, 16.0, 16.0])
        if mask_type is BitMasks:
            masks = BitMasks(torch.rand(count, 32, 32) > 0.5)
        else:
            masks = PolygonMasks([[torch.rand(10) * 32] for _ in range(count)])
        classes = torch.randint(K, (count,))
        rois.append(
            Instances((32, 32), proposal_boxes=Boxes(boxes), gt_classes=classes, gt_masks=masks)
        )
    return rois


@pytest.mark.parametrize("mask_type", [BitMasks, PolygonMasks])
@pytest.mark.parametrize("predictor", ["transfer", "class_specific"])
def test_with_all_masks_it_equals_the_head_and_the_loss_of_detectron2(predictor, mask_type):
    head, detector = make_head(predictor=predictor), make_detector()
    core = MaskRCNNConvUpsampleHead(SHAPE, num_classes=K, conv_dims=[C, C, C])
    rois, features = make_rois(mask_type), torch.randn(7, CHANNELS, P, P)
    weights = dict(head.named_parameters())
    if predictor == "transfer":
        w_seg = head.predictor.layers(torch.cat(detector, dim=1))
        weights["predictor.weight"] = w_seg[:, :, None, None]
        weights["predictor.bias"] = torch.zeros(K)
    weights = {name: weights[name] for name, _ in core.named_parameters()}

    with EventStorage():
        loss = head(features, rois, detector)["loss_mask"]
        expected = functional_call(core, weights, (features, rois))["loss_mask"]

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(loss, head.parameters())
    expected_gradients = torch.autograd.grad(expected, head.parameters())
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_inference_equals_that_of_detectron2():
    head, detector = make_head(predictor="class_specific").eval(), make_detector()
    core = MaskRCNNConvUpsampleHead(SHAPE, num_classes=K, conv_dims=[C, C, C]).eval()
    core.load_state_dict({k: v for k, v in head.state_dict().items() if k != "_extra_state"})
    features, classes = torch.randn(5, CHANNELS, P, P), [[3, 0], [], [4, 4, 1]]
    results = []
    for run in (lambda x: head(features, x, detector), lambda x: core(features, x)):
        instances = [Instances((9, 9), pred_classes=torch.tensor(c).long()) for c in classes]
        results.append([x.pred_masks for x in run(instances)])
    assert [tuple(x.shape) for x in results[0]] == [(2, 1, 8, 8), (0, 1, 8, 8), (3, 1, 8, 8)]
    torch.testing.assert_close(*results)


def test_a_checkpoint_of_mask_rcnn_initialises_the_head():
    core = MaskRCNNConvUpsampleHead(SHAPE, num_classes=K, conv_dims=[C, C, C])
    result = make_head(predictor="class_specific").load_state_dict(core.state_dict(), strict=True)
    assert not result.missing_keys
    head = make_head()
    result = head.load_state_dict(core.state_dict(), strict=False)
    assert set(result.missing_keys) == {
        name for name in head.state_dict() if name.startswith("predictor.")
    }
    assert torch.equal(head.deconv.weight, core.deconv.weight)


def test_loss_weight_and_the_number_of_rois_are_logged():
    detector, rois, features = make_detector(), make_rois(BitMasks), torch.randn(7, CHANNELS, P, P)
    with EventStorage() as storage:
        one = make_head()(features, rois, detector)["loss_mask"]
        half = make_head(loss_weight=0.5)(features, rois, detector)["loss_mask"]
        assert storage.latest()["maskx/num_mask_rois"] == (7, 0)
    torch.testing.assert_close(half, one * 0.5)


def test_another_roi_head_cannot_drive_it():
    with pytest.raises(ValueError, match="NAME MaskXROIHeads"):
        make_head()(torch.randn(7, CHANNELS, P, P), make_rois(BitMasks))


def test_config_keys_reach_the_head(make_cfg, tmp_path):
    cfg = make_cfg(
        *pairs(
            {
                "MODEL.MASKX.MLP": "bottleneck",
                "MODEL.MASKX.TRANSFER.INPUTS": "cls",
                "MODEL.MASKX.TRANSFER.LAYERS": 3,
                "MODEL.MASKX.TRANSFER.ACTIVATION": "relu",
                "MODEL.MASKX.TRANSFER.STOP_GRADIENT": False,
                "MODEL.MASKX.TRANSFER.MIX": 0.1,
                "MODEL.MASKX.TRANSFER.NORMALISE": True,
                "MODEL.MASKX.LOSS_WEIGHT": 2.0,
                "MODEL.ROI_MASK_HEAD.NORM": "GN",
                "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
            }
        )
    )
    head = MaskXMaskHead(cfg, SHAPE)
    assert head.mlp.reduce is not None
    assert head.predictor.inputs == "cls"
    assert not head.predictor.stop_gradient
    assert head.predictor.mix == 0.1
    assert head.predictor.normalise
    assert head.loss_weight == 2.0
    assert [type(m) for m in head.predictor.layers][1::2] == [nn.ReLU, nn.ReLU]
    assert isinstance(head.mask_fcn1.norm, nn.GroupNorm)
    assert head.predictor.layers[0].in_features == 24  # MODEL.ROI_BOX_HEAD.FC_DIM


@pytest.mark.parametrize("trunk", ["conv", "residual", "hourglass"])
def test_the_trunk_is_that_of_the_config(make_cfg, trunk):
    cfg = make_cfg("MODEL.MASKX.TRUNK", trunk, "MODEL.ROI_MASK_HEAD.NUM_CONV", 2)
    head = MaskXMaskHead(cfg, ShapeSpec(channels=CHANNELS, height=8, width=8))
    names = {name for name, _ in head.named_children() if name.startswith("mask_")}
    assert names == ({"mask_fcn1", "mask_fcn2"} if trunk == "conv" else {f"mask_{trunk}"})


@ROI_BOX_HEAD_REGISTRY.register()
class BoxHeadOfATest(nn.Module):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.output_shape = ShapeSpec(channels=2, height=3, width=3)


def test_any_box_head_gives_the_width_of_the_transfer(make_cfg):
    cfg = make_cfg("MODEL.ROI_BOX_HEAD.NAME", "BoxHeadOfATest")
    assert MaskXMaskHead(cfg, SHAPE).predictor.layers[0].in_features == 5 * 2 * 3 * 3


def test_word_vectors_are_looked_up_by_class_name(make_cfg, tiny_train, tmp_path):
    path = tmp_path / "vectors.txt"
    names = MetadataCatalog.get(tiny_train).thing_classes
    lines = [f"{name.replace(' ', '_')} {k} {k}\n" for k, name in enumerate(names)]
    path.write_text("".join(reversed(lines)))
    opts = ("MODEL.MASKX.TRANSFER.INPUTS", "vectors", "MODEL.MASKX.TRANSFER.VECTORS", str(path))
    head = MaskXMaskHead(make_cfg(*opts), SHAPE)
    assert head.predictor.class_vectors.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    with pytest.raises(ValueError, match="no data set 'nowhere'"):
        MaskXMaskHead(make_cfg(*opts, "DATASETS.TRAIN", ("nowhere",)), SHAPE)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("MODEL.MASKX.PREDICTOR", "fcn"), "mask predictor must be one of 'transfer'.*got 'fcn'"),
        (("MODEL.MASKX.MLP", "big"), "MLP branch must be one of"),
        (("MODEL.MASKX.TRUNK", "deep"), "mask trunk must be one of 'conv', .* got 'deep'"),
        (("MODEL.MASKX.TRUNK", "residual"), "num_convs must be even and at least 2, got 1"),
        (("MODEL.MASKX.TRANSFER.LAYERS", 0), "transfer layers must be one of 1, 2, 3, got 0"),
        (("MODEL.MASKX.TRANSFER.INPUTS", "vectors"), "MASKX.TRANSFER.VECTORS is empty"),
        (("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True), "MASKX.PREDICTOR class_agnostic"),
        (("MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""), "POOLER_TYPE is empty"),
    ],
)
def test_bad_configurations_are_named(make_cfg, opts, words):
    with pytest.raises(ValueError, match=words):
        MaskXMaskHead(make_cfg(*opts), SHAPE)
