"""LarvSeg: learns from several data sets together, and predicts any part of their classes."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor

from maskx.core.sample_models import SampleModel, required, take_classifier_backbone
from maskx.core.text import listed
from maskx.detectron2.image_model import choose_feature, pixel_arguments
from maskx.systems.larvseg.class_rows import take_rows
from maskx.systems.larvseg.class_table import match_rows
from maskx.systems.larvseg.classifier import check_class_indices
from maskx.systems.larvseg.detectron2.data import (
    indices_of_dataset,
    model_class_table,
    scored_indices,
)
from maskx.systems.larvseg.joint_sets import UNKNOWN
from maskx.systems.larvseg.network import LarvSeg
from maskx.systems.larvseg.windows import check_windows, predict_windows

__all__ = ["MaskXLarvSeg"]

logger = logging.getLogger(__name__)

_MAPPER = "Use the mapper of maskx.systems.larvseg.detectron2.data, as the Trainer of maskx does."
_LOSS_NAMES = {"loss_seg": "loss_pixels", "loss_cls": "loss_labels", "loss_aux": "loss_attention"}
# Tensors of the network with a row for each class.
_TRAINED = "classifier.trained"
_CLASS_ROWS = ("classifier.class_embeddings", _TRAINED, "bank.means", "bank.counts")


@META_ARCH_REGISTRY.register()
class MaskXLarvSeg(SampleModel):
    """Segmentation over the classes of several data sets, by name, that supervise it differently.

    Yu et al., "LarvSeg: Exploring Image Classification Data For Large Vocabulary Semantic
    Segmentation via Category-wise Attentive Classifier" (PRCV 2024). Checkpoints hold the memory
    bank and the names of the classes. In training mode a checkpoint with other classes may be
    loaded: rows of classes are taken by name, classes that it lacks keep their initial rows.

    Args:
        network: the plain network, of all classes; its backbone is one of Detectron2.
        class_names: by class index of the network.
        scored: by name of a training data set the class index of each of its labels.
        test_classes: class indices to predict where a sample does not say; None for all.
        image_size: side in pixels of the squares to which whole images are warped in evaluation.
        window: side of the windows that images are predicted by instead; 0 for whole images.
        stride: from window to window; 0 for that of their side.
        top_k: classes per pixel that are returned.
        pixel_mean: by channel, in the order of the images.
        pixel_std: by channel.

    Raises:
        ValueError: sizes or class indices do not fit the network.
    """

    @configurable
    def __init__(
        self,
        *,
        network: LarvSeg,
        class_names: Sequence[str],
        scored: Mapping[str, Sequence[int]] | None = None,
        test_classes: Sequence[int] | None = None,
        image_size: int = 512,
        window: int = 0,
        stride: int = 0,
        top_k: int = 1,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(image_size, pixel_mean=pixel_mean, pixel_std=pixel_std)
        if len(class_names) != network.num_classes:
            raise ValueError(
                f"class_names has {len(class_names)} names, the network {network.num_classes} "
                "classes. They must be as many."
            )
        if min(image_size, top_k) < 1 or min(window, stride) < 0:
            raise ValueError(
                f"image_size (INPUT.MASKX.SIZE) is {image_size}, top_k (TEST.MASKX.TOP_K) {top_k}, "
                f"window (TEST.MASKX.WINDOW) {window} and stride (TEST.MASKX.STRIDE) {stride}. "
                "Allowed: the first two from 1, the others from 0."
            )
        self.network = network
        self.class_names = tuple(class_names)
        self._scored = {
            name: check_class_indices(indices, network.num_classes)
            for name, indices in (scored or {}).items()
        }
        self.test_classes = (
            torch.arange(network.num_classes)
            if test_classes is None
            else check_class_indices(test_classes, network.num_classes)
        )
        self.top_k = top_k
        self.window, self.stride = window, stride or window
        self._divisor = divisor = network.backbone.size_divisibility or 1
        if window:
            self._feature_stride = network.backbone.output_shape()[network.in_feature].stride
            check_windows(window, self.stride, max(self._feature_stride, divisor))
        elif image_size % divisor:
            raise ValueError(
                f"INPUT.MASKX.SIZE (image_size) is {image_size}, but "
                f"{type(network.backbone).__name__} takes multiples of {divisor}. Set it to "
                f"{max(image_size // divisor, 1) * divisor}."
            )
        self._reported_untrained: set[int] = set()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration.

        The classes are those of the data sets, which must be registered; only their class lists
        are read.

        Raises:
            ValueError: keys or data sets do not fit together.
        """
        keys, test = cfg.MODEL.MASKX.LARVSEG, cfg.TEST.MASKX
        table = model_class_table(cfg)
        scored = scored_indices(cfg) if cfg.DATASETS.TRAIN else {}
        backbone = build_backbone(cfg)
        in_feature, in_channels = choose_feature(backbone, cfg.MODEL.MASKX.IN_FEATURE)
        network = LarvSeg(
            backbone,
            in_feature=in_feature,
            in_channels=in_channels,
            num_classes=len(table.names),
            hidden_channels=keys.HIDDEN_CHANNELS or None,
            logit_form=keys.LOGIT_FORM,
            memory=keys.MEMORY,
            bank_size=keys.BANK_SIZE,
            warm_up=keys.WARM_UP or None,
            top_tokens=keys.TOP_TOKENS,
            pooling=keys.POOLING,
            sample_classes=keys.SAMPLE_CLASSES,
            synchronise_bank=keys.SYNCHRONISE_BANK,
            image_weight=keys.IMAGE_WEIGHT,
            attentive_weight=keys.ATTENTIVE_WEIGHT,
        )
        if scored:
            # Until the trainer knows which of them some image shows.
            network.classifier.set_trained(sorted(set().union(*scored.values())))
        return {
            "network": network,
            "class_names": table.names,
            "scored": scored,
            "test_classes": indices_of_dataset(cfg, test.CLASSES_OF) if test.CLASSES_OF else None,
            "image_size": cfg.INPUT.MASKX.SIZE,
            "window": test.WINDOW,
            "stride": test.STRIDE,
            "top_k": test.TOP_K,
            **pixel_arguments(cfg),
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the weights; tensors with a row for each class are marked with the class list.

        Detectron2 leaves out what has another shape in the model before the model sees it. Under
        names of its own a class list of any length reaches `_load_from_state_dict`.
        """
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        mark = _mark(self.class_names)
        for name in _CLASS_ROWS:
            key = f"{prefix}network.{name}"
            if key in state:
                state[key + mark] = state.pop(key)
        encoded = json.dumps(self.class_names).encode()
        state[f"{prefix}class_names{mark}"] = torch.tensor(list(encoded), dtype=torch.uint8)
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Take rows of classes by name, or the backbone of a checkpoint of an image classifier."""
        take_classifier_backbone(self.network.backbone, state_dict, prefix)
        self._take_class_rows(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _take_class_rows(self, state: dict[str, Tensor], prefix: str) -> None:
        start = f"{prefix}class_names"
        marks = [key.removeprefix(start) for key in state if key.startswith(f"{start}@")]
        keys = [f"{prefix}network.{name}" for name in _CLASS_ROWS]
        if not marks:
            if keys[0] in state:
                raise ValueError(
                    "The weights do not say which classes their rows are of, so they cannot be "
                    "matched by name. Give a checkpoint of MaskXLarvSeg, or load the weights of a "
                    "plain LarvSeg into its attribute 'network'."
                )
            return
        names = json.loads(bytes(state.pop(start + marks[0]).tolist()))
        found = {key: state.pop(key + marks[0]) for key in keys if key + marks[0] in state}
        own = {key: self._row_tensor(name) for key, name in zip(keys, _CLASS_ROWS, strict=True)}
        is_same = tuple(names) == self.class_names
        if not self.training and not is_same:
            raise ValueError(
                f"The checkpoint has {len(names)} classes, which are not the "
                f"{len(self.class_names)} of the model"
                f"{_first_difference(names, self.class_names)}. Set DATASETS.TRAIN, or "
                "MODEL.MASKX.LARVSEG.CLASSES_OF, as the model was trained. Only the start of a "
                "training takes weights of other classes, by name."
            )
        match = match_rows(names, self.class_names)
        if not match.new_rows:
            raise ValueError(
                f"The checkpoint has none of the {len(self.class_names)} classes of the model. It "
                f"has {listed(names)}."
            )
        for key, name in zip(keys, _CLASS_ROWS, strict=True):
            if key not in found or own[key] is None:
                state |= {key: found[key]} if key in found else {}  # Detectron2 reports it
                continue
            rows = take_rows(own[key], match.new_rows, found[key], match.old_rows, what=key)
            # What this training shows counts as trained, beside what the other one showed.
            state[key] = rows | own[key] if name == _TRAINED and self.training else rows
        for names_left, what in (
            (match.only_new, "are not in the checkpoint and keep their initial weights"),
            (match.only_old, "of the checkpoint are not wanted"),
        ):
            if names_left:
                logger.warning("%d classes %s: %s.", len(names_left), what, listed(names_left))

    def _row_tensor(self, name: str) -> Tensor | None:
        part, _, attribute = name.partition(".")
        return getattr(getattr(self.network, part), attribute, None)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Learn from a batch of one data set, or segment images.

        Args:
            batched_inputs: samples with ``image`` (3, H, W) from 0 to 255. In training all of one
                size, of one ``data_set``, its name, and all with ``label_map``, (H, W) int64
                positions in ``scored`` of the data set and -1 where nothing is known, or with
                ``image_labels``, a list of positions; ``single_label`` where images show more than
                their one label says. In evaluation ``height`` and ``width``, the size of the
                output, are those of the image, and ``class_indices``, the classes to choose from,
                ``test_classes`` where they are not given.

        Returns:
            In training ``loss_pixels``, ``loss_labels`` and, unless the network has no memory,
            ``loss_attention``, weighted; one without supervision is zero. Otherwise per sample

            - ``sem_seg``: (height, width) int64 positions in ``class_indices``;
            - ``top_classes``: (k, height, width), the same of the k best classes;
            - ``top_scores``: (k, height, width) their logits, the best first;
            - ``class_indices``: (L,) the classes chosen from.

        Raises:
            ValueError: in training, a sample lacks something, the sizes differ, the data sets
                differ or are unknown, or a label is not among their classes; in evaluation, none of
                the classes was trained.
        """
        if not self.training:
            return [self.predict(sample) for sample in batched_inputs]
        name, scored = self._data_set_of(batched_inputs)
        images = [self.normalise(sample) for sample in batched_inputs]
        label_maps = image_labels = None
        if any("label_map" in sample for sample in batched_inputs):
            label_maps = [required(sample, "label_map", _MAPPER) for sample in batched_inputs]
            for sample, label_map in zip(batched_inputs, label_maps, strict=True):
                for label in map(int, label_map.aminmax()):
                    if not UNKNOWN <= label < len(scored):
                        raise ValueError(
                            f"Image {sample.get('image_id', 'without id')!r} of data set '{name}' "
                            f"has the label {label} in its label map. Allowed: 0 to "
                            f"{len(scored) - 1}, positions among its classes, and {UNKNOWN} where "
                            f"nothing is known. {_MAPPER}"
                        )
        else:
            image_labels = [required(sample, "image_labels", _MAPPER) for sample in batched_inputs]
        sizes = {tuple(tensor.shape[-2:]) for tensor in (*images, *(label_maps or ()))}
        if len(sizes) > 1:
            raise ValueError(
                "The images and label maps of a training batch have different sizes: "
                f"{', '.join(map(str, sorted(sizes)))}. {_MAPPER}"
            )
        if any(side % self._divisor for side in sizes.pop()):
            raise ValueError(
                f"The training images of data set '{name}' have sides of "
                f"{' x '.join(map(str, images[0].shape[-2:]))} pixels, but "
                f"{type(self.network.backbone).__name__} takes multiples of {self._divisor}. Set "
                "DATASETS.MASKX.JOINT.SIZES so."
            )
        losses = self.network.losses(
            self.network(torch.stack(images)),
            class_indices=scored,
            label_maps=None if label_maps is None else torch.stack(label_maps).to(self.device),
            image_labels=image_labels,
            single_label=batched_inputs[0].get("single_label", False),
            ignore=UNKNOWN,
        )
        return {_LOSS_NAMES[name]: loss for name, loss in losses.items()}

    def _data_set_of(self, samples: list[dict[str, Any]]) -> tuple[str, Tensor]:
        """Return the data set of a batch, and the class index of each of its labels."""
        names = {required(sample, "data_set", _MAPPER) for sample in samples}
        if len(names) != 1 or not names <= self._scored.keys():
            raise ValueError(
                f"A training batch has samples of the data sets {sorted(names)}. Allowed: samples "
                f"of one of {', '.join(self._scored) or 'DATASETS.TRAIN, which is empty'}. "
                f"{_MAPPER}"
            )
        (name,) = names
        # Assigned once per device, not copied in every step.
        self._scored[name] = self._scored[name].to(self.device)
        return name, self._scored[name]

    @torch.no_grad()
    def predict(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """Predict the best classes of every pixel of one image, in evaluation mode.

        Args:
            sample: see :meth:`forward`.

        Returns:
            See :meth:`forward`.

        Raises:
            ValueError: a class index is out of range, or none of the classes was trained.
        """
        classes = self.test_classes
        if "class_indices" in sample:
            classes = check_class_indices(sample["class_indices"], self.network.num_classes)
        classes = classes.to(self.device)
        positions = self._trained_positions(classes)
        image = sample["image"]
        size = (sample.get("height", image.shape[1]), sample.get("width", image.shape[2]))
        options = {"class_indices": classes[positions], "top_k": self.top_k}
        if self.window:
            options |= {"window": self.window, "stride": self.stride}
            options["feature_stride"] = self._feature_stride
            found, scores = predict_windows(
                self.network, self.normalise({"image": image}), size, **options
            )
        else:
            images = self.preprocess([sample])
            found, scores = (each[0] for each in self.network.predict(images, size, **options))
        labels = positions[found]
        return {
            "sem_seg": labels[0],
            "top_classes": labels,
            "top_scores": scores,
            "class_indices": classes,
        }

    def _trained_positions(self, classes: Tensor) -> Tensor:
        """Return the positions of the classes that training showed; name the others once."""
        is_trained = self.network.classifier.trained[classes]
        never = set(classes[~is_trained].tolist()) - self._reported_untrained
        if never:
            self._reported_untrained |= never
            logger.warning(
                "%d classes were in no image of the training, so they are never predicted: %s.",
                *(len(never), listed([self.class_names[index] for index in sorted(never)])),
            )
        if not is_trained.any():
            raise ValueError(
                f"None of the {len(classes)} classes to predict was in the training data: "
                f"{listed([self.class_names[index] for index in classes.tolist()])}. Choose "
                "others (TEST.MASKX.CLASSES_OF), or train on data that show them."
            )
        return is_trained.nonzero()[:, 0]


def _mark(class_names: Sequence[str]) -> str:
    """What the names of the tensors of a class list end with."""
    return f"@{hashlib.sha256(json.dumps(class_names).encode()).hexdigest()[:8]}"


def _first_difference(found: Sequence[str], own: Sequence[str]) -> str:
    for index, (theirs, ours) in enumerate(zip(found, own, strict=False)):
        if theirs != ours:
            return f": class {index} is {theirs!r} there, but {ours!r} here"
    return ""
