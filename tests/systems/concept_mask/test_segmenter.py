import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskx.core.backbones import SmallResNet
from maskx.core.timm_backbones import TimmBackbone
from maskx.systems.concept_mask.network import (
    ConceptSegmenter,
    concept_segmentation_loss,
    normalise_maps,
    resize_maps,
)

ROWS = torch.tensor([0, 0, 1])


def make_segmenter(**changes):
    torch.manual_seed(0)
    encoder = SmallResNet(widths=(4, 6, 8, 12), output_stride=16)
    return ConceptSegmenter(encoder, **({"decoder_channels": (8, 6, 6, 4, 4)} | changes))


def make_inputs(height=32, width=48):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, height, width, generator=generator)
    return images, torch.rand(3, 2, height, width, generator=generator), ROWS


# Maps


def test_maps_are_normalised_one_by_one():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[-4.0, 0.0], [-1.0, -2.0]]])
    expected = [[[0.0, 0.5], [0.25, 1.0]], [[0.0, 1.0], [0.75, 0.5]]]
    assert normalise_maps(maps).tolist() == expected


@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 1e-30])
def test_a_constant_map_becomes_zero_also_after_it_was_resized(value):
    constant = torch.full((1, 1, 10, 10), value)
    assert not normalise_maps(constant).any()
    resized = resize_maps(constant, (37, 23))
    assert resized.shape == (1, 1, 37, 23)
    assert not normalise_maps(resized).any()


def test_a_faint_map_is_not_a_constant_one():
    maps = torch.full((1, 4, 4), 1e-12)
    maps[0, 1, 2] = 2e-12
    assert normalise_maps(maps).sum() == 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 100), shift=st.floats(-10, 10))
def test_normalised_maps_span_0_to_1_whatever_scale_and_shift(seed, scale, shift):
    maps = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed))
    found = normalise_maps(maps * scale + shift)
    assert found.amin(dim=(1, 2)).tolist() == [0] * 3
    assert found.amax(dim=(1, 2)).tolist() == [1] * 3
    torch.testing.assert_close(found, normalise_maps(maps), atol=1e-4, rtol=0)


def test_no_maps_are_normalised_and_resized_to_none():
    assert normalise_maps(torch.zeros(2, 0, 4, 4)).shape == (2, 0, 4, 4)
    assert resize_maps(torch.zeros(2, 0, 4, 4), (8, 6)).shape == (2, 0, 8, 6)


def test_maps_are_resized_between_the_centres_of_their_cells():
    assert resize_maps(torch.tensor([[[[0.0, 1.0]]]]), (1, 4)).tolist() == [[[[0, 0.25, 0.75, 1]]]]


# Network


@torch.no_grad()
def test_the_two_stems_are_a_convolution_of_five_channels():
    segmenter = make_segmenter().eval()
    images, attention, rows = make_inputs()
    found = segmenter(images, attention, rows)

    weight = torch.cat([segmenter.image_stem.weight, segmenter.attention_stem.weight], dim=1)
    joint = nn.Conv2d(5, 4, 3, stride=2, padding=1, bias=False)
    joint.weight.copy_(weight)
    for p in range(3):
        x = joint(torch.cat([images[rows[p]], attention[p]])[None])
        skips = [x, *segmenter.encoder(x).values()]
        y = None
        for block in segmenter.decoder:
            y = block(y, skips.pop())
        y = resize_maps(segmenter.classify(y), (32, 48))[0, 0]
        torch.testing.assert_close(found[p], y, atol=1e-5, rtol=1e-4)


def test_masks_start_with_a_tenth_of_the_pixels():
    assert make_segmenter().classify.bias.sigmoid().item() == pytest.approx(0.1, abs=1e-3)


def test_the_image_goes_through_the_stem_once_for_all_its_concepts():
    segmenter = make_segmenter()
    seen = []
    segmenter.image_stem.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    images, attention, _ = make_inputs()
    segmenter(images[:1], attention, torch.zeros(3, dtype=torch.int64))
    assert seen == [1]


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (16, 64)])
@pytest.mark.parametrize(
    "make_encoder",
    [
        lambda: SmallResNet(widths=(4, 6, 8, 12), output_stride=16),
        lambda: TimmBackbone("resnet18"),
        lambda: TimmBackbone("tf_efficientnet_lite0"),
    ],
)
def test_masks_have_the_size_of_the_images(make_encoder, size):
    segmenter = ConceptSegmenter(make_encoder(), decoder_channels=(8, 6, 6, 4, 4))
    images, attention, rows = make_inputs(*size)
    logits = segmenter(images, attention, rows)
    assert logits.shape == (3, *size)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in segmenter.parameters())


def test_weights_of_the_encoder_serve_the_image():
    encoder = SmallResNet(widths=(4, 6, 8, 12), output_stride=16)
    stem, first = encoder.conv1, encoder.layer1
    segmenter = ConceptSegmenter(encoder, num_maps=1, decoder_channels=(8, 6, 6, 4, 4))
    assert segmenter.image_stem is stem
    assert segmenter.encoder.layer1 is first
    assert segmenter.attention_stem.weight.shape == (4, 1, 3, 3)


def test_the_mask_follows_the_attention_of_concepts_never_named():
    segmenter = make_segmenter()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    masks = torch.zeros(4, 32, 32)
    for p, (top, left) in enumerate([(0, 0), (16, 16), (0, 16), (16, 0)]):
        masks[p, top : top + 16, left : left + 16] = 1
    rows = torch.tensor([0, 0, 1, 1])
    attention = masks[:, None].expand(-1, 2, -1, -1)
    optimizer = torch.optim.Adam(segmenter.parameters(), lr=1e-2)
    for _ in range(70):
        optimizer.zero_grad()
        loss = concept_segmentation_loss(segmenter(images, attention, rows), masks)
        loss.backward()
        optimizer.step()
    assert loss < 0.15
    with torch.no_grad():  # the other image's attention, on this image
        moved = segmenter(images, attention, 1 - rows) > 0
    assert (moved == masks.bool()).float().mean() > 0.9


def test_no_pairs_give_a_zero_with_a_graph_through_every_parameter():
    segmenter = make_segmenter()
    logits = segmenter(torch.randn(2, 3, 32, 48), torch.zeros(0, 2, 32, 48), ROWS[:0])
    assert logits.shape == (0, 32, 48)
    loss = concept_segmentation_loss(logits, torch.zeros(0, 32, 48, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None for parameter in segmenter.parameters())


def test_channels_that_do_not_fit_the_encoder():
    with pytest.raises(ValueError, match=r"has 2 numbers, \(8, 4\)\. Needed: 5, one for each"):
        make_segmenter(decoder_channels=(8, 4))


# Loss


def test_the_loss_is_the_mean_binary_cross_entropy_of_all_pixels():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 3, 4, generator=generator) > 0.5
    terms = []
    for logit, inside in zip(logits.flatten().tolist(), masks.flatten().tolist(), strict=True):
        prob = 1 / (1 + math.exp(-logit))
        terms.append(-math.log(prob if inside else 1 - prob))
    assert concept_segmentation_loss(logits, masks).item() == pytest.approx(sum(terms) / 24)


def test_half_precision_logits_are_summed_in_full_precision():
    loss = concept_segmentation_loss(torch.zeros(1, 60, 60).bfloat16(), torch.ones(1, 60, 60))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
