"""A feature pyramid on top of any backbone that says the shapes of its features."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from maskx.core.backbones import FeatureShape


class PyramidBackbone(nn.Module):
    """Backbone whose features are levels of a feature pyramid, under the names they had.

    "Feature Pyramid Networks for Object Detection" (Lin et al., CVPR 2017).

    Args:
        backbone: with ``feature_shapes``, from the finest to the coarsest.
        in_features: names of the features that the pyramid is built of; None for all.
        out_channels: channels of every level; 512 for LarvSeg on ResNet-50.

    Attributes:
        feature_shapes: channels and stride by name.

    Raises:
        ValueError: the backbone has no such feature.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        in_features: Sequence[str] | None = None,
        out_channels: int = 512,
    ) -> None:
        super().__init__()
        shapes = backbone.feature_shapes
        names = list(shapes if in_features is None else in_features)
        unknown = [name for name in names if name not in shapes]
        if unknown:
            raise ValueError(
                f"in_features of the pyramid has {', '.join(map(repr, unknown))}; "
                f"{type(backbone).__name__} has {', '.join(shapes)}."
            )
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork([shapes[name].channels for name in names], out_channels)
        self.feature_shapes = {
            name: FeatureShape(out_channels, shapes[name].stride) for name in names
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to the levels of the pyramid."""
        features = self.backbone(images)
        return self.fpn(OrderedDict((name, features[name]) for name in self.feature_shapes))
