"""Quick starts of all systems, by name."""

from collections.abc import Callable, Mapping
from typing import Any

from maskx.engine.quickstart import QuickstartOptions
from maskx.systems.class_patterns.quickstart import quickstart_class_patterns
from maskx.systems.concept_mask.quickstart import quickstart_concept_mask
from maskx.systems.larvseg.quickstart import quickstart_larvseg
from maskx.systems.maskx_rcnn.torchvision.quickstart import quickstart_maskx
from maskx.systems.transfernet.quickstart import quickstart_transfernet

__all__ = ["SYSTEMS"]

SYSTEMS: Mapping[str, Callable[[QuickstartOptions, Callable[[str], None]], dict[str, Any]]] = {
    "maskx": quickstart_maskx,
    "class_patterns": quickstart_class_patterns,
    "transfernet": quickstart_transfernet,
    "larvseg": quickstart_larvseg,
    "concept_mask": quickstart_concept_mask,
}
"""What the quick start can run, by the name of the system."""
