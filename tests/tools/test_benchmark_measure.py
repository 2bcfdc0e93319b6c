import pytest
import torch
from benchmarks import measure as benchmark
from benchmarks.measure import describe_machine, format_table, measure, peak_bytes

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the steps advance: ``clock.step(name, durations)``."""

    class Clock:
        now = 0.0

        def __init__(self):
            self.calls = []

        def step(self, name, durations):
            durations = iter(durations)

            def run():
                self.calls.append(name)
                self.now += next(durations, 0.0)

            return run

    clock = Clock()
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock.now)
    return clock


def test_rounds_are_interleaved_and_the_first_only_warms_up(clock):
    steps = {
        "a": clock.step("a", [9.0, 1.0, 2.0, 4.0]),
        "b": clock.step("b", [9.0, 3.0, 2.0, 8.0]),
    }
    measured = measure(steps, rounds=3, device=CPU)

    assert "".join(clock.calls) == "ab" * 4 + "ab"  # the last calls measure memory
    assert measured["a"][:3] == (2.0, 1.0, 1.0)
    # Ratios 3, 1 and 2 of the rounds.
    assert measured["b"][:3] == (3.0, 2.0, 2.0)


def test_the_time_of_a_short_step_is_that_of_its_fastest_call(clock):
    steps = {"a": clock.step("a", [9.0, 0.0625, 0.03125, 0.125, 0.015625])}
    measured = measure(steps, rounds=1, device=CPU)

    # 0.0625 + 0.03125 + 0.125 seconds are more than 0.2, so the fourth call is not a timed one.
    assert measured["a"].seconds == 0.03125
    assert len(clock.calls) == 1 + 3 + 1


def test_rounds_out_of_range():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure({}, rounds=0, device=CPU)


def test_peak_memory_counts_what_is_there_at_one_time():
    before = torch.zeros(250_000)

    def step():
        one = before + 1  # 1 MB
        two = torch.cat([one, one])  # 3 MB
        del one
        return two + before.sum()  # 4 MB

    for _ in range(2):  # what an earlier call left behind does not count
        assert peak_bytes(step, CPU) == pytest.approx(4e6, abs=1e4)


def test_peak_memory_counts_gradients_but_not_the_weights():
    layer = torch.nn.Linear(500, 500, bias=False)  # 1 MB
    features = torch.ones(1, 500)

    def step():
        layer(features).sum().backward()
        layer.zero_grad()

    assert peak_bytes(step, CPU) == pytest.approx(1e6, abs=2e4)


def test_the_machine_is_described():
    machine = describe_machine(CPU)
    assert machine["device"].startswith("cpu: ")
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__


def test_a_table_is_aligned():
    assert format_table([("", "ms"), ("long name", "1.5"), ("b", "10.25")]) == (
        "              ms\nlong name    1.5\nb          10.25"
    )
