import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transfer_pairs import (
    IMAGE_SIZE,
    NO_PAIRS,
    PAIR_IMAGES,
    PAIR_LABELS,
    make_images,
    share_of_losses_left,
)

from maskx.core.backbones import VGG16, SmallResNet
from maskx.systems.transfernet.decoder import TransposedDecoder, UnpoolingDecoder
from maskx.systems.transfernet.network import (
    FactoredAttention,
    FullyConnectedAttention,
    MapNorm,
    TransferNet,
    foreground_prob,
    label_loss,
    mask_loss,
    merge_label_masks,
    pair_target,
)

L, IGNORE = 4, 255
PARTS = ("encoder", "attention", "classifier", "decoder_norm", "decoder")


def make_encoder():
    """Random encoder whose running statistics are those of the images, as after training."""
    encoder = SmallResNet(widths=(4, 6, 8, 12))
    for _ in range(30):
        encoder(make_images())
    return encoder


def make_net(**changes):
    torch.manual_seed(0)
    arguments = {
        "in_feature": "layer4",
        "in_channels": 12,
        "num_classes": L,
        "attention": FactoredAttention(in_channels=12, num_classes=L, num_factors=8),
        "decoder": TransposedDecoder(stride=8, widths=(6, 5, 4, 3)),
        "hidden_channels": 7,
    }
    return TransferNet(make_encoder(), **(arguments | changes))


def make_targets():
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, 2, (3, *IMAGE_SIZE), generator=generator)
    targets[0, :5] = IGNORE
    return targets


def parts_with_gradient(net):
    """Names of the parts of which every parameter has a gradient, and of which some has."""
    every, some = set(), set()
    for part in PARTS:
        grads = [parameter.grad is not None for parameter in getattr(net, part).parameters()]
        if grads and all(grads):
            every.add(part)
        if any(grads):
            some.add(part)
    return every, some


def is_zero(gradient):
    return gradient is None or not gradient.any()


# Losses and targets


def test_pair_target_is_one_on_the_class_and_unknown_where_the_label_map_is():
    label_maps = torch.tensor([[[0, 1, 3]], [[3, IGNORE, 2]]])
    found = pair_target(label_maps, torch.tensor([1, 0, 1]), torch.tensor([2, 2, 0]))
    assert found.tolist() == [[[1, IGNORE, 0]], [[0, 0, 1]], [[0, IGNORE, 0]]]


def test_pair_target_of_many_classes():
    label_maps = torch.tensor([[[255, 65535, 300]]])
    found = pair_target(label_maps, torch.tensor([0, 0]), torch.tensor([254, 299]), ignore=65535)
    assert found.tolist() == [[[1, 255, 0]], [[0, 255, 1]]]


def test_label_loss_is_eq_6():
    logits = torch.randn(3, L, dtype=torch.float64)
    expected = 0
    for scores, label in zip(logits.tolist(), PAIR_LABELS.tolist(), strict=True):
        expected += math.log(sum(math.exp(score) for score in scores)) - scores[label]
    assert label_loss(logits, PAIR_LABELS).item() == pytest.approx(expected / 3)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), known=st.floats(0.1, 1))
def test_mask_loss_is_eq_8_over_the_known_pixels(seed, known):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 2, 4, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 2, (2, 4, 5), generator=generator)
    targets[torch.rand(2, 4, 5, generator=generator) > known] = IGNORE
    targets[0, 0, 0] = 1
    losses = []
    for pair, row, column in (targets != IGNORE).nonzero().tolist():
        scores = logits[pair, :, row, column].tolist()
        log_sum = math.log(sum(math.exp(score) for score in scores))
        losses.append(log_sum - scores[targets[pair, row, column]])
    expected = sum(losses) / len(losses)
    assert mask_loss(logits, targets).item() == pytest.approx(expected)


def test_losses_are_weighted_as_eq_9():
    net = make_net()
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    losses = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, make_targets())
    assert list(losses) == ["loss_labels", "loss_masks"]
    expected = label_loss(outputs.class_logits, PAIR_LABELS)
    torch.testing.assert_close(losses["loss_labels"], expected)
    expected = 2 * mask_loss(outputs.mask_logits, make_targets())
    torch.testing.assert_close(losses["loss_masks"], expected)


# Network


