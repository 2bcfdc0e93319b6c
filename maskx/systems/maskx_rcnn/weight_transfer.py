"""Weight transfer T of Mask^X R-CNN: mask weights of a class, predicted from its box weights.

"Learning to Segment Every Thing" (Hu et al., CVPR 2018), Eq. 1: ``w_seg = T(w_det; theta)``.

Shape legend:
    R: number of RoIs; K: number of foreground classes; C: channels of the mask head;
    D: channels that enter the box predictor; E: length of the transfer input of one class.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.checks import check_choice
from maskx.core.global_mean import unite_flags

DETECTOR_INPUTS = ("cls", "box", "cls+box")
TRANSFER_INPUTS = (*DETECTOR_INPUTS, "vectors", "randn")
ACTIVATIONS = ("leaky_relu", "relu")

# The reference's random inputs are N(0, 0.055^2) in 300 dimensions: rows of norm about 1.
_RANDN_CHANNELS, _RANDN_STD = 300, 0.055


class DetectorWeights(NamedTuple):
    """Weights of a box predictor, one row per foreground class, without biases.

    Attributes:
        cls: (K, D) rows of the classifier; None of a predictor that has no such rows.
        box: (K, 4 * D) rows of the class-specific box regressor, the four deltas of a class side
            by side; None where box regression is class-agnostic.
    """

    cls: Tensor | None
    box: Tensor | None


def detector_weights(
    cls_weight: Tensor, box_weight: Tensor | None, *, background_row: int
) -> DetectorWeights:
    """View the weights of a box predictor as rows of foreground classes. Copies nothing.

    Args:
        cls_weight: (K + 1, D) weight of the classifier.
        box_weight: weight of the box regressor: (4 * K, D) as in Detectron2, (4 * (K + 1), D) as
            in torchvision, or (4, D) when class-agnostic. Class-major.
        background_row: row of the background in ``cls_weight``: 0 in torchvision, -1 in
            Detectron2.

    Returns:
        The foreground rows; ``box`` is None for class-agnostic regression.
    """
    num_rows, channels = cls_weight.shape
    foreground = slice(1, None) if background_row == 0 else slice(0, -1)
    box = None
    if box_weight is not None:
        box_rows = box_weight.reshape(-1, 4 * channels)
        if len(box_rows) == num_rows:
            box = box_rows[foreground]
        elif len(box_rows) == num_rows - 1:
            box = box_rows
    return DetectorWeights(cls_weight[foreground], box)


class WeightTransfer(nn.Module):
    """The function T (Eq. 1), evaluated for the classes that are asked for.

    T is applied to the distinct classes of a batch, of each once, and its rows are handed to the
    RoIs: 2 * (E * C + C * C) operations per class (2.8 MFLOP at the paper's sizes) whatever K is.

    Args:
        inputs: what describes a class: ``cls`` (classifier row), ``box`` (regressor row),
            ``cls+box`` (both, concatenated in this order), ``vectors`` (fixed vectors such as word
            embeddings) or ``randn`` (fixed random vectors, the control of the paper). Fixed
            vectors are part of a checkpoint: loading one replaces them.
        out_channels: C, length of the predicted mask weight; also the hidden width.
        num_layers: 1, 2 or 3 fully connected layers.
        activation: between layers: ``leaky_relu`` (slope 0.1) or ``relu``.
        stop_gradient: keep the mask loss from changing the detector weights (section 3.1).
        mix: temperature of the softmax that mixes weights; 0, the paper, mixes none. Else T
            extrapolates to no class: at inference the weight of one that no mask loss has taught is
            a mean of those of the taught ones, by the softmax of the cosines, over this
            temperature, between what T predicts for it and for them. The lower it is, the more the
            most alike class decides alone; 0.05 on the page.
        dropout: share of the numbers of a row that T does not see in a training step, others for
            each class. T learns from as many examples as there are classes with masks; where these
            are few it learns them by heart. 0 is the paper's.
        normalise: bring the row of a class to length 1 before T. At first the rows of a detector
            that starts at random are short (0.16 at 256 channels), so T, and with it the mask
            branch, hardly learns until they have grown. Off is the paper's.
    """

    def __init__(
        self,
        *,
        inputs: str = "cls+box",
        out_channels: int = 256,
        detector_channels: int | None = None,
        num_classes: int | None = None,
        class_vectors: Tensor | None = None,
        num_layers: int = 2,
        activation: str = "leaky_relu",
        stop_gradient: bool = True,
        mix: float = 0.0,
        dropout: float = 0.0,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(
                f"dropout of weight transfer (MODEL.MASKX.TRANSFER.DROPOUT) is {dropout}. Allowed: "
                "from 0 to below 1."
            )
        check_choice("transfer inputs", inputs, TRANSFER_INPUTS)
        check_choice("transfer activation", activation, ACTIVATIONS)
        check_choice("transfer layers", num_layers, (1, 2, 3))
        self.inputs = inputs
        self.stop_gradient = stop_gradient
        self.dropout = dropout
        self.normalise = normalise
        if inputs in DETECTOR_INPUTS:
            _check_given(inputs, "detector_channels", detector_channels)
            in_channels = detector_channels * {"cls": 1, "box": 4, "cls+box": 5}[inputs]
            class_vectors = None
        else:
            if inputs == "randn":
                _check_given(inputs, "num_classes", num_classes)
                generator = torch.Generator().manual_seed(0)
                shape = (num_classes, _RANDN_CHANNELS)
                class_vectors = torch.randn(shape, generator=generator) * _RANDN_STD
            _check_given(inputs, "class_vectors", class_vectors)
            in_channels = class_vectors.shape[1]
        self.register_buffer("class_vectors", class_vectors)
        if not 0 <= mix < math.inf:
            raise ValueError(
                f"mix of weight transfer (MODEL.MASKX.TRANSFER.MIX) is {mix}. Allowed: 0, which is "
                "off, or a temperature above 0 such as 0.05."
            )
        self.mix = mix
        if mix:
            if num_classes is None:
                raise ValueError(
                    f"mix of weight transfer is {mix}, but the classes of this model may change, "
                    "so that none counts as taught. Set mix (MODEL.MASKX.TRANSFER.MIX) 0."
                )
            self.register_buffer("taught", torch.zeros(num_classes, dtype=torch.bool))

        layers: list[nn.Module] = []
        for layer in range(num_layers):
            if layer > 0:
                layers.append(nn.LeakyReLU(0.1) if activation == "leaky_relu" else nn.ReLU())
            linear = nn.Linear(in_channels if layer == 0 else out_channels, out_channels)
            _init_linear(linear)
            layers.append(linear)
        self.layers = nn.Sequential(*layers)

    def class_inputs(self, class_indices: Tensor, detector: DetectorWeights | None) -> Tensor:
        """Gather the (R, E) transfer input of classes, detached where ``stop_gradient`` is on."""
        rows = self._rows(class_indices, detector)
        return F.normalize(rows, dim=1) if self.normalise else rows

    def _rows(self, class_indices: Tensor, detector: DetectorWeights | None) -> Tensor:
        if self.class_vectors is not None:
            return self.class_vectors[class_indices]
        if detector is None or detector.cls is None:
            raise ValueError(
                f"Weight transfer from '{self.inputs}' needs the weights of the box predictor, "
                "got none. Pass detector_weights(...) of it."
            )
        if detector.box is None and self.inputs != "cls":
            raise ValueError(class_agnostic_box_message(self.inputs))
        sources = {"cls": (detector.cls,), "box": (detector.box,), "cls+box": detector}[self.inputs]
        if self.stop_gradient:
            sources = tuple(source.detach() for source in sources)
        return torch.cat([source[class_indices] for source in sources], dim=1)

    def forward(self, class_indices: Tensor, detector: DetectorWeights | None = None) -> Tensor:
        """Predict (R, C) mask weights w_seg of (R,) foreground class indices."""
        if class_indices.is_meta:  # shapes alone, without values that could be alike
            return self.layers(self.class_inputs(class_indices, detector))
        classes, row_of_roi = torch.unique(class_indices, return_inverse=True)
        rows = F.dropout(self.class_inputs(classes, detector), self.dropout, self.training)
        weights = self.layers(rows)
        if self.mix and self.training:
            self.taught[classes] = True
            unite_flags(self.taught)
        elif self.mix and self.taught.any():
            known = self.layers(self.class_inputs(self.taught.nonzero()[:, 0], detector))
            cosines = F.normalize(weights, dim=1) @ F.normalize(known, dim=1).T
            mixed = (cosines / self.mix).softmax(dim=1) @ known
            weights = torch.where(self.taught[classes][:, None], weights, mixed)
        return weights[row_of_roi]


def class_agnostic_box_message(inputs: str) -> str:
    """Say why a transfer input cannot be had from class-agnostic box regression."""
    return (
        f"Weight transfer from '{inputs}' needs one row of box regression weights per class, but "
        "box regression is class-agnostic. Make it class-specific, or transfer from 'cls'."
    )


def _init_linear(linear: nn.Linear) -> None:
    """Initialise a layer of T as the MSRAFill of an older Caffe2: uniform, by fan-in.

    Later versions of MSRAFill go by fan-out, which makes the weights of the wide first layer 8
    times as large. On generated scenes with 20 classes of each side that gave mask AP 21.2 on
    classes without masks, this rule 29.4, with the same box AP: nothing corrects the random part
    of T for a class that no mask is seen of.
    """
    bound = (2 / linear.in_features) ** 0.5
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def _check_given(inputs: str, argument: str, value: object) -> None:
    if value is None:
        raise ValueError(f"Weight transfer from '{inputs}' needs the argument {argument}.")
