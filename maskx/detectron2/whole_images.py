"""Models of whole images on Detectron2: classifiers and semantic segmentation, of one class list.

Their configuration, the samples and records that they learn from, and their hooks.
"""

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone

from maskx.core.image_classifier import ImageClassifier
from maskx.core.sample_models import SampleClassifier
from maskx.data.images import ImageMapper
from maskx.data.label_maps import ignore_label, semantic_label_map
from maskx.detectron2.adapters import in_format, seeded_train_loader, test_loader
from maskx.detectron2.datasets import class_names_of, records_of, split_from_config
from maskx.detectron2.evaluation import MaskXImageLabelEvaluator, check_all_classes_known
from maskx.detectron2.hooks import Detectron2Hooks, check_classes, hooks_of

logger = logging.getLogger(__name__)


def known_class_names(cfg: CfgNode) -> Sequence[str]:
    """Class list of the training data; none where they are not known, as for a predictor."""
    names = cfg.DATASETS.TRAIN
    is_known = all(name in DatasetCatalog for name in names)
    return class_names_of(names[0]) if names and is_known else ()


def feature_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of a network on one feature map: its backbone, that map and the classes."""
    backbone = build_backbone(cfg)
    in_feature, in_channels = choose_feature(backbone, cfg.MODEL.MASKX.IN_FEATURE)
    shape = {"in_feature": in_feature, "in_channels": in_channels}
    return {"backbone": backbone, **shape, "num_classes": cfg.MODEL.MASKX.NUM_CLASSES}


def pixel_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of :class:`maskx.core.sample_models.SampleModel` but the size of images."""
    return {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}


def choose_feature(backbone: Backbone, name: str) -> tuple[str, int]:
    """Return the name and the channels of a feature map of a backbone.

    What the feature map does not depend on is taken away (backbones of maskx) or frozen (others):
    training by several processes stops where a parameter gets no gradient.

    Args:
        name: of the feature map; "" for the last.
    """
    shapes = backbone.output_shape()
    if name and name not in shapes:
        raise ValueError(
            f"MODEL.MASKX.IN_FEATURE (in_feature) is '{name}', which {type(backbone).__name__} "
            f"does not return. Allowed: {', '.join(shapes)}; '' for the last of them."
        )
    name = name or list(shapes)[-1]
    if hasattr(backbone, "drop_layers_after"):
        backbone.drop_layers_after(name)
    elif len(shapes) > 1:
        _freeze_unused(backbone, name)
    return name, shapes[name].channels


def _freeze_unused(backbone: Backbone, name: str) -> None:
    """Freeze the parameters that have no part in a feature map, found by a small image."""
    stride = max(shape.stride for shape in backbone.output_shape().values())
    side = 2 * max(stride, backbone.size_divisibility)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    if not trained:
        return
    is_training = backbone.training
    backbone.eval()  # keeps the statistics of batch norm
    image = trained[0].new_zeros(1, 3, side, side)
    with torch.enable_grad():
        found = torch.autograd.grad(backbone(image)[name].sum(), trained, allow_unused=True)
    backbone.train(is_training)
    for parameter, gradient in zip(trained, found, strict=True):
        parameter.requires_grad_(gradient is not None)


