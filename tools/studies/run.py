"""Ablations of every system on generated scenes: many settings and seeds, one table."""

from collections.abc import Callable, Mapping
from typing import Any

from maskx.evaluation.plots import check_matplotlib
from studies.class_patterns import CLASS_PATTERNS
from studies.concept_mask import CONCEPT_MASK
from studies.larvseg import LARVSEG
from studies.maskx_rcnn import MASKX
from studies.study import StudyOptions, System, make_study
from studies.transfernet import TRANSFERNET

__all__ = ["SYSTEMS", "StudyOptions", "run_study"]

SYSTEMS: Mapping[str, System] = {
    "maskx": MASKX,
    "class_patterns": CLASS_PATTERNS,
    "transfernet": TRANSFERNET,
    "larvseg": LARVSEG,
    "concept_mask": CONCEPT_MASK,
}
"""What can be compared, by the name of the system."""


def run_study(options: StudyOptions, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train and evaluate every setting with every seed; an interrupted study goes on.

    The same study may be run by several processes at once, whole or in parts: what one of them has
    made or is making, the others do not make again.

    Args:
        options: what to do.
        report: receives the lines for the reader.

    Returns:
        One row per setting, in order: ``setting``, and each measure by seed. They are written to
        ``study.json`` as well, with the orderings of the paper and whether they hold.

    Raises:
        ValueError: the system or a setting is not known, a seed stands twice, or a folder holds a
            run with other options.
        ImportError: matplotlib is not installed, which the picture needs, or what a setting needs.
    """
    check_matplotlib()
    if options.system not in SYSTEMS:
        raise ValueError(
            f"There is no study of the system {options.system!r}. Allowed: {', '.join(SYSTEMS)}."
        )
    return make_study(SYSTEMS[options.system], options, report)
