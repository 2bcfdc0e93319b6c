"""Mask^X R-CNN on ViTDet-B, as a LazyConfig.

Backbone, heads, augmentation, optimiser and schedule are those of Detectron2's
projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py (Li et al., "Exploring Plain Vision
Transformer Backbones for Object Detection", ECCV 2022); the mask branch learns from the masks of
coco_voc only. For Detectron2's tools/lazyconfig_train_net.py.
"""

from functools import partial

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from maskx.data.splits import resolve_split
from maskx.data.vocabularies import COCO_THING_CLASSES
from maskx.detectron2 import (
    MaskXCOCOEvaluator,
    MaskXDatasetMapper,
    MaskXMaskHead,
    MaskXRCNN,
    MaskXROIHeads,
    register_all,
)

register_all()  # lazyconfig_train_net.py registers no data sets

model = L(MaskXRCNN)(
    backbone=L(SimpleFeaturePyramid)(
        net=L(ViT)(
            img_size=1024,
            patch_size=16,
            embed_dim=768,
            depth=12,
            num_heads=12,
            drop_path_rate=0.1,
            window_size=14,
            mlp_ratio=4,
            qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],  # the others attend globally
            residual_block_indexes=[],
            use_rel_pos=True,
            out_feature="last_feat",
        ),
        in_feature="${.net.out_feature}",
        out_channels=256,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=L(LastLevelMaxPool)(),
        norm="LN",
        square_pad=1024,
    ),
    proposal_generator=L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels=256, num_anchors=3, conv_dims=[-1, -1]),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000),
        post_nms_topk=(1000, 1000),
        nms_thresh=0.7,
    ),
    roi_heads=L(MaskXROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(ROIPooler)(
            output_size=7,
            scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=256, height=7, width=7),
            conv_dims=[256, 256, 256, 256],
            fc_dims=[1024],
            conv_norm="LN",
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            num_classes="${..num_classes}",
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=(10.0, 10.0, 5.0, 5.0)),
        ),
        mask_in_features=["p2", "p3", "p4", "p5"],
        mask_pooler=L(ROIPooler)(
            output_size=14,
            scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        mask_head=L(MaskXMaskHead)(
            input_shape=ShapeSpec(channels=256, height=14, width=14),
            num_classes="${..num_classes}",
            channels=256,
            num_convs=4,
            norm=LayerNorm,
            predictor="transfer",
            mlp="bottleneck",  # 4.9 M parameters; the paper's single_fc has more than the backbone
            transfer_inputs="cls+box",
            transfer_layers=2,
            transfer_activation="leaky_relu",
            stop_gradient=True,
            detector_channels=1024,
        ),
    ),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="maskx_coco_2017_train"),
        mapper=L(MaskXDatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.RandomFlip)(horizontal=True),
                L(T.ResizeScale)(
                    min_scale=0.1, max_scale=2.0, target_height=1024, target_width=1024
                ),
                L(T.FixedSizeCrop)(crop_size=(1024, 1024), pad=False),
            ],
            image_format="RGB",
            use_instance_mask=True,
            classes_with_masks=resolve_split("coco_voc", COCO_THING_CLASSES).indices_with_masks,
        ),
        total_batch_size=64,
        num_workers=4,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="maskx_coco_2017_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=1024, max_size=1024)],
            image_format="RGB",
        ),
        num_workers=4,
    ),
    "evaluator": L(MaskXCOCOEvaluator)(
        dataset_name="${..test.dataset.names}",
        split="coco_voc",
        output_dir="${...train.output_dir}",
    ),
}

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(  # the training script adds the argument model
        base_lr="${..lr}",
        weight_decay_norm=0.0,
        lr_factor_func=partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    ),
    lr=0.0001,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)

# 100 epochs: 184,375 iterations of 64 images.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=184375
    ),
    warmup_factor=0.001,
    warmup_length=250 / 184375,
)

train = {
    "output_dir": "./output",
    "init_checkpoint": (
        "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
    ),
    "max_iter": 184375,
    "amp": {"enabled": True},
    "ddp": {
        "broadcast_buffers": False,
        "find_unused_parameters": False,
        "fp16_compression": True,
    },
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda",
}
