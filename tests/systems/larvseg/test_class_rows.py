import pytest
import torch

from maskx.systems.larvseg.class_rows import take_rows


def test_rows_are_taken_and_the_tensor_stays_as_it_is():
    own, found = torch.zeros(4, 2), torch.arange(6.0, dtype=torch.float64).view(3, 2)
    rows = take_rows(own, [3, 1], found, [0, 2], what="rows")
    assert rows.tolist() == [[0, 0], [4, 5], [0, 0], [0, 1]]
    assert rows.dtype == torch.float32
    assert not own.any()


def test_rows_of_one_number_or_flag():
    own = torch.tensor([False, False, True])
    assert take_rows(own, [0, 2], torch.tensor([True, False]), [0, 1], what="flags").tolist() == [
        *(True, False, False)
    ]


def test_other_channels_are_refused():
    message = r"row of bank\.means has shape \(2, 3\) in the checkpoint, but \(4, 3\) in this model"
    with pytest.raises(ValueError, match=message):
        take_rows(torch.zeros(5, 4, 3), [0], torch.zeros(5, 2, 3), [0], what="bank.means")
