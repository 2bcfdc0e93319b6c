import torch

from maskx.modeling.backbones import SmallFPN


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
