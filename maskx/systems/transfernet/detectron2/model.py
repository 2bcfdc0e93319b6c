"""TransferNet and its baselines, and the classifier of image labels that they start from."""

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.utils.events import get_event_storage
from torch import Tensor

from maskx.core.checks import check_choice
from maskx.core.image_classifier import ImageClassifier, choose_labels, multi_hot
from maskx.core.images import resized_image
from maskx.core.sample_models import SampleModel, lacking_weights, required
from maskx.data import dense_crf
from maskx.data.label_maps import ignore_label
from maskx.detectron2.hooks import architecture_of
from maskx.detectron2.image_classifier import MaskXImageClassifier
from maskx.detectron2.image_model import choose_feature, pixel_arguments
from maskx.systems.transfernet.attention import (
    FactoredAttention,
    FullyConnectedAttention,
    attention_entropy,
)
from maskx.systems.transfernet.baselines import BaselineNet, DecoupledNet
from maskx.systems.transfernet.decoder import TransposedDecoder, UnpoolingDecoder
from maskx.systems.transfernet.network import (
    PairNetwork,
    TransferNet,
    foreground_prob,
    merge_label_masks,
    pair_target,
)
from maskx.systems.transfernet.transfer_sets import label_pairs

__all__ = ["MaskXTransferClassifier", "MaskXTransferNet", "check_loaded", "check_transfernet"]

_KEYS = "MODEL.MASKX.TRANSFERNET"
_MAPPER = "Use MaskXTransferMapper, which warps images and label maps to one size."
_ENTROPY_PERIOD = 20  # iterations; Detectron2 writes as often, and reading it waits for the GPU


@META_ARCH_REGISTRY.register()
class MaskXTransferClassifier(MaskXImageClassifier):
    """:class:`MaskXImageClassifier` for the tags of source and target images.

    What source categories a target image shows is not known, and taken as absent: without, source
    categories are predicted on target images, see the page of TransferNet.

    Args:
        **kwargs: arguments of ``MaskXImageClassifier``.
    """


