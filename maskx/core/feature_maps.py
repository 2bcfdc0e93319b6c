"""What networks ask of the feature maps of a backbone."""

from collections.abc import Mapping

from torch import Tensor, nn


def named_feature(features: Mapping[str, Tensor], name: str, backbone: nn.Module) -> Tensor:
    """Return the feature map of that name.

    Args:
        features: what the backbone returned.
        name: of the feature map.
        backbone: named in the error.

    Raises:
        ValueError: the backbone returned no such feature map.
    """
    if name not in features:
        raise ValueError(
            f"{type(backbone).__name__} has no feature {name!r}. Allowed: {', '.join(features)}."
        )
    return features[name]


def check_feature(backbone: nn.Module, name: str, channels: int) -> None:
    """Check that a backbone has a feature map of so many channels, as far as it says.

    Args:
        backbone: with ``feature_shapes``, as those of maskx have; any other is not checked.
        name: of the feature map.
        channels: of it.

    Raises:
        ValueError: it has no such feature map, or one of other channels.
    """
    shapes = getattr(backbone, "feature_shapes", None)
    if shapes is None:
        return
    if name not in shapes:
        raise ValueError(
            f"in_feature must be a feature of {type(backbone).__name__}, one of "
            f"{', '.join(shapes)}; got {name!r}."
        )
    if shapes[name].channels != channels:
        raise ValueError(
            f"in_channels must be the channels of {name!r}, {shapes[name].channels}; got "
            f"{channels}."
        )
