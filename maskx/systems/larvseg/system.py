"""What LarvSeg is to the tools."""

from maskx.engine.system import System
from maskx.systems.larvseg.quickstart import quickstart_larvseg

SYSTEM = System(
    name="larvseg",
    title="LarvSeg",
    pipeline=quickstart_larvseg,
    options=frozenset(["masks_for"]),
)
