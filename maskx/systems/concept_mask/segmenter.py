"""Stage 3 of ConceptMask: an image and the attention maps of a concept give the concept's mask.

"ConceptMask: Large-Scale Segmentation from Semantic Concepts" (Wang et al., ECCV 2018), section
4.3. The network never hears of which concept the maps are, so that it serves concepts it was not
trained with. The paper leaves the layers to a supplement: here they are a residual encoder and a
decoder with a skip from every resolution.

Shape legend:
    N: images; P: pairs of an image and a concept; A: attention maps of a pair; H, W: size of the
    images.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.backbones import SmallResNet
from maskx.core.layers import convolution_like, msra_fill
from maskx.core.timm_backbones import TimmBackbone


def build_encoder(
    name: str = "resnet50",
    *,
    widths: Sequence[int] = (16, 32, 48, 64),
    pretrained: bool = False,
) -> SmallResNet | TimmBackbone:
    """Make the encoder of a :class:`ConceptSegmenter`, of its largest output stride.

    Args:
        name: ``small``, or a model of timm that starts with a convolution, e.g. ``resnet50``.
        widths: of the stages of ``small``.
        pretrained: start from ImageNet weights, of an installed package or by download.
    """
    if name != "small":
        return TimmBackbone(name, pretrained=pretrained)
    if pretrained:
        raise ValueError(
            "There are no pretrained weights of the encoder 'small'. Name one of timm, such as "
            "resnet50, or train it from random weights."
        )
    return SmallResNet(widths=tuple(widths), output_stride=16)


def normalise_maps(maps: Tensor) -> Tensor:
    """Scale each (..., h, w) map to [0, 1] by its minimum and maximum; a constant map becomes 0.

    A map counts as constant when its values differ by no more than rounding does, as they may
    after a constant map was resized.
    """
    if maps.numel() == 0:
        return maps
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    span = high - low
    rounding = 8 * torch.finfo(maps.dtype).eps * torch.maximum(low.abs(), high.abs())
    varies = span > rounding
    return torch.where(varies, (maps - low) / torch.where(varies, span, 1), 0)


def resize_maps(maps: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    """Resize (N, C, h, w) maps or images bilinearly to `size`, (H, W).

    Args:
        maps: float.
        size: of the result.
        antialias: average what is made smaller, as Pillow does; for images.
    """
    if maps.numel() == 0:
        return maps.new_zeros(*maps.shape[:2], *size)
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(
        maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias
    )


def mean_maps(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Make of the maps of all attention sizes those that are shown and measured.

    Each is brought to `size` and then to [0, 1], as the segmenter gets them; the mean is taken of
    what results.

    Args:
        maps: for each attention size (N, C, h, w).
        size: of the result, (H, W).

    Returns:
        (N, C, H, W) in [0, 1].
    """
    return sum(normalise_maps(resize_maps(each, size)) for each in maps) / len(maps)


class ConceptSegmenter(nn.Module):
    """Encoder-decoder with skips on an image and the attention maps of one concept.

    The first convolution has 3 + A input channels. It is computed as the sum of one on the image,
    once for all concepts of the image, and one on the attention maps.

    Args:
        encoder: of :func:`build_encoder`. Its first convolution becomes ``image_stem``.
        num_maps: A.
        decoder_channels: of the decoder, from the deepest feature map of the encoder to the
            output of its first convolution.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_maps: int = 2,
        decoder_channels: Sequence[int] = (256, 128, 64, 64, 32),
    ) -> None:
        super().__init__()
        self.num_maps = num_maps
        stem = encoder.take_input_convolution()
        skips = [shape.channels for shape in encoder.feature_shapes.values()]
        skips = [*reversed(skips), stem.out_channels]
        if len(decoder_channels) != len(skips):
            raise ValueError(
                f"decoder_channels of ConceptSegmenter has {len(decoder_channels)} numbers, "
                f"{tuple(decoder_channels)}. Needed: {len(skips)}, one for each feature map of "
                f"{encoder} and one for its first convolution."
            )
        self.image_stem = stem
        self.attention_stem = convolution_like(stem, num_maps)
        msra_fill(self.attention_stem)
        self.encoder = encoder
        deeper = [0, *decoder_channels]
        self.decoder = nn.ModuleList(
            _DecoderBlock(before, skip, after)
            for before, skip, after in zip(deeper, skips, decoder_channels, strict=False)
        )
        self.classify = nn.Conv2d(decoder_channels[-1], 1, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        # A tenth of the pixels are of the concept. From an even start the first steps push all
        # pixels down, which may leave a last layer that only pushes down: masks below 0.5.
        nn.init.constant_(self.classify.bias, -2.2)

    def start_encoder(self, trained: nn.Module) -> None:
        """Take over the weights of another encoder of the same kind."""
        self.image_stem.load_state_dict(trained.take_input_convolution().state_dict())
        self.encoder.load_state_dict(trained.state_dict())

    def forward(self, images: Tensor, attention: Tensor, image_rows: Tensor) -> Tensor:
        """Predict the (P, H, W) mask logits of P pairs.

        Args:
            images: (N, 3, H, W), normalised.
            attention: (P, A, H, W) in [0, 1], see :func:`normalise_maps`.
            image_rows: (P,) the image of each pair.

        Returns:
            Logits. Without pairs empty, with a graph through every parameter.
        """
        if len(attention) == 0:
            # Batch norm refuses to train on nothing.
            zero = sum(parameter.sum() for parameter in self.parameters()) * 0
            return images.new_zeros(0, *images.shape[-2:]) + zero
        stem = self.image_stem(images)[image_rows] + self.attention_stem(attention)
        skips = [stem, *self.encoder(stem).values()]
        x = None
        for block in self.decoder:
            x = block(x, skips.pop())
        return resize_maps(self.classify(x), images.shape[-2:])[:, 0]


class _DecoderBlock(nn.Module):
    """Join what comes from the deeper block, made larger, with the skip; one convolution."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(skip_channels, out_channels, 1, bias=False)
        self.lateral_norm = nn.BatchNorm2d(out_channels)
        self.conv = nn.Conv2d(in_channels + out_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        msra_fill(self.lateral)
        msra_fill(self.conv)

    def forward(self, deeper: Tensor | None, skip: Tensor) -> Tensor:
        x = F.relu(self.lateral_norm(self.lateral(skip)))
        if deeper is not None:
            x = torch.cat([resize_maps(deeper, x.shape[-2:]), x], dim=1)
        return F.relu(self.norm(self.conv(x)))


def concept_segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the pixels of all pairs.

    Args:
        logits: (P, H, W).
        masks: (P, H, W) bool or {0, 1}, the union of all instances of the concept.

    Returns:
        Scalar. Zero, with a graph through everything that made ``logits``, without pairs.
    """
    # Half precision cannot hold a sum over all pixels.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="sum")
    return total / max(logits.numel(), 1)
