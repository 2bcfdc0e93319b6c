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
