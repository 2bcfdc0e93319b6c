import runpy
import sys
from pathlib import Path

import pytest

TOOL = str(Path(__file__).parents[2] / "tools" / "train_net.py")


def test_user_errors_end_with_their_message(monkeypatch):
    monkeypatch.setattr(sys, "argv", [TOOL, "--config-file", "none.yaml"])
    with pytest.raises(SystemExit, match=r"^error: --config-file 'none\.yaml': there is no such"):
        runpy.run_path(TOOL, run_name="__main__")
