import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import studies.random_splits
import yaml
from studies.random_splits import (
    BASELINE,
    PAPER_SPLITS,
    TRANSFER,
    RandomSplits,
    count_masks,
    format_gains,
    read_results,
    relative_gains,
    write_summary,
)

from maskx.data.scenes.generator import THING_CATEGORIES
from maskx.data.splits import resolve_split
from maskx.detectron2 import register_coco
from maskx.detectron2.stagewise import Stage, run_stage
from maskx.engine.runs import read_run

ROOT = Path(__file__).parents[4]
TOOL = str(ROOT / "tools" / "random_splits.py")
CONFIGS = ROOT / "configs" / "MaskX"


@pytest.fixture
def protocol(make_cfg, scenes, tmp_path):
    """Arguments of RandomSplits: two splits of four tiny categories, not run."""
    register = ("DATASETS.MASKX.REGISTER", [["tiny_train", str(scenes[0]), str(scenes[1])]])
    paths = {}
    for name, file in (
        ("stage1", "stage1/faster_rcnn_R_50_FPN_1x.yaml"),
        (BASELINE, "random_splits/baseline_R_50_FPN_1x.yaml"),
        (TRANSFER, "random_splits/clsbox_2_layer_R_50_FPN_1x.yaml"),
    ):
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(make_cfg(*register, file=file).dump())
    names = [c["name"] for c in json.loads(scenes[0].read_text())["categories"]]
    for split, with_masks in (("one", names[:1]), ("three", names[:3])):
        (tmp_path / f"{split}.txt").write_text("\n".join(with_masks))
    return {
        "splits": [str(tmp_path / "one.txt"), str(tmp_path / "three.txt")],
        "configs": {method: paths[method] for method in (BASELINE, TRANSFER)},
        "detector": Stage(paths["stage1"], tmp_path / "out" / "stage1"),
        "output": tmp_path / "out",
    }


def write_result(output, split, method, ap_b, *, size=20, mean=100.0, **changes):
    folder = output / split / method
    folder.mkdir(parents=True)
    result = {
        "split": split,
        "method": method,
        "num_with_masks": size,
        "mean_masks": mean,
        "AP_A": 30.0,
        "AP_B": ap_b,
        "seconds": 1.0,
        "weights": "w",
        "classes_with_masks": [],
        "config": {"SEED": 1, "OUTPUT_DIR": split},
    }
    (folder / "result.json").write_text(json.dumps(result | changes))


def test_the_25_splits_of_the_paper_are_the_default():
    assert len(set(PAPER_SPLITS)) == 25
    assert {name.rsplit("_", 1)[0] for name in PAPER_SPLITS} == {
        f"coco_random_{size}" for size in (20, 30, 40, 50, 60)
    }


def test_an_interrupted_protocol_goes_on_and_no_run_is_made_twice(protocol, monkeypatch, scenes):
    made, told = [], []

    def watched(stage, **kwargs):
        if len(made) == 3 and not told[1:]:
            raise FloatingPointError("Loss became infinite or NaN")
        made.append(stage.output.relative_to(protocol["output"]).as_posix())
        return run_stage(stage, **kwargs)

    monkeypatch.setattr(studies.random_splits, "run_stage", watched)
    runs = RandomSplits(**protocol)
    with pytest.raises(FloatingPointError):
        runs.run(report=told.append)
    assert told == [
        "0 of 4 runs have a result.",
        "Stopped in the run three baseline. The same command goes on there.",
    ]
    assert made == ["stage1", "one/baseline", "one/transfer"]
    RandomSplits(**protocol).run(report=told.append)
    assert told[2] == "2 of 4 runs have a result."
    assert made[3:] == ["stage1", "three/baseline", "three/transfer"]
    RandomSplits(**protocol).run(report=told.append)
    assert told[3:] == ["4 of 4 runs have a result."]
    assert len(made) == 6

    results = {(r["split"], r["method"]): r for r in read_results(protocol["output"])}
    assert len(results) == 4
    assert len({r["weights"] for r in results.values()}) == 1
    content = json.loads(scenes[0].read_text())
    per_category = {
        c["name"]: sum(
            a["category_id"] == c["id"] and a["iscrowd"] == 0 for a in content["annotations"]
        )
        for c in content["categories"]
    }
    for (split, _), result in results.items():
        with_masks = Path(protocol["output"].parent / f"{split}.txt").read_text().split("\n")
        assert result["classes_with_masks"] == with_masks
        assert result["num_with_masks"] == len(with_masks)
        assert result["mean_masks"] == pytest.approx(
            sum(per_category[name] for name in with_masks) / len(with_masks)
        )
        assert result["seconds"] > 0
        assert result["config"]["MODEL"]["MASKX"]["FREEZE_DETECTOR"]
    table = write_summary(protocol["output"])
    for split in ("one", "three"):  # random detectors find nothing
        assert f"left out: {split}: AP on B is 0.0 (baseline)" in table


