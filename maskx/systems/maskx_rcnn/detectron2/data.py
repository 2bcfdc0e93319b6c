"""What Detectron2's engine asks of Mask^X R-CNN, and of every other detector.

The mapper of images in which only some instances have a mask, loaders, evaluator and checks.
"""

import copy
import functools
import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.structures import BitMasks, PolygonMasks
from torch import nn

from maskx.core.checks import check_choice, default_of
from maskx.core.text import listed
from maskx.data.coco import AnnotationProblem, read_mask
from maskx.data.images import read_record_image
from maskx.data.masks import decode_segmentation
from maskx.data.splits import check_masks
from maskx.detectron2.adapters import (
    AspectGroupedBatches,
    PhotographInput,
    SeededMapper,
    seeded_train_loader,
)
from maskx.detectron2.datasets import record_from_detectron2, split_from_config
from maskx.detectron2.evaluation import MaskXCOCOEvaluator
from maskx.detectron2.hooks import Detectron2Hooks, check_classes, set_default_hooks
from maskx.systems.maskx_rcnn.detectron2.model import (
    MaskXROIHeadsMixin,
    MaskXRPN,
    check_architecture,
    predicts_masks,
)
from maskx.systems.maskx_rcnn.samples import (
    PSEUDO_WEIGHTS,
    InstanceMapper,
    mask_weight,
    pseudo_masks_line,
    tags_of,
)

logger = logging.getLogger(__name__)


