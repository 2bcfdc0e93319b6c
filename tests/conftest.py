"""What the whole suite shares: where real data lies, and whether Detectron2 is here."""

import importlib.util
import logging
from pathlib import Path

import pytest

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None

# Without Detectron2 its tests cannot even be imported; the header below says so.
collect_ignore = [] if HAS_DETECTRON2 else ["detectron2"]


def pytest_report_header():
    found = "found" if HAS_DETECTRON2 else "not installed, tests/detectron2 is left out"
    return f"detectron2: {found}"


@pytest.fixture(autouse=True)
def restored_loggers():
    """Undo what a test did to loggers: Detectron2's setup_logger stops them from propagating."""
    loggers = [logging.getLogger(name) for name in ("maskx", "detectron2", "fvcore")]
    states = [(logger.propagate, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, state in zip(loggers, states, strict=True):
        logger.propagate, logger.level, logger.handlers = state


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real check data that may lie beside a checkout; it is not part of the project."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real check data (../shared/data) is not here")
    return folder
