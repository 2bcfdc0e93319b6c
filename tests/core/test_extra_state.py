import pytest
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from maskx.core.extra_state import EXTRA_STATE, pack_state, unpack_state


class Named(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.names = list(names)
        self.fc = nn.Linear(2, 2)

    def get_extra_state(self):
        return pack_state({"names": self.names}, version=3)

    def set_extra_state(self, state):
        found = unpack_state(state, version=3, what="a test")["names"]
        if found != self.names:
            raise ValueError(f"names are {found}")


def test_what_is_said_comes_back_whatever_its_length():
    for names in ([], ["cat", "größer"], [f"class {i * 7919}" for i in range(60_000)]):
        state = pack_state({"names": names}, version=1)
        assert unpack_state(state, version=1, what="x") == {"names": names}
    assert pack_state({"names": ["a"]}, version=1).shape == pack_state({"b": 1}, version=1).shape


def test_it_goes_through_a_file_and_reaches_the_module(tmp_path):
    torch.save(Named(["cat"]).state_dict(), tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert EXTRA_STATE in state
    Named(["cat"]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"names are \['cat'\]"):
        Named(["dog", "owl"]).load_state_dict(state)


def test_it_goes_through_the_checkpointer_of_detectron2(tmp_path):
    Checkpointer(Named(["cat"]), str(tmp_path)).save("model")
    load = Checkpointer(Named(["dog", "owl"])).load
    with pytest.raises(ValueError, match=r"names are \['cat'\]"):
        load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (torch.zeros(5, dtype=torch.uint8), "of a test cannot be read"),
        (None, r"cannot be read \(AttributeError\)"),
        (pack_state({}, version=4), "in form 4, but this version of maskx reads form 3"),
    ],
)
def test_what_cannot_be_read_is_said(state, words):
    with pytest.raises(ValueError, match=words):
        unpack_state(state, version=3, what="a test")
