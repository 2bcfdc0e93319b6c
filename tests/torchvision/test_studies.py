import runpy
import sys
from pathlib import Path

import pytest
from studies.options import StudyOptions
from studies.run import find_study, run_study

import maskx.systems  # noqa: F401 - registers them
from maskx.engine.system import system_names

TOOL = Path(__file__).parents[2] / "tools" / "study.py"
STUDIES = TOOL.with_name("studies")
# Not those that other tests register.
STUDIED = [name for name in system_names() if (STUDIES / f"{name}.py").is_file()]


def test_an_unknown_system_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no system 'maskrcnn'\. Allowed: .*\bmaskx, "):
        run_study(StudyOptions(tmp_path / "study", system="maskrcnn"), print)


@pytest.mark.parametrize("system", STUDIED)
def test_every_system_knows_its_settings_and_orders_what_it_measures(system):
    study, options = find_study(system), StudyOptions(Path("unused"), system=system)
    for setting in study.settings:
        if not setting.endswith("_crf"):  # which may not be installed
            assert study.describe(options, setting)["batch_size"] > 0
    assert set(study.plotted) <= set(study.measures)
    for _, better, worse in study.orderings:
        for side in (better, worse):
            if not isinstance(side, float):
                assert side[0] in study.settings
                assert side[1] in study.measures
    names = [ordering.name for ordering in study.orderings]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("system", STUDIED)
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"iterations": 0}, "iterations is 0. Allowed: a whole number of at least 1"),
        ({"stage2_iterations": -1}, "stage2_iterations is -1. Allowed"),
        ({"batch_size": -2}, "batch_size is -2. Allowed"),
        ({"seeds": (0, -1)}, "seeds has -1. Allowed: whole numbers from 0"),
        ({"seeds": (2**32,)}, "seeds has 4294967296. Allowed"),
    ],
)
def test_numbers_are_checked_before_the_first_training(tmp_path, system, option, words):
    with pytest.raises(ValueError, match=words):
        run_study(StudyOptions(tmp_path / "study", system=system, **option), print)
    assert not (tmp_path / "study").exists()


def test_a_user_error_ends_with_its_message(tmp_path, monkeypatch):
    command = [str(TOOL), "--system", "larvseg", "--settings", "nonsense"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^error: Setting 'nonsense' is not known\. Allowed: "):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert not (tmp_path / "out").exists()
