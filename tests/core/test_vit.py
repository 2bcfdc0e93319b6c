import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from maskx.core.vit import ViTBackbone, timm_vit


class TinyTransformer(nn.Module):
    """What a transformer must have, with one token before the patches."""

    embed_dim, num_prefix_tokens = 3, 1

    def __init__(self, patch_size=(4, 4)):
        super().__init__()
        self.patch_embed = SimpleNamespace(patch_size=patch_size)

    def forward_features(self, images):
        patches = nn.functional.avg_pool2d(images, 4, ceil_mode=True).flatten(2).transpose(1, 2)
        return torch.cat((patches.new_full((len(patches), 1, 3), 99), patches), dim=1)


def test_tokens_are_laid_out_as_the_image_without_the_class_token():
    backbone = ViTBackbone(TinyTransformer())
    assert backbone.feature_shapes == {"tokens": (3, 4)}
    images = torch.randn(2, 3, 8, 18)
    expected = nn.functional.avg_pool2d(images, 4, ceil_mode=True)
    torch.testing.assert_close(backbone(images), {"tokens": expected})
    assert expected.shape == (2, 3, 2, 5)


def test_patches_must_be_square():
    with pytest.raises(ValueError, match="must be square, got 4 x 8"):
        ViTBackbone(TinyTransformer(patch_size=(4, 8)))


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"'vit_tiny_patch16_224' needs timm: pip install timm"):
        timm_vit("vit_tiny_patch16_224")


if importlib.util.find_spec("timm"):

    def test_a_transformer_of_timm_takes_images_of_any_size():
        torch.manual_seed(0)
        backbone = timm_vit("vit_tiny_patch16_224").eval()
        assert backbone.feature_shapes == {"tokens": (192, 16)}
        vit = backbone.transformer
        images = torch.randn(1, 3, 224, 224)
        expected = vit.forward_features(images)[:, 1:].transpose(1, 2).reshape(1, 192, 14, 14)
        torch.testing.assert_close(backbone(images)["tokens"], expected)
        # After the last layer norm, which starts as the identity.
        assert expected.mean(dim=1).abs().max() < 1e-4
        assert backbone(torch.randn(2, 3, 64, 104))["tokens"].shape == (2, 192, 4, 7)
