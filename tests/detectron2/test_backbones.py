import pytest
import torch
from detectron2.modeling import build_backbone

from maskx.core import backbones
from maskx.core.backbones import VGG16, DilatedResNet, SmallResNet
from maskx.core.image_classifier import LayerTaps
from maskx.core.vit import timm_vit
from maskx.detectron2 import MaskXResNet, MaskXSmallResNet, MaskXVGG16, MaskXViT


@pytest.fixture
def loaded(monkeypatch):
    """Names of the ImageNet weights that were asked for; nothing is downloaded."""
    names = []
    monkeypatch.setattr(
        backbones, "_load_imagenet_weights", lambda _, name, weights, **__: names.append(name)
    )
    return names


@pytest.mark.parametrize(
    ("name", "opts", "plain"),
    [
        ("MaskXSmallResNet", (), lambda: SmallResNet(output_stride=8)),
        (
            "MaskXSmallResNet",
            ("MODEL.MASKX.BACKBONE.OUTPUT_STRIDE", 4),
            lambda: SmallResNet(output_stride=4),
        ),
        ("MaskXResNet", (), lambda: DilatedResNet(depth=18, output_stride=8)),
        (
            "MaskXResNet",
            (
                *("MODEL.RESNETS.DEPTH", 34, "MODEL.MASKX.BACKBONE.OUTPUT_STRIDE", 16),
                *("MODEL.MASKX.BACKBONE.FROZEN_NORM", True),
            ),
            lambda: DilatedResNet(depth=34, output_stride=16, frozen_norm=True),
        ),
        ("MaskXVGG16", (), lambda: VGG16(output_stride=8)),
        (
            "MaskXVGG16",
            ("MODEL.MASKX.BACKBONE.OUTPUT_STRIDE", 16),
            lambda: VGG16(output_stride=16),
        ),
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


def test_they_are_built_without_a_configuration():
    assert MaskXSmallResNet(widths=(4, 4, 4, 8)).output_shape()["layer4"].channels == 8
    assert MaskXResNet(depth=18, output_stride=16).output_shape()["layer4"].stride == 16
    with LayerTaps(MaskXVGG16(output_stride=8), ("conv5_3",)) as taps:
        assert taps.features == {}


def test_imagenet_weights_are_loaded_where_no_others_are(make_classifier_cfg, loaded):
    on = ("MODEL.MASKX.BACKBONE.PRETRAINED", True, "MODEL.BACKBONE.NAME")
    build_backbone(make_classifier_cfg(*on, "MaskXResNet"))
    build_backbone(make_classifier_cfg(*on, "MaskXVGG16"))
    assert loaded == ["resnet18", "vgg16"]
    build_backbone(make_classifier_cfg(*on, "MaskXResNet", "MODEL.WEIGHTS", "model.pth"))
    build_backbone(make_classifier_cfg("MODEL.BACKBONE.NAME", "MaskXResNet"))
    assert loaded == ["resnet18", "vgg16"]


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (
            ("MODEL.MASKX.BACKBONE.PRETRAINED", True),
            r"PRETRAINED is True, but MODEL\.BACKBONE\.NAME is MaskXSmallResNet: there are no w",
        ),
        (
            ("MODEL.MASKX.BACKBONE.FROZEN_NORM", True),
            r"FROZEN_NORM is True, .* MaskXSmallResNet: it is trained from scratch",
        ),
        (
            ("MODEL.BACKBONE.NAME", "MaskXVGG16", "MODEL.MASKX.BACKBONE.FROZEN_NORM", True),
            r"FROZEN_NORM is True, .* MaskXVGG16: it has no batch norm\. Set FROZEN_NORM False",
        ),
        (("MODEL.MASKX.BACKBONE.OUTPUT_STRIDE", 32), r"output_stride of SmallResNet .*4, 8, 16"),
        (
            ("MODEL.BACKBONE.NAME", "MaskXResNet", "MODEL.RESNETS.DEPTH", 19),
            r"depth of DilatedResNet",
        ),
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
    ],
)
def test_imagenet_weights_need_the_images_they_were_trained_on(make_classifier_cfg, loaded, opts):
    on = ("MODEL.BACKBONE.NAME", "MaskXResNet", "MODEL.MASKX.BACKBONE.PRETRAINED", True)
    words = r"INPUT\.FORMAT is .*, which expect RGB, \[123\.675, 116\.28, 103\.53\] and \[58\.395"
    with pytest.raises(ValueError, match=words):
        build_backbone(make_classifier_cfg(*on, *opts))
    assert loaded == []


