import pytest

from maskx.core import backbone_choice as backbones
from maskx.core.backbone_choice import BACKBONES, RESNETS, build_backbone, choose_feature
from maskx.core.backbones import VGG16, DilatedResNet, FeatureShape, SmallResNet


@pytest.mark.parametrize(
    ("name", "network", "last", "shape"),
    [
        ("small", SmallResNet, "layer4", FeatureShape(128, 8)),
        ("vgg16", VGG16, "conv5_3", FeatureShape(512, 16)),
        ("resnet18", DilatedResNet, "layer4", FeatureShape(512, 8)),
        ("resnet50", DilatedResNet, "layer4", FeatureShape(2048, 8)),
    ],
)
def test_a_name_makes_its_network(name, network, last, shape):
    backbone = build_backbone(name, frozen_norm=False, pretrained=False)
    assert type(backbone) is network
    assert choose_feature(backbone) == (last, shape)


def test_every_name_is_that_of_a_backbone():
    assert BACKBONES == ("small", "vgg16", "resnet18", "resnet34", "resnet50", "resnet101")
    assert set(RESNETS) == set(BACKBONES) - {"vgg16"}


def test_norms_and_weights_are_those_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(backbones, "DilatedResNet", lambda **options: made.append(options))
    monkeypatch.setattr(backbones, "VGG16", lambda **options: made.append(options))
    build_backbone("resnet34", frozen_norm=True, pretrained=False)
    build_backbone("resnet101", frozen_norm=False, pretrained=True)
    build_backbone("vgg16", frozen_norm=True, pretrained=True)
    assert made == [
        {"depth": 34, "frozen_norm": True, "weights": None},
        {"depth": 101, "frozen_norm": False, "weights": "DEFAULT"},
        {"weights": "DEFAULT"},
    ]


def test_what_cannot_be_made_is_named():
    with pytest.raises(ValueError, match=r"one of small, vgg16, resnet18, .*; got 'vgg'"):
        build_backbone("vgg", frozen_norm=False, pretrained=False)
    with pytest.raises(ValueError, match=r"must be one of small, resnet18, .*; got 'vgg16'"):
        build_backbone("vgg16", frozen_norm=False, pretrained=False, allowed=RESNETS)
    with pytest.raises(ValueError, match=r"no pretrained weights of the backbone 'small'"):
        build_backbone("small", frozen_norm=False, pretrained=True)


def test_a_feature_is_found_by_its_name():
    backbone = SmallResNet()
    assert choose_feature(backbone, "layer3") == ("layer3", backbone.feature_shapes["layer3"])
    with pytest.raises(ValueError, match=r"in_feature of SmallResNet must be one of .*'layer9'"):
        choose_feature(backbone, "layer9")
