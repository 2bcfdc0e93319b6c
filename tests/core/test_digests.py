import os

import pytest
import torch
from torch import nn

from maskx.core.digests import digest_of, network_hash, sha256_of


def test_the_digest_of_a_file_follows_its_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    first = sha256_of(path)
    assert first.startswith("ba7816bf8f01cfea")  # of FIPS 180-2
    path.write_bytes(b"abcd")
    os.utime(path, ns=(0, 0))
    assert sha256_of(str(path)) != first
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "none")


def test_the_digest_of_settings_does_not_know_the_order_of_keys():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})


def test_the_hash_of_a_network_follows_names_values_and_types():
    network = nn.Sequential(nn.BatchNorm1d(2))
    first = network_hash(network)
    assert network_hash(nn.Sequential(nn.BatchNorm1d(2))) == first
    assert network_hash(nn.BatchNorm1d(2)) != first
    network[0].running_var[1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert network_hash(network) != first
    assert network_hash(nn.Sequential(nn.BatchNorm1d(2)).double()) != first


def test_a_network_is_known_by_its_values_however_they_lie():
    def network(values):
        module = torch.nn.Module()
        module.register_buffer("values", values)
        return module

    for plain, other in (
        (torch.tensor([3]), torch.tensor(3).expand(1)),
        (torch.tensor([3, 3]), torch.tensor(3).expand(2)),
        (torch.arange(4).reshape(2, 2), torch.tensor([[0, 2], [1, 3]]).T),
    ):
        assert network_hash(network(plain)) == network_hash(network(other))
    assert network_hash(network(torch.tensor([3]))) != network_hash(network(torch.tensor([4])))
