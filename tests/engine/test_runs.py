import json
import shutil
from dataclasses import replace

import pytest

import maskx
from maskx.engine.runs import (
    Origin,
    Run,
    RunState,
    check_same_run,
    link_run,
    origin_of,
    read_run,
    write_run,
)
from maskx.supervision import split_one_side

CLASSES = ("cat", "dog", "horse")
SPLIT = split_one_side("half", CLASSES, with_masks=("cat",))
RUN = Run(
    system="toy",
    host="pip",
    class_names=CLASSES,
    split=SPLIT,
    settings={"model": {"size": 64, "sizes": (1, 2)}, "training": {"iterations": 10}},
    started_from={"annotations": Origin("ab12", "../train.json"), "start": Origin("cd34")},
)


def test_a_run_is_read_as_it_was_written(tmp_path):
    write_run(tmp_path / "new", RUN)
    found = read_run(tmp_path / "new")
    assert found == RUN
    assert found.split == SPLIT
    assert found.version == maskx.__version__
    assert found.settings["model"]["sizes"] == [1, 2]
    write_run(tmp_path / "new", replace(RUN, split=None, results={"mIoU": None}, seconds=2.5))
    found = read_run(tmp_path / "new")
    assert (found.split, found.results, found.seconds) == (None, {"mIoU": None}, 2.5)


def test_a_split_of_other_classes_than_the_model_keeps_them(tmp_path):
    split = split_one_side("own", ("cat", "ghost"), with_masks=("ghost",))
    write_run(tmp_path, replace(RUN, split=split))
    assert read_run(tmp_path).split == split


def test_the_folder_of_a_chain_leads_to_the_run_that_is_its_result(tmp_path):
    write_run(tmp_path / "retrained", RUN)
    link_run(tmp_path, "retrained")
    assert read_run(tmp_path).folder == tmp_path / "retrained"
    shutil.rmtree(tmp_path / "retrained")
    with pytest.raises(FileNotFoundError, match=r"names the run 'retrained', which is not in"):
        read_run(tmp_path)
    link_run(tmp_path, "../elsewhere")
    with pytest.raises(FileNotFoundError, match=r"elsewhere', which is not in"):
        read_run(tmp_path)


def test_what_is_no_run_folder_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        read_run(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no run.json, so it is no run folder"):
        read_run(tmp_path)
    write_run(tmp_path / "stage1", RUN)
    with pytest.raises(FileNotFoundError, match=r"Runs are in its folders 'stage1'\."):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "sys', "run.json' is damaged"),
        ('{"format": 1, "system": "a", "system": "b"}', "the key 'system' stands twice"),
        ("[1]", "does not describe a run"),
        ('{"images": []}', "does not describe a run"),
        ('{"format": 99, "version": "9.0"}', r"in form 99, written by maskx 9.0, but .* reads"),
        ('{"format": 1, "system": "a"}', r"no whole description of a run \(KeyError"),
    ],
)
def test_a_damaged_run_json_or_one_of_another_version_is_named(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize("key", ["split", "started_from", "class_names", "settings"])
def test_a_run_json_with_a_wrong_part_is_named(tmp_path, key):
    (tmp_path / "run.json").write_text(json.dumps(RUN.as_json() | {key: 5}))
    with pytest.raises(ValueError, match=r"run.json' is no whole description"):
        read_run(tmp_path)


def test_files_that_a_run_needs_move_with_it(tmp_path):
    words = tmp_path / "runs" / "words.txt"
    elsewhere = tmp_path / "elsewhere.txt"
    folder = tmp_path / "runs" / "stage1"
    folder.mkdir(parents=True)
    for file in (words, elsewhere):
        file.write_text("cat\n")
    origins = {"words": origin_of(words, folder), "other": origin_of(elsewhere, folder)}
    write_run(folder, replace(RUN, started_from=origins))
    assert read_run(folder).file("words").samefile(words)

    moved = tmp_path / "copy"
    shutil.move(tmp_path / "runs", moved)
    run = read_run(moved / "stage1")
    assert run.file("words").samefile(moved / "words.txt")
    assert run.file("other").samefile(elsewhere)
    elsewhere.unlink()
    with pytest.raises(FileNotFoundError, match=r"needs its other, which was .*elsewhere.txt' and"):
        run.file("other")
    (moved / "words.txt").write_text("dog\n")
    with pytest.raises(ValueError, match=r"words.txt' has changed since the run"):
        run.file("words")
    with pytest.raises(ValueError, match="says nothing of 'overlap', but of 'words', 'other'"):
        run.file("overlap")
    with pytest.raises(FileNotFoundError, match=r"checkpoint.pth': there are no weights"):
        _ = run.weights_file


def test_the_same_run_goes_on_wherever_its_files_lie():
    moved = {name: replace(o, path="/new/place") for name, o in RUN.started_from.items()}
    split = split_one_side("the same half", CLASSES, with_masks=("cat",))
    now = replace(RUN, started_from=moved, split=split, results={}, seconds=3.0)
    check_same_run(RUN, now, source="out")


OTHER_RUNS = {
    "system": ({"system": "other"}, r"system is 'other', but the run in 'out' was .* 'toy'"),
    "classes": ({"class_names": ("cat", "cow")}, r"class 1 is 'cow', but .* with 'dog'"),
    "fewer": ({"class_names": ("cat", "dog")}, r"class 2 is None, but .* with 'horse'"),
    "split": (
        {"split": split_one_side("s", CLASSES, with_masks=("dog",))},
        r"split 's' has other .*had 'cat': more 'dog', no more 'cat'\. Undo the change",
    ),
    "no split": ({"split": None}, r"split None has .*: no more 'cat'\."),
    "settings": ({"settings": {"model": {"size": 32}}}, r"model\.size is 32, but .* with 64"),
    "data": (
        {"started_from": RUN.started_from | {"annotations": Origin("ff", "new.json")}},
        r"annotations 'new.json' is not what the run in 'out' was started from",
    ),
    "nothing": ({"started_from": {}}, r"annotations 'nothing' is not"),
}


@pytest.mark.parametrize(("changes", "message"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_another_run_does_not_go_on(changes, message):
    with pytest.raises(ValueError, match=message):
        check_same_run(RUN, replace(RUN, **changes), source="out")


def test_settings_that_change_nothing_are_free():
    now = replace(RUN, settings={"model": RUN.settings["model"], "training": {"iterations": 20}})
    with pytest.raises(ValueError, match=r"training\.iterations is 20"):
        check_same_run(RUN, now, source="out", free=("model", "training.iter"))
    for free in ("training", "training.iterations"):
        check_same_run(RUN, now, source="out", free=(free,))
    check_same_run(RUN, now, source="out", settings=False)


def test_a_checkpoint_says_which_run_it_is_of():
    state = json.loads(json.dumps(RunState(RUN, source="x").state_dict()))
    RunState(replace(RUN, seconds=9.0), source="x").load_state_dict(state)
    split = split_one_side("s", CLASSES, with_masks=("dog",))
    other = RunState(replace(RUN, split=split, settings={}), source="c.pth", settings=False)
    with pytest.raises(ValueError, match=r"run in 'c.pth' was started with, which had 'cat'"):
        other.load_state_dict(state)
