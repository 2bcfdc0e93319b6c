import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskx.core.backbones import VGG16
from maskx.systems.transfernet.decoder import TransposedDecoder, UnpoolingDecoder, unpool

PAIR_IMAGES = torch.tensor([1, 0, 1])


def make_switches(image_size, channels=(4, 3, 2, 2)):
    """Switches of four poolings of random maps of two images, from the first to the last."""
    generator = torch.Generator().manual_seed(0)
    height, width = image_size
    switches = []
    for level, number in enumerate(reversed(channels)):
        plane = torch.randn(2, number, height >> level, width >> level, generator=generator)
        switches.append(F.max_pool2d(plane, 2, return_indices=True)[1])
    return switches


def convs_of(decoder):
    return [layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d)]


def test_unpooling_decoder_has_the_layers_of_the_reference():
    decoder = UnpoolingDecoder()
    shapes = [(conv.in_channels, conv.out_channels) for conv in convs_of(decoder)]
    assert shapes == [
        (1, 512),
        *[(512, 512), (512, 512), (512, 256)],
        *[(256, 256), (256, 256), (256, 128)],
        *[(128, 128), (128, 64)],
        *[(64, 64), (64, 64)],
        (64, 2),
    ]
    assert [conv.kernel_size for conv in convs_of(decoder)] == [(3, 3)] * 11 + [(1, 1)]
    assert sum(isinstance(layer, nn.ReLU) for layer in decoder.modules()) == 11
    # 9 * (512 + 2 * 512^2 + 512 * 256 + 2 * 256^2 + 256 * 128 + 128^2 + 128 * 64 + 2 * 64^2) + 128
    assert sum(conv.weight.numel() for conv in convs_of(decoder)) == 7_672_448
    assert sum(conv.bias.numel() for conv in convs_of(decoder)) == 2_754
    assert convs_of(decoder)[1].weight.std().item() == pytest.approx(0.01, rel=0.01)


def slow_unpooling(decoder, maps, pair_images, switches, image_size):
    """The reference's layers, pair by pair, with torch's own unpooling."""
    convs = iter(convs_of(decoder))
    rows = []
    for pair, image in enumerate(pair_images.tolist()):
        convs = iter(convs_of(decoder))
        x = next(convs)(maps[pair : pair + 1]).relu()
        for level, count in ((3, 3), (2, 3), (1, 2), (0, 2)):
            size = (image_size[0] >> level, image_size[1] >> level)
            x = F.max_unpool2d(x, switches[level][image : image + 1], 2, output_size=size)
            for _ in range(count):
                x = next(convs)(x).relu()
        rows.append(next(convs)(x))
    return torch.cat(rows)


@pytest.mark.parametrize("image_size", [(32, 48), (37, 61)])
def test_unpooling_decoder_equals_its_layers_written_out(image_size):
    torch.manual_seed(0)
    decoder = UnpoolingDecoder(channels=(4, 3, 2, 2))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    switches = make_switches(image_size)
    maps = torch.randn(3, 1, image_size[0] // 16, image_size[1] // 16)
    found = decoder(maps, PAIR_IMAGES, switches, image_size)
    assert found.shape == (3, 2, *image_size)
    assert found.std() > 0.01
    torch.testing.assert_close(
        found, slow_unpooling(decoder, maps, PAIR_IMAGES, switches, image_size)
    )


def test_unpool_is_the_inverse_of_pooling_at_the_maxima():
    plane = torch.rand(2, 3, 7, 8) + 1
    pooled, indices = F.max_pool2d(plane, 2, return_indices=True)
    found = unpool(pooled, indices, (7, 8))
    torch.testing.assert_close(found, F.max_unpool2d(pooled, indices, 2, output_size=(7, 8)))
    assert (found > 0).sum() == pooled.numel()
    torch.testing.assert_close(found[found > 0], plane[found > 0])


def test_unpool_refuses_maps_that_do_not_fit_the_switches():
    with pytest.raises(ValueError, match=r"maps of shape .* switches of shape .* conv5_3 of VGG16"):
        unpool(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2, dtype=torch.int64), (8, 8))


def test_unpooling_decoder_takes_the_switches_of_vgg16():
    torch.manual_seed(0)
    encoder, decoder = VGG16().eval(), UnpoolingDecoder()
    with torch.no_grad():
        features, switches = encoder.forward_with_switches(torch.randn(2, 3, 32, 48))
        maps = features["conv5_3"].mean(dim=1, keepdim=True)[PAIR_IMAGES]
        assert decoder(maps, PAIR_IMAGES, switches, (32, 48)).shape == (3, 2, 32, 48)


@pytest.mark.parametrize(
    ("stride", "widths", "image_size"),
    [(8, None, (32, 48)), (4, (6, 5, 4), (30, 41)), (1, (3,), (7, 5)), (16, None, (64, 32))],
)
def test_transposed_decoder_reaches_any_size(stride, widths, image_size):
    decoder = TransposedDecoder(stride=stride, widths=widths)
    maps = torch.randn(3, 1, -(-image_size[0] // stride), -(-image_size[1] // stride))
    assert decoder(maps, PAIR_IMAGES, None, image_size).shape == (3, 2, *image_size)


def test_transposed_decoder_has_the_widths_it_is_given():
    decoder = TransposedDecoder(stride=4, widths=(8, 6, 5))
    ups = [layer for layer in decoder.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert [(up.in_channels, up.out_channels) for up in ups] == [(8, 6), (6, 5)]
    assert decoder.predictor.in_channels == 5


def test_transposed_decoder_equals_its_layers_written_out():
    torch.manual_seed(0)
    decoder = TransposedDecoder(stride=4, widths=(4, 3, 2))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    convs = iter(convs_of(decoder))
    ups = iter([layer for layer in decoder.modules() if isinstance(layer, nn.ConvTranspose2d)])
    maps = torch.randn(3, 1, 5, 6)
    x = next(convs)(maps).relu()
    x = next(convs)(x).relu()
    for _ in range(2):
        up = next(ups)
        # each value spreads its 4 x 4 kernel around the 2 x 2 pixels that it covers
        assert up.kernel_size == (4, 4)
        x = F.conv_transpose2d(x, up.weight, up.bias, stride=2, padding=1).relu()
        x = next(convs)(x).relu()
    expected = next(convs)(x)
    assert next(convs, None) is None
    assert next(ups, None) is None
    found = decoder(maps, PAIR_IMAGES, None, (20, 24))
    torch.testing.assert_close(found, expected)
    smaller = F.interpolate(expected, size=(19, 22), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(maps, PAIR_IMAGES, None, (19, 22)), smaller)


def test_transposed_decoder_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match=r"stride is 12. Allowed: powers of two"):
        TransposedDecoder(stride=12)
    with pytest.raises(ValueError, match=r"widths are \(8, 4\). A stride of 8 needs 4 of them"):
        TransposedDecoder(stride=8, widths=(8, 4))


@pytest.mark.parametrize("kind", ["unpooling", "transposed"])
def test_no_pairs_reach_every_parameter(kind):
    if kind == "unpooling":
        decoder, switches = UnpoolingDecoder(channels=(4, 3, 2, 2)), make_switches((32, 32))
    else:
        decoder, switches = TransposedDecoder(stride=16), None
    none = torch.zeros(0, dtype=torch.int64)
    logits = decoder(torch.zeros(0, 1, 2, 2), none, switches, (32, 32))
    assert logits.shape == (0, 2, 32, 32)
    logits.sum().backward()
    assert all(not parameter.grad.any() for parameter in decoder.parameters())
