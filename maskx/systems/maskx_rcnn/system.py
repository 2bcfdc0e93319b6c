"""What Mask^X R-CNN is to the tools."""

from maskx.engine.system import System
from maskx.systems.maskx_rcnn.pipeline import quickstart_maskx

SYSTEM = System(
    name="maskx",
    title="Mask^X R-CNN",
    pipeline=quickstart_maskx,
    options=frozenset(["compare", "masks_for"]),
)
