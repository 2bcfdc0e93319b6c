import dataclasses
import json

import pytest
from studies.options import StudyOptions
from studies.study import (
    Measure,
    Ordering,
    Study,
    check_orderings,
    format_orderings,
    format_study,
    make_study,
    process_lock,
)

MEASURES = {"score": Measure("score"), "other": Measure("other"), "cosine": Measure("cosine", 3)}


class Runs:
    """Scores are 10 x seed + the length of the setting's name; what is made is written down."""

    shown = None

    def __init__(self, options, seed, report):
        self.options, self.seed = options, seed
        self.write_down("opened")

    def run(self, setting):
        self.write_down(setting)
        if setting == "fails":
            raise FloatingPointError("a loss is not finite")
        if setting == "nan":
            return {"score": float("nan"), "other": 1.0}
        if setting == "cosine":
            return {"cosine": 0.98765432}
        return {"score": 10.0 * self.seed + len(setting), "other": 1.0}

    def write_down(self, what):
        with (self.options.output / "made.txt").open("a") as file:
            file.write(f"{self.seed} {what}\n")


def describe(options, setting):
    if setting == "unknown":
        raise ValueError("Setting 'unknown' is not known.")
    if setting == "needs_more":
        raise ImportError("Install it with: pip install more")
    return {"iterations": options.iterations or 7}


SYSTEM = Study(
    settings=("a", "bb", "cosine"),
    measures=MEASURES,
    plotted=("score",),
    plot_label="Score",
    orderings=(
        Ordering("bb above a", ("bb", "score"), ("a", "score")),
        Ordering("cosine near 1", ("cosine", "cosine"), 0.99),
    ),
    describe=describe,
    open_seed=Runs,
)


@pytest.fixture
def options(tmp_path):
    return StudyOptions(tmp_path / "study", seeds=(0, 3))


def made(options):
    path = options.output / "made.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_rows_have_every_measure_by_seed(options):
    lines = []
    rows = make_study(SYSTEM, options, lines.append)
    assert rows == [
        {"setting": "a", "score": [1.0, 31.0], "other": [1.0, 1.0]},
        {"setting": "bb", "score": [2.0, 32.0], "other": [1.0, 1.0]},
        {"setting": "cosine", "cosine": [0.9877, 0.9877]},
    ]
    study = json.loads((options.output / "study.json").read_text())
    assert study["rows"] == rows
    assert [row["held"] for row in study["orderings"]] == [True, False]
    assert "| `bb` | 17.0 | 2.0 to 32.0 | 1.0 |" in lines[-2]
    assert "| bb above a | 17.0 | 16.0 | 2 of 2 | held |" in lines[-1]
    assert "| cosine near 1 | 0.988 | 0.990 | 0 of 2 | not held |" in lines[-1]
    assert (options.output / "study.png").stat().st_size > 5000
    left = {path.name for path in options.output.iterdir()} - {"made.txt"}
    assert left == {"seed_0", "seed_3", "study.json", "study.png"}


def test_nothing_is_made_twice_and_a_missing_result_is_made_again(options):
    rows = make_study(SYSTEM, options, print)
    names = ("opened", "a", "bb", "cosine")
    assert made(options) == [f"{seed} {name}" for seed in (0, 3) for name in names]
    assert make_study(SYSTEM, options, print) == rows
    assert made(options) == []
    (options.output / "seed_3" / "bb" / "result.json").unlink()
    assert make_study(SYSTEM, options, print) == rows
    assert made(options) == ["3 opened", "3 bb"]


def test_a_study_that_failed_goes_on(options):
    failing = dataclasses.replace(options, settings=("a", "fails", "bb"))
    with pytest.raises(FloatingPointError):
        make_study(SYSTEM, failing, print)
    assert made(options) == ["0 opened", "0 a", "0 fails"]
    assert not (options.output / "study.json").exists()
    make_study(SYSTEM, options, print)
    assert "0 a" not in made(options)


def test_a_result_of_other_options_is_refused_before_anything_is_made(options):
    make_study(SYSTEM, dataclasses.replace(options, settings=("bb",), seeds=(3,)), print)
    made(options)
    other = dataclasses.replace(options, iterations=8)
    match = r"bb/result.json' was made with \{'iterations': 7\}, now \{'iterations': 8\}"
    with pytest.raises(ValueError, match=match):
        make_study(SYSTEM, other, print)
    assert made(options) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is damaged"), ("[]", "holds no dict"), ('{"run": {}}', "is no result of a study")],
)
def test_a_damaged_result_is_named(options, content, words):
    path = options.output / "seed_0" / "a" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"result.json' {words}.*Delete it to make it again"):
        make_study(SYSTEM, options, print)


def test_the_study_of_another_system_is_refused(options):
    make_study(SYSTEM, options, print)
    other = dataclasses.replace(options, system="transfernet")
    with pytest.raises(ValueError, match=r"is a study of maskx, not of transfernet\. Name another"):
        make_study(SYSTEM, other, print)