def slow_outputs(net, images):
    """Eq. 1 to 7 and 10 for each pair, from the layers of the network."""
    net.encoder.eval()
    rows = []
    for image, label in zip(PAIR_IMAGES.tolist(), PAIR_LABELS.tolist(), strict=True):
        maps = net.encoder(images[image : image + 1])["layer4"] * net.feature_scale
        v = net.attention(maps, torch.tensor([0]), torch.tensor([label])).flatten()
        a = maps[0].flatten(1).T  # Eq. 1, M x D
        alpha = v.exp() / v.exp().sum()
        z = a.T @ alpha
        s = a @ a.T @ alpha
        first, last = net.classifier[0], net.classifier[2]
        class_logits = last.weight @ (first.weight @ z + first.bias).relu() + last.bias
        decoded = s if net.decoder_input == "densified" else alpha
        if isinstance(net.decoder_norm, MapNorm):
            decoded = (decoded - decoded.mean()) / decoded.std(correction=0)
            decoded = decoded * net.decoder_norm.weight + net.decoder_norm.bias
        size = maps.shape[2:]
        mask_logits = net.decoder(decoded.reshape(1, 1, *size), NO_PAIRS, None, IMAGE_SIZE)[0]
        rows.append((alpha.reshape(size), s.reshape(size), class_logits, mask_logits))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("decoder_input", ["densified", "attention"])
@pytest.mark.parametrize("feature_scale", [0.0, 0.004])
def test_outputs_equal_the_equations_pair_by_pair(decoder_input, feature_scale):
    net = make_net(decoder_input=decoder_input, feature_scale=feature_scale).double()
    for module in (net.attention, net.classifier, net.decoder_norm, net.decoder):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    assert net.feature_scale == (feature_scale or 1)
    images = make_images().double()
    found = net(images, PAIR_IMAGES, PAIR_LABELS)
    *expected, expected_masks = slow_outputs(net, images)
    for value, slow in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(value, slow)
    # the normalisation has an eps of 1e-8 of the mean square
    torch.testing.assert_close(found.mask_logits, expected_masks, rtol=1e-3, atol=1e-4)
    assert found.mask_logits.std() > 0


@pytest.mark.parametrize("scale", [1e-5, 1, 1e5])
def test_map_norm_is_layer_norm_at_any_scale(scale):
    norm = MapNorm(3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    maps = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = F.group_norm(maps, 1, norm.weight.flatten(), norm.bias.flatten(), eps=0)
    torch.testing.assert_close(norm(maps * scale), expected)


def test_map_norm_of_a_constant_map_is_its_shift():
    maps = torch.zeros(2, 1, 3, 3, requires_grad=True)
    norm = MapNorm(1)
    for constant in (0, 0.1, 1 / 7e4):
        found = norm(maps + constant)
        assert found.abs().max() < 0.01
        found.sum().backward()
        assert maps.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-5, 1e3])
def test_map_norm_of_float16_is_that_of_float32(scale):
    maps = (torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * scale).half()
    found = MapNorm(3)(maps)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, MapNorm(3)(maps.float()))


def test_masks_are_predicted_of_the_wanted_pairs_only():
    net = make_net().eval()
    images = make_images()
    every = net(images, PAIR_IMAGES, PAIR_LABELS)
    wanted = torch.tensor([True, False, True])
    some = net(images, PAIR_IMAGES, PAIR_LABELS, wanted)
    assert every.mask_logits.shape == (3, 2, *IMAGE_SIZE)
    torch.testing.assert_close(some.mask_logits, every.mask_logits[wanted])
    torch.testing.assert_close(some.class_logits, every.class_logits)


def test_the_encoder_runs_once_per_image():
    net = make_net()
    seen = []
    net.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    net(make_images(), PAIR_IMAGES.repeat(4), PAIR_LABELS.repeat(4))
    assert seen == [2]


