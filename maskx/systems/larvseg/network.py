"""LarvSeg: segmentation network for large vocabularies, from masks of some and image labels of all.

"LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic Segmentation via
Category-wise Attentive Classifier" (Yu et al., PRCV 2024).

The vocabulary is the union of the classes of several data sets. A batch comes from one of them, and
only its classes are scored: ``class_indices`` holds, for each label of the data set, the class of
the vocabulary it is. Labels, in label maps and image labels, are positions in ``class_indices``.

Shape legend:
    N: images; K: classes of the vocabulary; L: labels of the data set; C: channels of the feature
    map; d: channels of the classifier; h, w: size of the feature map, a position of which is a
    token; H, W: size of the label maps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskx.core.backbones import named_feature
from maskx.core.checks import check_choice
from maskx.core.losses import LabelPairs, label_pairs
from maskx.systems.larvseg.attention import (
    MemoryBank,
    attention_maps,
    pseudo_background,
    top_token_means,
)
from maskx.systems.larvseg.classifier import CosineClassifier
from maskx.systems.larvseg.losses import (
    POOLINGS,
    attentive_loss,
    image_level_loss,
    segmentation_loss,
)

MEMORIES = ("cross_image", "single_image", "none")


class LarvSeg(nn.Module):
    """A backbone, a cosine classifier on one of its features, and the three losses.

    Args:
        backbone: maps (N, 3, H, W) images to a dictionary of feature maps.
        in_feature: name of the feature map that is classified.
        in_channels: C.
        num_classes: K.
        hidden_channels: d; 0 for C.
        logit_form: ``temperature`` or ``layernorm``, see :class:`CosineClassifier`.
        memory: what the attention maps of the auxiliary loss are made with. ``cross_image``: the
            images seen last (the paper's). ``single_image``: the best tokens of the image itself.
            ``none``: there is no auxiliary loss (the paper's baseline).
        bank_size: images per class of the memory bank.
        warm_up: images of a class before its auxiliary loss starts; 0 for ``bank_size``.
        top_tokens: tokens of an image that represent its class.
        pooling: ``weighted`` or ``normalised``, see :func:`attentive_loss`.
        sample_classes: when above 0, training scores so many random classes of the data set, and
            all that are present in the batch, instead of all; 100 in the reference's runs with
            hundreds of classes or more.
        synchronise_bank: all workers hold the same memory bank. Each must then make its losses in
            each step. Otherwise each holds that of the images it sees, and the checkpoint that of
            the main process.
        image_weight: weight of the image-level loss.
        attentive_weight: weight of the auxiliary loss.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        in_feature: str,
        in_channels: int,
        num_classes: int,
        hidden_channels: int = 0,
        logit_form: str = "temperature",
        memory: str = "cross_image",
        bank_size: int = 20,
        warm_up: int = 0,
        top_tokens: int = 20,
        pooling: str = "weighted",
        sample_classes: int = 0,
        synchronise_bank: bool = False,
        image_weight: float = 0.1,
        attentive_weight: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("memory of LarvSeg", memory, MEMORIES)
        check_choice("pooling of LarvSeg", pooling, POOLINGS)
        if top_tokens < 1 or sample_classes < 0:
            raise ValueError(
                "top_tokens must be at least 1 and sample_classes at least 0 (all classes), got "
                f"{top_tokens} and {sample_classes}."
            )
        self.backbone = backbone
        self.in_feature = in_feature
        self.num_classes = num_classes
        self.classifier = CosineClassifier(
            in_channels, num_classes, hidden_channels=hidden_channels, logit_form=logit_form
        )
        self.memory = memory
        self.bank = (
            MemoryBank(num_classes, self.classifier.channels, size=bank_size, warm_up=warm_up)
            if memory == "cross_image"
            else None
        )
        self.top_tokens = top_tokens
        self.pooling = pooling
        self.sample_classes = sample_classes
        self.synchronise_bank = synchronise_bank
        self.image_weight = image_weight
        self.attentive_weight = attentive_weight

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) normalised images to (N, d, h, w) tokens of unit norm."""
        features = self.backbone(images)
        return self.classifier.tokens(named_feature(features, self.in_feature, self.backbone))

    def losses(
        self,
        tokens: Tensor,
        *,
        class_indices: Tensor | None = None,
        label_maps: Tensor | None = None,
        image_labels: Sequence[Sequence[int]] | None = None,
        single_label: bool = False,
        attention: bool = True,
        ignore: int = 255,
        loss_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch, which is from one data set (Eq. 6).

        A loss for which there is no supervision is zero, with a graph. The memory bank takes the
        tokens of the batch after the attention maps are made.

        Args:
            tokens: (N, d, h, w) of the batch, see :meth:`forward`.
            class_indices: (L,) int64, see the module; None for all K. Checked once by
                :func:`maskx.systems.larvseg.classifier.check_class_indices`, not here.
            label_maps: (N, H, W) int64, labels or ``ignore``; None without pixel supervision.
            image_labels: labels known to be present, for each image; None when none is known.
            single_label: the images show more than their one label says, so that the background
                of an attention map is guessed; otherwise it is the other labels of the image.
            attention: False learns image labels without attention, and the memory bank takes
                nothing of the batch.
            ignore: see :func:`segmentation_loss`.
            loss_size: see :func:`segmentation_loss`.
            generator: of the sampled classes, on the CPU.

        Returns:
            ``loss_pixels``, ``loss_labels`` and, unless ``memory`` is ``none``, ``loss_attention``,
            weighted.
        """
        device = tokens.device
        if class_indices is None:
            class_indices = torch.arange(self.num_classes, device=device)
        num_labels = len(class_indices)
        pairs = label_pairs(image_labels or [()] * len(tokens), num_labels, device)
        if len(tokens) != pairs.num_images:
            raise ValueError(
                f"image_labels has {pairs.num_images} entries for {len(tokens)} images."
            )
        every_class = class_indices
        if 0 < self.sample_classes < num_labels:
            chosen = _sample_labels(
                num_labels, self.sample_classes, pairs, label_maps, ignore, generator
            )
            class_indices = class_indices[chosen]
            position = torch.full((num_labels,), -1, device=device)
            position[chosen] = torch.arange(len(chosen), device=device)
            pairs = pairs._replace(classes=position[pairs.classes])
            if label_maps is not None:
                known = label_maps != ignore
                label_maps = position[torch.where(known, label_maps, 0)].where(known, ignore)
        class_vectors = self.classifier.class_vectors(class_indices)
        factors = self.classifier.factors(tokens, class_vectors)
        losses = {
            "loss_pixels": factors.zero()
            if label_maps is None
            else segmentation_loss(factors.dense(), label_maps, ignore=ignore, size=loss_size),
            "loss_labels": self.image_weight * image_level_loss(factors, pairs),
        }
        if self.memory != "none":
            if not attention:
                pairs = label_pairs([()] * len(tokens), num_labels, device)
            maps, ready = self._attend(
                tokens, class_vectors, pairs, class_indices, every_class if single_label else None
            )
            losses["loss_attention"] = self.attentive_weight * attentive_loss(
                factors, pairs, maps, ready, pooling=self.pooling
            )
        return losses

    @torch.no_grad()
    def _attend(
        self,
        tokens: Tensor,
        class_vectors: Tensor,
        pairs: LabelPairs,
        class_indices: Tensor,
        background_classes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Make the attention map of each pair, then remember its tokens.

        Returns:
            (P, T) maps, and (P,) whether they mean something.
        """
        if pairs.num_slots == 0:
            own = tokens.new_zeros(0, tokens.shape[1])
        else:
            own = top_token_means(tokens, class_vectors, pairs, self.top_tokens)
        classes = class_indices[pairs.classes]
        if self.bank is None:
            ready = torch.ones_like(classes, dtype=torch.bool)
            return attention_maps(tokens, pairs, own, ready), ready
        foreground = self.bank.class_means(classes)
        background = None
        if background_classes is not None:
            background = pseudo_background(tokens, pairs, foreground, self.bank, background_classes)
        known, ready = self.bank.seen(classes), self.bank.ready(classes)
        attention = attention_maps(tokens, pairs, foreground, known, background)
        self.bank.enqueue(classes, own, synchronise=self.synchronise_bank)
        return attention, ready


def _sample_labels(
    num_labels: int,
    num_sampled: int,
    pairs: LabelPairs,
    label_maps: Tensor | None,
    ignore: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Choose random labels and all that are present in the batch, in rising order."""
    chosen = torch.zeros(num_labels, dtype=torch.bool, device=pairs.classes.device)
    chosen[torch.randperm(num_labels, generator=generator)[:num_sampled].to(chosen.device)] = True
    chosen[pairs.classes] = True
    if label_maps is not None:
        chosen[label_maps[label_maps != ignore]] = True
    return chosen.nonzero(as_tuple=True)[0]
