import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

from maskx.core.backbones import VGG16, DilatedResNet, SmallFPN, SmallResNet


def shuffle_norms(network):
    """Give every batch norm statistics and an affine map of its own, so that each one counts."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.2, 0.6)
            nn.init.normal_(layer.bias, std=0.1)
    return network


def torchvision_resnet(depth, **options):
    torch.manual_seed(depth)
    return shuffle_norms(torchvision.models.get_model(f"resnet{depth}", **options)).eval()


def load_trunk(backbone, network):
    """Load a network of torchvision but its classifier, strictly."""
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    backbone.load_state_dict(state)
    return backbone.eval()


def stages(network, images):
    """Feature maps of a ResNet of torchvision, stage by stage."""
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    features = {}
    for name in ("layer1", "layer2", "layer3", "layer4"):
        features[name] = x = getattr(network, name)(x)
    return features


def assert_same_features(features, expected):
    assert list(features) == list(expected)
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name])


def serve(monkeypatch, state):
    """Let torchvision 'download' this state dict; returns the calls it made."""
    calls = []

    def load(url, *args, **kwargs):
        calls.append((url, kwargs))
        return state

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", load)
    return calls


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
    [(SmallResNet, {}), (DilatedResNet, {"depth": 18}), (VGG16, {"output_stride": 8})],
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
    assert DilatedResNet(depth=50).layer_aliases == three
    assert DilatedResNet(depth=18).layer_aliases == {"C41": "layer4.0", "C42": "layer4.1"}


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_dilated_resnet_at_stride_32_is_the_network_of_torchvision(depth):
    reference = torchvision_resnet(depth)
    backbone = load_trunk(DilatedResNet(depth=depth, output_stride=32), reference)
    images = torch.randn(1, 3, 61, 75)
    with torch.no_grad():
        assert_same_features(backbone(images), stages(reference, images))


@pytest.mark.parametrize(
    ("output_stride", "replaced"), [(16, [False, False, True]), (8, [False, True, True])]
)
def test_dilated_bottlenecks_are_those_of_torchvision(output_stride, replaced):
    reference = torchvision_resnet(50, replace_stride_with_dilation=replaced)
    backbone = load_trunk(DilatedResNet(depth=50, output_stride=output_stride), reference)
    images = torch.randn(1, 3, 61, 75)
    with torch.no_grad():
        features = backbone(images)
        assert_same_features(features, stages(reference, images))
    for name, (channels, stride) in backbone.feature_shapes.items():
        assert features[name].shape == (1, channels, -(-61 // stride), -(-75 // stride))


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_computes_the_strided_features_at_more_positions(depth, output_stride):
    reference = torchvision_resnet(depth)
    backbone = load_trunk(DilatedResNet(depth=depth, output_stride=output_stride), reference)
    images = torch.randn(1, 3, 61, 75)
    with torch.no_grad():
        features = backbone(images)
        expected = stages(reference, images)
    step3, step4 = 16 // min(output_stride, 16), 32 // output_stride
    torch.testing.assert_close(features["layer3"][..., ::step3, ::step3], expected["layer3"])
    torch.testing.assert_close(features["layer4"][..., ::step4, ::step4], expected["layer4"])
    assert features["layer4"].shape[1:] == (
        backbone.feature_shapes["layer4"].channels,
        -(-61 // output_stride),
        -(-75 // output_stride),
    )


def test_frozen_norm_computes_the_norm_of_evaluation_and_learns_nothing():
    reference = torchvision_resnet(18)
    backbone = DilatedResNet(depth=18, output_stride=32, frozen_norm=True)
    load_trunk(backbone, reference).train()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in backbone.modules())
    assert any(isinstance(layer, FrozenBatchNorm2d) for layer in backbone.modules())
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert_same_features(backbone(images), stages(reference, images))
    assert all(p.dim() == 4 for p in backbone.parameters())


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_resnet_loads_the_weights_of_torchvision_without_executing_code(monkeypatch, frozen_norm):
    reference = torchvision_resnet(18)
    calls = serve(monkeypatch, reference.state_dict())
    backbone = DilatedResNet(depth=18, weights="DEFAULT", frozen_norm=frozen_norm).eval()
    [(url, options)] = calls
    assert url == torchvision.models.ResNet18_Weights.DEFAULT.url
    assert options["weights_only"] is True
    assert options["check_hash"] is True
    with torch.no_grad():
        images = torch.randn(1, 3, 33, 33)
        torch.testing.assert_close(
            backbone(images)["layer4"][..., ::4, ::4], stages(reference, images)["layer4"]
        )


def test_weights_that_lack_a_layer_are_refused(monkeypatch):
    state = torchvision_resnet(18).state_dict()
    del state["layer3.1.conv2.weight"]
    serve(monkeypatch, state)
    with pytest.raises(RuntimeError, match=r"Missing key.*layer3\.1\.conv2\.weight"):
        DilatedResNet(depth=18, weights="DEFAULT")


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


def test_vgg16_loads_the_weights_of_torchvision_without_executing_code(
    monkeypatch, torchvision_vgg16
):
    state = {**vgg_state(torchvision_vgg16), "classifier.0.weight": torch.zeros(1)}
    calls = serve(monkeypatch, state)
    backbone = VGG16(weights="DEFAULT")
    [(url, options)] = calls
    assert url == torchvision.models.VGG16_Weights.DEFAULT.url
    assert options["weights_only"] is True
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
        (
            lambda: DilatedResNet(depth=20),
            "depth of DilatedResNet must be one of 18, 34, 50, 101, got 20",
        ),
        (
            lambda: DilatedResNet(depth=18, output_stride=4),
            "output_stride of DilatedResNet must be one of 8, 16, 32, got 4",
        ),
        (lambda: VGG16(output_stride=32), "output_stride of VGG16 must be one of 8, 16, got 32"),
        (
            lambda: DilatedResNet(depth=18, weights="imagenet"),
            "weights of resnet18 must be one of 'IMAGENET1K_V1', 'DEFAULT', got 'imagenet'",
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
