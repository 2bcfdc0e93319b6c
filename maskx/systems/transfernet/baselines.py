"""The two baselines of TransferNet that have no attention model.

"Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional Neural Network"
(Hong et al., CVPR 2016), section 6.3 and appendix B. Both read where a label is out of a classifier
of image labels, and give it to the decoder of TransferNet. As in the paper they learn in two
stages: ``source``, the classification network from the labels of the source and the decoder from
its masks; then ``target``, the classification network alone, encoder included, from the labels of
the target, while the decoder stays. What it reads is no longer what it learned to read then, which
is the shift that the paper compares TransferNet to.

The loss of the masks does not train the classifier: it would shape the score maps of the source
classes only.

For the shape legend see `maskx.systems.transfernet.network`. Also:
    Q: pairs whose mask is predicted; H, W: size of the images; C: hidden channels.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.checks import check_choice
from maskx.core.layers import msra_fill
from maskx.core.losses import multi_label_loss
from maskx.systems.transfernet.network import (
    ForOneSize,
    MapNorm,
    PairNetwork,
    mask_loss,
    pair_matmul,
)


class BaselineOutputs(NamedTuple):
    """What a baseline predicts.

    Attributes:
        class_logits: (N, L) logits of the labels of the images.
        mask_logits: (Q, 2, H, W) logits of background and foreground; None in the training of the
            stage ``target``.
    """

    class_logits: Tensor
    mask_logits: Tensor | None


class ScoreMapClassifier(nn.Module):
    """Fully convolutional classifier: 3x3 convolution, ReLU, 1x1 convolution, mean over positions.

    With its hidden layer the gradient of a score differs between positions, which it would not if
    the scores were linear in the features.
    """

    def __init__(self, *, in_channels: int, num_classes: int, hidden_channels: int = 512) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.score = nn.Linear(hidden_channels, num_classes)
        msra_fill(self.hidden)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.zeros_(self.score.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, D, h, w) features to (N, L) logits and the (N, C, h, w) hidden values."""
        hidden = F.relu(self.hidden(features))
        return self.score(hidden.mean(dim=(2, 3))), hidden

    def score_maps(self, hidden: Tensor, pair_images: Tensor, pair_labels: Tensor) -> Tensor:
        """Return the (P, h, w) scores of the pairs; their mean over the positions is the logit."""
        scores = pair_matmul(self.score.weight[pair_labels], hidden.flatten(2), pair_images)
        scores = scores + self.score.bias[pair_labels, None]
        return scores.unflatten(1, hidden.shape[2:])

    def score_gradients(self, hidden: Tensor, pair_images: Tensor, pair_labels: Tensor) -> Tensor:
        """Return the (P, D, h, w) gradient of the logit of each pair by the features.

        It is written out, so that it works where gradients are switched off. It runs in float32
        under autocast: the gradient of a mean over many positions is too small for float16.
        """
        by_hidden = self.score.weight[pair_labels][:, :, None, None] / hidden.shape[2:].numel()
        by_hidden = by_hidden * (hidden > 0)[pair_images]
        with torch.autocast(hidden.device.type, enabled=False):
            return F.conv_transpose2d(by_hidden, self.hidden.weight, padding=1)


BASELINE_STAGES = ("source", "target")


