"""What ConceptMask is to the tools."""

from maskx.engine.system import System
from maskx.systems.concept_mask.quickstart import quickstart_concept_mask

SYSTEM = System(
    name="concept_mask",
    title="ConceptMask",
    pipeline=quickstart_concept_mask,
    options=frozenset(["masks_for"]),
)