class MaskXDatasetMapper(DatasetMapper):
    """Detectron2's mapper, for annotations that may or may not have a mask.

    Masks may be polygons, RLE or arrays, mixed with box-only annotations in one image. The
    instances have, besides ``gt_boxes`` and ``gt_classes``:

    - ``gt_has_mask``: (N,) bool;
    - ``gt_mask_weight``: (N,), what the masks weigh in the loss;
    - ``gt_masks``: ``PolygonMasks`` if ``instance_mask_format`` is "polygon", all masks of the
      image are polygons and it is not cropped, else ``BitMasks``; empty where there is no mask;
    - ``gt_boxes_complete``: (N,) bool, all False, only if the record has ``boxes_complete`` False,
      or image labels alone: some objects have no box there, so nothing may be taken for background.
      An image without instances has it as well, of length 0.

    A sample of image labels alone has ``tags``, see
    :func:`maskx.systems.maskx_rcnn.samples.tags_of`.

    No box is dropped for its mask: an instance whose mask cannot be used, or was cropped away,
    goes on without it and is counted. Boxes that a crop cuts are clipped, and not fitted to their
    masks (``recompute_boxes``), which only some instances have.

    Args:
        classes_with_masks: class indices (A) whose masks are used; None for all. The masks of all
            other classes are removed before anything is computed from them, but for those that a
            model or a teacher made, see :func:`maskx.systems.maskx_rcnn.samples.mask_weight`.
        pseudo_weight: see there.

    Attributes:
        lost_masks: number of masks that could not be used, by reason. Each worker of the loader
            counts for itself, and logs the first of each reason.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        classes_with_masks: Collection[int] | None = None,
        pseudo_weight: str = default_of(InstanceMapper, "pseudo_weight"),
        **kwargs: Any,
    ) -> None:
        super().__init__(is_train, **kwargs)
        check_choice("MODEL.MASKX.PSEUDO_WEIGHT", pseudo_weight, PSEUDO_WEIGHTS)
        self.pseudo_weight = pseudo_weight
        if self.recompute_boxes:
            raise ValueError(
                "recompute_boxes would fit boxes of instances with a mask to what a crop leaves of "
                "it, those of the others not. Set recompute_boxes=False: all are clipped alike."
            )
        self.classes_with_masks = (
            None if classes_with_masks is None else frozenset(classes_with_masks)
        )
        self.lost_masks: Counter[str] = Counter()

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        ret = super().from_config(cfg, is_train) | {"recompute_boxes": False}
        if is_train and cfg.MODEL.MASK_ON:
            ret["classes_with_masks"] = split_from_config(cfg).indices_with_masks
            ret["pseudo_weight"] = cfg.MODEL.MASKX.PSEUDO_WEIGHT
        return ret

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map a record to a sample; see :class:`DatasetMapper`. Stuff maps are not read."""
        if self.image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {self.image_format!r}. Allowed: RGB, BGR.")
        sample = copy.deepcopy(dataset_dict)
        sample.pop("sem_seg_file_name", None)
        # In no name of its own, so that a photograph is let go once it is resized.
        resized = PhotographInput(self._read_image(sample))
        transforms = self.augmentations(resized)
        size = resized.image.shape[:2]
        sample["image"] = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        if self.proposal_topk is not None:
            utils.transform_proposals(sample, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            sample.pop("annotations", None)
        else:
            tags = tags_of(sample)
            if tags is not None:
                sample |= {"tags": tags, "boxes_complete": False}
                sample.setdefault("annotations", [])
            if "annotations" in sample:
                self._transform_annotations(sample, transforms, size)
        return sample

    def _read_image(self, record: dict[str, Any]) -> np.ndarray:
        """Read as everywhere in maskx: what is no image, or of another size, is named."""
        image = read_record_image(
            {"image_id": "without id", **record}, image_format=self.image_format
        )
        # Another code base's data set may not say the size.
        record.setdefault("height", image.shape[0])
        record.setdefault("width", image.shape[1])
        return image

    def _transform_annotations(
        self,
        dataset_dict: dict[str, Any],
        transforms: T.TransformList,
        image_shape: tuple[int, int],
    ) -> None:
        """Replace ``annotations`` by ``instances``; hook of :class:`DatasetMapper`."""
        annotations = [a for a in dataset_dict.pop("annotations") if a.get("iscrowd", 0) == 0]
        # Withheld masks leave first, so that nothing below can depend on them.
        weights = [self._mask_weight(annotation) for annotation in annotations]
        segmentations = [
            segmentation if weight > 0 else None
            for segmentation, weight in zip(
                [annotation.pop("segmentation", None) for annotation in annotations],
                weights,
                strict=True,
            )
        ]
        for annotation in annotations:
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
            utils.transform_instance_annotations(
                annotation,
                transforms,
                image_shape,
                keypoint_hflip_indices=self.keypoint_hflip_indices,
            )
        instances = utils.annotations_to_instances(annotations, image_shape)
        if self.use_instance_mask:
            masks = []
            for segmentation, annotation in zip(segmentations, annotations, strict=True):
                try:
                    masks.append(
                        _transform_mask(segmentation, transforms, dataset_dict, image_shape)
                    )
                except AnnotationProblem as problem:
                    masks.append(None)
                    self._count_lost(problem, annotation, dataset_dict)
            instances.gt_has_mask = torch.tensor([m is not None for m in masks], dtype=torch.bool)
            instances.gt_mask_weight = torch.tensor(weights, dtype=torch.float32)
            instances.gt_masks = _collect_masks(masks, image_shape, self.instance_mask_format)
        if not dataset_dict.get("boxes_complete", True):
            instances.gt_boxes_complete = torch.zeros(len(instances), dtype=torch.bool)
        dataset_dict["instances"] = utils.filter_empty_instances(instances, by_mask=False)

    def _mask_weight(self, annotation: dict[str, Any]) -> float:
        classes = self.classes_with_masks
        withheld = classes is not None and annotation["category_id"] not in classes
        return mask_weight(annotation, withheld=withheld, pseudo_weight=self.pseudo_weight)

    def _count_lost(
        self, problem: AnnotationProblem, annotation: dict[str, Any], record: dict[str, Any]
    ) -> None:
        self.lost_masks[problem.kind] += 1
        if self.lost_masks[problem.kind] == 1:
            logger.warning(
                "Annotation %s of image %s (%s) goes on without its mask: %s. Others of this kind "
                "(%s) are counted, but not logged.",
                annotation.get("id", "without id"),
                record.get("image_id", "without id"),
                record["file_name"],
                problem,
                problem.kind,
            )


def _transform_mask(
    segmentation: Any,
    transforms: T.TransformList,
    record: dict[str, Any],
    image_shape: tuple[int, int],
) -> list[np.ndarray] | np.ndarray | None:
    """Transform the mask of an annotation.

    Returns:
        Polygons, each (2 * points,), or an (H, W) bool array, in pixels of the transformed image;
        None if there is no mask.
    """
    height, width = record["height"], record["width"]
    mask = _read_mask(segmentation, height, width)
    if mask is None:
        return None
    if isinstance(mask, list) and any(
        isinstance(t, T.CropTransform) for t in transforms.transforms
    ):
        # Cropping polygons would need the package shapely.
        mask = decode_segmentation(mask, height, width)
    if isinstance(mask, list):
        polygons = [np.asarray(p, dtype=np.float64).reshape(-1, 2) for p in mask]
        mask = [p.reshape(-1) for p in transforms.apply_polygons(polygons)]
        # Rotation can turn all of them out of the image.
        (h, w), sides = image_shape, [(p[0::2], p[1::2]) for p in mask]
        inside = any(x.max() > 0 and x.min() < w and y.max() > 0 and y.min() < h for x, y in sides)
    else:
        # Some transforms pad with 255, which stands for "ignore" in semantic segmentation.
        mask = transforms.apply_segmentation(mask.view(np.uint8)) == 1
        inside = mask.any()
    if not inside:
        raise AnnotationProblem(
            "left_image", "the augmentations moved it out of the image", "inside"
        )
    return mask


def _read_mask(segmentation: Any, height: int, width: int) -> list | np.ndarray | None:
    """Check a mask and return polygons, a (height, width) bool array, or None if there is none."""
    if isinstance(segmentation, np.ndarray):
        if segmentation.shape != (height, width):
            raise AnnotationProblem(
                "array_size",
                f"mask array has shape {segmentation.shape}",
                f"the size (height, width) of the image, {(height, width)}",
            )
        if not segmentation.any():
            raise AnnotationProblem(
                "mask_empty", "mask array has no foreground pixel", "at least one"
            )
        return segmentation.astype(bool)
    if isinstance(segmentation, list):
        segmentation = [p.tolist() if isinstance(p, np.ndarray) else p for p in segmentation]
    mask = read_mask(segmentation, height, width)
    return decode_segmentation(mask, height, width) if isinstance(mask, dict) else mask


def _collect_masks(
    masks: list[list[np.ndarray] | np.ndarray | None],
    image_shape: tuple[int, int],
    mask_format: str,
) -> PolygonMasks | BitMasks:
    """Gather the masks of an image in one form; those that are None become empty."""
    if mask_format == "polygon" and not any(isinstance(mask, np.ndarray) for mask in masks):
        return PolygonMasks([mask or [] for mask in masks])
    bitmaps = np.zeros((len(masks), *image_shape), dtype=bool)
    for bitmap, mask in zip(bitmaps, masks, strict=True):
        if mask is not None:
            is_polygons = isinstance(mask, list)
            bitmap[:] = decode_segmentation(mask, *image_shape) if is_polygons else mask
    return BitMasks(torch.from_numpy(bitmaps))


def _train_loader(cfg: CfgNode) -> Any:
    mapper = MaskXDatasetMapper(cfg, is_train=True)
    keys, with_tags = cfg.DATALOADER, bool(cfg.MODEL.MASKX.TAG_LOSS_WEIGHT)
    if keys.SAMPLER_TRAIN != "TrainingSampler":  # its own order, which does not go on on resume
        return build_detection_train_loader(cfg, mapper=mapper)
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=keys.FILTER_EMPTY_ANNOTATIONS and not with_tags,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:
        raise ValueError(
            f"DATASETS.TRAIN {cfg.DATASETS.TRAIN}: {str(error).rstrip('.')}. An image counts if it "
            "has a box that is no crowd region; label maps and image labels have none. Add boxes, "
            "or name another data set."
        ) from error
    if keys.FILTER_EMPTY_ANNOTATIONS and with_tags:
        records = [record for record in records if _has_boxes(record) or _has_tags(record)]
    batches = None
    if keys.ASPECT_RATIO_GROUPING:
        is_wide = [record["width"] > record["height"] for record in records]
        batches = functools.partial(AspectGroupedBatches, is_wide)
    if cfg.MODEL.MASK_ON:
        split = split_from_config(cfg)
        check_masks(map(record_from_detectron2, records), split, label_maps=False)
        if line := pseudo_masks_line(records):
            logger.info("Training: %s", line)
    return seeded_train_loader(cfg, records, SeededMapper(mapper), batches)


def _has_boxes(record: dict[str, Any]) -> bool:
    return any(annotation.get("iscrowd", 0) == 0 for annotation in record.get("annotations", ()))


def _has_tags(record: dict[str, Any]) -> bool:
    tags = tags_of(record)
    return tags is not None and len(tags) > 0


def _evaluator(cfg: CfgNode, dataset_name: str) -> MaskXCOCOEvaluator:
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    return MaskXCOCOEvaluator(
        dataset_name,
        split=cfg.DATASETS.MASKX.SPLIT,
        iou_types=("bbox", "segm") if predicts_masks(cfg) else ("bbox",),
        output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name),
        max_detections=limit if limit >= 0 else 10**6,  # below 0: Detectron2 keeps all
    )


