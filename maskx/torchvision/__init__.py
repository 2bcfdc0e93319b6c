"""What plugs into torchvision: a mask branch for its detectors, and detectors that have one."""

from maskx.systems.maskx_rcnn.torchvision import (
    SampleDetector,
    add_mask_branch,
    detect,
    faster_rcnn,
    init_box_predictor,
    maskx_rcnn,
)

__all__ = [
    "SampleDetector",
    "add_mask_branch",
    "detect",
    "faster_rcnn",
    "init_box_predictor",
    "maskx_rcnn",
]
