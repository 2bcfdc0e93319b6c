"""What tools/benchmark.py measures of ConceptMask: what the size of the vocabulary costs."""

import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Case, num_parameters
from maskx.core.timm_backbones import TimmBackbone
from maskx.core.word_table import WordTable
from maskx.systems.concept_mask.concept_sets import ConceptSplit
from maskx.systems.concept_mask.model import EmbeddingModel, RefinementModel, SegmentationModel
from maskx.systems.concept_mask.network import ConceptEmbedding, ConceptSegmenter
from maskx.systems.concept_mask.query import ConceptQuery

# Length of the word vectors; channels of the refinement; boxed concepts, of the paper.
_DIM, _HIDDEN, _NUM_BOXED = 512, 1024, 750
_FEATURES, _STRIDE = 2048, 32
# Negatives of a boxed concept.
_NUM_NEGATIVES = 300


class _Features(nn.Module):
    """A backbone that costs nothing: what it is given is its feature map."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"features": features}


def attention_cases(
    *, vocabularies: Sequence[int], num_concepts: int, image_size: int, device: torch.device
) -> Iterator[Case]:
    """Make attention maps of some concepts from the embedded image, for vocabularies of each size.

    The last case is the unfolded computation in the largest vocabulary, which makes all maps. Its
    name and settings say by how much its refined maps, in [0, 1], differ at most.

    Args:
        vocabularies: values of V; the first is the reference.
        num_concepts: that are asked for.
        image_size: side of the image in pixels, see :func:`attention_sizes`.
        device: where to run.
    """
    settings = {"num_concepts": num_concepts, "image_size": image_size}
    sides = [-(-size // _STRIDE) for size in attention_sizes(image_size)]
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, _DIM, side, side, generator=generator).to(device) for side in sides]
    for num_vocabulary in vocabularies:
        network = _network(_Features(), num_vocabulary, image_size=image_size).to(device).eval()
        query = _query(network, num_concepts)
        yield Case(
            f"folded, V = {num_vocabulary}",
            torch.no_grad()(lambda n=network, q=query: n.attention(maps, q)),
            num_parameters(network.refinement),
            settings | {"vocabulary": num_vocabulary},
        )
    refinement, indices = network.refinement, query.indices
    with torch.no_grad():
        pairs = [
            (
                refinement(each, network.vectors, indices).sigmoid(),
                _unfolded(network, each, indices),
            )
            for each in maps
        ]
    difference = max(float((folded - unfolded).abs().max()) for folded, unfolded in pairs)
    yield Case(
        f"unfolded, V = {num_vocabulary}, differs by {difference:.1e}",
        torch.no_grad()(lambda: [_unfolded(network, each, indices) for each in maps]),
        num_parameters(refinement),
        settings | {"vocabulary": num_vocabulary, "largest_difference": difference},
    )


def prediction_cases(
    *,
    vocabularies: Sequence[int],
    num_concepts: int,
    image_size: int,
    depth: int,
    device: torch.device,
) -> Iterator[Case]:
    """Predict the masks of some concepts in one image, all three networks.

    Args:
        vocabularies: values of V; the first is the reference.
        num_concepts: that are asked for.
        image_size: side of the image in pixels.
        depth: of the two ResNets.
        device: where to run.
    """
    settings = {"num_concepts": num_concepts, "image_size": image_size, "depth": depth}
    image = torch.randn(3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    image = image.to(device)
    for num_vocabulary in vocabularies:
        backbone = TimmBackbone(f"resnet{depth}", output_stride=_STRIDE)
        segmenter = ConceptSegmenter(TimmBackbone(f"resnet{depth}", output_stride=_STRIDE))
        network = _network(backbone, num_vocabulary, image_size=image_size, segmenter=segmenter)
        network = network.to(device).eval()
        query = _query(network, num_concepts)
        yield Case(
            f"V = {num_vocabulary}",
            lambda n=network, q=query: n.predict({"image": image}, q),
            sum(parameter.numel() for parameter in network.parameters()),
            settings | {"vocabulary": num_vocabulary},
        )


def training_cases(
    *, vocabularies: Sequence[int], num_images: int, image_size: int, device: torch.device
) -> Iterator[Case]:
    """Make training steps of stage 2 without a backbone: losses, gradients, SGD with momentum.

    The name and the settings of a case say by how much the peak memory of the process grew from
    before its network was made to after its first step. Memory that cases before it have freed is
    used again, so the growth of all cases together is what the largest takes.

    Args:
        vocabularies: values of V; the first is the reference.
        num_images: of the batch, with four boxed concepts each.
        image_size: side of the images in pixels.
        device: where to run.
    """
    side = -(-image_size // _STRIDE)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_images, _FEATURES, side, side, generator=generator).to(device)
    # The features take the place of the images, so that boxes are in their positions.
    boxes = torch.tensor([0.0, 0, side / 2, side / 2], device=device).expand(4, 4)
    shared = {"boxes": boxes, "box_rows": torch.arange(4, device=device)}
    for num_vocabulary in vocabularies:
        before = _peak_resident_bytes()
        network = _network(_Features(), num_vocabulary, image_size=image_size).to(device).train()
        num_boxed = len(network.split.boxed)
        samples = [
            shared | {"concepts": [(7 * n + j) % num_boxed for j in range(4)]}
            for n in range(num_images)
        ]
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)

        def step(network=network, optimizer=optimizer, samples=samples) -> None:
            losses = network.losses(features, samples)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        grown = _peak_resident_bytes() - before
        yield Case(
            f"V = {num_vocabulary}, process grew by {grown / 1e6:.0f} MB",
            step,
            num_parameters(network),
            {
                "vocabulary": num_vocabulary,
                "num_images": num_images,
                "image_size": image_size,
                "peak_resident_growth_bytes": grown,
            },
        )


def attention_sizes(image_size: int) -> tuple[int, int]:
    """Return the attention sizes for an image: the paper's 300 and 700 for one of 320 pixels."""
    return max(image_size * 15 // 16, _STRIDE), max(image_size * 35 // 16, _STRIDE)


def _network(
    backbone: nn.Module,
    num_vocabulary: int,
    *,
    image_size: int,
    segmenter: ConceptSegmenter | None = None,
) -> EmbeddingModel:
    """Make a network of stage 3 with a segmenter, or of stage 2."""
    torch.manual_seed(0)
    in_feature, in_channels = "features", _FEATURES
    if segmenter is not None:
        in_feature, in_channels = "layer4", backbone.feature_shapes["layer4"].channels
    embedding = ConceptEmbedding(backbone, in_feature=in_feature, in_channels=in_channels, dim=_DIM)
    num_boxed = min(_NUM_BOXED, num_vocabulary // 2)
    names = tuple(f"concept {index}" for index in range(num_vocabulary))
    vectors = torch.randn(num_vocabulary, _DIM).numpy()
    parts = {
        "table": WordTable(names, vectors, torch.ones(num_vocabulary).numpy()),
        "split": ConceptSplit(names, names[:num_boxed], ()),
        "hidden_channels": _HIDDEN,
        "attention_sizes": attention_sizes(image_size),
    }
    if segmenter is None:
        return RefinementModel(embedding, gamma=_gamma(num_vocabulary, num_boxed), **parts)
    return SegmentationModel(embedding, segmenter=segmenter, mask_size=image_size, **parts)


def _gamma(num_vocabulary: int, num_boxed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make weights of Eq. 4: each boxed concept has the next ones as negatives."""
    count = min(_NUM_NEGATIVES, num_boxed - 1)
    counts = torch.zeros(num_vocabulary + 1, dtype=torch.int64)
    counts[1 : num_boxed + 1] = count
    rows = torch.arange(num_boxed)[:, None]
    indices = ((rows + 1 + torch.arange(count)) % num_boxed).flatten()
    return counts.cumsum(0), indices, torch.full((len(indices),), 0.9)


def _query(network: EmbeddingModel, num_concepts: int) -> ConceptQuery:
    """Ask for concepts that lie far apart in the table: boxed ones first, others after them."""
    indices = torch.linspace(0, len(network.vectors) - 1, num_concepts).long()
    device = network.vectors.device
    return ConceptQuery(indices.to(device), network.vectors[indices.to(device)])


def _unfolded(network: RefinementModel, embedding_map: Tensor, concepts: Tensor) -> Tensor:
    """Refine (N, C, h, w) maps through the maps of all concepts, twice."""
    refinement = network.refinement
    maps = F.conv2d(embedding_map, network.vectors[:, :, None, None])
    return refinement.conv2(F.relu(refinement.conv1(maps)))[:, concepts].sigmoid()


def _peak_resident_bytes() -> int:
    """Return the most memory that the process has had so far; 0 where Python cannot tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
