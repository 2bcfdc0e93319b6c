import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FeaturePyramidNetwork

from maskx.core.backbone_choice import build_backbone, build_pyramid, choose_feature
from maskx.core.backbones import VGG16, FeatureShape, PyramidBackbone, SmallFPN, SmallResNet
from maskx.core.timm_backbones import TimmBackbone


def assert_same_features(features, expected):
    assert list(features) == list(expected)
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name])


def test_feature_maps_have_the_promised_strides_and_channels():
    backbone = SmallFPN(widths=(4, 8, 8, 16), out_channels=6)
    features = backbone(torch.randn(2, 3, 64, 96))
    assert list(features) == list(backbone.strides)
    for name, stride in backbone.strides.items():
        assert features[name].shape == (2, 6, 64 // stride, 96 // stride)
    sum(f.sum() for f in features.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_size_is_what_its_docstring_says():
    count = sum(p.numel() for p in SmallFPN().parameters())
    assert 0.95e6 < count < 1.05e6


@pytest.mark.parametrize("output_stride", [4, 8, 16])
def test_small_resnet_returns_the_shapes_it_names(output_stride):
    backbone = SmallResNet(widths=(4, 6, 8, 10), output_stride=output_stride)
    features = backbone(torch.randn(2, 3, 64, 96))
    assert (
        list(features) == list(backbone.feature_shapes) == ["layer1", "layer2", "layer3", "layer4"]
    )
    for name, (channels, stride) in backbone.feature_shapes.items():
        assert features[name].shape == (2, channels, 64 // stride, 96 // stride)
    assert backbone.feature_shapes["layer1"].stride == 4
    assert backbone.feature_shapes["layer4"] == (10, output_stride)
    features["layer4"].sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_small_resnet_dilates_its_last_stage_only():
    backbone = SmallResNet()
    dilations = {
        name: layer.dilation[0]
        for name, layer in backbone.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    }
    # The first convolution sees the stage before, which lies dense.
    assert {name for name, dilation in dilations.items() if dilation == 2} == {
        "layer4.0.conv2",
        *(f"layer4.{block}.conv{i}" for block in (1, 2) for i in (1, 2)),
    }
    assert set(dilations.values()) == {1, 2}


@pytest.mark.parametrize(("output_stride", "gmac"), [(4, 1.36), (8, 0.36), (16, 0.13)])
def test_small_resnet_costs_what_its_docstring_says(output_stride, gmac):
    backbone = SmallResNet(output_stride=output_stride).eval()
    assert 1.25e6 < sum(p.numel() for p in backbone.parameters()) < 1.35e6
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, 128, 128))
    assert abs(counter.get_total_flops() / 2e9 - gmac) < 0.005


@pytest.mark.parametrize(
    ("make", "options"),
    [(SmallResNet, {}), (VGG16, {"output_stride": 8})],
)
def test_aliases_name_modules_whose_output_is_the_feature(make, options):
    backbone = make(**options)
    modules = dict(backbone.named_modules())
    kept = []
    last_alias = list(backbone.layer_aliases)[-1]
    modules[backbone.layer_aliases[last_alias]].register_forward_hook(
        lambda layer, inputs, output: kept.append(output)
    )
    with torch.no_grad():
        features = backbone.eval()(torch.randn(1, 3, 37, 50))
    assert kept[0] is features[list(features)[-1]]
    assert all(name in modules for name in backbone.layer_aliases.values())


def test_the_last_stage_has_the_block_names_of_the_papers():
    three = {"C41": "layer4.0", "C42": "layer4.1", "C43": "layer4.2"}
    assert SmallResNet().layer_aliases == three


@pytest.fixture(scope="module")
def torchvision_vgg16():
    """Convolutions of torchvision's VGG-16, made without its 124 M other weights."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # the default would leave biases only
            nn.init.normal_(layer.bias, std=0.1)
    return layers.eval()


def vgg_state(layers):
    return {f"features.{key}": value for key, value in layers.state_dict().items()}


@pytest.mark.parametrize("size", [(64, 48), (45, 61)])
def test_vgg16_is_the_network_of_torchvision(torchvision_vgg16, size):
    backbone = VGG16()
    backbone.load_state_dict(vgg_state(torchvision_vgg16))
    images = torch.randn(2, 3, *size)
    # Positions of the ReLU before each of the five pools.
    ends = {"conv1_2": 4, "conv2_2": 9, "conv3_3": 16, "conv4_3": 23, "conv5_3": 30}
    with torch.no_grad():
        features = backbone(images)
        assert_same_features(
            features, {name: torchvision_vgg16[:end](images) for name, end in ends.items()}
        )
    for name, (channels, stride) in backbone.feature_shapes.items():
        assert features[name].shape == (2, channels, size[0] // stride, size[1] // stride)


def test_vgg16_has_the_layers_of_the_complete_network():
    with torch.device("meta"):
        complete = torchvision.models.vgg16().state_dict()
        state = VGG16().state_dict()
    shapes = {k: v.shape for k, v in complete.items() if k.startswith("features.")}
    assert {key: value.shape for key, value in state.items()} == shapes


def test_vgg16_at_stride_8_is_the_network_of_deeplab(torchvision_vgg16):
    backbone = VGG16(output_stride=8)
    backbone.load_state_dict(vgg_state(torchvision_vgg16))
    images = torch.randn(1, 3, 45, 61)
    with torch.no_grad():
        features = backbone(images)
        x = torchvision_vgg16[:23](images)
        torch.testing.assert_close(features["conv4_3"], x)
        x = F.max_pool2d(x, 3, stride=1, padding=1)
        for index in (24, 26, 28):
            conv = torchvision_vgg16[index]
            x = F.relu(F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2))
    torch.testing.assert_close(features["conv5_3"], x)
    assert backbone.feature_shapes["conv5_3"] == (512, 8)
    assert x.shape == (1, 512, 45 // 8, 61 // 8)


def test_vgg16_aliases_are_the_layers_after_their_relu():
    backbone = VGG16()
    assert len(backbone.layer_aliases) == 13
    modules = dict(backbone.named_modules())
    assert all(isinstance(modules[name], nn.ReLU) for name in backbone.layer_aliases.values())
    assert backbone.layer_aliases["conv4_3"] == "features.22"


@pytest.mark.parametrize("way", ["file", "download"])
def test_vgg16_starts_from_weights(monkeypatch, tmp_path, torchvision_vgg16, way):
    state = {**vgg_state(torchvision_vgg16), "classifier.0.weight": torch.zeros(1)}
    if way == "file":
        torch.save(state, tmp_path / "vgg.pth")
        options = {"pretrained": tmp_path / "vgg.pth"}
    else:
        options = {"pretrained": True}
        served = nn.Module()
        served.state_dict = lambda: state
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: served)
    backbone = VGG16(**options)
    assert torch.equal(backbone.features[28].weight, torchvision_vgg16[28].weight)


@pytest.mark.parametrize("size", [(32, 48), (45, 61)])
def test_switches_put_values_back_to_where_they_came_from(size):
    torch.manual_seed(1)
    backbone = VGG16().eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features, switches = backbone.forward_with_switches(images)
        assert_same_features(features, backbone(images))
    assert len(switches) == 4
    before_pools = list(features.values())[:4]
    for before, indices in zip(before_pools, switches, strict=True):
        height, width = before.shape[-2:]
        assert indices.shape[-2:] == (height // 2, width // 2)
        pooled = F.max_pool2d(before, 2)
        back = F.max_unpool2d(pooled, indices, 2, output_size=before.shape[-2:])
        # Slow reference: the first maximum of each window stays, all else is zero.
        windows = before[..., : height // 2 * 2, : width // 2 * 2]
        windows = windows.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2)).transpose(-3, -2)
        first = windows.flatten(-2).argmax(dim=-1)
        kept = F.one_hot(first, 4).unflatten(-1, (2, 2)) * windows
        kept = kept.transpose(-3, -2).flatten(-2).flatten(-3, -2)
        expected = torch.zeros_like(before)
        expected[..., : kept.shape[-2], : kept.shape[-1]] = kept
        assert torch.equal(back, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SmallResNet(output_stride=32),
            "output_stride of SmallResNet must be one of 4, 8, 16, got 32",
        ),
        (lambda: VGG16(output_stride=32), "output_stride of VGG16 must be one of 8, 16, got 32"),
        (
            lambda: SmallResNet(frozen_stages=6),
            "frozen_stages of SmallResNet must be one of 0, 1, 2, 3, 4, 5, got 6",
        ),
        (
            lambda: PyramidBackbone(SmallResNet(), in_features=("layer1", "layer5")),
            "has 'layer5'; SmallResNet has layer1, layer2",
        ),
        (
            lambda: VGG16(output_stride=8).forward_with_switches(torch.zeros(1, 3, 16, 16)),
            r"pool switches need VGG16\(output_stride=16\), got output_stride=8",
        ),
    ],
)
def test_what_a_backbone_cannot_do_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "feature", "gone"),
    [
        (lambda: SmallResNet(widths=(4, 4, 4, 8)), "layer2", "layer4.0"),
        (VGG16, "conv2_2", "features.9"),
    ],
)
def test_layers_after_a_map_can_be_dropped(make, feature, gone):
    backbone = make().eval()
    images = torch.rand(1, 3, 33, 48)
    with torch.no_grad():
        expected = backbone(images)
        modules = set(dict(backbone.named_modules()))
        backbone.drop_layers_after(feature)
        found = backbone(images)
    assert list(found) == list(expected)[: list(expected).index(feature) + 1]
    assert list(backbone.feature_shapes) == list(found)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    left = set(dict(backbone.named_modules()))
    assert gone in modules - left
    assert set(backbone.layer_aliases.values()) <= left


@pytest.mark.parametrize(
    ("backbone", "trained"),
    [
        (SmallResNet(frozen_stages=4), "layer4."),
        (VGG16(frozen_stages=5), ("features.24.", "features.26.", "features.28.")),
        (SmallResNet(frozen_stages=5), "nothing"),
    ],
)
def test_frozen_stages_learn_nothing_in_training(backbone, trained):
    backbone.train()
    parameters = {name for name, value in backbone.named_parameters() if value.requires_grad}
    assert parameters == {n for n, _ in backbone.named_parameters() if n.startswith(trained)}
    before = {k: v.clone() for k, v in backbone.state_dict().items() if not k.startswith(trained)}
    backbone(torch.randn(2, 3, 64, 64))
    after = backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_levels_are_those_of_a_pyramid_on_the_features():
    torch.manual_seed(0)
    backbone = SmallResNet(output_stride=16)
    network = PyramidBackbone(backbone, in_features=("layer1", "layer3"), out_channels=8).eval()
    assert network.feature_shapes == {"layer1": (8, 4), "layer3": (8, 16)}
    images = torch.randn(1, 3, 32, 48)
    levels = network(images)
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        "layer1": (1, 8, 8, 12),
        "layer3": (1, 8, 2, 3),
    }
    pyramid = FeaturePyramidNetwork([32, 96], 8)
    pyramid.load_state_dict(network.fpn.state_dict())
    features = backbone(images)
    expected = pyramid({name: features[name] for name in ("layer1", "layer3")})
    torch.testing.assert_close(dict(levels), dict(expected))


@pytest.mark.parametrize(
    ("name", "network", "last", "shape"),
    [
        ("small", SmallResNet, "layer4", FeatureShape(128, 8)),
        ("vgg16", VGG16, "conv5_3", FeatureShape(512, 16)),
        ("resnet18", TimmBackbone, "layer4", FeatureShape(512, 8)),
        ("efficientnet_lite0", TimmBackbone, "layer4", FeatureShape(320, 8)),
        ("pvt_v2_b0", TimmBackbone, "layer4", FeatureShape(256, 32)),
    ],
)
def test_a_name_makes_its_network(name, network, last, shape):
    backbone = build_backbone(name)
    assert type(backbone) is network
    assert choose_feature(backbone) == (last, shape)


def test_a_name_makes_a_pyramid_of_undilated_maps():
    assert type(build_pyramid("small")) is SmallFPN
    network = build_pyramid("efficientnet_lite0", out_channels=16, frozen_stages=2).eval()
    assert network.out_channels == 16
    assert network.pixel_mean == (127.5, 127.5, 127.5)
    shapes = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32, "pool": 64}
    assert network.feature_shapes == {name: (16, stride) for name, stride in shapes.items()}
    with torch.no_grad():
        levels = network(torch.randn(1, 3, 128, 192))
    assert {name: tuple(level.shape[2:]) for name, level in levels.items()} == {
        name: (128 // stride, 192 // stride) for name, stride in shapes.items()
    }


def test_what_a_name_cannot_make_is_refused():
    with pytest.raises(ValueError, match=r"no backbone 'vgg'\. Allowed: 'small', 'vgg16', and"):
        build_backbone("vgg")
    for options in ({"pretrained": True}, {"pretrained": "weights.pth"}):
        with pytest.raises(ValueError, match=r"no pretrained weights of the backbone 'small'"):
            build_backbone("small", **options)
    backbone = SmallResNet()
    assert choose_feature(backbone, "layer3") == ("layer3", backbone.feature_shapes["layer3"])
    with pytest.raises(ValueError, match=r"in_feature of SmallResNet must be one of .*'layer9'"):
        choose_feature(backbone, "layer9")
