import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
COMMANDS = [*sorted(TOOLS.glob("*.py")), TOOLS.parent / "datasets" / "prepare.py"]


@pytest.mark.parametrize("name", sorted(path.stem for path in TOOLS.glob("*.py")))
def test_the_help_shows_commands_as_they_are_typed(name):
    """A backslash at the end of a line would join it with the next, but for raw docstrings."""
    text = ast.get_docstring(ast.parse((TOOLS / f"{name}.py").read_text(encoding="utf-8")))
    assert f"python tools/{name}.py" in text
    assert [line for line in text.splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_a_help_text_waits_for_no_library(path):
    code = f"""
import runpy, sys
sys.argv = [{str(path)!r}, "--help"]
sys.path[:0] = [{str(path.parent)!r}, {str(TOOLS.parent)!r}]
try:
    runpy.run_path({str(path)!r}, run_name="__main__")
except SystemExit as ending:
    assert not ending.code, ending.code
print("loaded:", *sys.modules)
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    text, _, loaded = finished.stdout.rpartition("loaded:")
    assert "usage:" in text
    heavy = {"torch", "numpy", "cv2", "scipy", "detectron2", "torchvision"}
    assert not heavy & set(loaded.split())