def test_paper_form_with_vgg16_switches_and_fully_connected_attention():
    torch.manual_seed(0)
    net = TransferNet(
        VGG16(),
        in_feature="conv5_3",
        in_channels=512,
        num_classes=L,
        attention=FullyConnectedAttention(
            in_channels=512, num_classes=L, feature_size=(2, 3), num_factors=16
        ),
        decoder=UnpoolingDecoder(),
        feature_scale=0.004,
    )
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    assert outputs.mask_logits.shape == (3, 2, *IMAGE_SIZE)
    losses = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, make_targets())
    sum(losses.values()).backward()
    assert parts_with_gradient(net)[0] == {"attention", "classifier", "decoder"}
    # a pair takes the switches of its own image, also among a few pairs only
    nn.init.normal_(net.decoder.first[0].bias)
    for conv in net.decoder.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    wanted = torch.tensor([False, True, False])
    with torch.no_grad():
        every = net(make_images(), PAIR_IMAGES, PAIR_LABELS).mask_logits
        some = net(make_images(), PAIR_IMAGES, PAIR_LABELS, wanted).mask_logits
    assert every.std() > 0.01
    torch.testing.assert_close(some, every[wanted], rtol=1e-4, atol=1e-4)


def test_the_scale_of_the_reference_is_of_pixels_that_are_not_divided():
    """VGG-16 without biases is homogeneous: what enters the decoder goes with the square."""
    encoder = VGG16()
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.bias)

    def decoder_input(scale, images):
        torch.manual_seed(0)
        attention = FactoredAttention(in_channels=512, num_classes=L, num_factors=8)
        form = {"in_feature": "conv5_3", "in_channels": 512, "num_classes": L}
        form |= {"attention": attention, "decoder": UnpoolingDecoder()}
        net = TransferNet(encoder, feature_scale=scale, **form)
        nn.init.zeros_(net.attention.attend.weight)  # alike for both: the maps are uniform
        with torch.no_grad():
            return net(images, PAIR_IMAGES, PAIR_LABELS).densified

    of_reference = decoder_input(0.004, 58 * make_images())
    torch.testing.assert_close(decoder_input(0.004 * 58, make_images()), of_reference)
    too_little = decoder_input(0.004, make_images())
    torch.testing.assert_close(58**2 * too_little, of_reference)


@pytest.mark.parametrize("attention", ["factored", "fc"])
def test_training_finds_a_label_and_its_mask(attention):
    net = make_net()
    if attention == "fc":
        net.attention = FullyConnectedAttention(
            in_channels=12, num_classes=L, feature_size=(4, 6), num_factors=8
        )
    shares = share_of_losses_left(net, steps=100)
    assert all(share < 0.6 for share in shares.values())


# Where gradients go


def test_a_frozen_encoder_stays_in_evaluation_mode_and_gets_no_gradient():
    net = make_net().train()
    assert net.training
    assert not any(module.training for module in net.encoder.modules())
    before = {name: value.clone() for name, value in net.encoder.state_dict().items()}
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    sum(net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, make_targets()).values()).backward()
    assert parts_with_gradient(net) == ({"attention", "classifier", "decoder_norm", "decoder"},) * 2
    for name, value in net.encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_encoder_that_is_not_frozen_is_trained():
    net = make_net(freeze_encoder=False).train()
    assert all(module.training for module in net.encoder.modules())
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    sum(net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, make_targets()).values()).backward()
    assert parts_with_gradient(net)[0] == set(PARTS)


def test_the_loss_of_the_masks_reaches_the_attention_through_s():
    net = make_net()
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    losses = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, make_targets())
    losses["loss_masks"].backward()
    assert parts_with_gradient(net)[0] == {"attention", "decoder_norm", "decoder"}
    assert not is_zero(net.attention.attend.weight.grad)
    assert all(is_zero(parameter.grad) for parameter in net.classifier.parameters())


def test_the_loss_of_the_labels_does_not_reach_the_decoder():
    net = make_net()
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    losses = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, make_targets())
    losses["loss_labels"].backward()
    assert parts_with_gradient(net) == ({"attention", "classifier"},) * 2


def test_the_stage_attention_runs_and_trains_no_decoder():
    net = make_net(train_stage="attention")
    net.decoder.register_forward_hook(lambda *_: pytest.fail("the decoder ran"))
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    assert outputs.mask_logits is None
    losses = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS)
    assert list(losses) == ["loss_labels"]
    losses["loss_labels"].backward()
    trained = {name.partition(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"attention", "classifier"}
    assert parts_with_gradient(net) == ({"attention", "classifier"},) * 2


def test_a_checkpoint_of_the_stage_attention_starts_the_joint_stage():
    first = make_net(train_stage="attention")
    nn.init.normal_(first.attention.attend.weight)
    second = make_net()
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.attention.attend.weight, first.attention.attend.weight)
    assert all(parameter.requires_grad for parameter in second.decoder.parameters())