@META_ARCH_REGISTRY.register()
class MaskXImageClassifier(SampleClassifier):
    """:class:`maskx.core.sample_models.SampleClassifier` with any backbone of Detectron2."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        return {
            "classifier": ImageClassifier(**feature_arguments(cfg)),
            "size": cfg.INPUT.MASKX.SIZE,
            "class_names": known_class_names(cfg),
            **pixel_arguments(cfg),
        }


def image_mapper(cfg: CfgNode) -> ImageMapper:
    """Make what makes samples of records; see :func:`maskx.detectron2.adapters.in_format`.

    Where the split withholds masks, label maps are those of :func:`allowed_label_map`.
    """
    flip = cfg.INPUT.RANDOM_FLIP
    if flip not in ("none", "horizontal"):
        raise ValueError(
            f"INPUT.RANDOM_FLIP is {flip!r}, but {cfg.MODEL.META_ARCHITECTURE} mirrors images "
            "horizontally or not at all. Allowed: horizontal, none."
        )
    num_classes, allowed = cfg.MODEL.MASKX.NUM_CLASSES, _classes_with_masks(cfg)
    read = functools.partial(allowed_label_map, num_classes=num_classes, allowed=allowed)
    return ImageMapper(
        num_classes,
        size=cfg.INPUT.MASKX.SIZE,
        flip=flip == "horizontal",
        label_maps=hooks_of(cfg).learns_label_maps,
        read_label_map=None if allowed is None else read,
    )


def allowed_label_map(
    record: Mapping[str, Any], *, num_classes: int, allowed: Collection[int]
) -> np.ndarray:
    """Make the label map of a record without the masks of other classes.

    Of objects they are removed before it is drawn; in a label map of a file their pixels become
    unknown, and with them the background, which would show their outlines.

    Args:
        allowed: class indices whose masks are used.
    """
    withheld = [
        annotation
        if annotation["class_index"] in allowed
        else {key: value for key, value in annotation.items() if key != "segmentation"}
        for annotation in record["annotations"]
    ]
    label_map = semantic_label_map({**record, "annotations": withheld}, num_classes)
    return _withhold(label_map, allowed, num_classes)


def training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """Read the data sets of ``DATASETS.TRAIN``, without the images that teach the model nothing.

    An image classifier learns from every image whose labels are known, also from one that is known
    to have none. Semantic segmentation learns from every image of which a pixel is known.
    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``, which leaves out images without a box, is not used.
    """
    names = cfg.DATASETS.TRAIN
    for name in names[1:]:
        if class_names_of(name) != class_names_of(names[0]):
            raise ValueError(
                f"Data sets '{names[0]}' and '{name}' (DATASETS.TRAIN) have different class lists. "
                "To train on both at once, give both the same names in the same order."
            )
    records = [record for name in names for record in records_of(name)]
    if hooks_of(cfg).learns_label_maps:
        allowed, what = _classes_with_masks(cfg), "a label map or a mask"
        kept = [record for record in records if _has_known_pixels(record, allowed)]
    else:
        what = "image labels"
        kept = [record for record in records if "image_labels" in record]
    if not kept:
        raise ValueError(
            f"None of the {len(records)} images of {', '.join(names)} (DATASETS.TRAIN) has {what}, "
            f"which {cfg.MODEL.META_ARCHITECTURE} learns from. Choose another data set."
        )
    if len(kept) < len(records):
        logger.warning(
            "%d of the %d images of DATASETS.TRAIN are left out: they do not have %s, which the "
            "model learns from.",
            len(records) - len(kept),
            len(records),
            what,
        )
    return kept


def _classes_with_masks(cfg: CfgNode) -> frozenset[int] | None:
    """Class indices whose masks may be used; None for all, or where none is read."""
    if not hooks_of(cfg).learns_label_maps:
        return None
    split = split_from_config(cfg)
    return frozenset(split.indices_with_masks) if split.indices_without_masks else None


def _has_known_pixels(record: dict[str, Any], allowed: Collection[int] | None) -> bool:
    if "label_map_file_name" in record:
        return True
    if "image_labels" not in record:
        return False
    annotations = record["annotations"]
    if any(
        "segmentation" in a and (allowed is None or a["class_index"] in allowed)
        for a in annotations
        if not a["iscrowd"]
    ):
        return True
    # The background is known only where all objects have a box.
    return record.get("boxes_complete", True) and {
        a["class_index"] for a in annotations
    }.issuperset(record["image_labels"])


def _withhold(label_map: np.ndarray, allowed: Collection[int], num_classes: int) -> np.ndarray:
    """Make the classes that are not allowed unknown and, where there are any, the background."""
    ignore = ignore_label(num_classes)
    is_withheld = np.ones(ignore + 1, bool)
    is_withheld[[0, ignore, *(index + 1 for index in allowed)]] = False
    withheld = is_withheld[label_map]
    if withheld.any():
        withheld |= label_map == 0
        return np.where(withheld, label_map.dtype.type(ignore), label_map)
    return label_map


def image_hooks(
    system: str,
    evaluator: Callable[..., DatasetEvaluator],
    *,
    learns_label_maps: bool,
    check: Callable[[CfgNode], None] | None = None,
) -> Detectron2Hooks:
    """Make the hooks of a model that :func:`image_mapper` makes samples for."""

    def train_loader(cfg: CfgNode) -> Any:
        mapper = in_format(image_mapper(cfg), cfg.INPUT.FORMAT)
        split = split_from_config(cfg) if learns_label_maps else None
        return seeded_train_loader(cfg, training_records(cfg), mapper, split=split)

    def check_all(cfg: CfgNode) -> None:
        if cfg.MODEL.MASKX.FREEZE_DETECTOR:
            raise ValueError(
                f"MODEL.MASKX.FREEZE_DETECTOR is True, but {cfg.MODEL.META_ARCHITECTURE} has no "
                "detector. Set it to False."
            )
        check_classes(cfg, "MODEL.MASKX.NUM_CLASSES")
        if check is not None:
            check(cfg)

    return Detectron2Hooks(
        system=system,
        train_loader=train_loader,
        test_loader=lambda cfg, name: test_loader(cfg, name, image_mapper(cfg).read_image),
        evaluator=lambda cfg, name: evaluator(name, split=cfg.DATASETS.MASKX.SPLIT),
        check=check_all,
        learns_label_maps=learns_label_maps,
    )


MaskXImageClassifier.maskx_hooks = image_hooks(
    "image_classifier",
    MaskXImageLabelEvaluator,
    learns_label_maps=False,
    check=lambda cfg: [check_all_classes_known(name) for name in cfg.DATASETS.TRAIN],
)