@pytest.mark.parametrize(
    ("make", "feature", "gone"),
    [
        (lambda: MaskXSmallResNet(widths=(4, 4, 4, 8)), "layer2", "layer4.0"),
        (lambda: MaskXResNet(depth=18), "layer3", "layer4.0"),
        (MaskXVGG16, "conv2_2", "features.9"),
    ],
)
def test_layers_after_a_feature_map_can_be_dropped(make, feature, gone):
    backbone = make().eval()
    images = torch.rand(1, 3, 33, 48)
    with torch.no_grad():
        expected = backbone(images)
        modules = set(dict(backbone.named_modules()))
        backbone.drop_layers_after(feature)
        found = backbone(images)
    assert list(found) == list(expected)[: list(expected).index(feature) + 1]
    assert list(backbone.output_shape()) == list(found)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    left = set(dict(backbone.named_modules()))
    assert gone in modules - left
    assert set(backbone.layer_aliases.values()) <= left


VIT = ("MODEL.BACKBONE.NAME", "MaskXViT", "MODEL.MASKX.BACKBONE.VIT", "vit_tiny_patch16_224")


def test_a_vision_transformer_is_that_of_timm(make_classifier_cfg):
    pytest.importorskip("timm")
    cfg = make_classifier_cfg(*VIT, "MODEL.MASKX.BACKBONE.DROP_PATH", 0.5)
    backbone = build_backbone(cfg)
    assert isinstance(backbone, MaskXViT)
    assert backbone.transformer.blocks[-1].drop_path1.drop_prob == 0.5
    reference = timm_vit("vit_tiny_patch16_224").eval()
    reference.load_state_dict(backbone.state_dict())  # the same names and shapes
    images = torch.rand(1, 3, 40, 64)
    features = backbone.eval()(images)
    assert torch.equal(features["tokens"], reference(images)["tokens"])
    shape = backbone.output_shape()["tokens"]
    assert (shape.channels, shape.stride) == (192, 16)
    backbone.drop_layers_after("tokens")
    assert torch.equal(backbone(images)["tokens"], features["tokens"])


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (
            ("MODEL.MASKX.BACKBONE.VIT", "vit_b_16"),
            r"BACKBONE\.VIT is 'vit_b_16', which timm .* does not have\. Give one of timm\.list_mo",
        ),
        (("MODEL.MASKX.BACKBONE.FROZEN_NORM", True), r"MaskXViT: it has no batch norm"),
        (
            ("MODEL.MASKX.BACKBONE.PRETRAINED", True),
            r"weights of timm, which expect RGB, \[127\.5, 127\.5, 127\.5\] and \[127\.5",
        ),
    ],
)
def test_what_a_vision_transformer_does_not_have_is_named(make_classifier_cfg, opts, words):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=words):
        build_backbone(make_classifier_cfg(*VIT, *opts))


def test_weights_of_timm_are_loaded_where_no_others_are(make_classifier_cfg, monkeypatch):
    timm = pytest.importorskip("timm")
    create, asked = timm.create_model, []

    def without_download(name, *, pretrained, **options):
        asked.append(pretrained)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    on = (*VIT, "MODEL.MASKX.BACKBONE.PRETRAINED", True)
    images = ("MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3)
    build_backbone(make_classifier_cfg(*on, *images))
    build_backbone(make_classifier_cfg(*on, "MODEL.WEIGHTS", "model.pth"))
    assert asked == [True, False]