def test_a_seed_that_stands_twice_is_refused(options):
    with pytest.raises(ValueError, match=r"A seed stands twice in \[0, 3, 0\]"):
        make_study(SYSTEM, dataclasses.replace(options, seeds=(0, 3, 0)), print)
    assert not options.output.exists()


def test_an_unknown_setting_is_refused_before_anything_is_made(options):
    with pytest.raises(ValueError, match="'unknown' is not known"):
        make_study(SYSTEM, dataclasses.replace(options, settings=("a", "unknown")), print)
    assert not options.output.exists()


def test_a_setting_that_needs_more_is_left_out_unless_it_is_named(options):
    system = dataclasses.replace(SYSTEM, settings=("a", "needs_more"))
    lines = []
    assert [row["setting"] for row in make_study(system, options, lines.append)] == ["a"]
    assert lines[0] == "Left out: needs_more. Install it with: pip install more"
    with pytest.raises(ImportError, match="pip install more"):
        make_study(system, dataclasses.replace(options, settings=("needs_more",)), print)


def test_a_measure_that_is_no_number_is_shown_as_none(options):
    lines = []
    rows = make_study(SYSTEM, dataclasses.replace(options, settings=("nan", "bb")), lines.append)
    assert rows[0] == {"setting": "nan", "score": [None, None], "other": [1.0, 1.0]}
    assert "| `nan` | - | - to - | 1.0 |" in lines[-1]


def test_what_another_process_makes_is_waited_for_at_the_end(options, monkeypatch):
    folder = options.output / "seed_0" / "a"
    lock = process_lock(folder)
    lock.acquire()
    lines = []

    def report(line):
        lines.append(line)
        if line == "seed 3: cosine done":  # the last of what is free
            content = {"run": {"iterations": 7}, "result": {"score": 99.0, "other": 9.0}}
            (folder / "result.json").write_text(json.dumps(content))
            lock.release()

    rows = make_study(SYSTEM, options, report)
    assert lines[0] == "seed 0: a is being made by another process"
    assert rows[0]["score"] == [99.0, 31.0]
    assert "0 a" not in made(options)


def test_an_ordering_holds_in_the_mean_and_seeds_are_counted():
    rows = [
        {"setting": "x", "score": [10.0, 20.0, 31.0]},
        {"setting": "y", "score": [12.0, 20.0, 25.0], "cosine": [0.98, 0.995, 0.999]},
        {"setting": "z", "score": [None, 1.0, 2.0]},
    ]
    orderings = [
        Ordering("x above y", ("x", "score"), ("y", "score")),
        Ordering("y above x", ("y", "score"), ("x", "score")),
        Ordering("y near 1", ("y", "cosine"), 0.99),
        Ordering("x above z", ("x", "score"), ("z", "score")),
        Ordering("x has no cosine", ("x", "cosine"), 0.99),
        Ordering("no such setting", ("x", "score"), ("w", "score")),
    ]
    checked = check_orderings(orderings, rows)
    x, y = pytest.approx(61 / 3), 19.0
    shared = {"measure": "score", "seeds": 3}
    assert checked == [
        {"ordering": "x above y", "better": x, "worse": y, "seeds_held": 1, "held": True} | shared,
        {"ordering": "y above x", "better": y, "worse": x, "seeds_held": 1, "held": False} | shared,
        {
            "ordering": "y near 1",
            "measure": "cosine",
            "better": pytest.approx(0.99133333),
            "worse": 0.99,
            "seeds_held": 2,
            "seeds": 3,
            "held": True,
        },
        {"ordering": "x above z", "better": x, "worse": None, "seeds_held": 2, "held": False}
        | shared,
    ]
    assert format_orderings(MEASURES, checked).splitlines()[2:] == [
        "| x above y | 20.3 | 19.0 | 1 of 3 | held |",
        "| y above x | 19.0 | 20.3 | 1 of 3 | not held |",
        "| y near 1 | 0.991 | 0.990 | 2 of 3 | held |",
        "| x above z | 20.3 | - | 2 of 3 | not held |",
    ]


def test_settings_with_another_main_measure_have_a_table_of_their_own():
    rows = [
        {"setting": "x", "score": [10.0, 14.0], "other": [1.0, 2.0]},
        {"setting": "w", "cosine": [0.5, 1.0]},
        {"setting": "y", "score": [20.0, 20.0]},
    ]
    assert format_study(MEASURES, rows).splitlines() == [
        "| setting | score | lowest to highest | other |",
        "|---|---|---|---|",
        "| `x` | 12.0 | 10.0 to 14.0 | 1.5 |",
        "| `y` | 20.0 | 20.0 to 20.0 | - |",
        "",
        "| setting | cosine | lowest to highest |",
        "|---|---|---|",
        "| `w` | 0.750 | 0.500 to 1.000 |",
    ]
