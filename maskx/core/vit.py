"""Vision transformers as backbones that return a feature map.

"An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR 2021).
"""

from torch import Tensor, nn

from maskx.core.backbones import FeatureShape


class ViTBackbone(nn.Module):
    """The tokens of the last layer of a vision transformer, as a feature map called ``tokens``.

    The transformer is one of timm's, see :func:`timm_vit`, or any module with the same attributes:
    ``embed_dim``, ``num_prefix_tokens``, ``patch_embed.patch_size`` (height and width), and
    ``forward_features`` from (N, 3, H, W) images to (N, prefix + T, C) tokens after the last layer
    norm.

    Args:
        transformer: with square patches.

    Attributes:
        feature_shapes: channels and stride of ``tokens``.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        height, width = transformer.patch_embed.patch_size
        if height != width:
            raise ValueError(f"patches of ViTBackbone must be square, got {height} x {width}.")
        self.transformer = transformer
        self.feature_shapes = {"tokens": FeatureShape(transformer.embed_dim, height)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to ``{"tokens": (N, C, H / stride, W / stride)}``.

        A size that is no multiple of the stride is padded by the transformer at the bottom and at
        the right, so that the last row and column of tokens see less of the image.
        """
        stride = self.feature_shapes["tokens"].stride
        height, width = (-(-side // stride) for side in images.shape[-2:])
        tokens = self.transformer.forward_features(images)
        # Class token, and whatever else comes before the patches.
        tokens = tokens[:, self.transformer.num_prefix_tokens :]
        return {"tokens": tokens.transpose(1, 2).unflatten(2, (height, width))}


def timm_vit(
    name: str = "vit_base_patch16_384", *, pretrained: bool = False, drop_path: float = 0.1
) -> ViTBackbone:
    """Build a vision transformer of timm for images of any size.

    Position embeddings are resized (bicubic) to the size of each batch.

    Args:
        name: of the model. ``vit_base_patch16_384.augreg_in21k_ft_in1k`` names the weights the
            reference code of LarvSeg starts from: trained on ImageNet-21K, then on ImageNet-1K.
        pretrained: download the weights.
        drop_path: probability with which a layer is skipped in training.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"the vision transformer {name!r} needs timm: pip install timm (the extra 'vit'). Any "
            "other transformer can be given to maskx.core.vit.ViTBackbone directly."
        ) from error
    transformer = timm.create_model(
        name,
        pretrained=pretrained,
        num_classes=0,
        drop_path_rate=drop_path,
        dynamic_img_size=True,
        dynamic_img_pad=True,
    )
    return ViTBackbone(transformer)
