import pytest
import torch
from benchmarks import measure as benchmark
from benchmarks.measure import (
    Case,
    Rates,
    changes,
    count_operations,
    describe_machine,
    format_memory_rows,
    format_rows,
    format_table,
    measure,
    measure_rates,
    measure_table,
    memory_row,
    peak_bytes,
    sync_share,
)

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


def test_the_noise_of_the_rounds_is_kept(clock):
    steady, noisy = [9.0] + [2.0] * 5, [9.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    steps = {"steady": clock.step("s", steady), "noisy": clock.step("n", noisy)}
    measured = measure(steps, rounds=5, device=CPU)
    assert measured["steady"].spread == 0
    assert measured["noisy"].spread == (4 - 2) / 3  # the quartiles over the median


def test_a_floor_is_what_takes_longer():
    rates = Rates(bytes_per_second=100.0, operations_per_second=1000.0)
    assert rates.floor(500, 10) == 0.5
    assert rates.floor(500, 200) == 2.0
    assert rates.floor(0, 0) == 0.0
    measured = measure_rates(CPU, size=64)
    assert min(measured) > 0
    assert count_operations(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7


def test_a_row_says_alternative_floor_and_own_time(clock):
    matrix = torch.ones(10, 10)
    step = clock.step("b", [9.0, 2.0])
    cases = [
        Case("other", clock.step("a", [9.0, 4.0]), 0, {}),
        Case("ours", lambda: (step(), matrix @ matrix), 7, {"size": 10}),
        Case("bytes", clock.step("c", [9.0, 6.0]), 0, {}, 300, traced=True),
    ]
    rates = Rates(bytes_per_second=100.0, operations_per_second=4000.0)
    rows = measure_table("table", cases, rounds=1, device=CPU, rates=rates)
    assert [row["seconds"] for row in rows] == [4.0, 2.0, 6.0]
    assert [row["ratio"] for row in rows] == [1.0, 0.5, 1.5]
    assert [row["floor_seconds"] for row in rows] == [0.0, 0.5, 3.0]
    assert [row["over_floor"] for row in rows] == [None, 4.0, 2.0]
    assert rows[1]["operations"] == 2000
    assert rows[1]["settings"] == {"size": 10}
    lines = format_rows(rows).splitlines()
    assert lines[0].split()[:4] == ["parameters", "alternative", "floor", "ms"]
    assert lines[2].split()[2:8] == ["4000.00", "500.00", "2000.00", "2000.00", "0.50", "4.0"]


@pytest.mark.parametrize(
    ("ratio", "spread", "words"),
    [
        (2.0, 0.0, "unchanged (+0%"),
        (2.5, 0.02, "slower (+25%"),
        (1.5, 0.02, "faster (-25%"),
        (2.5, 0.1, "unchanged (+25%, noise 30%)"),
    ],
)
def test_changes_are_told_where_they_exceed_the_noise(ratio, spread, words):
    row = {"table": "t", "name": "a", "ratio": 2.0, "over_floor": 7.0, "spread": 0.0}
    new = row | {"ratio": ratio, "spread": spread}
    (line,) = changes([new, row | {"name": "new"}], [row])
    assert line.startswith(f"a: {words}")


def test_rows_of_a_run_that_did_not_know_the_noise_count():
    row = {"table": "t", "name": "a", "ratio": 1.0, "over_floor": 2.0, "spread": 0.0}
    (line,) = changes([row], [{"table": "t", "name": "a", "ratio": 1.0}])
    assert line.startswith("a: unchanged")


@pytest.mark.parametrize(
    ("over_floor", "words"), [(2.2, "unchanged (+10%, noise 15%)"), (2.5, "slower"), (None, "unch")]
)
def test_the_first_row_of_a_table_is_compared_by_its_floor(over_floor, words):
    row = {"table": "t", "name": "a", "ratio": 1.0, "over_floor": 2.0, "spread": 0.0}
    (line,) = changes([row | {"over_floor": over_floor}], [row])
    assert line.startswith(f"a: {words}")


def test_memory_of_processes_is_compared_with_the_last_run():
    sizes = {"alternative": 400_000_000, "floor": 100_000_000}
    before = memory_row("photograph", "train", 200_000_000, **sizes, objects=24)
    row = memory_row("photograph", "train", 250_000_000, **sizes, objects=24)
    assert (row["ratio"], row["over_floor"], row["settings"]) == (0.625, 2.5, {"objects": 24})
    assert format_memory_rows([row]).splitlines()[1].split() == [
        "train",
        "400",
        "100",
        "250",
        "0.625",
        "2.500",
    ]
    assert changes([row], [before]) == ["train: larger (+25%, noise 3%)"]


def test_on_a_cpu_nothing_waits_for_a_gpu():
    assert sync_share(lambda: torch.ones(3).sum().item(), CPU) is None
