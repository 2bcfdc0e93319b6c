import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskx.systems.maskx_rcnn.mask_head import TRUNKS, Hourglass, MaskXHead, mask_loss, trunk_layers

C = 6


def make_trunk(trunk, **changes):
    torch.manual_seed(0)
    arguments = {"in_channels": 3, "channels": C, "num_convs": 2, "pool_size": 14}
    network = nn.Sequential()
    for name, layer in trunk_layers(trunk, **(arguments | changes)).items():
        network.add_module(name, layer)
    return network


def randomise(network):
    """Weights of one size and biases that are not zero: as initialised, branches are small."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


class Reference:
    """The trunks written out with functions, from the weights of a state dict.

    ``groups`` is that of the group norm after each convolution; None for none.
    """

    def __init__(self, network, groups=None):
        self.weights = {name: value.double() for name, value in network.state_dict().items()}
        self.groups = groups

    def conv(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        x = F.conv2d(F.pad(x, [weight.shape[-1] // 2] * 4), weight, bias)
        if self.groups is not None:
            scale, shift = self.weights[f"{name}.norm.weight"], self.weights[f"{name}.norm.bias"]
            parts = x.reshape(len(x), self.groups, -1)
            parts = parts - parts.mean(dim=2, keepdim=True)
            parts = parts / (parts.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
            x = parts.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]
        return x

    def pairs(self, name, x):
        for index in itertools.count():
            pair = f"{name}.{index}"
            if f"{pair}.conv1.weight" not in self.weights:
                return x
            skip = self.conv(f"{pair}.skip", x) if f"{pair}.skip.weight" in self.weights else x
            branch = self.conv(f"{pair}.conv2", self.conv(f"{pair}.conv1", x).clamp(min=0))
            x = (skip + branch).clamp(min=0)

    def hourglass(self, name, x, sizes):
        x = self.pairs(f"{name}.down", x)
        if len(sizes) == 1:
            return x
        pooled = x.new_empty(*x.shape[:2], sizes[1], sizes[1])
        for row, column in itertools.product(range(sizes[1]), repeat=2):
            window = x[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            pooled[..., row, column] = window.amax(dim=(-2, -1))
        inner = self.hourglass(f"{name}.inner", pooled, sizes[1:])
        window_of = torch.arange(sizes[0]) // 2
        return self.pairs(f"{name}.up", x + inner[..., window_of, :][..., window_of])


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("in_channels", [3, C])
@pytest.mark.parametrize("num_convs", [2, 4])
def test_residual_pairs_equal_a_slow_reference(num_convs, in_channels, groups):
    norm = None if groups is None else lambda channels: nn.GroupNorm(groups, channels)
    network = make_trunk("residual", num_convs=num_convs, in_channels=in_channels, norm=norm)
    randomise(network).double()
    x = torch.randn(3, in_channels, 5, 5, dtype=torch.float64)
    expected = Reference(network, groups).pairs("mask_residual", x)
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize(
    ("in_channels", "num_convs", "sizes"),
    [
        (3, 2, (14, 7, 4)),
        (C, 4, (14, 7, 4)),
        (C, 2, (7, 4)),
        (3, 2, (9, 5)),
        (3, 2, (28, 14, 7, 4)),
    ],
)
def test_an_hourglass_equals_a_slow_reference(in_channels, num_convs, sizes, groups):
    norm = None if groups is None else lambda channels: nn.GroupNorm(groups, channels)
    network = make_trunk(
        "hourglass", in_channels=in_channels, num_convs=num_convs, pool_size=sizes[0], norm=norm
    )
    randomise(network).double()
    x = torch.randn(2, in_channels, sizes[0], sizes[0], dtype=torch.float64)
    expected = Reference(network, groups).hourglass("mask_hourglass", x, sizes)
    torch.testing.assert_close(network(x), expected)
    # 2 * num_convs at every resolution but the smallest, which has num_convs.
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convs) == num_convs * (2 * len(sizes) - 1)


@pytest.mark.parametrize(("trunk", "reach"), [("conv", 2), ("residual", 2), ("hourglass", 13)])
def test_only_an_hourglass_sees_the_whole_roi(trunk, reach):
    """How far from a corner of the RoI an input pixel can be to influence the output there."""
    network = make_trunk(trunk)
    x = torch.randn(8, 3, 14, 14, requires_grad=True)
    network(x)[..., 0, 0].sum().backward()
    rows = (x.grad != 0).flatten(0, 1).any(dim=0).any(dim=1)
    assert rows.nonzero().max().item() == reach


@pytest.mark.parametrize("channels", [3, C])
def test_conv_layers_are_plain_convolutions(channels):
    network = make_trunk("conv", num_convs=3, channels=channels)
    assert list(dict(network.named_children())) == ["mask_fcn1", "mask_fcn2", "mask_fcn3"]
    x = expected = torch.randn(2, 3, 5, 5)
    for layer in network:
        expected = F.relu(F.conv2d(expected, layer.weight, layer.bias, padding=1))
    torch.testing.assert_close(network(x), expected)
    assert trunk_layers("conv", in_channels=3, channels=C, num_convs=0, pool_size=4) == {}


def test_the_conv_trunk_draws_the_random_numbers_of_its_first_version():
    """Seeds give the heads they always gave: the default initialisation, then MSRAFill."""
    network = make_trunk("conv")
    torch.manual_seed(0)
    for in_channels, layer in zip((3, C), network, strict=True):
        plain = nn.Conv2d(in_channels, C, 3)
        nn.init.kaiming_normal_(plain.weight, mode="fan_out", nonlinearity="relu")
        assert torch.equal(layer.weight, plain.weight)
        assert (layer.bias == 0).all()


def test_paper_size_parameter_counts():
    def millions(trunk, num_convs):
        with torch.device("meta"):
            layers = make_trunk(trunk, in_channels=256, channels=256, num_convs=num_convs)
        return round(sum(p.numel() for p in layers.parameters()) / 1e6, 2)

    # One 3x3 convolution has 256 * 256 * 9 weights and 256 biases: 0.59 M.
    assert millions("conv", 4) == millions("residual", 4) == 2.36
    assert millions("hourglass", 2) == 5.90
    assert millions("hourglass", 4) == 11.80


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("norm", [None, lambda channels: nn.GroupNorm(2, channels)])
def test_a_norm_replaces_every_bias_of_a_convolution(trunk, norm):
    convs = [m for m in make_trunk(trunk, norm=norm).modules() if isinstance(m, nn.Conv2d)]
    assert all((conv.bias is None) == (norm is not None) for conv in convs)
    assert all(isinstance(conv.norm, nn.GroupNorm) == (norm is not None) for conv in convs)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_head_learns_discs_at_the_learning_rate_of_the_paper(trunk):
    """Without norm too: 20 convolutions of an hourglass neither explode nor vanish."""
    torch.manual_seed(0)
    head = MaskXHead(
        in_channels=32,
        num_classes=1,
        channels=32,
        trunk=trunk,
        num_convs=4,
        predictor="class_agnostic",
    )
    optimizer = torch.optim.SGD(head.parameters(), lr=0.02, momentum=0.9)
    pattern, losses = torch.randn(32), []
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    for _ in range(60):
        centre_x, centre_y = (8 + 12 * torch.rand(2, 8, 1, 1)).unbind()
        radius = 4 + 6 * torch.rand(8, 1, 1)
        masks = (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2
        seen = F.avg_pool2d(masks[:, None].float(), 2) * pattern[:, None, None]
        logits = head(seen + torch.randn(8, 32, 14, 14), torch.zeros(8, dtype=torch.long))
        loss = mask_loss(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.69, abs=0.05)
    assert max(losses) < 1
    assert sum(losses[-10:]) / 10 < 0.5


@pytest.mark.parametrize("trunk", ["residual", "hourglass"])
@pytest.mark.parametrize("num_convs", [-2, 0, 3])
def test_pairs_need_an_even_number_of_convolutions(trunk, num_convs):
    words = f"'{trunk}' is made of pairs .* even and at least 2, got {num_convs}"
    with pytest.raises(ValueError, match=words):
        make_trunk(trunk, num_convs=num_convs)


def test_an_hourglass_needs_a_size_to_halve():
    with pytest.raises(ValueError, match="pool_size must be at least 7, got 6"):
        make_trunk("hourglass", pool_size=6)
    assert Hourglass(C, C, 2, 7).inner is not None


def test_trunks_are_named():
    with pytest.raises(ValueError, match=r"mask trunk must be one of 'conv', .* got 'unet'"):
        make_trunk("unet")
