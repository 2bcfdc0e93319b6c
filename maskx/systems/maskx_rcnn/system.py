"""What Mask^X R-CNN is to the tools."""

from maskx.engine.results import instances_prediction
from maskx.engine.system import System
from maskx.systems.maskx_rcnn.export import exportable
from maskx.systems.maskx_rcnn.pipeline import open_detector, quickstart_maskx
from maskx.systems.maskx_rcnn.samples import masks_of_boxes

SYSTEM = System(
    name="maskx",
    title="Mask^X R-CNN",
    pipeline=quickstart_maskx,
    open=open_detector,
    prediction=instances_prediction,
    box_masks=masks_of_boxes,
    exportable=exportable,
    options=frozenset(
        [
            *("annotated_boxes", "box_loss", "compare", "ema_teacher", "masks_for"),
            *("pseudo_weight", "start"),
        ]
    ),
    learns_from=("boxes_and_masks", "masks"),
)
