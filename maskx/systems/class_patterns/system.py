"""What class patterns is to the tools."""

from maskx.engine.system import System
from maskx.systems.class_patterns.quickstart import quickstart_class_patterns

SYSTEM = System(
    name="class_patterns",
    title="class patterns",
    pipeline=quickstart_class_patterns,
    options=frozenset(["threshold", "resolve", "crf", "multi_scale"]),
)
