import argparse
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.mask_head import (
    KChannelTransferPredictor,
    MeanPredictor,
    count_predictor,
    head_cases,
    mlp_cases,
    predictor_cases,
    trunk_cases,
)
from torch.utils.flop_counter import FlopCounterMode

from maskx.systems.maskx_rcnn.mask_head import MaskXHead, TransferPredictor, mask_loss
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
CPU, META = torch.device("cpu"), torch.device("meta")
LIMIT = "limit: mean of the channels"
R, K, C, M, D = 5, 7, 6, 4, 3


def predictor_inputs():
    torch.manual_seed(0)
    detector = DetectorWeights(torch.randn(K, D), torch.randn(K, 4 * D))
    return torch.randn(R, C, M, M), torch.tensor([0, 6, 6, 3, 1]), detector


def count_operations(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_both_forms_of_the_predictor_compute_the_same():
    predictors = [
        form(out_channels=C, detector_channels=D)
        for form in (TransferPredictor, KChannelTransferPredictor)
    ]
    predictors[1].load_state_dict(predictors[0].state_dict())
    features, *inputs = predictor_inputs()
    logits, gradients = [], []
    for predictor in predictors:
        own = features.clone().requires_grad_()
        logits.append(predictor(own, *inputs))
        loss = mask_loss(logits[-1], torch.ones(R, M, M))
        gradients.append(torch.autograd.grad(loss, [own, *predictor.parameters()]))

    torch.testing.assert_close(*logits)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("form", [TransferPredictor, KChannelTransferPredictor])
def test_counted_operations_are_those_that_pytorch_counts(form):
    predictor = form(out_channels=C, detector_channels=D)
    counted = count_predictor(
        num_rois=R,
        num_classes=K,
        gathered=form is TransferPredictor,
        channels=C,
        mask_size=M,
        input_channels=5 * D,
        num_distinct=len(predictor_inputs()[1].unique()),
    )
    assert count_operations(lambda: predictor(*predictor_inputs())) == counted["operations"]


def test_learned_weights_cost_a_convolution_and_its_output():
    sizes = {"num_rois": R, "num_classes": K, "channels": C, "mask_size": M}
    counted = count_predictor(**sizes, gathered=False, transfer=False)
    convolution, outputs = torch.nn.Conv2d(C, K, 1), []
    operations = count_operations(lambda: outputs.append(convolution(torch.ones(R, C, M, M))))
    assert counted == {"operations": operations, "logit_bytes": outputs[0].nbytes}


def test_the_numbers_of_the_documentation():
    def rounded(**arguments):
        counted = count_predictor(num_rois=128, **arguments)
        return round(counted["operations"] / 1e9, 1), round(counted["logit_bytes"] / 1e6, 1)

    learned = {"gathered": False, "transfer": False}
    assert rounded(num_classes=80, **learned) == (4.1, 32.1)
    assert rounded(num_classes=1203, **learned) == (61.8, 482.9)
    assert {rounded(num_classes=k, gathered=True) for k in (80, 1203, 21841)} == {(0.4, 0.4)}

    with META:
        trunk = MaskXHead(in_channels=256, num_classes=80, predictor="class_agnostic")
        trunk.predictor = MeanPredictor()
        roi_features = torch.ones(128, 256, 14, 14)
        operations = count_operations(lambda: trunk(roi_features, None))
    assert round(operations / 1e9, 1) == 131.5


def test_the_k_channel_form_is_left_out_where_its_logits_are_too_large():
    with META:
        cases = list(predictor_cases(num_rois=100, classes=[80, 21841], device=META, backward=True))
        names = [case.name for case in cases]
    assert names == ["gathered, K = 80", "gathered, K = 21841", "K-channel, K = 80", LIMIT]
    assert [case.parameters for case in cases] == [1_376_768] * 3 + [0]


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_of_the_predictor_differentiates_only_when_asked(backward):
    cases = list(predictor_cases(num_rois=2, classes=[3], device=CPU, backward=backward))
    cases.pop().step()  # the limit has no operations that PyTorch counts
    for case, gathered in zip(cases, (True, False), strict=True):
        counted = count_predictor(num_rois=2, num_classes=3, gathered=gathered)
        assert case.settings["operations"] == counted["operations"]
        operations = count_operations(case.step)
        assert (operations > counted["operations"]) == backward


def test_heads_differ_in_their_predictor_only():
    with META:
        cases = list(head_cases(num_rois=2, classes=[80, 3000], device=META))
        operations = {case.name: count_operations(case.step) for case in cases}
    trunk, *others = cases
    assert trunk.name == "trunk alone"
    assert {case.parameters - trunk.parameters for case in others} == {1_376_768}  # those of T
    gathered = [operations[f"gathered, K = {k}"] for k in (80, 3000)]
    assert operations["trunk alone"] < gathered[0] == gathered[1]
    assert gathered[0] < operations["K-channel, K = 80"] < operations["K-channel, K = 3000"]


def test_mlp_branches_have_the_parameters_that_they_are_said_to_have():
    with META:
        cases = list(mlp_cases(num_rois=2, num_classes=80, device=META))
        for case in cases:
            case.step()
    assert [case.name for case in cases] == ["none", "bottleneck", "single_fc"]
    millions = [round((case.parameters - cases[0].parameters) / 1e6, 1) for case in cases]
    assert millions == [0.0, 4.9, 157.4]


def test_every_trunk_is_measured_against_that_of_mask_rcnn():
    with META:
        cases = list(trunk_cases(num_rois=2, num_classes=80, device=META))
        operations = [count_operations(case.step) for case in cases]
    assert [case.name for case in cases] == ["conv 4", "residual 4", "hourglass 2"]
    assert operations[0] == operations[1] < operations[2]


def test_a_step_leaves_no_gradients_behind(monkeypatch):
    made = []
    monkeypatch.setattr(
        "benchmarks.mask_head.num_parameters", lambda model: made.append(model) or 0
    )
    cases = predictor_cases(num_rois=2, classes=[3], device=CPU, backward=True)
    next(cases).step()
    assert all(parameter.grad is None for parameter in made[0].parameters())


@pytest.fixture
def run_tool(monkeypatch):
    """Run the tool in this process: ``run_tool(*arguments)``."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), "mask_head", *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")

    return run


def test_the_tool_writes_what_it_prints(run_tool, tmp_path, capsys):
    path = tmp_path / "folder" / "rows.json"
    options = ("--section", "predictor", "--rois", 2, "--classes", 3, "--repeats", 1)
    run_tool("--json", path, *options, "--device", "cpu")

    printed = capsys.readouterr().out
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["machine"]["torch"] == torch.__version__
    assert written["repeats"] == 1
    names = ["gathered, K = 3", "K-channel, K = 3", LIMIT]
    assert [row["name"] for row in written["rows"]] == names * 2
    for row in written["rows"]:
        assert row["table"] in printed
        assert f"{1e3 * row['seconds']:.2f}" in printed
        assert 0 < row["seconds_min"] <= row["seconds"]
        assert row["peak_bytes"] > 0
        assert row["settings"]["num_classes"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rois", 0), "argument --rois: must be a whole number of at least 1, got '0'"),
        (("--section", "nothing"), "invalid choice: 'nothing'"),
    ],
)
def test_the_tool_refuses_bad_options(run_tool, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        run_tool(*arguments)
    assert message in capsys.readouterr().err


def test_the_tool_says_that_there_is_no_gpu(run_tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: PyTorch finds no GPU"):
        run_tool("--device", "cuda")


def test_without_detectron2_the_tool_leaves_the_whole_model_out(run_tool, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "maskx.detectron2", raising=False)
    monkeypatch.delitem(sys.modules, "benchmarks.whole_model", raising=False)
    tables = runpy.run_path(str(TOOL))["mask_head_tables"]
    arguments = argparse.Namespace(section=None, rois=1, classes=[3])
    titles = [title for title, _ in tables(arguments, CPU)]
    assert len(titles) == 5
    assert "The section 'model' is left out: it needs Detectron2." in capsys.readouterr().out

    with pytest.raises(SystemExit, match=r"error: maskx\.detectron2 needs Detectron2"):
        run_tool("--section", "model", "--device", "cpu")


def test_whole_models_train_and_infer_beside_those_of_detectron2():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from benchmarks.whole_model import benchmark_cfg, model_cases

    config = TOOL.parents[1] / "configs/MaskX/quick_schedules/maskx_scenes_cpu.yaml"
    cfg = benchmark_cfg(config, num_classes=3, device=CPU)
    for case in model_cases(cfg, image_size=64):
        assert case.step().keys() >= {"loss_cls", "loss_mask"}
    for case in model_cases(cfg, image_size=64, training=False):
        (result,) = case.step()
        assert len(result["instances"].pred_masks) > 0  # else the mask head is not measured


def test_the_gpu_table_says_that_there_is_no_gpu(capsys):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    arguments = argparse.Namespace(rois=1, classes=[3], image_size=64)
    titles = [title for title, _ in runpy.run_path(str(TOOL))["gpu_tables"](arguments, CPU)]
    assert "There is no GPU" in capsys.readouterr().out
    assert [title.partition(",")[0] for title in titles] == 2 * ["predictor alone"] + 2 * [
        "whole model"
    ]
