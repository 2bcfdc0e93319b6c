import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from settings import pairs

import maskx.detectron2.stagewise
from maskx.data.scenes.generator import generate_scenes
from maskx.detectron2 import Trainer
from maskx.detectron2.stagewise import Stage, check_stages, run_stage, stage_is_finished
from maskx.engine.runs import read_run, write_run

ROOT = Path(__file__).parents[2]
FIRST = "stage1/faster_rcnn_R_50_FPN_1x.yaml"
SECOND = "voc2nonvoc/sw/clsbox_2_layer_R_50_FPN_1x.yaml"


@pytest.fixture
def write_config(make_cfg, scenes, tmp_path):
    """Write a tiny config file, data included: ``write_config(<under configs/MaskX>, *opts)``."""

    def write(file, *opts):
        register = [["tiny_train", str(scenes[0]), str(scenes[1])]]
        cfg = make_cfg("DATASETS.MASKX.REGISTER", register, *opts, file=file)
        path = tmp_path / f"{Path(file).stem}_{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(cfg.dump())
        return path

    return write


@pytest.fixture
def stages(write_config, tmp_path):
    """Both stages, not run."""
    first = Stage(write_config(FIRST), tmp_path / "out" / "stage1")
    second = Stage(write_config(SECOND), tmp_path / "out" / "stage2", (), first.final_weights)
    return first, second


def weights_of(stage):
    return torch.load(stage.final_weights, weights_only=True)["model"]


TOOL = str(ROOT / "tools" / "train_stagewise.py")


def test_the_tool_trains_both_stages_and_neither_twice(write_config, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    command = [
        "--stage1",
        str(write_config(FIRST)),
        "--stage2",
        str(write_config(SECOND)),
        "--output",
        str(output),
        "--stage2-opts",
        "SOLVER.MAX_ITER",
        "3",
        "SEED",
        "5",
    ]

    def run_here(*args):
        monkeypatch.setattr(sys, "argv", [TOOL, *args])
        runpy.run_path(TOOL, run_name="__main__")
        return capsys.readouterr().out

    run_here(*command)
    first, second = (read_run(output / name) for name in ("stage1", "stage2"))
    assert first.results.keys() >= {"bbox/AP", "bbox_A/AP"}
    assert "segm/AP" not in first.results
    assert second.results.keys() >= {"segm_A/AP", "segm_B/AP", "bbox/AP"}
    assert second.seconds > 0
    assert [r.settings["SOLVER"]["MAX_ITER"] for r in (first, second)] == [2, 3]
    assert [r.settings["SEED"] for r in (first, second)] == [5, 5]
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}

    log = run_here(*command)
    assert log.count("finished before, not run again") == 2
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()} == written

    # Another second stage on the same detector.
    run_here(
        "--stage1-weights",
        str(output / "stage1" / "model_final.pth"),
        "--stage2",
        command[3],
        "--output",
        str(tmp_path / "other"),
        "SEED",
        "6",
    )
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["stage2"]
    other = read_run(tmp_path / "other" / "stage2")
    assert other.started_from["MODEL.WEIGHTS"].sha256 == second.started_from["MODEL.WEIGHTS"].sha256

    with pytest.raises(SystemExit, match=rf"^error: SEED is 7, but the run in '{output}/stage1'"):
        run_here(*command[:-1], "7")


def test_stage_2_changes_the_mask_branch_alone(stages):
    check_stages(*stages)
    for stage in stages:
        run_stage(stage)
    first, second = map(weights_of, stages)
    branch = {name for name in second if name.startswith("roi_heads.mask_head.")}
    assert branch
    assert second.keys() - branch == first.keys()
    assert all(torch.equal(second[name], first[name]) for name in first)


def test_each_stage_logs_once_and_into_its_own_folder(stages, capsys):
    for stage in stages:
        run_stage(stage)
    assert capsys.readouterr().out.count("Starting training from iteration 0") == 2
    logs = [(stage.output / "log.txt").read_text() for stage in stages]
    for log, stage in zip(logs, stages, strict=True):
        assert log.count("Starting training from iteration 0") == 1
        assert log.count("Saving checkpoint to") == 1
        assert f"Saving checkpoint to {stage.final_weights}" in log


