"""What tools/benchmark.py measures of the mask head: steps, by section.

Shape legend:
    R: number of RoIs; K: number of foreground classes; C: channels of the mask head;
    M: resolution of the masks; E: length of the transfer input of one class.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Case, num_parameters
from maskx.systems.maskx_rcnn.mask_head import MaskXHead, TransferPredictor, mask_loss
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights

# Sizes of the paper: channels of the box predictor, of the mask head; resolution of the masks.
_DETECTOR_CHANNELS, _CHANNELS, _MASK_SIZE = 1024, 256, 28
# The K-channel form takes about twice the memory of its logits.
_LARGEST_LOGIT_BYTES = 2**30


class KChannelTransferPredictor(TransferPredictor):
    """The usual form of the predictor, to compare with: the logits of every class, one is kept."""

    def forward(
        self, features: Tensor, class_indices: Tensor, detector: DetectorWeights | None = None
    ) -> Tensor:
        """Predict (R, M, M) logits of the given classes from (R, C, M, M) features."""
        every_class = torch.arange(len(detector.cls), device=features.device)
        w_seg = self.layers(self.class_inputs(every_class, detector))
        logits = F.conv2d(features, w_seg[:, :, None, None])
        return logits[torch.arange(len(features), device=features.device), class_indices]


class MeanPredictor(nn.Module):
    """The cheapest predictor there is, a mean over the channels: what the trunk alone costs."""

    def forward(
        self, features: Tensor, class_indices: Tensor, detector: DetectorWeights | None = None
    ) -> Tensor:
        """Predict (R, M, M) logits from (R, C, M, M) features."""
        return features.mean(dim=1)


_FORMS = {"gathered": TransferPredictor, "K-channel": KChannelTransferPredictor}


def count_predictor(
    *,
    num_rois: int,
    num_classes: int,
    gathered: bool,
    transfer: bool = True,
    channels: int = _CHANNELS,
    mask_size: int = _MASK_SIZE,
    input_channels: int = 5 * _DETECTOR_CHANNELS,
    num_distinct: int | None = None,
) -> dict[str, int]:
    """Count what a forward pass of the mask predictor costs.

    Two operations for each product of a sum, four bytes per logit::

        logits, K-channel   2 * R * K * M^2 * C operations    4 * R * K * M^2 bytes
        logits, gathered    2 * R * M^2 * C                   4 * R * M^2
        T of N classes      2 * N * (E * C + C^2)             N = K, gathered N <= R

    K-channel weights that are learned, as in Mask R-CNN, need no T. Both forms read the features
    once, 4 * R * C * M^2 bytes: beside those, the gathered form adds 1 / C to the bytes, the
    K-channel form K / C. The backward pass doubles the operations of the logits and makes their
    gradient, which has their size.

    With the paper's sizes and the 128 foreground RoIs of an image: K-channel 4.1 GFLOP and 32 MB at
    K = 80, 61.8 GFLOP and 483 MB at K = 1203; gathered with T 0.4 GFLOP and 0.4 MB at any K. The
    trunk takes 131.5 GFLOP.

    Args:
        num_rois: R.
        num_classes: K.
        gathered: whether only the logits of each RoI's class are computed.
        transfer: whether T (two layers) predicts the weights.
        channels: C.
        mask_size: M.
        input_channels: E.
        num_distinct: different classes of the RoIs, for which alone the gathered form needs T;
            None for as many as there are RoIs, which is the most.

    Returns:
        ``operations`` and ``logit_bytes``.
    """
    logits = num_rois * mask_size**2 * (1 if gathered else num_classes)
    num_distinct = num_rois if num_distinct is None else num_distinct
    transferred = (num_distinct if gathered else num_classes) if transfer else 0
    products = logits * channels + transferred * (input_channels + channels) * channels
    return {"operations": 2 * products, "logit_bytes": 4 * logits}


def predictor_cases(
    *, num_rois: int, classes: Sequence[int], device: torch.device, backward: bool
) -> Iterator[Case]:
    """Make steps of the predictor alone, on features of (R, C, M, M).

    Args:
        num_rois: R.
        classes: values of K; the first, gathered, is the reference. The K-channel form is left
            out where its logits need more than 1 GiB. The last step is that of
            :class:`MeanPredictor`.
        device: where to run.
        backward: compute the gradients of the parameters and the features as well.
    """
    features = torch.randn(num_rois, _CHANNELS, _MASK_SIZE, _MASK_SIZE, device=device)
    limit = ("limit", MeanPredictor(), classes[0])
    for form, predictor, num_classes in [*_predictors(num_rois, classes, device), limit]:
        inputs = _inputs(features.requires_grad_(backward), num_classes)
        step = _training_step(predictor, *inputs)
        if not backward:
            step = partial(_no_grad_forward, predictor, *inputs)
        sizes = {"num_rois": num_rois, "num_classes": num_classes}
        settings = {"form": form, "backward": backward, **sizes}
        name = "limit: mean of the channels"
        if form != "limit":
            settings |= count_predictor(**sizes, gathered=form == "gathered")
            name = f"{form}, K = {num_classes}"
        yield Case(name, step, num_parameters(predictor), settings)


def head_cases(*, num_rois: int, classes: Sequence[int], device: torch.device) -> Iterator[Case]:
    """Make training steps of the whole head; the reference is its trunk alone.

    Args:
        num_rois: R.
        classes: values of K, as in :func:`predictor_cases`.
        device: where to run.
    """
    forms = [("trunk alone", MeanPredictor(), classes[0])]
    for form, predictor, num_classes in [*forms, *_predictors(num_rois, classes, device)]:
        head = MaskXHead(in_channels=_CHANNELS, num_classes=num_classes, predictor="class_agnostic")
        head.predictor = predictor
        name = form if form == "trunk alone" else f"{form}, K = {num_classes}"
        yield _head_case(name, head.to(device), num_rois, num_classes, form=form)


def mlp_cases(*, num_rois: int, num_classes: int, device: torch.device) -> Iterator[Case]:
    """Make training steps of the head with each MLP branch; the reference has none."""
    for mlp in ("none", "bottleneck", "single_fc"):
        head = _transfer_head(num_classes, mlp=mlp)
        yield _head_case(mlp, head.to(device), num_rois, num_classes, mlp=mlp)


def trunk_cases(*, num_rois: int, num_classes: int, device: torch.device) -> Iterator[Case]:
    """Make training steps of the head with each trunk; the reference is that of Mask R-CNN."""
    for trunk, num_convs in (("conv", 4), ("residual", 4), ("hourglass", 2)):
        options = {"trunk": trunk, "num_convs": num_convs}
        head = _transfer_head(num_classes, **options).to(device)
        yield _head_case(f"{trunk} {num_convs}", head, num_rois, num_classes, **options)


def _predictors(
    num_rois: int, classes: Sequence[int], device: torch.device
) -> Iterator[tuple[str, TransferPredictor, int]]:
    """Yield the name of the form, the predictor and K; gathered first."""
    for form, predictor_class in _FORMS.items():
        for num_classes in classes:
            gathered = form == "gathered"
            count = count_predictor(num_rois=num_rois, num_classes=num_classes, gathered=gathered)
            if count["logit_bytes"] <= _LARGEST_LOGIT_BYTES:
                predictor = predictor_class(detector_channels=_DETECTOR_CHANNELS)
                yield form, predictor.to(device), num_classes


def _transfer_head(num_classes: int, **options: Any) -> MaskXHead:
    return MaskXHead(
        in_channels=_CHANNELS,
        num_classes=num_classes,
        detector_channels=_DETECTOR_CHANNELS,
        **options,
    )


def _head_case(
    name: str, head: MaskXHead, num_rois: int, num_classes: int, **settings: Any
) -> Case:
    size = _MASK_SIZE // 2
    roi_features = torch.randn(num_rois, _CHANNELS, size, size, device=head.deconv.weight.device)
    step = _training_step(head, *_inputs(roi_features, num_classes))
    settings = {"num_rois": num_rois, "num_classes": num_classes, **settings}
    return Case(name, step, num_parameters(head), settings)


def _inputs(features: Tensor, num_classes: int) -> tuple[Tensor, Tensor, DetectorWeights]:
    """Make the arguments of a predictor or head: features, class indices, detector weights."""
    # Successive RoIs read rows that lie far apart, as those of real images do.
    class_indices = torch.arange(len(features), device=features.device) * 7919 % num_classes
    cls = torch.randn(num_classes, _DETECTOR_CHANNELS, device=features.device)
    box = torch.randn(num_classes, 4 * _DETECTOR_CHANNELS, device=features.device)
    return features, class_indices, DetectorWeights(cls, box)


def _training_step(
    module: nn.Module, features: Tensor, class_indices: Tensor, detector: DetectorWeights
) -> Callable[[], None]:
    """Make a step that computes the gradients of the module and, if asked for, of the features."""
    targets = torch.rand(len(features), _MASK_SIZE, _MASK_SIZE, device=features.device) > 0.5

    def step() -> None:
        mask_loss(module(features, class_indices, detector), targets).backward()
        module.zero_grad()
        features.grad = None

    return step


@torch.no_grad()
def _no_grad_forward(module: nn.Module, *inputs: Any) -> None:
    module(*inputs)
