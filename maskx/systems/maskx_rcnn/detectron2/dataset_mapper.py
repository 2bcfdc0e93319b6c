"""Mapper for images in which only some instances have a mask."""

import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances, PolygonMasks

from maskx.data.coco import AnnotationProblem, read_mask
from maskx.data.masks import decode_segmentation
from maskx.detectron2.datasets import split_from_config

__all__ = ["MaskXDatasetMapper"]

logger = logging.getLogger(__name__)


class MaskXDatasetMapper(DatasetMapper):
    """Detectron2's mapper, for annotations that may or may not have a mask.

    Masks may be polygons, RLE or arrays, mixed with box-only annotations in one image. The
    instances have, besides ``gt_boxes`` and ``gt_classes``:

    - ``gt_has_mask``: (N,) bool;
    - ``gt_masks``: ``PolygonMasks`` if ``instance_mask_format`` is "polygon", all masks of the
      image are polygons and it is not cropped, else ``BitMasks``; empty where there is no mask;
    - ``gt_boxes_complete``: (N,) bool, all False, only if the record has ``boxes_complete`` False:
      objects of some classes have no box there, so nothing may be taken for background. An image
      without instances has it as well, of length 0.

    No box is dropped for its mask: an instance whose mask cannot be used, or was cropped away,
    goes on without it and is counted.

    Args:
        is_train: whether it is used in training.
        classes_with_masks: class indices (A) whose masks are used; None for all. The masks of all
            other classes are removed before anything is computed from them.
        **kwargs: arguments of :class:`DatasetMapper`.

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
        **kwargs: Any,
    ) -> None:
        super().__init__(is_train, **kwargs)
        self.classes_with_masks = (
            None if classes_with_masks is None else frozenset(classes_with_masks)
        )
        self.lost_masks: Counter[str] = Counter()

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read the arguments from a configuration."""
        ret = super().from_config(cfg, is_train)
        if is_train and cfg.MODEL.MASK_ON:
            ret["classes_with_masks"] = split_from_config(cfg).indices_with_masks
        return ret

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map a record to a sample; see :class:`DatasetMapper`."""
        # The base class would read a stuff map for every image; nothing here uses it.
        return super().__call__(
            {key: value for key, value in dataset_dict.items() if key != "sem_seg_file_name"}
        )

    def _transform_annotations(
        self,
        dataset_dict: dict[str, Any],
        transforms: T.TransformList,
        image_shape: tuple[int, int],
    ) -> None:
        """Replace ``annotations`` by ``instances``; hook of :class:`DatasetMapper`."""
        annotations = [a for a in dataset_dict.pop("annotations") if a.get("iscrowd", 0) == 0]
        # Withheld masks leave first, so that nothing below can depend on them.
        segmentations = [self._take_segmentation(annotation) for annotation in annotations]
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
            instances.gt_masks = _collect_masks(masks, image_shape, self.instance_mask_format)
            if self.recompute_boxes:
                _tighten_boxes(instances)
        if not dataset_dict.get("boxes_complete", True):
            instances.gt_boxes_complete = torch.zeros(len(instances), dtype=torch.bool)
        dataset_dict["instances"] = utils.filter_empty_instances(instances, by_mask=False)

    def _take_segmentation(self, annotation: dict[str, Any]) -> Any:
        """Remove the mask from an annotation and return it, or None if it is to be withheld."""
        segmentation = annotation.pop("segmentation", None)
        if self.classes_with_masks is None or annotation["category_id"] in self.classes_with_masks:
            return segmentation
        return None

    def _count_lost(
        self, problem: AnnotationProblem, annotation: dict[str, Any], record: dict[str, Any]
    ) -> None:
        self.lost_masks[problem.kind] += 1
        if self.lost_masks[problem.kind] == 1:
            logger.warning(
                "Annotation %s of image %s (%s) goes on without its mask: %s. Others of this kind "
                "(%s) are counted, but not logged.",
                *(annotation.get("id", "without id"), record.get("image_id", "without id")),
                *(record["file_name"], problem, problem.kind),
            )


def _transform_mask(
    segmentation: Any,
    transforms: T.TransformList,
    record: dict[str, Any],
    image_shape: tuple[int, int],
) -> list[np.ndarray] | np.ndarray | None:
    """Transform the mask of an annotation.

    Args:
        segmentation: polygons, an RLE dict, an (H, W) array, or None if there is no mask.
        transforms: what was done to the image.
        record: with ``height`` and ``width`` of the image as in its file.
        image_shape: (H, W) of the transformed image.

    Returns:
        Polygons, each (2 * points,), or an (H, W) bool array, in pixels of the transformed image;
        None if there is no mask.

    Raises:
        AnnotationProblem: the mask cannot be used, or lies outside the transformed image.
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
        inside = _any_inside(mask, image_shape)
    else:
        # Some transforms pad with 255, which stands for "ignore" in semantic segmentation.
        mask = transforms.apply_segmentation(mask.astype(np.uint8)) == 1
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


def _any_inside(polygons: list[np.ndarray], image_shape: tuple[int, int]) -> bool:
    """Whether a polygon reaches into the image; rotation can turn all of them out of it."""
    height, width = image_shape
    return any(
        p[0::2].max() > 0 and p[0::2].min() < width and p[1::2].max() > 0 and p[1::2].min() < height
        for p in polygons
    )


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


def _tighten_boxes(instances: Instances) -> None:
    """Fit the boxes of instances with a mask to what a crop has left of it."""
    has_mask = instances.gt_has_mask
    boxes = instances.gt_masks[has_mask].get_bounding_boxes()
    instances.gt_boxes.tensor[has_mask] = boxes.tensor
