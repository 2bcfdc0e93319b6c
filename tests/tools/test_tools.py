import ast
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.parametrize("name", sorted(path.stem for path in TOOLS.glob("*.py")))
def test_the_help_shows_commands_as_they_are_typed(name):
    """A backslash at the end of a line would join it with the next, but for raw docstrings."""
    text = ast.get_docstring(ast.parse((TOOLS / f"{name}.py").read_text(encoding="utf-8")))
    assert f"python tools/{name}.py" in text
    assert [line for line in text.splitlines() if len(line) > 100] == []
