import random

import pytest
import torch

from maskx.core.tensor_files import read_content, read_tensors, write_tensors

TENSORS = {
    "a": torch.linspace(0, 1, 40).reshape(5, 8),
    "b": torch.tensor(3.5, dtype=torch.float64),
    "c": torch.zeros(0, 2),
    "d": torch.arange(6).reshape(2, 3).T,
    "e": torch.tensor([True, False]),
}
CONTENT = {"names": ["cat", "dog"], "seed": 3, "margin": 0.1}


def test_tensors_and_text_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "file.safetensors"
    write_tensors(path, TENSORS, "toys", CONTENT)
    assert read_content(path, "toys") == {"kind": "toys", **CONTENT}
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert read_tensors(path, ["d", "b"]).keys() == {"b", "d"}
    with pytest.raises(ValueError, match=r"lacks the tensors \['x'\]"):
        read_tensors(path, ["a", "x"])
    with pytest.raises(ValueError, match="but not one with patterns"):
        read_content(path, "patterns")


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, "toys", CONTENT)
    whole, draw, noticed = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            content, tensors = read_content(path, "toys"), read_tensors(path)
        except ValueError:
            noticed += 1
        else:  # in what only fills a gap
            assert content == {"kind": "toys", **CONTENT}
            assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert noticed > 280
