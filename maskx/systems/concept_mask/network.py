"""The networks of ConceptMask: embedding (stage 1), refinement (2) and segmentation (3).

"ConceptMask: Large-Scale Segmentation from Semantic Concepts" (Wang et al., ECCV 2018), section 4.

Shape legend:
    N: images; V: concepts of the vocabulary; C: concepts that are asked for; k: length of a word
    vector; P: pairs of an image and a concept; A: attention maps of a pair; H, W: size of an image;
    h, w: size of a feature map, embedding map or attention map.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.backbones import SmallResNet, check_feature, named_feature
from maskx.core.global_mean import global_mean
from maskx.core.layers import convolution_like, msra_fill
from maskx.core.losses import label_pairs
from maskx.core.timm_backbones import TimmBackbone


class ConceptEmbedding(nn.Module):
    """A backbone and three fully connected layers, each with batch norm, into the word space.

    The layers see the average of a feature map, or every position of it: the same weights are then
    1x1 convolutions, and the batch norm is spatial.

    Args:
        backbone: maps (N, 3, H, W) images to a dictionary of feature maps.
        stride: of the feature map in pixels; None to ask the backbone's ``feature_shapes``.
        final_relu: ReLU after the last layer too, as the paper has it. No embedding then has a
            negative entry, which word vectors do have.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        in_feature: str,
        in_channels: int,
        dim: int,
        stride: int | None = None,
        hidden_channels: Sequence[int] = (2048, 2048),
        final_relu: bool = False,
    ) -> None:
        super().__init__()
        check_feature(backbone, in_feature, in_channels)
        widths = (in_channels, *hidden_channels, dim)
        if min(widths) < 1:
            raise ValueError(f"the layers must be at least 1 wide, got {widths}.")
        self.backbone, self.in_feature, self.dim = backbone, in_feature, dim
        shapes = getattr(backbone, "feature_shapes", None)
        if stride is None:
            stride = 1 if shapes is None else shapes[in_feature].stride
        self.stride = stride
        self.layers = nn.Sequential()
        for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            # The batch norm would subtract a bias again.
            fc = nn.Linear(before, after, bias=False)
            msra_fill(fc)
            self.layers.add_module(f"fc{number}", fc)
            self.layers.add_module(f"norm{number}", nn.BatchNorm1d(after))
            if final_relu or number < len(widths) - 1:
                self.layers.add_module(f"relu{number}", nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) normalised images to (N, k) embeddings."""
        return self._embed(self._features(images).mean(dim=(2, 3)))

    def embedding_map(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) normalised images to (N, k, h, w), an embedding for every position."""
        features = self._features(images)
        num_images, _, height, width = features.shape
        rows = self._embed(features.permute(0, 2, 3, 1).flatten(0, 2))
        return rows.reshape(num_images, height, width, self.dim).permute(0, 3, 1, 2)

    def _embed(self, rows: Tensor) -> Tensor:
        if len(rows) == 1 and self.training and isinstance(self.layers.norm1, nn.BatchNorm1d):
            raise ValueError(
                "the embedding is trained on a batch of one image and one position, which has no "
                "batch statistics. Use at least 2 images per batch (per worker, without "
                "synchronised batch norm)."
            )
        return self.layers(rows)

    def _features(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < self.stride:
            raise ValueError(
                f"images of {height} x {width} pixels are smaller than the stride {self.stride} of "
                f"the feature {self.in_feature!r}. Resize them to at least {self.stride} pixels "
                "on both sides."
            )
        return named_feature(self.backbone(images), self.in_feature, self.backbone)


def soft_topics(image_labels: Sequence[Sequence[int]], vectors: Tensor, idf: Tensor) -> Tensor:
    """Sum the word vectors of the tags of each image, weighted by how rare they are.

    ``t = sum a_i w_i``; its length has no part in the cosine loss. A tag counts once.

    Args:
        image_labels: for each image the concept indices of its tags; may be empty.
        vectors: (V, k) word vectors.
        idf: (V,), ``a_i = -log p(w_i)``.

    Returns:
        (N, k); zero for an image without tags.
    """
    pairs = label_pairs(image_labels, len(vectors), vectors.device)
    weighted = idf[pairs.classes, None] * vectors[pairs.classes]
    topics = vectors.new_zeros(len(image_labels), vectors.shape[1])
    return topics.index_add(0, pairs.images, weighted)


def embedding_loss(embeddings: Tensor, topics: Tensor) -> Tensor:
    """Mean of one minus the cosine between (N, k) embeddings and soft topics.

    An image whose topic is zero has no loss. Where all are, the loss is zero with a graph.
    """
    # In half precision a squared norm overflows, or loses its digits.
    embeddings = full_precision(embeddings)
    known = (topics != 0).any(dim=1)
    cosines = F.cosine_similarity(embeddings, topics.to(embeddings.dtype), dim=1, eps=1e-6)
    return global_mean(((1 - cosines) * known).sum(), known.sum())


def full_precision(values: Tensor) -> Tensor:
    """Return half precision as float32: sums over maps have more digits than it holds."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def initial_attention(embedding_map: Tensor, vectors: Tensor, *, cosine: bool = False) -> Tensor:
    """Compute the (N, C, h, w) attention maps of concepts from their word vectors (Eq. 1).

    Args:
        embedding_map: (N, k, h, w), see :meth:`ConceptEmbedding.embedding_map`.
        vectors: (C, k) word vectors, of any concepts; or (N, C, k), others for each image.
        cosine: the cosine, in [-1, 1], instead of the inner product of the paper.
    """
    columns = embedding_map.flatten(2)
    if cosine:
        columns, vectors = F.normalize(columns, dim=1), F.normalize(vectors, dim=-1)
    return (vectors @ columns).unflatten(2, embedding_map.shape[-2:])


class AttentionRefinement(nn.Module):
    """Two 1x1 convolutions over the initial attention maps of all concepts (section 4.2).

    ``V maps -> hidden channels, ReLU -> V``. The V maps are a product with the word vectors: the
    first convolution and these are multiplied to one matrix, and of the second only the rows that
    are asked for are used. No map of a concept that nobody asked for is made.

    In evaluation mode and without a gradient the product is computed once and used until either
    factor changes. Changes that PyTorch does not count, through ``.data`` or a NumPy view, need a
    call of ``train()`` or ``eval()``. The product is no part of the state dict.
    """

    def __init__(self, num_concepts: int, *, hidden_channels: int = 1024) -> None:
        super().__init__()
        if min(num_concepts, hidden_channels) < 1:
            raise ValueError(
                f"num_concepts is {num_concepts}, hidden_channels {hidden_channels}. Allowed: at "
                "least 1."
            )
        self.conv1 = nn.Conv2d(num_concepts, hidden_channels, kernel_size=1)
        self.conv2 = nn.Conv2d(hidden_channels, num_concepts, kernel_size=1)
        # By fan-in: the widths may differ 20 times, and the hidden layer keeps the size of its
        # input.
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_in", nonlinearity="relu")
        nn.init.normal_(self.conv2.weight, std=0.01)
        nn.init.zeros_(self.conv1.bias)
        nn.init.zeros_(self.conv2.bias)
        self._kept: _KeptProduct | None = None

    def forward(
        self, embedding_map: Tensor, vectors: Tensor, concepts: Tensor | None = None
    ) -> Tensor:
        """Compute refined maps: ``logits(hidden(embedding_map, vectors), concepts)``."""
        return self.logits(self.hidden(embedding_map, vectors), concepts)

    def hidden(self, embedding_map: Tensor, vectors: Tensor) -> Tensor:
        """Map (N, k, h, w) embeddings to the layer (N, hidden channels, h, w) of all concepts."""
        return self.hidden_of_product(embedding_map, self.product(vectors))

    def hidden_of_product(self, embedding_map: Tensor, product: Tensor) -> Tensor:
        """Compute :meth:`hidden` by a :meth:`product` made before."""
        # Not F.conv2d, which rounds float32 to TF32 on a GPU.
        columns = product @ embedding_map.flatten(2) + self.conv1.bias[:, None]
        return F.relu(columns).unflatten(2, embedding_map.shape[-2:])

    def logits(self, hidden: Tensor, concepts: Tensor | None = None) -> Tensor:
        """Compute the (N, C, h, w) logits of some concepts.

        Args:
            concepts: (C,) concept indices, or (N, C) others for each image; None for all V.
        """
        weight, bias = self.conv2.weight.flatten(1), self.conv2.bias
        if concepts is not None:
            # index_select refuses the -1 of an unseen concept, where indexing takes the last row.
            rows = concepts.flatten()
            weight = weight.index_select(0, rows).unflatten(0, concepts.shape)
            bias = bias.index_select(0, rows).unflatten(0, concepts.shape)
        return (weight @ hidden.flatten(2) + bias[..., None]).unflatten(2, hidden.shape[-2:])

    def pair_logits(self, hidden: Tensor, pair_images: Tensor, pair_concepts: Tensor) -> Tensor:
        """Compute the (P, h, w) logits of (P,) concepts, each in one of (P,) images."""
        # All of the batch's concepts in all of its images are less than P times the hidden layer.
        concepts, columns = pair_concepts.unique(return_inverse=True)
        return self.logits(hidden, concepts)[pair_images, columns]

    def train(self, mode: bool = True) -> "AttentionRefinement":
        """Set the mode; the product is then made anew."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the product out of copies and pickles."""
        return {**self.__dict__, "_kept": None}

    def product(self, vectors: Tensor) -> Tensor:
        """Multiply the first convolution and (V, k) word vectors to (hidden channels, k)."""
        factors = (self.conv1.weight, vectors)
        has_graph = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
        # A graph means that an optimiser step follows, and fused optimisers do not count theirs.
        # Nor are changes counted of tensors that were made in inference mode.
        if has_graph or self.training or any(factor.is_inference() for factor in factors):
            self._kept = None
            return _multiply(*factors)
        states = [(f.data_ptr(), f.device, f.dtype, f._version) for f in factors]
        if self._kept is None or self._kept.states != states:
            # Not an inference tensor, which no later graph could use.
            with torch.inference_mode(False), torch.no_grad():
                held = [factor.detach() for factor in factors]
                self._kept = _KeptProduct(_multiply(*factors), states, held)
        return self._kept.product


class _KeptProduct(NamedTuple):
    product: Tensor
    states: list[tuple[int, torch.device, torch.dtype, int]]  # of the factors when it was made
    held: list[Tensor]  # share the memory of the factors, so that nothing else gets its address


def _multiply(weight: Tensor, vectors: Tensor) -> Tensor:
    # Sums of V products, which are worth full precision: autocast would round both factors.
    with torch.autocast(weight.device.type, enabled=False):
        return weight.flatten(1) @ vectors


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
    """Resize (N, C, h, w) float maps or images bilinearly to a size (H, W).

    With `antialias` what is made smaller is averaged, as Pillow does; for images.
    """
    if maps.numel() == 0:
        return maps.new_zeros(*maps.shape[:2], *size)
    # A program traced past this would refuse images of just this size.
    if not torch.compiler.is_compiling() and maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(
        maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias
    )


def mean_maps(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Average the (N, C, h, w) maps of all attention sizes, each brought to (H, W) and [0, 1]."""
    return sum(normalise_maps(resize_maps(each, size)) for each in maps) / len(maps)


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


class ConceptSegmenter(nn.Module):
    """Encoder-decoder with skips on an image and the attention maps of one concept (section 4.3).

    It never hears of which concept the maps are, so that it serves concepts it was not trained
    with. The paper leaves the layers to a supplement: here they are a residual encoder and a
    decoder with a skip from every resolution. The first convolution has 3 + A input channels. It is
    computed as the sum of one on the image, once for all concepts of the image, and one on the
    attention maps.

    Args:
        encoder: of :func:`build_encoder`. Its first convolution becomes ``image_stem``.
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
        """Predict the (P, H, W) mask logits of P pairs; without pairs empty, with a graph.

        Args:
            images: (N, 3, H, W), normalised.
            attention: (P, A, H, W) in [0, 1], see :func:`normalise_maps`.
            image_rows: (P,) the image of each pair.
        """
        if attention.shape[0] == 0:  # len() would fix the number in a trace
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
    """Binary cross-entropy, mean over the pixels of all pairs; without pairs zero, with a graph.

    Args:
        logits: (P, H, W).
        masks: (P, H, W) bool or {0, 1}, the union of all instances of the concept.
    """
    logits = full_precision(logits)
    total = F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="sum")
    return global_mean(total, logits.numel())
