"""maskx_rcnn_R_50_FPN_1x.py, in which objects without a mask teach the mask branch too.

By their boxes, and by masks that a moving average of the model makes of them:
voc2nonvoc/e2e/clsbox_2_layer_mlp_box_loss_ema_teacher_R_50_FPN_1x.yaml, written as a LazyConfig.
"""

from detectron2.config import LazyCall as L

from maskx.detectron2 import BoxMaskLoss, EMATeacher

from .maskx_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.roi_heads.box_loss = L(BoxMaskLoss)(
    weight=1.0,
    warm_up=10000,
    pixel_mean=[value / 255 for value in model.pixel_mean],
    pixel_std=[value / 255 for value in model.pixel_std],
    is_bgr=True,
)
model.ema_teacher = L(EMATeacher)(weight=1.0, warm_up=10000)
