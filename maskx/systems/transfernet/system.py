"""What TransferNet is to the tools."""

from maskx.engine.system import System
from maskx.systems.transfernet.quickstart import quickstart_transfernet

SYSTEM = System(
    name="transfernet",
    title="TransferNet",
    pipeline=quickstart_transfernet,
    options=frozenset(["compare", "masks_for", "crf"]),
)
