import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskx.core.processes import run_jobs

ROOT = Path(__file__).parents[2]


def square(number):
    return number * number


def my_process(_):
    return os.getpid()


def refuse(number):
    raise ValueError(f"not {number}")


def test_one_worker_is_this_process_and_keeps_the_order():
    assert list(run_jobs(square, [3, 1, 2], 1)) == [9, 1, 4]
    assert set(run_jobs(my_process, [1, 2], 1)) == {os.getpid()}


def test_more_workers_are_other_processes():
    assert sorted(run_jobs(abs, [-3, 1, -2], 2)) == [1, 2, 3]
    assert os.getpid() not in set(run_jobs(os.path.getsize, [os.devnull], 2))


def test_errors_of_workers_are_raised():
    with pytest.raises(ValueError, match="invalid literal"):
        list(run_jobs(int, ["1", "x"], 2))
    with pytest.raises(ValueError, match="not 1"):
        list(run_jobs(refuse, [1], 1))


def test_workers_below_1_are_refused_at_once():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run_jobs(square, [], 0)


@pytest.mark.skipif(os.name == "nt", reason="ends the process with a signal")
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    code = """
import os, sys, time
from maskx.core.processes import run_jobs

def note_and_wait(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(60)

if __name__ == "__main__":
    list(run_jobs(note_and_wait, [sys.argv[1]], 2))
"""
    script, notes = tmp_path / "script.py", tmp_path / "notes"
    script.write_text(code)
    notes.mkdir()
    parent = subprocess.Popen(
        [sys.executable, script, notes], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        wait_until(lambda: any(notes.iterdir()))
    finally:
        parent.kill()
        parent.wait()
    (worker,) = [int(note.name) for note in notes.iterdir()]
    wait_until(lambda: not is_running(worker))


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # What has ended stays a zombie where nobody waits for it, as in some containers.
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
