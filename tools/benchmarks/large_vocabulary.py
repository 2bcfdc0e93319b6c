"""What tools/benchmark.py measures of LarvSeg: inference and training on a large vocabulary."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Case, num_parameters
from maskx.systems.larvseg.large_vocabulary import predict_label_map
from maskx.systems.larvseg.network import LarvSeg

_STRIDE = 16
# Classes that are there in the image with peaked scores.
_NUM_PRESENT = 12


class _Features(nn.Module):
    """A backbone that costs nothing: what it is given is its feature map."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"features": features}


def inference_cases(
    *, num_classes: int, channels: int, image_size: int, device: torch.device
) -> Iterator[Case]:
    """Make label maps of one image; the reference is the product of tokens and classes.

    On random vectors all classes have like scores, so that little can be left out. In the peaked
    image every token is the vector of one of 12 classes, which lie in regions, plus as much noise.

    Args:
        num_classes: of the vocabulary.
        channels: of the tokens.
        image_size: height and width in pixels; tokens have stride 16.
        device: where to run.
    """
    torch.manual_seed(0)
    side = image_size // _STRIDE
    vectors = F.normalize(torch.randn(num_classes, channels), dim=1)
    noise = F.normalize(torch.randn(channels, side, side), dim=0)
    regions = F.interpolate(torch.randn(1, _NUM_PRESENT, 5, 5), (side, side), mode="bilinear")
    present = torch.randint(num_classes, (_NUM_PRESENT,))
    means = vectors[present[regions[0].argmax(dim=0)]].permute(2, 0, 1)
    images = {"random": noise, "peaked": F.normalize(means + noise, dim=0)}
    images = {name: tokens.to(device) for name, tokens in images.items()}
    vectors = vectors.to(device)
    settings = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
    flat = images["random"].flatten(1).T
    yield Case("product at the tokens alone", lambda: flat @ vectors.T, 0, settings)
    size = (image_size, image_size)
    for top_k in (1, 5):
        for name, tokens in images.items():
            yield Case(
                f"label map, {name} scores, top {top_k}",
                lambda t=tokens, k=top_k: predict_label_map(t, vectors, size, top_k=k),
                0,
                settings | {"scores": name, "top_k": top_k},
            )


def training_cases(
    *, num_classes: int, channels: int, image_size: int, num_images: int, device: torch.device
) -> Iterator[Case]:
    """Make forward and backward passes of classifier and losses, all classes scored, no backbone.

    The reference is the image-level loss alone. The memory bank is full.

    Args:
        num_classes: of the vocabulary.
        channels: of the features.
        image_size: height and width in pixels; features have stride 16.
        num_images: of the batch, with three labels each, or with one.
        device: where to run.
    """
    torch.manual_seed(0)
    side = image_size // _STRIDE
    features = torch.randn(num_images, channels, side, side, device=device)
    network = LarvSeg(
        _Features(), in_feature="features", in_channels=channels, num_classes=num_classes
    ).to(device)
    bank = network.bank
    bank.means.normal_(std=channels**-0.5)
    bank.counts.fill_(bank.size)
    settings = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
    settings |= {"num_images": num_images, "bank_bytes": bank.num_bytes}

    def step(memory: str, num_labels: int) -> None:
        network.memory = memory
        labels = [[(7 * i + j) % num_classes for j in range(num_labels)] for i in range(num_images)]
        losses = network.losses(
            network(features), image_labels=labels, single_label=num_labels == 1
        )
        sum(losses.values()).backward()
        network.zero_grad()

    parameters = num_parameters(network)
    for name, memory, num_labels in (
        ("image-level loss, 3 labels", "none", 3),
        ("and auxiliary loss, 3 labels", "cross_image", 3),
        ("and auxiliary loss, 1 label, pseudo background", "cross_image", 1),
    ):
        details = {"memory": memory, "num_labels": num_labels}
        yield Case(name, lambda m=memory, n=num_labels: step(m, n), parameters, settings | details)
