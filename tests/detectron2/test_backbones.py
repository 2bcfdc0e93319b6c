import pytest
import torch
from detectron2.modeling import build_backbone

from maskx.core.backbones import VGG16, SmallResNet
from maskx.core.image_classifier import LayerTaps
from maskx.core.timm_backbones import TimmBackbone
from maskx.detectron2 import MaskXSmallResNet, MaskXTimm, MaskXTimmFPN, MaskXVGG16

KEYS = "MODEL.MASKX.BACKBONE."
TIMM = ("MODEL.BACKBONE.NAME", "MaskXTimm", KEYS + "NAME")


@pytest.mark.parametrize(
    ("name", "opts", "plain"),
    [
        ("MaskXSmallResNet", (), lambda: SmallResNet(output_stride=8)),
        ("MaskXSmallResNet", (KEYS + "OUTPUT_STRIDE", 4), lambda: SmallResNet(output_stride=4)),
        (
            "MaskXTimm",
            (KEYS + "NAME", "resnet18", KEYS + "OUTPUT_STRIDE", 8),
            lambda: TimmBackbone("resnet18", output_stride=8),
        ),
        (
            "MaskXTimm",
            (
                KEYS + "NAME",
                "resnet34",
                KEYS + "OUTPUT_STRIDE",
                16,
                KEYS + "FROZEN_NORM",
                True,
                KEYS + "FROZEN_STAGES",
                2,
            ),
            lambda: TimmBackbone("resnet34", output_stride=16, frozen_norm=True, frozen_stages=2),
        ),
        (
            "MaskXTimm",
            (KEYS + "NAME", "efficientnet_lite0", KEYS + "OUTPUT_STRIDE", 0),
            lambda: TimmBackbone("tf_efficientnet_lite0"),
        ),
        (
            "MaskXTimm",
            (KEYS + "NAME", "vit_tiny_patch16_224", KEYS + "OUTPUT_STRIDE", 0),
            lambda: TimmBackbone("vit_tiny_patch16_224"),
        ),
        ("MaskXVGG16", (KEYS + "OUTPUT_STRIDE", 8), lambda: VGG16(output_stride=8)),
        ("MaskXVGG16", (KEYS + "OUTPUT_STRIDE", 16), lambda: VGG16(output_stride=16)),
    ],
)
def test_they_are_the_plain_backbones(make_classifier_cfg, name, opts, plain):
    backbone = build_backbone(make_classifier_cfg("MODEL.BACKBONE.NAME", name, *opts)).eval()
    reference = plain().eval()
    reference.load_state_dict(backbone.state_dict())  # the same names and shapes
    images = torch.rand(1, 3, 50, 33)
    features, expected = backbone(images), reference(images)
    assert list(features) == list(expected) == list(backbone.output_shape())
    for key, shape in backbone.output_shape().items():
        assert torch.equal(features[key], expected[key])
        assert shape.channels == features[key].shape[1]
        assert shape.stride == reference.feature_shapes[key].stride
    assert backbone.layer_aliases == reference.layer_aliases
    assert backbone.size_divisibility == 0
    trained = [name for name, value in reference.named_parameters() if value.requires_grad]
    assert [name for name, value in backbone.named_parameters() if value.requires_grad] == trained


def test_they_are_built_without_a_configuration():
    assert MaskXSmallResNet(widths=(4, 4, 4, 8)).output_shape()["layer4"].channels == 8
    assert MaskXTimm("resnet18", output_stride=16).output_shape()["layer4"].stride == 16
    with LayerTaps(MaskXVGG16(output_stride=8), ("conv5_3",)) as taps:
        assert taps.features == {}
    network = MaskXTimm("resnet18")
    pyramid = MaskXTimmFPN(bottom_up=network, in_features=["layer2", "layer3"], out_channels=8)
    assert list(pyramid.output_shape()) == ["p3", "p4", "p5"]


