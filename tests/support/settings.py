"""Settings of a configuration, written as a table."""

from collections.abc import Mapping
from typing import Any

TINY_DETECTOR = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    # Narrow, a step costs a third of that of ResNet-18, whose width Detectron2 prescribes.
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    # Random weights with frozen statistics would give activations in the thousands.
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.PIXEL_STD": [58.0, 58.0, 58.0],
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 24,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 4,
    "MODEL.ROI_HEADS.NUM_CLASSES": 4,
}
"""Of a Mask R-CNN."""


def pairs(settings: Mapping[str, Any]) -> list[Any]:
    """Return keys and values in turn, as ``merge_from_list`` takes them."""
    return [part for item in settings.items() for part in item]
