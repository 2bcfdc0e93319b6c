"""The fixtures of tests/detectron2 are these too."""

import importlib.util
from pathlib import Path

_FILE = Path(__file__).parents[3] / "detectron2" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("detectron2_fixtures", _FILE)
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
globals().update({k: v for k, v in vars(_MODULE).items() if not k.startswith("_")})