@META_ARCH_REGISTRY.register()
class MaskXTransferNet(SampleModel):
    """TransferNet, BaselineNet or DecoupledNet, with a separate classifier that chooses labels.

    Hong et al., "Learning Transferrable Knowledge for Semantic Segmentation with Deep Convolutional
    Neural Network" (CVPR 2016). Checkpoints hold the classifier as well.

    Args:
        network: the plain network; :meth:`from_config` makes any of the three.
        classifier: of image labels, as trained by :class:`MaskXTransferClassifier`. It is not
            trained here.
        image_size: side S in pixels of the squares that the networks see.
        classifier_weights: checkpoint of the classifier, whose backbone is the encoder as well; ""
            leaves both as they are.
        gt_labels: segment the ``image_labels`` of a sample that has them (TransferNet-GT).
        crf: whether a dense CRF refines the mask of each label.
        pixel_mean: by channel, in the order of the images.
        pixel_std: by channel.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ImportError: there is no library for the CRF.
        ValueError: the checkpoint lacks weights of the classifier or of the encoder.
    """

    @configurable
    def __init__(
        self,
        *,
        network: PairNetwork,
        classifier: ImageClassifier,
        image_size: int = 320,
        classifier_weights: str = "",
        gt_labels: bool = False,
        crf: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(image_size, pixel_mean=pixel_mean, pixel_std=pixel_std)
        if crf:
            dense_crf.check_crf()
        self.network = network
        self.classifier = classifier.requires_grad_(False)
        self.num_classes = classifier.num_classes
        self.gt_labels = gt_labels
        self.crf = crf
        # Kept in checkpoints, so that a random classifier never chooses labels.
        self.register_buffer("has_classifier", torch.tensor(False))
        if classifier_weights:
            self.load_classifier(classifier_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Raises:
            ValueError: keys do not fit together.
        """
        keys = cfg.MODEL.MASKX.TRANSFERNET
        weights = "" if cfg.MODEL.WEIGHTS else keys.CLASSIFIER_WEIGHTS
        without_imagenet = cfg.clone()
        without_imagenet.defrost()
        without_imagenet.MODEL.MASKX.BACKBONE.PRETRAINED = False
        backbone = build_backbone(without_imagenet)
        in_feature, in_channels = choose_feature(backbone, keys.CLASSIFIER_FEATURE)
        classifier = ImageClassifier(
            backbone,
            in_feature=in_feature,
            in_channels=in_channels,
            num_classes=cfg.MODEL.MASKX.NUM_CLASSES,
        )
        return {
            "network": _build_network(cfg, build_backbone(without_imagenet if weights else cfg)),
            "classifier": classifier,
            "image_size": cfg.INPUT.MASKX.SIZE,
            "classifier_weights": weights,
            "gt_labels": cfg.TEST.MASKX.GT_LABELS,
            "crf": cfg.TEST.MASKX.CRF,
            **pixel_arguments(cfg),
        }

    def train(self, mode: bool = True) -> "MaskXTransferNet":
        """Set training or evaluation mode; the classifier stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def load_classifier(self, path: str) -> None:
        """Take over a trained classifier, and its backbone as the encoder.

        Args:
            path: checkpoint of :class:`MaskXTransferClassifier` or :class:`MaskXImageClassifier`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be read, lacks weights, or holds them in another shape.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, KeyError) as error:
            raise ValueError(
                f"{_KEYS}.CLASSIFIER_WEIGHTS '{path}' cannot be read ({type(error).__name__}). "
                "Give the model_final.pth of a training of MaskXTransferClassifier."
            ) from error
        for what, module, prefix in (
            ("classifier", self.classifier, "classifier."),
            ("encoder", self.network.encoder, "classifier.backbone."),
        ):
            lacking = lacking_weights(module, state, prefix)
            if lacking:
                raise ValueError(
                    f"{_KEYS}.CLASSIFIER_WEIGHTS '{path}' lacks {len(lacking)} of the "
                    f"{len(module.state_dict())} weights of the {what}, or holds them in another "
                    f"shape: {', '.join(lacking[:3])}"
                    f"{' and more' if len(lacking) > 3 else ''}. Give a checkpoint of "
                    "MaskXTransferClassifier with the same backbone and NUM_CLASSES, and its "
                    "IN_FEATURE as CLASSIFIER_FEATURE."
                )
            found = {n: state[prefix + n] for n in module.state_dict() if prefix + n in state}
            module.load_state_dict(found, strict=False)
        self.has_classifier.fill_(True)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Learn from source and target images, or segment images.

        Args:
            batched_inputs: samples with ``image`` (3, H, W) from 0 to 255 and, in training, all of
                one size, ``image_labels`` and, where there are masks, ``sem_seg``, the label map
                (H, W). In evaluation ``candidate_labels``, the class indices that may be predicted,
                are all where they are not given; for ``gt_labels`` also ``image_labels``.

        Returns:
            In training ``loss_labels`` and, but in the stage "attention", ``loss_masks``, which is
            zero where no sample has masks. Otherwise per sample

            - ``image_labels``: (L,) class indices of the labels that were segmented;
            - ``masks_prob``: (L, height, width), probability of each, after that of the background
              was halved, and without the CRF;
            - ``sem_seg``: (height, width) int64 label map, 0 the background, c + 1 class index c;
            - ``attention``: (L, h, w), of TransferNet, on the padded square;
            - ``image_labels_prob``: (K,), where the classifier chose the labels.

            The stage "attention" predicts no masks: neither ``masks_prob`` nor ``sem_seg``.

        Raises:
            ValueError: in training, a sample has no labels, a label is no class index, or the sizes
                differ; in evaluation, the labels are not given and there is no classifier.
        """
        if not self.training:
            return self.inference(batched_inputs) if batched_inputs else []
        labels = [required(sample, "image_labels", _MAPPER) for sample in batched_inputs]
        multi_hot(labels, self.num_classes)  # refuses labels outside the class list
        images = [self.normalise(sample) for sample in batched_inputs]
        label_maps = [sample["sem_seg"] for sample in batched_inputs if "sem_seg" in sample]
        sizes = {tuple(tensor.shape[-2:]) for tensor in (*images, *label_maps)}
        if len(sizes) > 1:
            raise ValueError(
                "The images and label maps of a training batch have different sizes: "
                f"{', '.join(map(str, sorted(sizes)))}. {_MAPPER}"
            )
        return self._losses(torch.stack(images), labels, batched_inputs)

    def _losses(
        self, images: Tensor, labels: list[list[int]], samples: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        pair_images, pair_labels = self._pairs(labels)
        ignore = ignore_label(self.num_classes)
        unknown = torch.full(images.shape[2:], ignore, dtype=torch.int64)
        label_maps = torch.stack([sample.get("sem_seg", unknown) for sample in samples])
        has_masks = torch.tensor(["sem_seg" in sample for sample in samples], dtype=torch.bool)
        mask_pairs = has_masks.to(self.device)[pair_images]
        outputs = self.network(images, pair_images, pair_labels, mask_pairs)
        targets = pair_target(
            label_maps.to(self.device),
            pair_images[mask_pairs],
            pair_labels[mask_pairs],
            ignore=ignore,
        )
        storage = get_event_storage()
        storage.put_scalar("maskx/images_without_labels", sum(not found for found in labels))
        if hasattr(outputs, "attention") and storage.iter % _ENTROPY_PERIOD == 0 and any(labels):
            entropy = attention_entropy(outputs.attention.detach()).mean()
            storage.put_scalar("maskx/attention_entropy", entropy)
        return self.network.losses(outputs, pair_images, pair_labels, targets)

    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Segment at least one image; all labels of all images go through together.

        See :meth:`forward`.
        """
        images = torch.stack([self.preprocess(sample["image"]) for sample in batched_inputs])
        labels, prob = self._choose_labels(images, batched_inputs)
        pair_images, pair_labels = self._pairs(labels)
        outputs = self.network(images, pair_images, pair_labels)
        counts = torch.bincount(pair_images, minlength=len(images)).tolist()
        results = [{"image_labels": found} for found in pair_labels.split(counts)]
        if hasattr(outputs, "attention"):
            for result, attention in zip(results, outputs.attention.split(counts), strict=True):
                result["attention"] = attention
        if prob is not None:
            for result, row in zip(results, prob, strict=True):
                result["image_labels_prob"] = row
        if outputs.mask_logits is not None:
            masks = foreground_prob(outputs.mask_logits).split(counts)
            for sample, result, prob_fg in zip(batched_inputs, results, masks, strict=True):
                result |= self._merge(sample, result["image_labels"], prob_fg)
        return results

    def preprocess(self, image: Tensor) -> Tensor:
        """Normalise an image, pad it to a square at the bottom and on the right, and resize that.

        Args:
            image: (3, H, W) from 0 to 255.

        Returns:
            (3, S, S). What is padded has the mean colour.
        """
        image = self.normalise({"image": image})
        height, width = image.shape[1:]
        side, size = max(height, width), self.size
        image = F.pad(image, (0, side - width, 0, side - height))
        if side == size:
            return image
        return F.interpolate(
            image[None], (size, size), mode="bilinear", align_corners=False, antialias=True
        )[0]

    def _pairs(self, labels: list[list[int]]) -> tuple[Tensor, Tensor]:
        pair_images, pair_labels = (torch.from_numpy(indices) for indices in label_pairs(labels))
        return pair_images.to(self.device), pair_labels.to(self.device)

    def _choose_labels(
        self, images: Tensor, samples: list[dict[str, Any]]
    ) -> tuple[list[list[int]], Tensor | None]:
        """Return class indices by image and, if the classifier chose any, (N, K) probabilities."""
        is_given = [self.gt_labels and "image_labels" in sample for sample in samples]
        given = [
            list(sample["image_labels"]) if has else []
            for sample, has in zip(samples, is_given, strict=True)
        ]
        multi_hot(given, self.num_classes)  # refuses labels outside the class list
        if all(is_given):
            return given, None
        if not self.has_classifier:
            raise ValueError(
                "MaskXTransferNet has no trained classifier that could choose the labels of an "
                f"image. Train it with {_KEYS}.CLASSIFIER_WEIGHTS, or set TEST.MASKX.GT_LABELS "
                "True and give samples with image_labels."
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
            true if has else row.nonzero()[:, 0].tolist()
            for has, true, row in zip(is_given, given, chosen, strict=True)
        ]
        return labels, prob

    def _merge(self, sample: dict[str, Any], labels: Tensor, prob_fg: Tensor) -> dict[str, Tensor]:
        """Bring (L, S, S) masks of the padded square to the size of the output, and merge them."""
        image = sample["image"]
        height, width = sample.get("height", image.shape[1]), sample.get("width", image.shape[2])
        if len(prob_fg) == 0:
            prob_fg = prob_fg.new_zeros(0, height, width)
            return {"masks_prob": prob_fg, "sem_seg": merge_label_masks(prob_fg, labels)}
        side = max(image.shape[1:])
        square = (round(side * height / image.shape[1]), round(side * width / image.shape[2]))
        prob_fg = F.interpolate(
            prob_fg.float()[:, None], square, mode="bilinear", align_corners=False, antialias=True
        )[:, 0, :height, :width].clamp(0, 1)
        if self.crf:
            label_map = self._refined_label_map(image, labels, prob_fg)
        else:
            label_map = merge_label_masks(prob_fg, labels, halve_background=False)
        return {"masks_prob": prob_fg, "sem_seg": label_map}

    def _refined_label_map(self, image: Tensor, labels: Tensor, prob_fg: Tensor) -> Tensor:
        """Merge masks as the reference does: the CRF says where, the network which label."""
        pixels = resized_image(image, *prob_fg.shape[1:])
        scores = prob_fg.cpu().clone()
        for score in scores:
            both = torch.stack([1 - score, score]).numpy()
            background, foreground = dense_crf.refine(pixels, both, dense_crf.TRANSFERNET)
            score *= torch.from_numpy(foreground > background)
        best, which = scores.max(dim=0)
        return torch.where(best > 0, labels.cpu()[which] + 1, 0).to(prob_fg.device)


def check_transfernet(cfg: CfgNode) -> None:
    """Refuse configurations of :class:`MaskXTransferNet` that would fail or mislead later.

    Raises:
        FileNotFoundError: there is no such checkpoint of a classifier.
        ValueError: the stage cannot be evaluated, or a key has no effect.
    """
    if not issubclass(architecture_of(cfg), MaskXTransferNet):
        return
    if cfg.MODEL.MASKX.TRANSFERNET.STAGE == "attention" and cfg.DATASETS.TEST:
        raise ValueError(
            f"{_KEYS}.STAGE is 'attention', which makes no masks that could be evaluated on "
            f"{', '.join(cfg.DATASETS.TEST)}. Set DATASETS.TEST ()."
        )
    if cfg.SOLVER.MASKX.BACKBONE_LR_FACTOR != 1:
        raise ValueError(
            f"SOLVER.MASKX.BACKBONE_LR_FACTOR is {cfg.SOLVER.MASKX.BACKBONE_LR_FACTOR}, but the "
            f"backbone of MaskXTransferNet is frozen, or trains as everything else with "
            f"{_KEYS}.FREEZE_ENCODER False. Set it to 1."
        )


def check_loaded(cfg: CfgNode, model: MaskXTransferNet, missing: Sequence[str]) -> None:
    """Check, before a training starts, that what stays as it was loaded was loaded.

    Args:
        cfg: the configuration.
        model: with its weights.
        missing: names of the weights that ``MODEL.WEIGHTS`` does not have.

    Raises:
        ValueError: a frozen part, or the classifier that an evaluation needs, is random.
    """
    keys, weights = cfg.MODEL.MASKX.TRANSFERNET, cfg.MODEL.WEIGHTS
    from_elsewhere = keys.CLASSIFIER_WEIGHTS or cfg.MODEL.MASKX.BACKBONE.PRETRAINED
    for key, prefix, is_loaded in (
        ("FREEZE_ENCODER", "network.encoder.", bool(weights or from_elsewhere)),
        ("FREEZE_ATTENTION", "network.attention.", bool(weights)),
    ):
        lacking = [name for name in missing if name.startswith(prefix)]
        if keys[key] and (lacking or not is_loaded):
            lacks = f"lacks {', '.join(lacking[:3])}" if lacking else "is empty"
            raise ValueError(
                f"{_KEYS}.{key} is True, but what is to stay as it was loaded is random: "
                f"MODEL.WEIGHTS '{weights}' {lacks}. Train the stages in their order, with "
                f"tools/train_transfernet.py, or set {_KEYS}.CLASSIFIER_WEIGHTS for stage 1 and "
                "MODEL.WEIGHTS for stage 2."
            )
    if cfg.DATASETS.TEST and not cfg.TEST.MASKX.GT_LABELS and not model.has_classifier:
        raise ValueError(
            f"{_KEYS}.CLASSIFIER_WEIGHTS is '{keys.CLASSIFIER_WEIGHTS}' and MODEL.WEIGHTS "
            f"'{weights}': neither gives a trained classifier, which chooses the labels of the "
            f"images of {', '.join(cfg.DATASETS.TEST)} after the training. Train one with "
            "META_ARCHITECTURE MaskXTransferClassifier, or set TEST.MASKX.GT_LABELS True."
        )


def _build_network(cfg: CfgNode, encoder: Backbone) -> PairNetwork:
    """Make TransferNet or a baseline on an encoder."""
    keys, size = cfg.MODEL.MASKX.TRANSFERNET, cfg.INPUT.MASKX.SIZE
    for key, allowed in (
        ("METHOD", ("transfernet", "baseline", "decoupled")),
        ("ATTENTION", ("factored", "fc")),
        ("DECODER", ("transposed", "unpooling")),
    ):
        check_choice(f"{_KEYS}.{key}", keys[key], allowed)
    if size < 1:
        raise ValueError(f"INPUT.MASKX.SIZE is {size}. Allowed: a side in pixels, above 0.")
    in_feature, in_channels = choose_feature(encoder, cfg.MODEL.MASKX.IN_FEATURE)
    stride = encoder.output_shape()[in_feature].stride
    feature_size = None
    if keys.ATTENTION == "fc":
        _check_size(f"{_KEYS}.ATTENTION fc", size, stride)
        feature_size = (size // stride, size // stride)
    if keys.DECODER == "unpooling":
        # Only VGG-16 with switches has this output_stride; all four pools come before its last map.
        if (getattr(encoder, "output_stride", None), stride) != (16, 16):
            raise ValueError(
                f"{_KEYS}.DECODER is 'unpooling', which needs all pooling switches of "
                "MODEL.BACKBONE.NAME MaskXVGG16 with MODEL.MASKX.BACKBONE.OUTPUT_STRIDE 16 and "
                "MODEL.MASKX.IN_FEATURE conv5_3. Set these, or DECODER transposed."
            )
        _check_size(f"{_KEYS}.DECODER unpooling", size, 16)
    common = {
        "in_feature": in_feature,
        "in_channels": in_channels,
        "num_classes": cfg.MODEL.MASKX.NUM_CLASSES,
        "decoder": (
            UnpoolingDecoder() if keys.DECODER == "unpooling" else TransposedDecoder(stride=stride)
        ),
        "freeze_encoder": keys.FREEZE_ENCODER,
        "mask_weight": keys.MASK_WEIGHT,
    }
    if keys.METHOD == "transfernet":
        form = {key: common[key] for key in ("in_channels", "num_classes")}
        form["num_factors"] = keys.NUM_FACTORS
        return TransferNet(
            encoder,
            attention=(
                FactoredAttention(**form)
                if feature_size is None
                else FullyConnectedAttention(feature_size=feature_size, **form)
            ),
            hidden_channels=keys.HIDDEN_CHANNELS,
            decoder_input=keys.DECODER_INPUT,
            reference_scale=keys.REFERENCE_SCALE,
            train_stage=keys.STAGE,
            freeze_attention=keys.FREEZE_ATTENTION,
            **common,
        )
    for key, default in (
        *(("STAGE", "joint"), ("DECODER_INPUT", "densified")),
        *(("REFERENCE_SCALE", False), ("FREEZE_ATTENTION", False)),
    ):
        if keys[key] != default:
            raise ValueError(
                f"{_KEYS}.{key} is {keys[key]!r}, but METHOD '{keys.METHOD}' has no attention. Set "
                f"it to {default!r}."
            )
    common["classifier_channels"] = keys.HIDDEN_CHANNELS
    if keys.METHOD == "baseline":
        return BaselineNet(encoder, feature_size=feature_size, **common)
    return DecoupledNet(encoder, **common)


def _check_size(what: str, size: int, stride: int) -> None:
    if size % stride:
        raise ValueError(
            f"INPUT.MASKX.SIZE is {size}, but {what} needs a multiple of {stride}, the stride of "
            f"the features. Set it to {size // stride * stride or stride}, or choose the form for "
            "any size (ATTENTION factored, DECODER transposed)."
        )
