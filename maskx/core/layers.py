"""Weight initialisation shared by the networks."""

from torch import nn


def msra_fill(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Initialise a layer as Caffe2's MSRAFill: N(0, 2 / fan_out), zero bias.

    This is fvcore's ``c2_msra_fill``; importing ``fvcore.nn`` for it would load all of
    ``torch.jit`` and print its deprecation warning to everybody.
    """
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
