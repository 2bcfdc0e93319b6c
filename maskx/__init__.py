"""maskx: segmentation from partial supervision, for torchvision and Detectron2.

Importing this package is light: it loads neither torch nor a host. The names below are imported
when they are asked for; everything else by its module: :mod:`maskx.data`, :mod:`maskx.evaluation`,
:mod:`maskx.engine`, the systems in :mod:`maskx.systems` and, for the hosts,
:mod:`maskx.torchvision` and :mod:`maskx.detectron2`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# What to import for each name; the last module has it.
_MODULES = {
    "CategorySplit": ("maskx.supervision",),
    "add_maskx_config": ("maskx.detectron2",),
    "get_cfg": ("maskx.detectron2",),
    "load_coco": ("maskx.data.coco",),
    "open_run": ("maskx.systems", "maskx.engine.predictor"),  # of the systems that it registers
    "resolve_split": ("maskx.data.splits",),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'maskx' has no attribute '{name}'")
    *_, module = map(importlib.import_module, _MODULES[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
