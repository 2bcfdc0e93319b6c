"""TransferNet and its baselines as a model of samples, which both hosts train and evaluate."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.checks import check_choice
from maskx.core.extra_state import pack_state, same_class_names, unpack_state
from maskx.core.image_classifier import ImageClassifier, choose_labels, multi_hot
from maskx.core.images import resized_image, warp_images
from maskx.core.losses import label_pairs
from maskx.core.sample_models import Sample, SampleModel, lacking_weights, required
from maskx.data import dense_crf
from maskx.data.label_maps import ignore_label
from maskx.engine.model_export import Exportable, export_label_maps
from maskx.systems.transfernet.baselines import BaselineNet, DecoupledNet
from maskx.systems.transfernet.decoder import TransposedDecoder, UnpoolingDecoder
from maskx.systems.transfernet.network import (
    FactoredAttention,
    FullyConnectedAttention,
    PairNetwork,
    TransferNet,
    attention_entropy,
    foreground_prob,
    merge_label_masks,
    pair_target,
)

METHODS = ("transfernet", "baseline", "decoupled")
ATTENTIONS = ("factored", "fc")
DECODERS = ("transposed", "unpooling")
_VERSION = 1  # of what checkpoints say beside weights


class TransferNetModel(SampleModel):
    """TransferNet, BaselineNet or DecoupledNet, with the classifier that chooses labels.

    Images are warped to squares in training and evaluation alike. The reference pads those of the
    evaluation to a square instead, which its networks never see in training.

    Args:
        network: any of the three; see :func:`build_network`.
        classifier: separate classifier of image labels, which is not trained here. Checkpoints
            hold it as well.
        size: side in pixels of the squares that both see.
        class_names: of source and target, by class index. Checkpoints hold them, and those of
            other classes are refused; none by default.
        gt_labels: segment the ``image_labels`` of a sample that has them (TransferNet-GT).
        crf: refine the mask of each label by a dense CRF.
        pixel_stats: ``pixel_mean`` and ``pixel_std`` of :class:`SampleModel`.
    """

    def __init__(
        self,
        network: PairNetwork,
        classifier: ImageClassifier,
        *,
        size: int,
        class_names: Sequence[str] = (),
        gt_labels: bool = False,
        crf: bool = False,
        **pixel_stats: Sequence[float],
    ) -> None:
        super().__init__(size, **pixel_stats)
        if crf:
            dense_crf.check_crf()
        self.network = network
        self.classifier = classifier.requires_grad_(False)
        self.num_classes = classifier.num_classes
        self.class_names = tuple(class_names)
        self.gt_labels = gt_labels
        self.crf = crf
        # Kept in checkpoints, so that a random classifier never chooses labels.
        self.register_buffer("has_classifier", torch.tensor(False))

    def train(self, mode: bool = True) -> "TransferNetModel":
        """Set training or evaluation mode; the classifier stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Return what checkpoints hold beside weights: the class list, and what has no weights."""
        return pack_state(self._identity(), version=_VERSION)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a checkpoint is of this model, which takes its class names if it has none."""
        found = unpack_state(state, version=_VERSION, what="TransferNet")
        own = self._identity()
        remedy = "Set DATASETS.TRAIN and DATASETS.MASKX.SPLIT as the model was trained."
        self.class_names = same_class_names(found["class_names"], self.class_names, remedy)
        for key in ("method", "feature_scale"):
            if found[key] != own[key]:
                raise ValueError(
                    f"The checkpoint is of {key} {found[key]!r}, but this model of {own[key]!r}. "
                    "Set it as the model was trained."
                )

    def _identity(self) -> dict[str, Any]:
        return {
            "class_names": list(self.class_names),
            "method": type(self.network).__name__,
            "feature_scale": getattr(self.network, "feature_scale", None),
        }

    @property
    def shares_encoder(self) -> bool:
        """Whether the encoder starts from the classifier's backbone.

        Not that of a baseline, which has learned nothing of the target before its second stage.
        """
        return isinstance(self.network, TransferNet) or self.network.freeze_encoder

    def start_from(self, weights: Mapping[str, Tensor], what: str) -> None:
        """Take over a trained classifier and, where it is shared, its backbone as the encoder.

        Args:
            weights: of :class:`maskx.core.sample_models.SampleClassifier`.
            what: where they are from, in errors.
        """
        parts = [("classifier", self.classifier, "classifier.")]
        if self.shares_encoder:
            parts.append(("encoder", self.network.encoder, "classifier.backbone."))
        for part, module, prefix in parts:
            own = module.state_dict()
            lacking = lacking_weights(module, weights, prefix)
            if lacking:
                raise ValueError(
                    f"{what} lacks {len(lacking)} of the {len(own)} weights of the {part}, or "
                    f"holds them in another shape: {', '.join(lacking[:3])}"
                    f"{' and more' if len(lacking) > 3 else ''}. Give a checkpoint of such a "
                    "classifier with the same backbone, classes and feature map."
                )
            found = {name: weights[prefix + name] for name in own if prefix + name in weights}
            module.load_state_dict(found, strict=False)
        self.has_classifier.fill_(True)

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Learn from source and target images, or segment images.

        All labels of all samples go through the network together.

        Args:
            samples: as of :class:`maskx.systems.transfernet.samples.TransferMapper`: ``image`` and,
                in training, ``image_labels`` and, where there are masks, ``sem_seg``, the label
                map. In evaluation perhaps ``candidate_labels``, the only class indices that may be
                predicted; for ``gt_labels`` also ``image_labels``.

        Returns:
            In training ``loss_labels`` and, but in the stage "attention", ``loss_masks``, which is
            zero where no sample has masks. Otherwise per sample

            - ``image_labels``: (L,) class indices of the labels that were segmented, ascending;
            - ``masks_prob``: (L, height, width), probability of each, after that of the background
              was halved, and without the CRF;
            - ``sem_seg``: (height, width) int64 label map, 0 the background, c + 1 class index c;
            - ``attention`` and ``densified``: (L, h, w), of TransferNet;
            - ``image_labels_prob``: (K,), where the classifier chose the labels.

            The stage "attention" predicts no masks: neither ``masks_prob`` nor ``sem_seg``.
        """
        if self.training:
            return self._losses(samples)
        return self._segment(samples) if samples else []

    def log(self, name: str, value: float | Tensor) -> None:
        """Take note of a number of the training step; a host that keeps such has its own way."""

    def _losses(self, samples: list[Sample]) -> dict[str, Tensor]:
        label_maps = torch.full(
            (len(samples), self.size, self.size), ignore_label(self.num_classes)
        )
        for row, sample in zip(label_maps, samples, strict=True):
            if "sem_seg" not in sample:
                continue
            found = tuple(sample["sem_seg"].shape)
            if found != row.shape:
                raise ValueError(
                    f"Image {sample.get('image_id')!r} came with a label map of {found}, but this "
                    f"model trains on {tuple(row.shape)}. Make samples with TransferMapper(..., "
                    f"size={self.size})."
                )
            row.copy_(sample["sem_seg"])
        remedy = "Make samples with TransferMapper."
        labels = [required(sample, "image_labels", remedy) for sample in samples]
        pairs = label_pairs(labels, self.num_classes, self.device)
        pair_images, pair_labels = pairs.images, pairs.classes
        has_masks = torch.tensor(["sem_seg" in sample for sample in samples], dtype=torch.bool)
        mask_pairs = has_masks.to(self.device)[pair_images]
        outputs = self.network(self.preprocess(samples), pair_images, pair_labels, mask_pairs)
        targets = pair_target(
            label_maps.to(self.device),
            pair_images[mask_pairs],
            pair_labels[mask_pairs],
            ignore=ignore_label(self.num_classes),
        )
        self.log("images_without_labels", sum(not found for found in labels))
        if hasattr(outputs, "attention") and any(labels):
            self.log("attention_entropy", attention_entropy(outputs.attention.detach()).mean())
        return self.network.losses(outputs, pair_images, pair_labels, targets)

    def _segment(self, samples: list[Sample]) -> list[dict[str, Any]]:
        images = self.preprocess(samples)
        labels, prob = self._choose_labels(images, samples)
        pairs = label_pairs(labels, self.num_classes, self.device)
        pair_images, pair_labels = pairs.images, pairs.classes
        outputs = self.network(images, pair_images, pair_labels)
        counts = torch.bincount(pair_images, minlength=len(samples)).tolist()
        results = [{"image_labels": found} for found in pair_labels.split(counts)]
        for name in ("attention", "densified"):
            if hasattr(outputs, name):
                rows = getattr(outputs, name).split(counts)
                for result, maps in zip(results, rows, strict=True):
                    result[name] = maps
        if prob is not None:
            for result, row in zip(results, prob, strict=True):
                result["image_labels_prob"] = row
        if outputs.mask_logits is not None:
            masks = foreground_prob(outputs.mask_logits).split(counts)
            for sample, result, prob_fg in zip(samples, results, masks, strict=True):
                result |= self._merged(sample, result["image_labels"], prob_fg)
        return results

    def _choose_labels(
        self, images: Tensor, samples: list[Sample]
    ) -> tuple[list[list[int]], Tensor | None]:
        """Return class indices by image and, if the classifier chose any, (N, K) probabilities."""
        given = [sample.get("image_labels") if self.gt_labels else None for sample in samples]
        if all(labels is not None for labels in given):
            return given, None
        if not self.has_classifier:
            raise ValueError(
                "There is no trained classifier that could choose the labels of an image. Train "
                "one (MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS), or set gt_labels "
                "(TEST.MASKX.GT_LABELS) and give samples with image_labels."
            )
        prob = self.classifier(images).sigmoid()
        everything = list(range(self.num_classes))
        is_candidate = multi_hot(
            [sample.get("candidate_labels", everything) for sample in samples],
            self.num_classes,
            self.device,
        )
        chosen = choose_labels(prob.masked_fill(is_candidate == 0, -1.0))
        labels = [
            row.nonzero()[:, 0].tolist() if wanted is None else wanted
            for wanted, row in zip(given, chosen, strict=True)
        ]
        return labels, prob

    def _merged(self, sample: Sample, labels: Tensor, prob_fg: Tensor) -> dict[str, Tensor]:
        """Bring (L, S, S) masks to the size of the file, and merge them."""
        image = sample["image"]
        size = (sample.get("height", image.shape[1]), sample.get("width", image.shape[2]))
        if len(prob_fg) == 0:
            prob_fg = prob_fg.new_zeros(0, *size)
        else:
            prob_fg = F.interpolate(prob_fg.float()[None], size, mode="bilinear", antialias=True)[0]
            prob_fg = prob_fg.clamp(0, 1)
        if self.crf and len(prob_fg):
            label_map = _refined_label_map(image, labels, prob_fg)
        else:
            label_map = merge_label_masks(prob_fg, labels)
        return {"masks_prob": prob_fg, "sem_seg": label_map}


class _LabelMaps(nn.Module):
    """What is exported of a model: an image (1, 3, H, W) in, label map and scores out."""

    def __init__(self, model: TransferNetModel, chunk: int = 16) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        squares = model.normalise({"image": warp_images(image, model.size)})
        chosen = choose_labels(model.classifier(squares).sigmoid())
        labels = chosen[0].nonzero()[:, 0]
        torch._check(labels.shape[0] >= 1)  # of choose_labels
        outputs = model.network(squares, torch.zeros_like(labels), labels)
        prob = foreground_prob(outputs.mask_logits)
        # Of all classes, as the number of those that are chosen can be no size of a resized image;
        # some at a time, so that memory does not grow with the number of classes.
        every = prob.new_zeros(model.num_classes, *prob.shape[1:]).index_put((labels,), prob)
        best = image.new_zeros(image.shape[-2:])
        label_map = torch.zeros_like(best, dtype=torch.int64)
        for first in range(0, model.num_classes, self.chunk):
            maps = every[None, first : first + self.chunk]
            maps = F.interpolate(maps, image.shape[-2:], mode="bilinear", antialias=True)[0]
            scores, found = maps.clamp(0, 1).max(dim=0)
            label_map = torch.where(scores > best, first + found + 1, label_map)
            best = torch.maximum(scores, best)
        return torch.where(best > 1 - best, label_map, 0), torch.maximum(best, 1 - best)


def exportable(model: TransferNetModel, class_names: Sequence[str]) -> Exportable:
    """Describe a trained model for :func:`maskx.engine.model_export.export_model`.

    Raises:
        ValueError: it has no decoder or no classifier yet, or refines its predictions by a CRF.
    """
    dense_crf.check_no_crf(model.crf)
    if not model.has_classifier or getattr(model.network, "train_stage", None) == "attention":
        raise ValueError(
            "The model cannot be exported: it predicts no masks, or has no trained classifier that "
            "chooses the labels. Give the folder of a finished run."
        )
    score = "probability of the label, or of the background"
    return export_label_maps(_LabelMaps(model), class_names, score)


def build_network(
    encoder: nn.Module,
    *,
    in_feature: str,
    in_channels: int,
    stride: int,
    size: int,
    num_classes: int,
    stage_classes: Sequence[int] | None,
    method: str = "transfernet",
    stage: str = "joint",
    attention: str = "factored",
    num_factors: int = 1024,
    hidden_channels: int = 512,
    decoder: str = "transposed",
    decoder_input: str = "densified",
    feature_scale: float = 0.0,
    freeze_encoder: bool = True,
    freeze_attention: bool = False,
    mask_weight: float = 2.0,
) -> PairNetwork:
    """Make TransferNet or a baseline on an encoder.

    Args:
        in_feature: name of the feature map that masks are learned from; it has ``in_channels`` and
            a ``stride`` in pixels.
        size: side in pixels of the squares that the encoder sees.
        num_classes: source and target classes.
        stage_classes: of a baseline, class indices that its stage learns the labels of; None for
            all.
        method: ``transfernet``, or a baseline without attention: ``baseline`` (BaselineNet) or
            ``decoupled`` (DecoupledNet).
        stage: of TransferNet ``attention`` (Eq. 6) or ``joint`` (Eq. 9); of a baseline ``source``
            or ``target``, see :mod:`maskx.systems.transfernet.baselines`.
        attention: ``factored`` (1x1 factors, any size) or ``fc`` (Eq. 4 as published, for one
            size). BaselineNet has the same two forms of the layer before its decoder.
        num_factors: d of the attention.
        hidden_channels: of the classifier that is trained with the masks.
        decoder: ``transposed`` (any backbone, any size) or ``unpooling`` (the paper's, VGG-16).
        decoder_input: see :class:`maskx.systems.transfernet.network.TransferNet`.
        feature_scale: likewise.
        freeze_encoder: the encoder stays as it was loaded, in the paper that of TransferNet does.
        freeze_attention: see :class:`maskx.systems.transfernet.network.TransferNet`.
        mask_weight: lambda of Eq. 9.
    """
    check_choice("method of TransferNet", method, METHODS)
    check_choice("attention of TransferNet", attention, ATTENTIONS)
    check_choice("decoder of TransferNet", decoder, DECODERS)
    feature_size = None
    if attention == "fc":
        _check_size("attention 'fc'", size, stride)
        feature_size = (size // stride, size // stride)
    if decoder == "unpooling":
        # Only VGG-16 with switches has this output_stride; all four pools come before its last map.
        if (getattr(encoder, "output_stride", None), stride) != (16, 16):
            raise ValueError(
                "decoder 'unpooling' needs all pooling switches of VGG-16 with an output stride of "
                "16, and its feature map conv5_3. Choose these, or decoder 'transposed'."
            )
        _check_size("decoder 'unpooling'", size, stride)
    common = {
        "in_feature": in_feature,
        "in_channels": in_channels,
        "num_classes": num_classes,
        "decoder": UnpoolingDecoder()
        if decoder == "unpooling"
        else TransposedDecoder(stride=stride),
        "freeze_encoder": freeze_encoder,
        "mask_weight": mask_weight,
    }
    if method == "transfernet":
        form = {"in_channels": in_channels, "num_classes": num_classes, "num_factors": num_factors}
        return TransferNet(
            encoder,
            attention=FactoredAttention(**form)
            if feature_size is None
            else FullyConnectedAttention(feature_size=feature_size, **form),
            hidden_channels=hidden_channels,
            decoder_input=decoder_input,
            feature_scale=feature_scale,
            train_stage=stage,
            freeze_attention=freeze_attention,
            **common,
        )
    for name, value, default in (
        ("decoder_input", decoder_input, "densified"),
        ("feature_scale", feature_scale, 0),
        ("freeze_attention", freeze_attention, False),
    ):
        if value != default:
            raise ValueError(
                f"{name} is {value!r}, but the method {method!r} has no attention. Set it to "
                f"{default!r}."
            )
    common |= {"classifier_channels": hidden_channels, "train_stage": stage}
    common["stage_classes"] = stage_classes
    if method == "baseline":
        return BaselineNet(encoder, feature_size=feature_size, **common)
    return DecoupledNet(encoder, **common)


def _check_size(what: str, size: int, stride: int) -> None:
    if size % stride or size < stride:
        raise ValueError(
            f"size is {size}, but {what} needs a multiple of {stride}, the stride of the features. "
            f"Set it to {size // stride * stride or stride}, or choose the form for any size "
            "(attention 'factored', decoder 'transposed')."
        )


def _refined_label_map(image: Tensor, labels: Tensor, prob_fg: Tensor) -> Tensor:
    """Merge the masks as the reference does: the CRF says where, the network which label."""
    pixels = resized_image(image, *prob_fg.shape[1:])
    scores = prob_fg.cpu().clone()
    for score in scores:
        both = torch.stack([1 - score, score]).numpy()
        background, foreground = dense_crf.refine(pixels, both, dense_crf.TRANSFERNET)
        score *= torch.from_numpy(foreground > background)
    best, which = scores.max(dim=0)
    return torch.where(best > 0, labels.cpu()[which] + 1, 0).to(prob_fg.device)
