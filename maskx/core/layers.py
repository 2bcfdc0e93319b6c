"""Weight initialisation shared by the networks."""

import copy

import torch
from torch import nn


def msra_fill(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Initialise a layer as Caffe2's MSRAFill: N(0, 2 / fan_out), zero bias.

    This is fvcore's ``c2_msra_fill``; importing ``fvcore.nn`` for it would load all of
    ``torch.jit`` and print its deprecation warning to everybody.
    """
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def convolution_like(layer: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    """Make a convolution without bias that has all of another but its input; not initialised."""
    if layer.groups != 1:
        raise ValueError(f"A convolution of {layer.groups} groups has no form for other inputs.")
    made = copy.deepcopy(layer)
    made.in_channels, made.bias = in_channels, None
    weight = layer.weight
    made.weight = nn.Parameter(
        torch.empty(weight.shape[0], in_channels, *weight.shape[2:], device=weight.device)
    )
    return made
