import tempfile
from collections import defaultdict, deque
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskx.systems.larvseg.attention import MemoryBank


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 4), max_size=9), max_size=6),
    size=st.integers(1, 4),
)
def test_the_bank_is_a_queue_per_class(batches, size):
    bank = MemoryBank(5, 3, size=size)
    queues = defaultdict(lambda: deque(maxlen=size))
    seen = [0] * 5
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        means = torch.randn(len(batch), 3)
        bank.enqueue(torch.tensor(batch, dtype=torch.int64), means)
        for label, mean in zip(batch, means, strict=True):
            queues[label].append(mean)
            seen[label] += 1
    every_class = torch.arange(5)
    assert bank.counts.tolist() == seen
    assert bank.seen(every_class).tolist() == [count > 0 for count in seen]
    assert bank.ready(every_class).tolist() == [count >= size for count in seen]
    means = bank.class_means(every_class)
    for label in range(5):
        expected = torch.stack(list(queues[label])).mean(dim=0) if seen[label] else torch.zeros(3)
        torch.testing.assert_close(means[label], expected)


def test_warm_up_may_be_shorter_than_the_queue():
    bank = MemoryBank(2, 3, size=20, warm_up=2)
    for images, ready in ((1, False), (2, True)):
        bank.enqueue(torch.tensor([1]), torch.ones(1, 3))
        assert bank.counts[1] == images
        assert bank.ready(torch.tensor([1, 0])).tolist() == [ready, False]


def test_the_bank_is_in_the_checkpoint_and_has_no_parameters():
    bank = MemoryBank(3, 2, size=2)
    bank.enqueue(torch.tensor([2, 2, 0]), torch.randn(3, 2))
    other = MemoryBank(3, 2, size=2)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.means, bank.means)
    assert torch.equal(other.counts, bank.counts)
    assert not list(bank.parameters())
    assert isinstance(bank, nn.Module)


def test_the_bank_of_21841_classes_takes_1_34_gb_and_a_single_mean_67_mb():
    with torch.device("meta"):
        bank, one = MemoryBank(21841, 768, size=20), MemoryBank(21841, 768, size=1)
    assert bank.num_bytes == 21841 * (20 * 768 * 4 + 8) == 1_342_085_768
    assert one.num_bytes == pytest.approx(67.3e6, rel=1e-2)


def test_means_are_stored_without_gradient_and_in_the_type_of_the_bank():
    bank = MemoryBank(1, 2, size=2)
    bank.enqueue(torch.tensor([0]), torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True))
    assert bank.means.dtype == torch.float32
    assert not bank.means.requires_grad


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 3, "warm_up": -1}])
def test_sizes_below_one_are_refused(options):
    with pytest.raises(ValueError, match="size of a memory bank must be at least 1"):
        MemoryBank(2, 3, **options)


def _worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    bank = MemoryBank(3, 2, size=3)
    # The first worker has two pairs, of the type that autocast gives them, and the second none;
    # then the other way round.
    for step in range(2):
        classes = torch.tensor([2, 0] if rank == step else [], dtype=torch.int64)
        dtype = torch.float16 if len(classes) else torch.float32
        means = torch.full((len(classes), 2), float(1 + step), dtype=dtype)
        bank.enqueue(classes, means, synchronise=True)
    torch.save(bank.state_dict(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_workers_that_synchronise_hold_the_same_bank():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _worker, args=(folder,), nprocs=2, start_method="fork"
        )
        states = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert states[0]["counts"].tolist() == [2, 0, 2]
    assert states[0]["means"][2, :, 0].tolist() == [1, 2, 0]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


def test_one_worker_needs_no_group_to_synchronise():
    bank = MemoryBank(3, 2, size=3)
    bank.enqueue(torch.tensor([1]), torch.ones(1, 2), synchronise=True)
    assert bank.counts.tolist() == [0, 1, 0]