def interrupt_at(monkeypatch, iteration):
    """Let all training end with a KeyboardInterrupt before an iteration."""

    class Interrupted(Trainer):
        def before_step(self):
            super().before_step()
            if self.iter == iteration:
                raise KeyboardInterrupt

    monkeypatch.setattr(maskx.detectron2.stagewise, "Trainer", Interrupted)


def test_an_interrupted_stage_goes_on_where_it_stopped(stages, monkeypatch):
    first, second = stages
    run_stage(first)
    opts = ("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 4)
    second = Stage(second.config_file, second.output, opts, second.weights)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_stage(second)
    assert not stage_is_finished(second)
    earlier = read_run(second.output)
    assert earlier.results is None
    assert earlier.seconds > 0
    write_run(second.output, replace(earlier, seconds=1000.0))
    with pytest.raises(ValueError, match=r"interrupted run\. Add --resume"):
        run_stage(second, resume=False)
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR is 0\.5, but .*started with 0\.001"):
        run_stage(replace(second, opts=(*opts, "SOLVER.BASE_LR", 0.5)))

    starts = []

    class Watched(Trainer):
        def before_train(self):
            super().before_train()
            starts.append(self.start_iter)

    monkeypatch.setattr(maskx.detectron2.stagewise, "Trainer", Watched)
    record = run_stage(second)
    assert starts == [2]
    assert 1000 < record.seconds < 1100
    assert stage_is_finished(second)
    assert run_stage(second, resume=False) == record
    assert starts == [2]


def test_a_run_that_saved_nothing_may_start_again_otherwise(stages, monkeypatch):
    first, _ = stages
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run_stage(first)
    other = Stage(first.config_file, first.output, ("SOLVER.MAX_ITER", 1))
    assert run_stage(other, resume=False).settings["SOLVER"]["MAX_ITER"] == 1


def test_a_stage_may_move_and_change_what_does_not_matter(stages, tmp_path):
    first, second = stages
    run_stage(first)
    run_stage(second)
    moved = tmp_path / "moved"
    shutil.copytree(first.output.parent, moved)
    same = Stage(
        second.config_file,
        moved / "stage2",
        ("DATALOADER.NUM_WORKERS", 1),
        moved / "stage1" / "model_final.pth",
    )
    assert stage_is_finished(same)


def test_other_content_behind_the_same_names_is_refused(stages, scenes, tmp_path):
    first, second = stages
    run_stage(first)
    names = [c["name"] for c in json.loads(scenes[0].read_text())["categories"]]
    split = tmp_path / "split.txt"
    split.write_text(names[0])
    opts = ("DATASETS.MASKX.SPLIT", str(split))
    second = Stage(second.config_file, second.output, opts, second.weights)
    run_stage(second)
    split.write_text(names[1])
    with pytest.raises(ValueError, match=r"The split '.*split\.txt' has other categories"):
        stage_is_finished(second)
    split.write_text(names[0])
    assert stage_is_finished(second)
    state = torch.load(first.final_weights, weights_only=True)
    torch.save(state | {"iteration": 77}, first.final_weights)
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS '.*model_final\.pth' is not what"):
        stage_is_finished(second)


def test_checkpoints_of_another_tool_are_not_mixed_in(stages):
    first, _ = stages
    first.output.mkdir(parents=True)
    (first.output / "model_final.pth").touch()
    with pytest.raises(ValueError, match=r"holds checkpoints without run\.json"):
        run_stage(first)


@pytest.mark.parametrize(
    ("first_opts", "second_opts", "words"),
    [
        ((), ("MODEL.MASKX.FREEZE_DETECTOR", False), r"MODEL\.MASKX\.FREEZE_DETECTOR is False in"),
        ((), ("MODEL.MASK_ON", False), r"MODEL\.MASK_ON is False in .*stage 2"),
        (("MODEL.MASK_ON", True), (), r"MODEL\.MASK_ON is True in .*stage 1"),
        ((), ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), r"Set MODEL\.META_ARCHITECTURE"),
        ((), ("MODEL.FPN.OUT_CHANNELS", 8), r"MODEL\.FPN\.OUT_CHANNELS is 8 in .*but 16 in"),
        ((), ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]), r"MODEL\.PIXEL_STD is \[1\.0"),
        ((), ("MODEL.ROI_HEADS.NUM_CLASSES", 5), r"NUM_CLASSES is 5, but data set 'tiny_train'"),
        ((), ("MODEL.MASKX.TRANSFER.LAYERS", 4), r"4"),  # found by building the model
        ((), ("DATASETS.MASKX.SPLIT", "none"), r"'none' is neither a named category split"),
        ((), ("MODEL.FPNX", 1), r"Non-existent key: MODEL\.FPNX"),
        ((), ("SOLVER.MAX_ITER",), r"odd length"),
        ((), ("SOLVER.MAX_ITER", "many"), r"SOLVER\.MAX_ITER"),
        ((), ("OUTPUT_DIR", "x"), r"Use --output instead"),
        ((), ("MODEL.WEIGHTS", "x"), r"MODEL\.WEIGHTS is given for stage 2, .*Remove it"),
    ],
)
def test_stages_that_do_not_fit_are_refused_before_the_first(
    stages, first_opts, second_opts, words
):
    first, second = stages
    first = Stage(first.config_file, first.output, first_opts)
    second = Stage(second.config_file, second.output, second_opts, first.final_weights)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        check_stages(first, second)
    assert not first.output.parent.exists()


