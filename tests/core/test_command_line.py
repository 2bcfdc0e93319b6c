"""Every command ends in one line."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
from torch.utils.data import DataLoader

from maskx.core.command_line import ended_in_one_line

ROOT = Path(__file__).parents[2]


def ending(action, **options):
    with pytest.raises(SystemExit) as caught, ended_in_one_line(**options):
        action()
    return str(caught.value.code)


def raising(error):
    def action():
        raise error

    return lambda: ending(action)


class Broken:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise ValueError("Image 'a.png' (id 7) cannot be read")


def test_what_the_package_refuses_is_said_as_it_is():
    assert raising(ValueError("size is 0. Allowed: 1 or more."))() == (
        "error: size is 0. Allowed: 1 or more."
    )


def test_an_interruption_says_how_to_go_on():
    def interrupt():
        raise KeyboardInterrupt

    assert ending(interrupt, goes_on="--resume goes on") == "interrupted; --resume goes on"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left", "out/x.pth"), "disk is full 'out/x.pth'. Make"),
        (OSError(errno.EROFS, "Read-only", "out/x"), "'out/x' is read-only. Choose another"),
        (PermissionError(errno.EACCES, "denied", "a.json"), "No permission to use 'a.json'"),
        (URLError("Name or service not known"), "network could not be used.*--weights FILE"),
        (RuntimeError("CUDA out of memory. Tried"), "not enough memory: .*Lower the batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "not enough memory"),
        (OSError("'x' could not be written (full). Make room."), "^error: 'x' could not be"),
        (MemoryError(), "not enough memory"),
        (FileNotFoundError(errno.ENOENT, "No such", "/no/x"), "no file or folder '/no/x'. Correct"),
        (
            NotADirectoryError(errno.ENOTDIR, "", "a.json/b"),
            "'a.json/b' is a file, not a",
        ),
        (IsADirectoryError(errno.EISDIR, "", "data"), "'data' is a folder, where a file .* Name a"),
        (AssertionError(), "AssertionError, without a message"),
        (KeyError("bbox"), "KeyError: 'bbox'"),
    ],
)
def test_what_a_library_raises_has_cause_remedy_and_a_traceback_in_a_file(error, words):
    line = raising(error)()
    assert "\n" not in line
    assert re.search(words, line)
    log = Path(re.search(r"The traceback is in (\S+\.log)\.$", line).group(1))
    assert type(error).__name__ in log.read_text()
    log.unlink()


_FULL_DISK = """
import atexit, errno, logging
from maskx.core.command_line import ended_in_one_line
stream = open("/dev/full", "w")
atexit.register(stream.close)  # as Detectron2 does with its log
log = logging.getLogger("maskx")
log.addHandler(logging.StreamHandler(stream))
with ended_in_one_line():
    for _ in range(3):
        log.warning("step")
    raise OSError(errno.ENOSPC, "No space left on device", "out/x.pth")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is full")
def test_a_full_disk_is_one_line_though_logs_and_temporary_files_are_on_it(tmp_path):
    environment = os.environ | {"TMPDIR": "/dev/full", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-c", _FULL_DISK],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert re.fullmatch(
        r"error: The disk is full 'out/x\.pth'\. Make room; the last checkpoint is whole\..*\n",
        finished.stderr,
    )


def test_an_error_in_a_worker_is_that_error():
    line = ending(lambda: list(DataLoader(Broken(), num_workers=1, batch_size=None)))
    assert "A process that reads images failed: ValueError: Image 'a.png' (id 7) cannot" in line
    assert "\n" not in line
    Path(re.search(r"in (\S+\.log)\.$", line).group(1)).unlink()
