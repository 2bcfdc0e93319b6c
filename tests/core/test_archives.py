import os
import random
import tarfile

import pytest
import torch
from checkpoint_content import CONTENT, same

from maskx.core.archives import find_damage, read_archive


def test_no_flipped_bit_and_no_lost_end_goes_unnoticed(tmp_path):
    path, broken = tmp_path / "checkpoint.pth", tmp_path / "broken.pth"
    torch.save(CONTENT, path)
    whole = path.read_bytes()
    draw = random.Random(0)
    messages = []
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        broken.write_bytes(flipped)
        try:
            found = read_archive(broken)
        except ValueError as error:
            messages.append(str(error))
        else:  # in what only fills gaps
            assert same(found)
    assert len(messages) > 250
    assert all("broken.pth' is no checkpoint, or is damaged" in text for text in messages)
    for length in (0, 1, 3, 100, len(whole) // 2, len(whole) - 1):
        broken.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"broken.pth' is no checkpoint, or is damaged"):
            read_archive(broken)


def test_files_of_before_there_were_checksums_are_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert find_damage(path) is None
    assert same(read_archive(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"old.pth' is no checkpoint, or is damaged"):
        read_archive(path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*none.pth'"):
        read_archive(tmp_path / "none.pth")


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"model": os.getcwd}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile.pth' is no checkpoint, or is damaged \(Unp"):
        read_archive(tmp_path / "hostile.pth")


def test_a_tar_archive_is_never_given_to_pytorch(tmp_path):
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.add(__file__, "pickle")
    with pytest.raises(ValueError, match=r"old\.pth' is .*a tar archive"):
        read_archive(tmp_path / "old.pth")
