import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork

from maskx.core.backbones import SmallResNet
from maskx.core.feature_pyramid import PyramidBackbone


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


def test_an_unknown_feature_is_refused():
    with pytest.raises(ValueError, match="has 'layer5'; SmallResNet has layer1, layer2"):
        PyramidBackbone(SmallResNet(), in_features=("layer1", "layer5"))
