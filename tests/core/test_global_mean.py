from pathlib import Path

import torch
from two_ranks import run_as_two

from maskx.core.global_mean import global_mean


def test_two_processes_have_the_gradient_of_one_with_the_same_batch():
    run_as_two(Path(__file__).with_name("two_mean_processes.py"))


def test_one_process_divides_by_its_count():
    total = torch.tensor(6.0, requires_grad=True)
    assert global_mean(total, 3) == 2
    assert global_mean(total, torch.tensor(4)) == 1.5
    loss = global_mean(total * 0, 0)
    assert loss == 0
    assert loss.requires_grad
