"""Every command ends in one line."""

import errno
import re
from pathlib import Path
from urllib.error import URLError

import pytest
from torch.utils.data import DataLoader

from maskx.core.command_line import ended_in_one_line


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
        (MemoryError(), "not enough memory"),
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


def test_an_error_in_a_worker_is_that_error():
    line = ending(lambda: list(DataLoader(Broken(), num_workers=1, batch_size=None)))
    assert "A process that reads images failed: ValueError: Image 'a.png' (id 7) cannot" in line
    assert "\n" not in line
    Path(re.search(r"in (\S+\.log)\.$", line).group(1)).unlink()
