"""The part of the system that plugs into Detectron2."""

import maskx.detectron2  # noqa: F401 - the host first: it imports the parts of all systems
