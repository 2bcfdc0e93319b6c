"""What leaks in a long run is seen, and what does not leak is not."""

import sys

import pytest
from benchmarks.long_runs import watch

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the tool reads /proc, which Linux has"
)

TOOL = """
import sys
import torch

layer = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
kept = []
for step in range(int(sys.argv[2])):
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    if sys.argv[1] == "leaky":
        kept.append((bytearray(200_000), open(__file__)))
"""


@pytest.fixture
def tool(tmp_path):
    path = tmp_path / "tool.py"
    path.write_text(TOOL)
    return path


def test_a_leak_of_memory_and_of_files_is_seen(tool):
    (run,) = watch([tool, "leaky", "300"], warm_up=100)
    assert run.steps == 300
    assert run.growth > 0.05  # 200 steps of 200 kB beside some 300 MB of torch
    assert run.end_files == run.start_files + 200


def test_a_run_without_a_leak_is_flat(tool):
    (run,) = watch([tool, "sound", "300"], warm_up=100)
    assert run.growth < 0.02
    assert run.end_files == run.start_files


def test_a_command_that_fails_and_one_that_is_too_short_are_named(tool):
    with pytest.raises(RuntimeError, match=r"(?s)tool\.py.*IndexError"):
        watch([tool, "sound"])
    with pytest.raises(RuntimeError, match="more than 100 steps"):
        watch([tool, "sound", "60"], warm_up=100)
