import json
from dataclasses import replace

import pytest

from maskx.core.files import write_json
from maskx.engine.checkpoints import write_checkpoint
from maskx.engine.runs import Origin, Run, read_run, write_run
from maskx.engine.stages import StageState, begin_stage, run_stage, stage_state, timed_stage

RUN = Run(
    system="toy",
    host="pip",
    class_names=("cat",),
    settings={"threshold": 0.5, "workers": 1},
    started_from={"classifier": Origin("ab12")},
    weights="masks.json",
)
TRAINING = replace(RUN, weights="model_final.pth")


class Interrupted(Exception):
    pass


class Work:
    """Makes three parts, then the file of them; stops before the part ``stop_at``."""

    def __init__(self, folder, stop_at=None):
        self.folder, self.stop_at, self.made = folder, stop_at, []

    def __call__(self):
        for part in range(3):
            if part == self.stop_at:
                raise Interrupted
            path = self.folder / f"{part}.txt"
            if not path.exists():
                path.write_text("whole")
                self.made.append(part)
        write_json(self.folder / "masks.json", {"parts": 3})
        return {"mIoU": 12.5, "nothing": None}


def run(work, run=RUN, *, resume=False, report=lambda line: None):
    return run_stage(work.folder, run, work, resume=resume, report=report)


def test_a_stage_is_made_once_and_goes_on_where_it_stopped(tmp_path):
    folder, said = tmp_path / "proxy", []
    assert stage_state(folder, RUN) is StageState.NEW
    with pytest.raises(Interrupted):
        run(Work(folder, stop_at=2))
    assert stage_state(folder, RUN) is StageState.STARTED
    first = read_run(folder).seconds
    assert first > 0
    with pytest.raises(ValueError, match=r"proxy' holds an interrupted run\. Add --resume"):
        run(Work(folder))
    work = Work(folder)
    assert run(work, resume=True) == {"mIoU": 12.5, "nothing": None}
    assert work.made == [2]
    found = read_run(folder)
    assert found == replace(RUN, results=found.results, seconds=found.seconds)
    assert found.seconds > first
    assert stage_state(folder, RUN) is StageState.FINISHED
    again = Work(folder, stop_at=0)
    assert run(again, report=said.append) == {"mIoU": 12.5, "nothing": None}
    assert said == [f"{folder}: finished before, not run again"]


def test_a_stage_is_finished_when_its_file_loads(tmp_path, caplog):
    run(Work(tmp_path))
    path = tmp_path / "masks.json"
    for damaged in ('{"parts', ""):
        path.write_text(damaged)
        assert stage_state(tmp_path, RUN) is StageState.STARTED
        assert "masks.json' is made again:" in caplog.text
        run(Work(tmp_path), resume=True)
        assert json.loads(path.read_text()) == {"parts": 3}
    path.unlink()
    assert stage_state(tmp_path, RUN) is StageState.STARTED


def test_weights_that_were_cut_off_are_trained_again(tmp_path):
    begun = begin_stage(tmp_path, TRAINING, resume=False)
    with timed_stage(tmp_path, begun) as results:
        write_checkpoint(tmp_path / "model_final.pth", {"model": {}})
        results["AP"] = 1.0
    assert begin_stage(tmp_path, TRAINING, resume=False) is None
    path = tmp_path / "model_final.pth"
    path.write_bytes(path.read_bytes()[:-20])
    assert stage_state(tmp_path, TRAINING) is StageState.STARTED
    again = begin_stage(tmp_path, TRAINING, resume=True)
    assert again.seconds > 0
    assert read_run(tmp_path).results is None


def test_a_stage_of_something_else_is_not_gone_on_with(tmp_path):
    with pytest.raises(Interrupted):
        run(Work(tmp_path, stop_at=1))
    others = {
        r"threshold is 0\.7, but the run in .* with 0\.5": {"settings": {"threshold": 0.7}},
        r"classifier 'cd34' is not what the run": {"started_from": {"classifier": Origin("cd34")}},
    }
    for message, changes in others.items():
        with pytest.raises(ValueError, match=message):
            run(Work(tmp_path), replace(RUN, **changes), resume=True)
    more = replace(RUN, settings={"threshold": 0.5, "workers": 4})
    assert stage_state(tmp_path, more, free=("workers",)) is StageState.STARTED


def test_a_stage_that_made_nothing_yet_may_become_another(tmp_path):
    write_run(tmp_path, RUN)
    other = replace(RUN, settings={"threshold": 0.7})
    assert stage_state(tmp_path, other) is StageState.NEW
    assert run(Work(tmp_path), other)["mIoU"] == 12.5


def test_checkpoints_of_another_tool_are_left_alone(tmp_path):
    (tmp_path / "model_0000099.pth").touch()
    with pytest.raises(ValueError, match=r"holds checkpoints without run\.json, so something"):
        begin_stage(tmp_path, TRAINING, resume=True)
