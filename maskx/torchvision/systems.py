"""Quick starts of all systems, by name."""

from collections.abc import Callable, Mapping
from typing import Any

from maskx.torchvision.quickstart import QuickstartOptions
from maskx.torchvision.quickstart_class_patterns import quickstart_class_patterns
from maskx.torchvision.quickstart_concept_mask import quickstart_concept_mask
from maskx.torchvision.quickstart_larvseg import quickstart_larvseg
from maskx.torchvision.quickstart_maskx import quickstart_maskx
from maskx.torchvision.quickstart_transfernet import quickstart_transfernet

__all__ = ["SYSTEMS"]

SYSTEMS: Mapping[str, Callable[[QuickstartOptions, Callable[[str], None]], dict[str, Any]]] = {
    "maskx": quickstart_maskx,
    "class_patterns": quickstart_class_patterns,
    "transfernet": quickstart_transfernet,
    "larvseg": quickstart_larvseg,
    "concept_mask": quickstart_concept_mask,
}
"""What the quick start can run, by the name of the system."""
