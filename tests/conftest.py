"""What the whole suite shares: where real data lies, and whether Detectron2 is here."""

import gc
import importlib.util
import logging
from pathlib import Path

import pytest
import timm
import torch

# The networks of the tests are tiny, and sums by several threads depend on their number.
torch.set_num_threads(1)

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None

# Without Detectron2 its tests cannot even be imported; the header below says so.
collect_ignore_glob = [] if HAS_DETECTRON2 else ["*detectron2*"]


def pytest_report_header():
    found = "found" if HAS_DETECTRON2 else "not installed, tests/detectron2 is left out"
    return f"detectron2: {found}"


def pytest_collection_finish():
    """Leave what the libraries hold out of garbage collection: it would be a tenth of the time."""
    gc.freeze()


_LOGGERS = [logging.getLogger(name) for name in ("maskx", "detectron2", "fvcore")]
_LOGGER_STATES = [(log.propagate, log.level, list(log.handlers)) for log in _LOGGERS]


@pytest.fixture(autouse=True)
def restored_loggers():
    """Undo what was done to loggers: Detectron2's setup_logger stops them from propagating.

    Before a test as well, as a fixture of its module may have trained.
    """
    _restore_loggers()
    yield
    _restore_loggers()


def _restore_loggers():
    for log, (propagate, level, handlers) in zip(_LOGGERS, _LOGGER_STATES, strict=True):
        log.propagate, log.level, log.handlers = propagate, level, list(handlers)


@pytest.fixture
def downloads(monkeypatch):
    """Names of the models whose weights timm was asked to download; they stay at random."""
    names, create = [], timm.create_model

    def without_download(name, pretrained=False, **options):
        if pretrained and "pretrained_cfg_overlay" not in options:
            names.append(name)
            pretrained = False
        return create(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    return names


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real check data that may lie beside a checkout; it is not part of the project."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real check data (../shared/data) is not here")
    return folder
