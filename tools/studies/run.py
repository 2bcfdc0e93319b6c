"""Ablations of every system on generated scenes: many settings and seeds, one table."""

import importlib
from collections.abc import Callable
from typing import Any

import maskx.systems  # noqa: F401 - registers them
from maskx.engine.system import find_system
from maskx.evaluation.plots import check_matplotlib
from studies.options import StudyOptions
from studies.study import Study, make_study

__all__ = ["find_study", "run_study"]


def find_study(system: str) -> Study:
    """Return what a system can compare: ``STUDY`` of the module of its name.

    Raises:
        ValueError: there is no such system, or no study of it.
    """
    find_system(system)
    try:
        return importlib.import_module(f"studies.{system}").STUDY
    except ModuleNotFoundError as error:
        raise ValueError(f"There is no study of the system {system!r}.") from error


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
    return make_study(find_study(options.system), options, report)