def test_a_frozen_attention_is_not_trained():
    net = make_net(freeze_attention=True)
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    sum(net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, make_targets()).values()).backward()
    assert parts_with_gradient(net) == ({"classifier", "decoder_norm", "decoder"},) * 2


@pytest.mark.parametrize("case", ["no masks", "no pair with a mask", "no pairs"])
def test_a_batch_without_supervision_gives_zero_with_graph_through_every_parameter(case):
    net = make_net()
    pair_images, pair_labels = (
        (NO_PAIRS, NO_PAIRS) if case == "no pairs" else (PAIR_IMAGES, PAIR_LABELS)
    )
    wanted, targets = None, torch.full((len(pair_images), *IMAGE_SIZE), IGNORE)
    if case == "no pair with a mask":
        wanted, targets = torch.zeros(3, dtype=torch.bool), targets[:0]
    outputs = net(make_images(), pair_images, pair_labels, wanted)
    losses = net.losses(outputs, pair_images, pair_labels, targets)
    assert losses["loss_masks"].item() == 0
    assert (losses["loss_labels"].item() == 0) == (case == "no pairs")
    losses["loss_masks"].backward(retain_graph=True)
    for part in ("attention", "decoder_norm", "decoder"):
        for parameter in getattr(net, part).parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
    losses["loss_labels"].backward()
    assert "classifier" in parts_with_gradient(net)[0]
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_masks_of_pairs_without_masks_change_nothing():
    net = make_net()
    targets = make_targets()
    targets[1:] = IGNORE
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    every = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, targets)
    wanted = torch.tensor([True, False, False])
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS, wanted)
    some = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, targets[wanted])
    torch.testing.assert_close(some, every)


# Errors


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="decoder_input must be one of 'densified', 'attention'"):
        make_net(decoder_input="sparse")
    with pytest.raises(ValueError, match="train_stage must be one of 'attention', 'joint'"):
        make_net(train_stage="decoder")
    with pytest.raises(ValueError, match="freeze_attention leaves only the classifier"):
        make_net(train_stage="attention", freeze_attention=True)


def test_an_encoder_without_switches_is_refused_for_unpooling():
    with pytest.raises(
        ValueError, match=r"SmallResNet gives none. Use VGG16, or TransposedDecoder"
    ):
        make_net(decoder=UnpoolingDecoder())


def test_an_unknown_feature_is_refused():
    net = make_net(in_feature="layer9")
    with pytest.raises(ValueError, match=r"no feature 'layer9'. Allowed: layer1, layer2"):
        net(make_images(), PAIR_IMAGES, PAIR_LABELS)


# Inference


def test_foreground_prob_halves_the_background():
    logits = torch.tensor([[0.6, 0.4], [0.5, 0.5]]).log()[:, :, None, None]
    # 0.4 / (0.4 + 0.3) and 0.5 / (0.5 + 0.25)
    assert foreground_prob(logits).flatten().tolist() == pytest.approx([4 / 7, 2 / 3])


def test_merged_masks_by_hand():
    # columns: both below 1/2; first wins; second wins; both below 1/2
    prob_fg = torch.tensor([[[0.30, 0.9, 0.6, 0.4]], [[0.32, 0.8, 0.7, 0.1]]])
    assert merge_label_masks(prob_fg, [6, 2]).tolist() == [[0, 7, 3, 0]]


def test_a_label_wins_from_a_third_on():
    """By the halved probability of the background."""
    logits = torch.tensor([[0.66, 0.34], [0.68, 0.32]]).log()[:, :, None, None]
    maps = [merge_label_masks(foreground_prob(logits[i : i + 1]), [4]).item() for i in range(2)]
    assert maps == [5, 0]


def test_no_labels_are_background():
    merged = merge_label_masks(torch.zeros(0, 2, 3), [])
    assert merged.tolist() == [[0, 0, 0]] * 2
    assert merged.dtype == torch.int64


def test_a_pixel_that_no_label_claims_is_background():
    assert merge_label_masks(torch.zeros(2, 1, 1), [0, 1]).tolist() == [[0]]
    # p_fg == p_bg is not more probable
    assert merge_label_masks(torch.full((1, 1, 1), 0.5), [0]) == 0