def _check(cfg: CfgNode) -> None:
    check_architecture(cfg)
    _check_text_classifier(cfg)
    text = cfg.MODEL.MASKX.TEXT_CLASSIFIER
    check_classes(cfg, "MODEL.ROI_HEADS.NUM_CLASSES", text.CLASSES if text.VECTORS else ())
    if not cfg.MODEL.MASKX.FREEZE_DETECTOR:
        _check_incomplete_boxes(cfg)
    _check_tags(cfg)


def _check_text_classifier(cfg: CfgNode) -> None:
    """Refuse RoI heads that would classify by learned weights all the same."""
    vectors, name = cfg.MODEL.MASKX.TEXT_CLASSIFIER.VECTORS, cfg.MODEL.ROI_HEADS.NAME
    if vectors and not issubclass(ROI_HEADS_REGISTRY.get(name), MaskXROIHeadsMixin):
        raise ValueError(
            f"MODEL.MASKX.TEXT_CLASSIFIER.VECTORS is '{vectors}', but MODEL.ROI_HEADS.NAME {name} "
            "do not read it. Set NAME MaskXROIHeads or MaskXCascadeROIHeads, or VECTORS ''."
        )


def _check_incomplete_boxes(cfg: CfgNode) -> None:
    """Refuse modules that would take objects of classes without annotations for background."""
    for dataset in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(dataset)
        num_annotated = len(metadata.thing_dataset_id_to_contiguous_id)
        if num_annotated == len(metadata.thing_classes):
            continue
        for key, registry, needed in (
            ("PROPOSAL_GENERATOR", PROPOSAL_GENERATOR_REGISTRY, MaskXRPN),
            ("ROI_HEADS", ROI_HEADS_REGISTRY, MaskXROIHeadsMixin),
        ):
            name = cfg.MODEL[key].NAME
            if name != "PrecomputedProposals" and not issubclass(registry.get(name), needed):
                remedy = needed.__name__.removesuffix("Mixin")
                raise ValueError(
                    f"Data set '{dataset}' annotates {num_annotated} of "
                    f"{len(metadata.thing_classes)} classes, so its boxes are incomplete, but "
                    f"MODEL.{key}.NAME {name} would take every other object for background. Set "
                    f"it to {remedy}."
                )


