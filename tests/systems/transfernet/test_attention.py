import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskx.systems.transfernet.network import (
    FactoredAttention,
    FullyConnectedAttention,
    attended_features,
    attention_entropy,
    attention_weights,
    densified_attention,
    pair_matmul,
)

D, L, FACTORS, SIZE = 5, 4, 6, (3, 4)
PAIR_IMAGES = torch.tensor([1, 0, 1, 1])
PAIR_LABELS = torch.tensor([3, 0, 0, 2])


class LargestOutput(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def make_features(num_images=2, channels=D, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_images, channels, *size, generator=generator, dtype=torch.float64)
    return features.relu()


def make_attention(kind, size=SIZE):
    torch.manual_seed(1)
    arguments = {"in_channels": D, "num_classes": L, "num_factors": FACTORS}
    if kind == "fc":
        attention = FullyConnectedAttention(feature_size=size, **arguments)
    else:
        attention = FactoredAttention(**arguments)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention.double()


def columns(features, image):
    """A of one image as an M x D list of rows."""
    return features[image].reshape(features.shape[1], -1).T.tolist()


def test_fully_connected_attention_is_eq_4_with_the_extra_layer():
    attention, features = make_attention("fc"), make_features()
    found = attention(features, PAIR_IMAGES, PAIR_LABELS)
    for pair, (image, label) in enumerate(
        zip(PAIR_IMAGES.tolist(), PAIR_LABELS.tolist(), strict=True)
    ):
        one_hot = torch.zeros(L, dtype=torch.float64)
        one_hot[label] = 1
        by_feature = attention.feature_embed.weight @ features[image].reshape(-1)
        by_label = attention.label_embed.weight @ one_hot
        gate = (by_feature + attention.feature_embed.bias) * (by_label + attention.label_embed.bias)
        hidden = (attention.hidden.weight @ gate + attention.hidden.bias).clamp(min=0)
        v = attention.attend.weight @ hidden + attention.attend.bias
        torch.testing.assert_close(found[pair], v.reshape(SIZE))


def test_factored_attention_is_the_gate_at_each_position():
    attention, features = make_attention("factored"), make_features()
    found = attention(features, PAIR_IMAGES, PAIR_LABELS)
    assert found.shape == (4, *SIZE)
    for pair, (image, label) in enumerate(
        zip(PAIR_IMAGES.tolist(), PAIR_LABELS.tolist(), strict=True)
    ):
        by_label = attention.label_embed.weight[:, label] + attention.label_embed.bias
        for row in range(SIZE[0]):
            for column in range(SIZE[1]):
                weight = attention.feature_embed.weight[:, :, 0, 0]
                factors = weight @ features[image, :, row, column] + attention.feature_embed.bias
                v = attention.attend.weight.flatten() @ (factors * by_label).clamp(min=0)
                assert found[pair, row, column].item() == pytest.approx(v.item())


def test_numbers_of_parameters_are_those_of_the_reference():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        arguments = {"in_channels": 512, "num_classes": 80}
        fc = FullyConnectedAttention(feature_size=(20, 20), **arguments)
        factored = FactoredAttention(**arguments)
    assert fc.feature_embed.weight.numel() == 204_800 * 1024
    assert count(fc) == 204_801 * 1024 + 81 * 1024 + 1025 * 1024 + 1025 * 400
    assert count(factored) == 513 * 1024 + 81 * 1024 + 1024


@pytest.mark.parametrize("kind", ["fc", "factored"])
def test_features_are_embedded_once_per_image(kind):
    attention, features = make_attention(kind), make_features()
    seen = []
    attention.feature_embed.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    attention(features, PAIR_IMAGES.repeat(5), PAIR_LABELS.repeat(5))
    assert seen == [len(features)]


@pytest.mark.parametrize("kind", ["fc", "factored"])
def test_a_batch_without_pairs_reaches_every_parameter(kind):
    attention = make_attention(kind)
    none = torch.zeros(0, dtype=torch.int64)
    logits = attention(make_features(), none, none)
    assert logits.shape == (0, *SIZE)
    logits.sum().backward()
    assert all(not parameter.grad.any() for parameter in attention.parameters())


@pytest.mark.parametrize("kind", ["fc", "factored"])
def test_a_pair_does_not_depend_on_the_others(kind):
    attention, features = make_attention(kind), make_features()
    together = attention(features, PAIR_IMAGES, PAIR_LABELS)
    alone = attention(features[1:], torch.tensor([0]), PAIR_LABELS[:1])
    torch.testing.assert_close(together[:1], alone)


def test_factored_attention_moves_with_the_image_at_any_size():
    attention, features = make_attention("factored"), make_features(size=(6, 9))
    found = attention(features, PAIR_IMAGES, PAIR_LABELS)
    moved = attention(features.roll((2, 3), (2, 3)), PAIR_IMAGES, PAIR_LABELS)
    torch.testing.assert_close(moved, found.roll((2, 3), (1, 2)))


def test_fully_connected_attention_refuses_another_size():
    attention = make_attention("fc")
    # as many positions, but another shape
    with pytest.raises(ValueError, match=r"feature map of 4 x 3 positions. Allowed: 3 x 4"):
        attention(make_features(size=(4, 3)), PAIR_IMAGES, PAIR_LABELS)


def test_fully_connected_attention_refuses_a_checkpoint_of_another_size():
    state = torch.nn.ModuleDict({"attention": make_attention("fc", (4, 3))}).state_dict()
    model = torch.nn.ModuleDict({"attention": make_attention("fc")})
    with pytest.raises(ValueError, match=r"maps of 3 x 4 positions, but the checkpoint for 4 x 3"):
        model.load_state_dict(state)
    same = make_attention("fc")
    same.load_state_dict(make_attention("fc").state_dict())


def test_attention_weights_are_eq_3():
    logits = torch.randn(3, *SIZE, dtype=torch.float64)
    alpha = attention_weights(logits)
    for pair in range(3):
        exps = [math.exp(v) for v in logits[pair].flatten().tolist()]
        expected = [e / sum(exps) for e in exps]
        assert alpha[pair].flatten().tolist() == pytest.approx(expected)
    torch.testing.assert_close(alpha.sum(dim=(1, 2)), torch.ones(3, dtype=torch.float64))


def test_attended_features_are_eq_5_and_densified_attention_eq_7_and_10():
    features = make_features()
    alpha = attention_weights(torch.randn(4, *SIZE, dtype=torch.float64))
    z = attended_features(features, alpha, PAIR_IMAGES)
    s = densified_attention(features, z, PAIR_IMAGES)
    for pair, image in enumerate(PAIR_IMAGES.tolist()):
        a = columns(features, image)
        weights = alpha[pair].flatten().tolist()
        expected_z = [
            sum(w * row[channel] for w, row in zip(weights, a, strict=True)) for channel in range(D)
        ]
        assert z[pair].tolist() == pytest.approx(expected_z)
        expected_s = [sum(x * y for x, y in zip(row, expected_z, strict=True)) for row in a]
        assert s[pair].flatten().tolist() == pytest.approx(expected_s)
        gram = torch.tensor(a, dtype=torch.float64) @ torch.tensor(a, dtype=torch.float64).T
        torch.testing.assert_close(s[pair].flatten(), gram @ alpha[pair].flatten())


def test_neither_the_gram_matrix_nor_features_per_pair_are_made():
    size, channels, num_images, num_pairs = (20, 20), 8, 2, 40
    features = make_features(num_images, channels, size)
    pair_images = torch.arange(num_pairs) % num_images
    alpha = attention_weights(torch.randn(num_pairs, *size, dtype=torch.float64))
    alpha.requires_grad_()
    with LargestOutput() as largest:
        z = attended_features(features, alpha, pair_images)
        densified_attention(features, z, pair_images).square().sum().backward()
    # P * M; the Gram matrix has M * M = 160 000, features per pair P * D * M = 128 000
    assert largest.numel == num_pairs * 400


@settings(max_examples=20, deadline=None)
@given(
    images=st.lists(st.integers(0, 3), max_size=7),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
)
def test_pair_matmul_equals_a_product_per_pair(images, rows, columns):
    pair_images = torch.tensor(images, dtype=torch.int64)
    left = torch.randn(len(images), rows, dtype=torch.float64, requires_grad=True)
    right = torch.randn(4, rows, columns, dtype=torch.float64, requires_grad=True)
    found = pair_matmul(left, right, pair_images)
    expected = (left[:, None] @ right[pair_images])[:, 0]
    torch.testing.assert_close(found, expected)
    found_grads = torch.autograd.grad(found.square().sum(), (left, right))
    expected_grads = torch.autograd.grad(expected.square().sum(), (left, right))
    torch.testing.assert_close(found_grads, expected_grads)


def test_products_are_float32_under_autocast():
    features = torch.full((1, 512, 2, 2), 300.0)
    alpha = torch.full((1, 2, 2), 0.25)
    image = torch.tensor([0])
    with torch.autocast("cpu", dtype=torch.float16):
        z = attended_features(features.half(), alpha.half(), image)
        s = densified_attention(features.half(), z, image)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s, torch.full((1, 2, 2), 512 * 300.0**2))


def test_entropy_is_one_for_a_uniform_map_and_zero_for_one_position():
    maps = torch.zeros(3, 2, 4)
    maps[0] = 1 / 8
    maps[1, 0, 2] = 1
    maps[2, 0, :2] = 1 / 2
    # log 2 / log 8
    torch.testing.assert_close(attention_entropy(maps), torch.tensor([1, 0, 1 / 3]))
    assert attention_entropy(torch.zeros(0, 2, 4)).shape == (0,)
    assert attention_entropy(torch.ones(1, 1, 1)).tolist() == [0]


def test_attention_starts_almost_uniform():
    torch.manual_seed(0)
    features = F.relu(torch.randn(2, 64, 8, 8))
    for attention in (
        FactoredAttention(in_channels=64, num_classes=L, num_factors=128),
        FullyConnectedAttention(
            in_channels=64, num_classes=L, feature_size=(8, 8), num_factors=128
        ),
    ):
        alpha = attention_weights(attention(features, PAIR_IMAGES, PAIR_LABELS))
        assert (attention_entropy(alpha) > 0.99).all()