def test_the_tool_runs_the_protocol_and_plots(protocol, tmp_path, monkeypatch, capsys):
    output = protocol["output"]
    arguments = (
        TOOL,
        "--stage1",
        protocol["detector"].config_file,
        "--baseline-config",
        protocol["configs"][BASELINE],
        "--transfer-config",
        protocol["configs"][TRANSFER],
        "--splits",
        protocol["splits"][0],
        "--output",
        output,
        "--stage1-opts",
        "SOLVER.MAX_ITER",
        "3",
        "SOLVER.MAX_ITER",
        "1",
    )
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    runpy.run_path(TOOL, run_name="__main__")
    printed = capsys.readouterr()
    assert "2/2" in printed.err  # the progress bar
    assert "left out: one: AP on B is 0.0" in printed.out
    assert read_run(output / "stage1").settings["SOLVER"]["MAX_ITER"] == 3
    assert read_run(output / "one" / BASELINE).settings["SOLVER"]["MAX_ITER"] == 1
    assert not (output / "random_splits.png").exists()

    faked = tmp_path / "faked"
    for method, ap in ((BASELINE, 10.0), (TRANSFER, 12.0)):
        write_result(faked, "a", method, ap)
    monkeypatch.setattr(sys, "argv", [TOOL, "--plot-only", "--output", str(faked)])
    runpy.run_path(TOOL, run_name="__main__")
    assert "+20.0" in capsys.readouterr().out
    assert (faked / "random_splits.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", [TOOL, "--plot-only", "--output", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^error: '.*none' holds no result"):
        runpy.run_path(TOOL, run_name="__main__")


def test_gains_are_those_computed_by_hand(tmp_path):
    write_result(tmp_path, "b", BASELINE, 20.0, size=30, mean=10.5)
    write_result(tmp_path, "b", TRANSFER, 26.0, size=30, mean=10.5)
    write_result(tmp_path, "a", BASELINE, 8.0, mean=7.0)
    write_result(tmp_path, "a", TRANSFER, 6.0, mean=7.0, AP_A=31.0)
    gains, left_out = relative_gains(read_results(tmp_path))
    assert left_out == {}
    assert [(g["split"], g["num_with_masks"], g["mean_masks"]) for g in gains] == [
        ("a", 20, 7.0),
        ("b", 30, 10.5),
    ]
    assert [g["relative_gain"] for g in gains] == pytest.approx([-25.0, 30.0])
    assert gains[0] | {"relative_gain": 0} == {
        "split": "a",
        "num_with_masks": 20,
        "mean_masks": 7.0,
        "baseline_AP_B": 8.0,
        "transfer_AP_B": 6.0,
        "baseline_AP_A": 30.0,
        "transfer_AP_A": 31.0,
        "relative_gain": 0,
    }
    rows = [line.split() for line in format_gains(gains, left_out).splitlines()[2:]]
    assert rows == [
        ["a", "20", "7.0", "8.0", "6.0", "30.0", "31.0", "-25.0"],
        ["b", "30", "10.5", "20.0", "26.0", "30.0", "30.0", "+30.0"],
    ]


def test_the_figure_shows_the_points_of_the_table(tmp_path, monkeypatch):
    for split, size, mean, ap in (("a", 20, 7.0, 12.0), ("b", 30, 9.0, 15.0), ("z", 40, 3.0, 0.0)):
        write_result(tmp_path, split, BASELINE, 10.0 if ap else 0.0, size=size, mean=mean)
        write_result(tmp_path, split, TRANSFER, ap, size=size, mean=mean)
    drawn = {}
    monkeypatch.setattr(
        studies.random_splits,
        "plot_relative_gains",
        lambda path, **points: drawn.update(points, path=path),
    )
    table = write_summary(tmp_path)
    assert drawn == {
        "path": tmp_path / "random_splits.png",
        "mean_masks": [7.0, 9.0],
        "relative_gains": pytest.approx([20.0, 50.0]),
        "num_with_masks": [20, 30],
    }
    written = json.loads((tmp_path / "random_splits.json").read_text())
    assert [g["relative_gain"] for g in written["gains"]] == pytest.approx([20.0, 50.0])
    assert written["left_out"].keys() == {"z"}
    assert table.endswith(f"figure: {tmp_path / 'random_splits.png'}")


@pytest.mark.parametrize(("baseline", "words"), [(0.0, "is 0.0"), (None, "is NaN")])
def test_a_split_without_a_baseline_is_left_out_and_named(tmp_path, baseline, words):
    write_result(tmp_path, "good", BASELINE, 10.0)
    write_result(tmp_path, "good", TRANSFER, 11.0)
    write_result(tmp_path, "bad", BASELINE, baseline)
    write_result(tmp_path, "bad", TRANSFER, 5.0)
    write_result(tmp_path, "half", BASELINE, 10.0)
    table = write_summary(tmp_path)
    assert f"left out: bad: AP on B {words} (baseline) and 5.0 (transfer)" in table
    assert "left out: half: no result of transfer" in table
    assert "good" in table
    assert (tmp_path / "random_splits.png").exists()


def test_without_any_gain_there_is_no_figure_not_even_an_old_one(tmp_path):
    write_result(tmp_path, "bad", BASELINE, 0.0)
    write_result(tmp_path, "bad", TRANSFER, 5.0)
    (tmp_path / "random_splits.png").write_bytes(b"old")
    assert write_summary(tmp_path).endswith("no figure: no split has a relative gain")
    assert not (tmp_path / "random_splits.png").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"SEED": 2}}, r"b/baseline/result\.json cannot be compared: SEED is 1 in the"),
        ({"weights": "v"}, r"cannot be compared: the content of MODEL\.WEIGHTS"),
    ],
)
def test_results_of_different_configurations_are_not_mixed(tmp_path, changes, words):
    write_result(tmp_path, "a", BASELINE, 10.0)
    write_result(tmp_path, "b", BASELINE, 10.0, **changes)
    with pytest.raises(ValueError, match=words):
        read_results(tmp_path)