def _check_tags(cfg: CfgNode) -> None:
    """Refuse region proposals that would learn that images with tags alone show nothing."""
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    is_known = name == "PrecomputedProposals" or issubclass(
        PROPOSAL_GENERATOR_REGISTRY.get(name), MaskXRPN
    )
    if cfg.MODEL.MASKX.TAG_LOSS_WEIGHT and not is_known:
        raise ValueError(
            f"MODEL.MASKX.TAG_LOSS_WEIGHT is {cfg.MODEL.MASKX.TAG_LOSS_WEIGHT}, but "
            f"MODEL.PROPOSAL_GENERATOR.NAME {name} would take what images with tags alone show for "
            "background. Set it to MaskXRPN."
        )


def _started(cfg: CfgNode, model: nn.Module, missing: Sequence[str]) -> None:
    """Check that a detector that is to stay frozen was loaded."""
    if not cfg.MODEL.MASKX.FREEZE_DETECTOR:
        return
    weights = cfg.MODEL.WEIGHTS
    own = ("roi_heads.mask_head.", "roi_heads.box_loss.", "roi_heads.ema_teacher.")
    missing = [name for name in missing if not name.startswith(own)]
    if weights and not missing:
        return
    lacks = f"lacks {len(missing)} of its weights: {listed(missing, 5)}" if weights else "is empty"
    raise ValueError(
        f"MODEL.MASKX.FREEZE_DETECTOR keeps the detector as it was trained in stage 1, but "
        f"MODEL.WEIGHTS '{weights}' {lacks}. Train a detector with the same backbone and classes "
        "first, for example configs/MaskX/stage1/faster_rcnn_R_50_FPN_1x.yaml, and set "
        "MODEL.WEIGHTS to its model_final.pth."
    )


HOOKS = Detectron2Hooks(
    system="maskx",
    train_loader=_train_loader,
    test_loader=lambda cfg, name: build_detection_test_loader(
        cfg, name, mapper=MaskXDatasetMapper(cfg, is_train=False)
    ),
    evaluator=_evaluator,
    check=_check,
    started=_started,
)
set_default_hooks(HOOKS)
