import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from safetensors.numpy import save_file

from maskx.core.files import remove_leftovers, write_json, written_text, written_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_half(path):
    with written_whole(path, durable=True) as scratch:
        scratch.write_text("half of")
        raise KeyboardInterrupt


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"AP": 1.5})
    assert json.loads(path.read_text()) == {"AP": 1.5}
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert json.loads(path.read_text()) == {"AP": 1.5}
    assert names(path.parent) == ["result.json"]
    with written_text(path) as file:
        file.write("a\nb\n")
    assert path.read_bytes() == b"a\nb\n"


def test_an_error_of_the_disk_names_the_file_that_is_meant(tmp_path):
    path = tmp_path / "result.json"
    path.mkdir()
    with pytest.raises(OSError, match=r"result\.json'") as caught:
        write_json(path, 1)
    assert ".partial" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_files_get_the_mode_of_the_umask_whoever_writes_them(tmp_path):
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "tensors") as scratch:
            save_file({}, scratch)  # which alone gives 0o600
        write_json(tmp_path / "json", 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


_WRITES_FOREVER = """
import sys
from maskx.core.files import written_whole
with written_whole(sys.argv[1]) as scratch:
    scratch.write_text("half of")
    print(scratch.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_but_not_what_a_live_one_writes(tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_text("whole")
    command = [sys.executable, "-c", _WRITES_FOREVER, str(path)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    scratch = writer.stdout.readline().strip()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [scratch, "checkpoint.pth"]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert names(tmp_path) == [scratch, "checkpoint.pth"]
    write_json(tmp_path / "other.json", 1)  # the first file that this process writes there
    assert names(tmp_path) == ["checkpoint.pth", "other.json"]
    assert path.read_text() == "whole"


def test_files_of_other_machines_are_left_for_a_day(tmp_path):
    scratch = tmp_path / f".result.json.not-{socket.gethostname()}.1.partial"
    scratch.write_text("half of")
    remove_leftovers(tmp_path)
    assert scratch.exists()
    os.utime(scratch, (0, time.time() - 25 * 3600))
    remove_leftovers(tmp_path)
    assert not scratch.exists()


def test_large_files_can_do_without_white_space(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"AP": [1, 2]}, compact=True)
    assert path.read_text() == '{"AP":[1,2]}\n'
    write_json(path, {"AP": [1]})
    assert path.read_text() == '{\n "AP": [\n  1\n ]\n}\n'


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "result.json", {"AP": float("nan")})
    assert not list(tmp_path.iterdir())
