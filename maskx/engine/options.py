"""Options of the quick start.

A system says which of them have a meaning for it alone, see :class:`maskx.engine.system.System`.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from maskx.engine.system import find_system, system_names


@dataclass(frozen=True)
class QuickstartOptions:
    """Options of the quick start.

    Attributes:
        output: folder of the generated data, checkpoints, ``metrics.json`` and pictures.
        seed: of the scenes, the initial weights and the order of the data.
        iterations: training steps of every model; None for those of the system.
        batch_size: images per step; None for that of the system. For ``transfernet`` it must be
            even.
        compare: train one more baseline in the same way: of ``maskx`` the class-agnostic one, with
            GrabCut in the boxes that Mask^X finds evaluated too; of ``transfernet`` DecoupledNet.
        coco_train: annotation file and image folder to train on instead of generated scenes.
        held_out: share of its images, chosen by the seed, that are not trained on but evaluated on;
            0 where ``coco_val`` is given.
        target_train: of ``transfernet``, annotation file and image folder of the target, with tags;
            ``coco_train`` is then the source. Their classes are joined by name.
        masks_for: category split, see :func:`maskx.data.splits.resolve_split`: the categories
            with masks of ``maskx``, the source of ``transfernet``, the base classes of
            ``larvseg``, on COCO files the concepts with masks of ``concept_mask``, whose scenes
            have a split of their own; ``class_patterns`` learns from no masks. ``drawn`` are those
            of which the training data has a mask. None is ``scenes_half``; on COCO files for
            ``maskx`` ``all``, for ``concept_mask`` ``coco_voc``.
        concept_split: of ``concept_mask`` on COCO files, JSON file of the concepts with boxes and
            with masks, see
            :func:`maskx.systems.concept_mask.concept_sets.read_concept_split`.
        tags: of the same, a tag list and the folder of its images, for more concepts than the COCO
            files have; see :func:`maskx.data.tag_lists.read_tag_list`.
        skip_bad: leave bad annotations out, counted, instead of stopping at them.
        backbone: see :func:`maskx.core.backbone_choice.build_backbone`.
        pretrained: start from ImageNet weights, or from a file; likewise.
        start: of ``maskx``, folder of a trained run, or a model file, to start from; see
            :mod:`maskx.engine.start`.
        frozen: keep the backbone as it is. Then its features of an image are computed once and
            kept, see :class:`maskx.core.feature_cache.FeatureCache`.
        feature_cache: gigabytes of features that are kept at most, in the folder ``features`` of
            the output; 0 keeps none.
        image_size: shorter side of the images in pixels; None is 128 for scenes, 256 else. All but
            ``maskx`` warp images to squares of this side.
        workers: processes that read images; 0 reads them in the process that trains.
        threshold: of ``class_patterns``, see
            :class:`maskx.systems.class_patterns.proxy_masks.ProxyMaskSettings`;
            None is "otsu", the paper has "zero".
        resolve: the same; None is "standardised", the paper has "ignore".
        annotated_boxes: of ``maskx``, train masks in annotated boxes alone, not in those that the
            detector proposes: ``gt_boxes_only`` of :func:`maskx.torchvision.add_mask_branch`.
        box_loss: of ``maskx``, weight of the mask loss of objects that have a box only: ``weight``
            of :class:`maskx.systems.maskx_rcnn.weak_losses.BoxMaskLoss`; 0 trains on masks alone.
        ema_teacher: of ``maskx``, weight of the loss of masks that a moving average of the model
            makes of these objects: ``weight`` of
            :class:`maskx.systems.maskx_rcnn.weak_losses.EMATeacher`; 0 goes without it.
        light: of ``maskx``, few channels and few samples in the heads of the detector; those of
            the backbone ``small`` are light in any case.
        tag_loss: of ``maskx``, weight of the loss of images that have image labels alone, see
            :mod:`maskx.systems.maskx_rcnn.weak_losses`; at 0 they teach nothing.
        pseudo_weight: of ``maskx``, what masks that nobody drew weigh, see
            :func:`maskx.systems.maskx_rcnn.samples.mask_weight`.
        crf: refine masks by a dense CRF: of ``class_patterns`` proxy masks of images with one
            label, and predictions; of ``transfernet`` predictions.
        multi_scale: of ``class_patterns``, test the segmentation network at three sizes, as the
            paper does.
        layer: of ``class_patterns``, the layer whose proxy masks are trained on; None is the first
            of the last stage, such as ``C41`` of a ResNet or ``conv5_1`` of ``vgg16``.
        max_images: of ``class_patterns``, images of a class that its pattern is found in; None is
            800.
    """

    output: Path
    seed: int = 0
    iterations: int | None = None
    batch_size: int | None = None
    compare: bool = False
    resume: bool = False
    device: str = "auto"
    coco_train: tuple[str, str] | None = None
    coco_val: tuple[str, str] | None = None
    held_out: float = 0.0
    target_train: tuple[str, str] | None = None
    masks_for: str | None = None
    concept_split: str | None = None
    tags: tuple[str, str] | None = None
    skip_bad: bool = False
    backbone: str = "small"
    pretrained: bool | str = False
    start: str | None = None
    frozen: bool = False
    feature_cache: float = 2.0
    image_size: int | None = None
    workers: int = 0
    threshold: str | None = None
    resolve: str | None = None
    annotated_boxes: bool = False
    box_loss: float = 0.0
    ema_teacher: float = 0.0
    light: bool = False
    tag_loss: float = 0.0
    pseudo_weight: str = "quality"
    crf: bool = False
    multi_scale: bool = False
    layer: str | None = None
    max_images: int | None = None


_MOST_SEED = 2**30  # the seeds of scenes are made of it


def check_options(system: str, options: QuickstartOptions) -> None:
    """Refuse options that have no meaning for a system, and numbers out of range."""
    if not 0 <= options.seed <= _MOST_SEED:
        raise ValueError(f"seed is {options.seed}. Allowed: 0 to {_MOST_SEED}.")
    if options.workers < 0:
        raise ValueError(
            f"workers is {options.workers}. Allowed: 0, to read images in the process that trains, "
            "or more."
        )
    check_frozen(options)
    if not 0 <= options.feature_cache < math.inf:
        raise ValueError(
            f"feature_cache is {options.feature_cache}. Allowed: 0, to keep no features, or more "
            "gigabytes."
        )
    owners: dict[str, list[str]] = {}
    for name in system_names():
        for option in find_system(name).options:
            owners.setdefault(option, []).append(name)
    default = {field.name: field.default for field in fields(QuickstartOptions)}
    for option in owners.keys() - find_system(system).options:
        if getattr(options, option) != default[option]:
            raise ValueError(
                f"{option} has no meaning for the system {system}, only for "
                f"{', '.join(owners[option])}. Leave it out, or choose another system."
            )


def check_frozen(options: QuickstartOptions) -> None:
    """Refuse a frozen backbone of random weights."""
    if options.frozen and options.pretrained is False and options.start is None:
        raise ValueError(
            "frozen keeps the backbone as it is, but it starts from random weights. Let it start "
            "from others: --pretrained, --weights FILE, or --start RUN."
        )