class _Baseline(PairNetwork):
    """A classifier of image labels, and a subclass's way from it to the input of the decoder.

    ``stage_classes`` are the class indices that the stage learns the labels of; None for all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        in_feature: str,
        in_channels: int,
        num_classes: int,
        decoder: nn.Module,
        classifier_channels: int = 512,
        freeze_encoder: bool = True,
        mask_weight: float = 2.0,
        train_stage: str = "source",
        stage_classes: Sequence[int] | None = None,
    ) -> None:
        check_choice("train_stage of a baseline", train_stage, BASELINE_STAGES)
        super().__init__(
            encoder, in_feature=in_feature, decoder=decoder, freeze_encoder=freeze_encoder
        )
        self.mask_weight = mask_weight
        self.train_stage = train_stage
        self.stage_classes = list(range(num_classes) if stage_classes is None else stage_classes)
        self.classifier = ScoreMapClassifier(
            in_channels=in_channels, num_classes=num_classes, hidden_channels=classifier_channels
        )

    def _freeze_for_stage(self) -> None:
        """In the stage ``target`` train nothing but the classification network."""
        if self.train_stage == "target":
            for name, parameter in self.named_parameters():
                if not name.startswith(("encoder.", "classifier.")):
                    parameter.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        pair_images: Tensor,
        pair_labels: Tensor,
        mask_pairs: Tensor | None = None,
    ) -> BaselineOutputs:
        """Predict the labels of the images and the masks of the pairs, see ``TransferNet``."""
        features, switches = self.encode(images)
        class_logits, hidden = self.classifier(features)
        if self.training and self.train_stage == "target":
            return BaselineOutputs(class_logits, None)
        if mask_pairs is not None:
            pair_images, pair_labels = pair_images[mask_pairs], pair_labels[mask_pairs]
        maps = self.decoder_maps(features.detach(), hidden.detach(), pair_images, pair_labels)
        mask_logits = self.decoder(maps, pair_images, switches, images.shape[-2:])
        return BaselineOutputs(class_logits, mask_logits)

    def decoder_maps(
        self, features: Tensor, hidden: Tensor, pair_images: Tensor, pair_labels: Tensor
    ) -> Tensor:
        """Return the (Q, 1, h, w) input of the decoder."""
        raise NotImplementedError

    def losses(
        self, outputs: BaselineOutputs, pair_images: Tensor, pair_labels: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss_labels`` and, in the stage ``source``, ``loss_masks`` as in TransferNet.

        ``loss_labels`` is the binary cross-entropy over the classes of the stage, mean over the
        images that have a pair. A class without a pair counts as absent.
        """
        labels = torch.zeros_like(outputs.class_logits)
        labels[pair_images, pair_labels] = 1
        has_pair = labels.any(dim=1)
        logits, labels = (
            x[has_pair][:, self.stage_classes] for x in (outputs.class_logits, labels)
        )
        losses = {"loss_labels": multi_label_loss(logits, labels)}
        if self.train_stage == "source":
            losses["loss_masks"] = self.mask_weight * mask_loss(outputs.mask_logits, targets)
        return losses


class BaselineNet(_Baseline):
    """The score map of the label, through a fully connected layer, is the input of the decoder.

    ``feature_size`` (h, w) is that of the only feature map that the fully connected layer of the
    paper fits; None for two 1x1 convolutions with 16 channels instead, for any size.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        feature_size: tuple[int, int] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(encoder, **arguments)
        self.to_decoder = (
            _pointwise(1, 16) if feature_size is None else _FullyConnectedMap(feature_size)
        )
        self._freeze_for_stage()

    def decoder_maps(
        self, features: Tensor, hidden: Tensor, pair_images: Tensor, pair_labels: Tensor
    ) -> Tensor:
        """Return the (Q, 1, h, w) input of the decoder."""
        scores = self.classifier.score_maps(hidden, pair_images, pair_labels).detach()
        return self.to_decoder(scores[:, None])


class DecoupledNet(_Baseline):
    """Features and the gradient of the label's score by them make the input of the decoder.

    The transfer form of "Decoupled Deep Neural Network for Semi-supervised Semantic Segmentation"
    (Hong et al., NIPS 2015). Features and gradient are normalised each over the positions and
    channels of a pair, whose number in a batch varies too much for batch norm. The two hidden
    layers between both and the decoder have ``bridge_channels``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        in_channels: int,
        bridge_channels: int = 256,
        **arguments: Any,
    ) -> None:
        super().__init__(encoder, in_channels=in_channels, **arguments)
        self.feature_norm = MapNorm(in_channels)
        self.gradient_norm = MapNorm(in_channels)
        widen = nn.Conv2d(2 * in_channels, bridge_channels, 3, padding=1)
        msra_fill(widen)
        self.to_decoder = nn.Sequential(
            widen, nn.ReLU(), *_pointwise(bridge_channels, bridge_channels)
        )
        self._freeze_for_stage()

    def decoder_maps(
        self, features: Tensor, hidden: Tensor, pair_images: Tensor, pair_labels: Tensor
    ) -> Tensor:
        """Return the (Q, 1, h, w) input of the decoder."""
        gradients = self.classifier.score_gradients(hidden, pair_images, pair_labels).detach()
        features = self.feature_norm(features)[pair_images]
        return self.to_decoder(torch.cat([features, self.gradient_norm(gradients)], dim=1))


class _FullyConnectedMap(ForOneSize):
    """Fully connected layer from a map to a map of the same size."""

    what = "BaselineNet"

    def __init__(self, feature_size: tuple[int, int]) -> None:
        super().__init__(feature_size)
        self.fc = nn.Linear(math.prod(feature_size), math.prod(feature_size))
        msra_fill(self.fc)

    def forward(self, maps: Tensor) -> Tensor:
        self.check_size(maps)
        return self.fc(maps.flatten(1)).reshape(maps.shape)


def _pointwise(in_channels: int, hidden_channels: int) -> nn.Sequential:
    hidden = nn.Conv2d(in_channels, hidden_channels, kernel_size=1)
    last = nn.Conv2d(hidden_channels, 1, kernel_size=1)
    msra_fill(hidden)
    msra_fill(last)
    return nn.Sequential(hidden, nn.ReLU(), last)
