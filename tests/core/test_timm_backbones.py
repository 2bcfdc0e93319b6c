import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame
from torch import nn

from maskx.core.image_classifier import LayerTaps
from maskx.core.timm_backbones import TimmBackbone, can_dilate, expected_pixels, make_traceable

# Small networks of different kinds; the last map as (channels, stride).
KINDS = {
    "resnet10t": ("layer4", 512, 32),
    "tf_efficientnet_lite0": ("layer4", 320, 32),
    "mobilenetv3_small_050": ("layer4", 288, 32),
    "convnext_atto": ("layer4", 320, 32),
    "regnetx_002": ("layer4", 368, 32),
    "swin_tiny_patch4_window7_224": ("layer4", 768, 32),
    "densenet121": ("layer4", 1024, 32),
    "vit_tiny_patch16_224": ("tokens", 192, 16),
}


def shuffle_norms(network):
    """Give every batch norm statistics and an affine map of its own, so that each one counts."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.2, 0.6)
                nn.init.normal_(layer.bias, std=0.1)
    return network


def torchvision_resnet(depth, **options):
    torch.manual_seed(depth)
    return shuffle_norms(torchvision.models.get_model(f"resnet{depth}", **options)).eval()


def load_trunk(backbone, network):
    """Load a network of torchvision but its classifier, strictly."""
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    backbone.network.load_state_dict(state)
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


@pytest.mark.parametrize("name", KINDS)
def test_maps_have_the_names_shapes_and_channels_that_it_says(name):
    last, channels, stride = KINDS[name]
    backbone = TimmBackbone(name).eval()
    assert list(backbone.feature_shapes)[-1] == last
    assert backbone.feature_shapes[last] == (channels, stride)
    with torch.no_grad(), LayerTaps(backbone, tuple(backbone.layer_aliases)) as taps:
        features = backbone(torch.randn(2, 3, 96, 160))
    assert list(features) == list(backbone.feature_shapes)
    for key, (depth, step) in backbone.feature_shapes.items():
        assert features[key].shape == (2, depth, 96 // step, 160 // step)
        assert step == {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32, "tokens": 16}[key]
    # Class patterns read the blocks of the last stage.
    assert next(iter(taps.features)) == "C41"
    assert all(each.shape[-2:] == features[last].shape[-2:] for each in taps.features.values())
    torch.testing.assert_close(list(taps.features.values())[-1], features[last])


def test_blocks_of_the_last_stage_are_known_by_the_names_of_the_papers():
    three = {f"C4{i}": f"network.layer4.{i - 1}" for i in (1, 2, 3)}
    assert TimmBackbone("resnet50").layer_aliases == three
    lite = TimmBackbone("efficientnet_lite0").layer_aliases
    paths = ("network.blocks.5.0", "network.blocks.5.1", "network.blocks.5.2")
    paths = (*paths, "network.blocks.5.3", "network.blocks.6.0")
    assert lite == {f"C4{i}": path for i, path in enumerate(paths, start=1)}


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_a_resnet_is_the_network_of_torchvision(depth):
    reference = torchvision_resnet(depth)
    backbone = load_trunk(TimmBackbone(f"resnet{depth}"), reference)
    images = torch.randn(1, 3, 61, 75)
    with torch.no_grad():
        assert_same_features(backbone(images), stages(reference, images))


@pytest.mark.parametrize(
    ("output_stride", "replaced"), [(16, [False, False, True]), (8, [False, True, True])]
)
def test_dilated_bottlenecks_are_those_of_torchvision(output_stride, replaced):
    reference = torchvision_resnet(50, replace_stride_with_dilation=replaced)
    backbone = load_trunk(TimmBackbone("resnet50", output_stride=output_stride), reference)
    images = torch.randn(1, 3, 61, 75)
    with torch.no_grad():
        features = backbone(images)
        assert_same_features(features, stages(reference, images))
    for name, (channels, stride) in backbone.feature_shapes.items():
        assert features[name].shape == (1, channels, -(-61 // stride), -(-75 // stride))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_computes_the_strided_features_at_more_positions(output_stride):
    reference = torchvision_resnet(18)
    backbone = load_trunk(TimmBackbone("resnet18", output_stride=output_stride), reference)
    images = torch.randn(1, 3, 61, 75)
    with torch.no_grad():
        features, expected = backbone(images), stages(reference, images)
    step3, step4 = 16 // min(output_stride, 16), 32 // output_stride
    torch.testing.assert_close(features["layer3"][..., ::step3, ::step3], expected["layer3"])
    torch.testing.assert_close(features["layer4"][..., ::step4, ::step4], expected["layer4"])
    assert backbone.feature_shapes["layer4"].stride == output_stride


def test_an_efficientnet_is_that_of_timm():
    torch.manual_seed(0)
    reference = shuffle_norms(timm.create_model("tf_efficientnet_lite0")).eval()
    backbone = TimmBackbone("efficientnet_lite0").eval()
    state = reference.state_dict()
    backbone.network.load_state_dict({key: state[key] for key in backbone.network.state_dict()})
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = reference.bn1(reference.conv_stem(images))
        torch.testing.assert_close(backbone(images)["layer4"], reference.blocks(x))
    assert backbone.pixel_mean == backbone.pixel_std == (127.5, 127.5, 127.5)


def test_tokens_of_a_transformer_are_laid_out_as_the_image():
    torch.manual_seed(0)
    backbone = TimmBackbone("vit_tiny_patch16_224").eval()
    images = torch.randn(1, 3, 224, 224)
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    reference.load_state_dict(backbone.network.model.state_dict())
    with torch.no_grad():
        expected = reference.forward_features(images)[:, 1:].transpose(1, 2)
        torch.testing.assert_close(backbone(images)["tokens"], expected.reshape(1, 192, 14, 14))
        # Padded at the bottom and at the right.
        assert backbone(torch.randn(2, 3, 64, 104))["tokens"].shape == (2, 192, 4, 7)


def test_maps_of_a_network_with_channels_last_are_turned():
    backbone = TimmBackbone("swin_tiny_patch4_window7_224").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = [each.permute(0, 3, 1, 2) for each in backbone.network(images)]
        for found, wanted in zip(backbone(images).values(), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_frozen_norm_computes_the_norm_of_evaluation_and_learns_nothing():
    reference = torchvision_resnet(18)
    backbone = TimmBackbone("resnet18", frozen_norm=True)
    load_trunk(backbone, reference).train()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in backbone.modules())
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert_same_features(backbone(images), stages(reference, images))
    assert all(p.dim() == 4 for p in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "frozen_stages", "trained"),
    [
        ("resnet10t", 1, {"layer1", "layer2", "layer3", "layer4"}),
        ("resnet10t", 3, {"layer3", "layer4"}),
        ("tf_efficientnet_lite0", 4, {"blocks.5", "blocks.6"}),
        ("convnext_atto", 2, {"stages_1", "stages_2", "stages_3"}),
        ("resnet10t", 5, set()),
        ("vit_tiny_patch16_224", 2, set()),
    ],
)
def test_frozen_stages_learn_nothing_in_training(name, frozen_stages, trained):
    torch.manual_seed(0)
    backbone = TimmBackbone(name, frozen_stages=frozen_stages).train()
    parameters = {k for k, v in backbone.named_parameters() if v.requires_grad}
    prefixes = tuple(f"network.{each}." for each in trained)
    assert parameters == {k for k, _ in backbone.named_parameters() if k.startswith(prefixes)}
    before = {k: v.clone() for k, v in backbone.state_dict().items() if not k.startswith(prefixes)}
    backbone(torch.randn(2, 3, 64, 64))
    after = backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    if trained and name != "convnext_atto":
        assert any(m.training and isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


def test_a_frozen_backbone_computes_in_training_what_it_computes_in_evaluation():
    backbone = TimmBackbone("resnet10t", frozen_stages=5)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_same_features(backbone.train()(images), backbone.eval()(images))


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "convnext_atto"])
def test_layers_after_a_map_can_be_dropped(name):
    torch.manual_seed(0)
    backbone = TimmBackbone(name, frozen_norm=True, frozen_stages=1).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(images)
    backbone.drop_layers_after("layer2")
    found = backbone(images)
    assert list(found) == list(backbone.feature_shapes) == ["layer1", "layer2"]
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])
    found["layer2"].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    assert not all(p.requires_grad for p in backbone.parameters())
    assert backbone.layer_aliases == {}


def test_the_input_convolution_can_be_taken_out():
    backbone = TimmBackbone("tf_efficientnet_lite0").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(images)
        layer = backbone.take_input_convolution()
        assert layer.in_channels == 3
        assert_same_features(backbone(layer(images)), expected)
    with pytest.raises(ValueError, match=r"does not start with one convolution"):
        backbone.take_input_convolution()


def test_blocks_are_skipped_with_the_probability_asked_for():
    backbone = TimmBackbone("vit_tiny_patch16_224", drop_path=0.5)
    assert backbone.network.model.blocks[-1].drop_path1.drop_prob == 0.5


def test_pixels_are_those_of_the_weights():
    assert expected_pixels("resnet50") == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert expected_pixels("vit_base_patch16_384.augreg_in21k_ft_in1k")[0] == (127.5,) * 3


def test_making_a_backbone_is_the_same_whether_its_form_is_known_or_not():
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(TimmBackbone("mobilenetv3_small_050", output_stride=16).state_dict())
    first, second = made
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_can_be_dilated_is_known():
    assert can_dilate("resnet18", 8)
    assert can_dilate("efficientnet_lite0", 16)
    assert not can_dilate("densenet121", 8)
    assert not can_dilate("vit_tiny_patch16_224", 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimmBackbone("resnet5"), r"no backbone 'resnet5'.*the closest: resnet5"),
        (
            lambda: TimmBackbone("resnet50.tv3_in1k"),
            r"no weights 'tv3_in1k' of the backbone 'resnet50'\. Allowed: .*resnet50\.tv2_in1k",
        ),
        (
            lambda: TimmBackbone("resnet18", output_stride=4),
            r"output_stride of resnet18 must be one of 8, 16, 32, got 4",
        ),
        (
            lambda: TimmBackbone("densenet121", output_stride=8),
            r"'densenet121' cannot have the output stride 8: timm's network has stride 32",
        ),
        (
            lambda: TimmBackbone("resnet10t", frozen_stages=6),
            r"frozen_stages of TimmBackbone\('resnet10t'\) must be one of 0, 1, 2, 3, 4, 5, got 6",
        ),
        (
            lambda: TimmBackbone("vit_tiny_patch16_224", frozen_stages=1),
            r"frozen_stages of .* must be one of 0, 2, got 1",
        ),
        (
            lambda: TimmBackbone("densenet121", drop_path=0.1),
            r"'densenet121' has no blocks to skip: set drop_path 0",
        ),
        (
            lambda: TimmBackbone("hiera_tiny_224")(torch.zeros(1, 3, 64, 64)),
            r"'hiera_tiny_224' takes images of 224 x 224 pixels only, got 64 x 64",
        ),
    ],
)
def test_what_a_backbone_cannot_do_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("output_stride", [None, 8])
def test_a_traceable_copy_computes_the_same(output_stride):
    torch.manual_seed(0)
    backbone = shuffle_norms(TimmBackbone("tf_efficientnet_lite0", output_stride=output_stride))
    copied = make_traceable(backbone.eval())
    for size in ((64, 96), (75, 107), (33, 58)):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected, found = backbone(image), copied(image)
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=0, rtol=0)


def test_it_is_traced_with_any_image_size():
    torch.manual_seed(0)
    sides = ((3, 2), (1, 1), (5, 2), (3, 1), (3, 2))  # of window and stride
    network = nn.Sequential(*(Conv2dSame(3, 3, side, stride) for side, stride in sides))
    sizes = {2: torch.export.Dim.DYNAMIC(min=32), 3: torch.export.Dim.DYNAMIC(min=32)}
    with torch.no_grad():
        program = torch.export.export(
            make_traceable(network), (torch.randn(1, 3, 75, 107),), dynamic_shapes=(sizes,)
        ).module()
        for size in ((64, 96), (97, 131), (43, 38)):
            image = torch.randn(1, 3, *size)
            torch.testing.assert_close(program(image), network(image))
