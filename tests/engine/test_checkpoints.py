import os
import subprocess
import sys

import pytest
import torch
from checkpoint_content import CONTENT, same
from full_disk import full_disk

from maskx.core.archives import find_damage, read_archive
from maskx.engine.checkpoints import (
    check_finite,
    locked,
    newest_whole,
    write_checkpoint,
)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "checkpoint.pth"
    write_checkpoint(path, CONTENT)
    assert find_damage(path) is None
    assert same(read_archive(path))
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pth"]


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    paths = [tmp_path / f"model_{index}.pth" for index in range(3)]
    for age, path in enumerate(paths):
        write_checkpoint(path, CONTENT)
        os.utime(path, (age, age))
    assert newest_whole(paths) == paths[2]
    paths[2].write_bytes(b"")
    assert newest_whole(paths) == paths[1]
    paths[1].write_bytes(paths[1].read_bytes()[:-50])
    assert newest_whole(paths) == paths[0]
    assert newest_whole(paths[1:]) is None


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(path, CONTENT)
    message = r"could not be written \(.*File too large.*--resume"
    with full_disk(5000), pytest.raises(OSError, match=message):
        write_checkpoint(path, CONTENT | {"iteration": 8})
    assert same(read_archive(path))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_an_error_that_is_not_of_the_disk_stays_as_it_is(tmp_path):
    with pytest.raises(AttributeError):  # a function of a function cannot be pickled
        write_checkpoint(tmp_path / "checkpoint.pth", {"model": lambda: 0})
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named(tmp_path):
    weights = {"a": torch.ones(2), "n": torch.tensor([1]), "e": torch.ones(0), "_extra": "text"}
    check_finite(weights, when="after iteration 3")
    check_finite({}, when="after iteration 3")
    weights |= {"b": torch.tensor([1.0, float("nan")]), "var": torch.tensor(float("inf"))}
    message = (
        r"2 of 3 weights are not finite after iteration 3, such as 'b', 'var'\..*"
        r"The last images were '5', 'cat.jpg'\..*--resume"
    )
    with pytest.raises(FloatingPointError, match=message):
        check_finite(weights, when="after iteration 3", images=(5, "cat.jpg"))


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = r"file.run' cannot be written to \(Not a directory\)\. Make it writable"
    with pytest.raises(OSError, match=message), locked(tmp_path / "file" / "run"):
        pass


_HOLDS = """
import sys
from maskx.core.archives import find_damage, read_archive
from maskx.engine.checkpoints import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_holds_a_folder(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", _HOLDS, str(folder)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=r"Another process is at work in '.*run'"), locked(folder):
        pass
    other.kill()  # the lock goes with it
    other.wait()
    leftover = (
        folder / f".checkpoint.pth.{os.uname().nodename.replace('.', '-')}.{other.pid}.partial"
    )
    leftover.touch()
    with locked(folder), locked(folder):
        assert not leftover.exists()
    with locked(folder):
        pass
