"""maskx: segmentation from partial supervision, for torchvision and Detectron2.

Importing this package is light: it loads neither torch nor a host. The parts are imported by
name: :mod:`maskx.supervision`, :mod:`maskx.modeling`, :mod:`maskx.data`,
:mod:`maskx.evaluation`, :mod:`maskx.torchvision` and, where Detectron2 is installed,
:mod:`maskx.detectron2`.
"""

from typing import Any

__version__ = "0.1.0"

_FROM_DETECTRON2_HOST = ("add_maskx_config", "get_cfg")


def __getattr__(name: str) -> Any:
    """Resolve the Detectron2 conveniences on first use, so that importing stays light."""
    if name in _FROM_DETECTRON2_HOST:
        from maskx import detectron2

        return getattr(detectron2, name)
    raise AttributeError(f"module 'maskx' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FROM_DETECTRON2_HOST])
