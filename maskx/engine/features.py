"""Features of frozen backbones, kept in the output folder of a run."""

from pathlib import Path

from maskx.core.backbones import Backbone
from maskx.core.digests import network_hash

__all__ = ["FEATURES_NAME", "keep_features"]

FEATURES_NAME = "features"


def keep_features(backbone: Backbone, output: Path, gigabytes: float) -> None:
    """Let a frozen backbone compute its features of an image once.

    They lie in the output folder, apart for each backbone, so that all trainings of a run share
    them, and a resumed one finds them.

    Args:
        gigabytes: see :class:`maskx.engine.options.QuickstartOptions`.
    """
    most = round(1e9 * gigabytes)
    folder = output / FEATURES_NAME / network_hash(backbone)[:16]
    backbone.keep_features(folder=folder if most else None, max_bytes=most)