def test_a_detector_gets_a_pyramid(make_classifier_cfg):
    cfg = make_classifier_cfg(
        "MODEL.BACKBONE.NAME",
        "MaskXTimmFPN",
        KEYS + "NAME",
        "efficientnet_lite0",
        "MODEL.FPN.IN_FEATURES",
        ["layer1", "layer2", "layer3"],
        "MODEL.FPN.OUT_CHANNELS",
        16,
        KEYS + "OUTPUT_STRIDE",
        0,
    )
    backbone = build_backbone(cfg).eval()
    features = backbone(torch.rand(1, 3, 64, 96))
    shapes = {
        name: (shape.channels, shape.stride) for name, shape in backbone.output_shape().items()
    }
    assert shapes == {"p2": (16, 4), "p3": (16, 8), "p4": (16, 16), "p5": (16, 32)}
    assert {name: tuple(each.shape[1:]) for name, each in features.items()} == {
        name: (16, 64 // stride, 96 // stride) for name, (_, stride) in shapes.items()
    }
    sum(each.sum() for each in features.values()).backward()
    assert all(value.grad is not None for value in backbone.parameters())
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "layer4"]
    with pytest.raises(ValueError, match=r"FPN\.IN_FEATURES is .*lite0'\) has layer1, .*layer4"):
        build_backbone(cfg)


def test_weights_are_loaded_where_no_others_are(make_classifier_cfg, downloads):
    on = (KEYS + "PRETRAINED", True, KEYS + "NAME", "resnet18", "MODEL.BACKBONE.NAME")
    build_backbone(make_classifier_cfg(*on, "MaskXTimm"))
    build_backbone(make_classifier_cfg(*on, "MaskXVGG16"))
    assert downloads == ["resnet18", "vgg16"]
    build_backbone(make_classifier_cfg(*on, "MaskXTimm", "MODEL.WEIGHTS", "model.pth"))
    build_backbone(make_classifier_cfg("MODEL.BACKBONE.NAME", "MaskXTimm"))
    assert downloads == ["resnet18", "vgg16"]


def test_a_file_of_weights_is_loaded(make_classifier_cfg, tmp_path):
    torch.save({}, tmp_path / "empty.pth")
    cfg = make_classifier_cfg(*TIMM, "resnet18", KEYS + "WEIGHTS", str(tmp_path / "empty.pth"))
    with pytest.raises(ValueError, match=r"empty\.pth' does not hold the weights of 'resnet18'"):
        build_backbone(cfg)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (
            (KEYS + "PRETRAINED", True),
            r"PRETRAINED is True, but MODEL\.BACKBONE\.NAME is MaskXSmallResNet: there are no w",
        ),
        (
            (KEYS + "WEIGHTS", "a.pth"),
            r"WEIGHTS is a\.pth, but .* MaskXSmallResNet: there are no weights.*Set WEIGHTS ''",
        ),
        (
            (KEYS + "FROZEN_NORM", True),
            r"FROZEN_NORM is True, .* MaskXSmallResNet: it is trained from scratch",
        ),
        (
            ("MODEL.BACKBONE.NAME", "MaskXVGG16", KEYS + "FROZEN_NORM", True),
            r"FROZEN_NORM is True, .* MaskXVGG16: it has no batch norm\. Set FROZEN_NORM False",
        ),
        ((KEYS + "OUTPUT_STRIDE", 32), r"output_stride of SmallResNet .*4, 8, 16"),
        ((*TIMM, "resnet19"), r"There is no backbone 'resnet19'"),
    ],
)
def test_what_a_backbone_does_not_have_is_named(make_classifier_cfg, opts, words):
    with pytest.raises(ValueError, match=words):
        build_backbone(make_classifier_cfg(*opts))


@pytest.mark.parametrize(
    "opts",
    [
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
        (KEYS + "NAME", "efficientnet_lite0"),
    ],
)
def test_weights_need_the_images_they_were_trained_on(make_classifier_cfg, downloads, opts):
    on = ("MODEL.BACKBONE.NAME", "MaskXTimm", KEYS + "PRETRAINED", True)
    means = r"(\[123\.675, 116\.28, 103\.53\] and \[58\.395|\[127\.5, 127\.5, 127\.5\] and)"
    words = rf"INPUT\.FORMAT is .*, which expect RGB, {means}"
    with pytest.raises(ValueError, match=words):
        build_backbone(make_classifier_cfg(*on, *opts))
    assert downloads == []