def test_initial_weights_given_for_both_stages_are_those_of_the_first(stages):
    first, second = stages
    opts = ("MODEL.WEIGHTS", "")
    second = Stage(second.config_file, second.output, opts, first.final_weights)
    check_stages(Stage(first.config_file, first.output, opts), second)
    assert Path(second.cfg.MODEL.WEIGHTS) == first.final_weights


def test_a_second_stage_is_no_first_stage(stages):
    _, second = stages
    with pytest.raises(ValueError, match="exchange --stage1 and --stage2"):
        check_stages(Stage(second.config_file, second.output), second)


def test_both_stages_need_the_same_classes(stages, write_config, tmp_path):
    first, second = stages
    path = generate_scenes(tmp_path / "other", count=2, size=64, num_categories=4, seed=0)
    content = json.loads(path.read_text())
    for category, name in zip(content["categories"], ("a", "b", "c", "d"), strict=True):
        category["name"] = name
    renamed = tmp_path / "other" / "renamed.json"
    renamed.write_text(json.dumps(content))
    other = write_config(
        SECOND,
        "DATASETS.MASKX.REGISTER",
        [["other", str(renamed), str(renamed.parent)]],
        *pairs(
            {
                "DATASETS.TRAIN": ("other",),
                "DATASETS.TEST": ("other",),
                "DATASETS.MASKX.SPLIT": "all",
            }
        ),
    )
    with pytest.raises(ValueError, match=r"Class 0 is '.*' in tiny_train, .*but 'a' in other"):
        check_stages(first, Stage(other, second.output, (), second.weights))


def test_given_weights_must_exist_and_fit(stages, tmp_path):
    first, second = stages
    with pytest.raises(FileNotFoundError, match=r"--stage1-weights .*there is no such file"):
        check_stages(first.final_weights, second)
    run_stage(first)
    check_stages(first.final_weights, second)
    smaller = Stage(second.config_file, second.output, ("MODEL.FPN.OUT_CHANNELS", 8))
    with pytest.raises(ValueError, match=r"OUT_CHANNELS is 8 in .*but 16 in .*config\.yaml"):
        check_stages(first.final_weights, smaller)
    twice = Stage(second.config_file, second.output, ("MODEL.WEIGHTS", "x"), first.final_weights)
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is given for stage 2"):
        check_stages(first.final_weights, twice)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'none\.yaml': there is no such config file"):
        _ = Stage(Path("none.yaml"), tmp_path).cfg