def test_both_methods_must_stand_on_one_detector(tmp_path):
    write_result(tmp_path, "a", BASELINE, 10.0)
    write_result(tmp_path, "a", TRANSFER, 11.0, weights="v")
    with pytest.raises(ValueError, match=r"the content of MODEL\.WEIGHTS"):
        read_results(tmp_path)


def test_crowds_and_boxes_without_masks_do_not_count(write_coco):
    square = [[2, 2, 20, 2, 20, 20, 2, 20]]
    box = {"bbox": [2, 2, 18, 18]}
    path, root = write_coco(
        [
            {"category_id": 10, "segmentation": square, **box},
            {"category_id": 10, "segmentation": square, **box},
            {"category_id": 10, **box},
            {"category_id": 20, "segmentation": square, "iscrowd": 1, **box},
            {"category_id": 30, "segmentation": square, "iscrowd": 0, **box},
        ]
    )
    register_coco("counted", path, root)
    assert count_masks(["counted"], 4) == [2, 0, 1, 0]
    assert count_masks(["counted", "counted"], 4) == [4, 0, 2, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"opts": ("DATASETS.MASKX.SPLIT", "all")}, r"Use --splits instead"),
        ({"splits": ["all"]}, r"'all' leaves no category without masks"),
        ({"splits": ["none.txt"]}, r"'none\.txt' is neither a named category split nor a file"),
        ({"splits": ["x/one.txt", "one.txt"]}, r"2 splits 'one', whose runs would share"),
        ({"opts": ("DATASETS.TEST", ("tiny_train", "tiny_train"))}, r"DATASETS\.TEST is \('tiny"),
        ({"opts": ("MODEL.MASKX.FREEZE_DETECTOR", False)}, r"FREEZE_DETECTOR is False"),
    ],
)
def test_a_protocol_that_cannot_work_is_refused_before_the_first_run(protocol, change, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        RandomSplits(**protocol | change)
    assert not protocol["output"].exists()


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_both_methods_need_the_same_data(protocol, key):
    for method, path in protocol["configs"].items():
        config = yaml.safe_load(path.read_text())
        data = config["DATASETS"]
        data["MASKX"]["REGISTER"].append(["other", *data["MASKX"]["REGISTER"][0][1:]])
        if method == TRANSFER:
            data[key] = ["other"]
        path.write_text(yaml.safe_dump(config))
    with pytest.raises(
        ValueError, match=rf"DATASETS\.{key} is \('tiny_train',\) in .*\('other',\)"
    ):
        RandomSplits(**protocol)


def test_the_split_files_of_the_scenes_are_the_draws_they_say():
    class_names = [category.name for category in THING_CATEGORIES[:40]]
    random_state = np.random.RandomState(3)
    folder = CONFIGS / "quick_schedules" / "scenes_splits"
    expected = {}
    for trial in (1, 2):
        for size in (10, 20, 30):
            drawn = random_state.choice(40, size, replace=False)
            expected[f"scenes_random_{size}_{trial}.txt"] = sorted(drawn.tolist())
    found = {
        path.name: list(resolve_split(path, class_names).indices_with_masks)
        for path in folder.iterdir()
    }
    assert found == expected
