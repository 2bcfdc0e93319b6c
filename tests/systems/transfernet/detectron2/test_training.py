"""Training, resuming, evaluation and prediction of TransferNet, and the chain of its stages."""

import json
import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from settings import pairs

from maskx.core.digests import sha256_of
from maskx.data.scenes.generator import generate_scenes
from maskx.detectron2 import (
    MaskXTransferLabelEvaluator,
    MaskXTransferSemSegEvaluator,
    Trainer,
    evaluate,
    get_cfg,
    register_coco,
)
from maskx.detectron2.trainer import check_config
from maskx.engine.runs import read_run, write_run
from maskx.systems.transfernet.detectron2.stages import check_transfer_stages, transfer_stages

ROOT = Path(__file__).parents[4]
TOOL = str(ROOT / "tools" / "train_transfernet.py")
KEYS = "MODEL.MASKX.TRANSFERNET."
GT = ("TEST.MASKX.GT_LABELS", True)
TRAINED = (KEYS + "FREEZE_ENCODER", False, *GT)  # needs no weights to start from
FILES = {
    "stage0": "quick_schedules/stage0_classifier_scenes_cpu.yaml",
    "stage1": "quick_schedules/stage1_attention_scenes_cpu.yaml",
    "stage2": "quick_schedules/stage2_joint_scenes_cpu.yaml",
    "source": "quick_schedules/stage1_baseline_scenes_cpu.yaml",
    "target": "quick_schedules/stage2_baseline_scenes_cpu.yaml",
}


@pytest.fixture
def write_config(make_transfer_cfg, sparse_scenes, tmp_path):
    """Write a tiny config file, data included: ``write_config(<key of FILES>, *opts)``."""

    def write(name, *opts):
        register = [["tiny_sparse", *map(str, sparse_scenes)]]
        test = ("DATASETS.TEST", ()) if name in ("stage1", "source") else ()
        cfg = make_transfer_cfg("DATASETS.MASKX.REGISTER", register, *test, *opts, file=FILES[name])
        path = tmp_path / f"{name}_{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(cfg.dump())
        return path

    return write


def train(cfg, *, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def weights_of(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("method", ["transfernet", "baseline", "decoupled"])
def test_it_trains_evaluates_and_predicts(method, make_transfer_cfg, tiny_sparse):
    stage = "joint" if method == "transfernet" else "source"
    cfg = make_transfer_cfg(*TRAINED, KEYS + "METHOD", method, KEYS + "STAGE", stage)
    latest = train(cfg).storage.latest()
    assert latest["loss_labels"][0] > 0
    assert latest["loss_masks"][0] > 0
    assert latest["sem_seg/mIoU"][0] >= 0
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    for result in (evaluate(cfg), evaluate(cfg, resume=True)):
        assert result["sem_seg"]["mIoU"] == pytest.approx(latest["sem_seg/mIoU"][0])
    predictor = DefaultPredictor(cfg)
    predictor.model.has_classifier.fill_(True)
    image = cv2.imread(DatasetCatalog.get(tiny_sparse)[0]["file_name"])[:40]
    output = predictor(image)
    assert output["sem_seg"].shape == image.shape[:2]
    assert output["image_labels_prob"].shape == (4,)
    assert output["masks_prob"].shape == (len(output["image_labels"]), *image.shape[:2])


def test_an_interrupted_run_goes_on_where_it_stopped(make_transfer_cfg, tiny_sparse):
    cfg = make_transfer_cfg(*TRAINED, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 4)

    class Interrupted(Trainer):
        def before_step(self):
            super().before_step()
            if self.iter == 2:
                raise KeyboardInterrupt

    trainer = Interrupted(cfg)
    trainer.resume_or_load(resume=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stopped = {n: p.clone() for n, p in trainer.model.state_dict().items()}
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert all(torch.equal(p, stopped[n]) for n, p in trainer.model.state_dict().items())
    trainer.train()
    assert trainer.iter == 4


def test_it_learns_the_masks_of_its_images(make_transfer_cfg, tiny_sparse):
    cfg = make_transfer_cfg(
        *TRAINED,
        "SOLVER.MAX_ITER",
        60,
        "SOLVER.BASE_LR",
        0.005,
        "INPUT.MASKX.SIZE",
        64,
        "MODEL.MASKX.IN_FEATURE",
        "layer3",
        KEYS + "NUM_FACTORS",
        64,
        "SOLVER.IMS_PER_BATCH",
        8,
        "INPUT.RANDOM_FLIP",
        "none",
    )
    latest = train(cfg).storage.latest()
    assert latest["sem_seg/mIoU_A"][0] > 30


def test_the_architecture_chooses_the_evaluator(make_transfer_cfg, tiny_sparse):
    for name, evaluator in (
        ("stage0", MaskXTransferLabelEvaluator),
        ("stage2", MaskXTransferSemSegEvaluator),
    ):
        built = Trainer.build_evaluator(make_transfer_cfg(file=FILES[name]), tiny_sparse)
        assert type(built) is evaluator
        assert built._groups == {"all": (0, 1, 2, 3), "A": (0, 2), "B": (1, 3)}


def test_the_model_predicts_only_classes_of_the_data_set(make_transfer_cfg, tmp_path):
    """Source and target are two data sets; on the target no source class is predicted."""
    for name, seed, keep in (("source", 0, (1, 2)), ("target", 1, (3, 4))):
        scenes = generate_scenes(
            tmp_path / name, count=8, size=64, num_categories=4, seed=seed, style="sparse"
        )
        content = json.loads(Path(scenes).read_text())
        shown = {a["image_id"] for a in content["annotations"] if a["category_id"] in keep}
        hidden = {a["image_id"] for a in content["annotations"] if a["category_id"] not in keep}
        images = [i for i in content["images"] if i["id"] in shown - hidden]
        content["categories"] = [c for c in content["categories"] if c["id"] in keep]
        content["annotations"] = [
            a for a in content["annotations"] if a["image_id"] in shown - hidden
        ]
        Path(scenes).write_text(json.dumps(content | {"images": images}))
        register_coco(name, scenes, tmp_path / name)
    cfg = make_transfer_cfg(
        *pairs(
            {
                "DATASETS.TRAIN": ("source", "target"),
                "DATASETS.TEST": ("target",),
                "DATASETS.MASKX.SPLIT": "all",
            }
        )
    )
    check_config(cfg)
    model = build_model(cfg).eval()
    model.has_classifier.fill_(True)
    with torch.no_grad():
        model.classifier.classifier.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 9.0]))  # of source
        model.network.decoder.predictor.bias.copy_(torch.tensor([0.0, 9.0]))
    predicted = set()
    with torch.no_grad():
        for batch in Trainer.build_test_loader(cfg, "target"):
            predicted |= set(model(batch)[0]["sem_seg"].unique().tolist())
    assert predicted <= {1, 2}
    result = Trainer.test(cfg, model)["sem_seg"]
    assert np.isnan(result["mIoU_A"])
    assert result["mIoU_B"] > 0
    latest = train(make_transfer_cfg(*TRAINED, *cfg_pairs(cfg))).storage.latest()
    assert latest["loss_masks"][0] > 0


def cfg_pairs(cfg):
    keys = cfg.DATASETS
    return pairs(
        {
            "DATASETS.TRAIN": keys.TRAIN,
            "DATASETS.TEST": keys.TEST,
            "DATASETS.MASKX.SPLIT": keys.MASKX.SPLIT,
        }
    )


# --- what is to be loaded


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (GT, r"FREEZE_ENCODER is True, but what is to stay as it was loaded is random.*is empty"),
        (
            (*TRAINED, KEYS + "FREEZE_ATTENTION", True),
            r"FREEZE_ATTENTION is True, but .*MODEL\.WEIGHTS '' is empty.*train_transfernet\.py",
        ),
        (
            (KEYS + "FREEZE_ENCODER", False),
            r"neither gives a trained classifier.*tiny_sparse after the training.*GT_LABELS True",
        ),
    ],
)
def test_random_weights_are_not_kept_frozen(make_transfer_cfg, tiny_sparse, opts, words):
    trainer = Trainer(make_transfer_cfg(*opts))
    with pytest.raises(ValueError, match=words):
        trainer.resume_or_load(resume=False)


def test_weights_that_lack_what_is_frozen_are_refused(make_transfer_cfg, tiny_sparse, tmp_path):
    state = build_model(make_transfer_cfg()).state_dict()
    path = tmp_path / "part.pth"
    for part, opts in (("encoder", GT), ("attention", (*TRAINED, KEYS + "FREEZE_ATTENTION", True))):
        kept = {n: v for n, v in state.items() if not n.startswith(f"network.{part}.")}
        torch.save({"model": kept}, path)
        trainer = Trainer(make_transfer_cfg(*opts, "MODEL.WEIGHTS", str(path)))
        with pytest.raises(ValueError, match=rf"part\.pth' lacks network\.{part}\."):
            trainer.resume_or_load(resume=False)


@pytest.mark.parametrize(
    ("opts", "error", "words"),
    [
        (
            (KEYS + "CLASSIFIER_WEIGHTS", "gone.pth"),
            FileNotFoundError,
            r"CLASSIFIER_WEIGHTS 'gone\.pth': there is no such file\. Train the classifier of sta",
        ),
        (
            (KEYS + "STAGE", "attention"),
            ValueError,
            r"'attention', which makes no masks.*TEST \(\)",
        ),
        (
            ("SOLVER.MASKX.BACKBONE_LR_FACTOR", 0.1),
            ValueError,
            r"BACKBONE_LR_FACTOR is 0\.1, but the backbone of MaskXTransferNet is frozen",
        ),
    ],
)
def test_keys_without_sense_are_named(make_transfer_cfg, tiny_sparse, opts, error, words):
    with pytest.raises(error, match=words):
        check_config(make_transfer_cfg(*opts))


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("MODEL.META_ARCHITECTURE", "MaskYNet"), r"META_ARCHITECTURE is 'MaskYNet', which is not"),
        (("MODEL.BACKBONE.NAME", "MaskYNet"), r"BACKBONE\.NAME is 'MaskYNet', .*: .*MaskXVGG16"),
    ],
)
def test_names_that_nobody_registered_are_said(write_config, tmp_path, opts, words):
    paths = [write_config("stage0"), write_config("stage1"), write_config("stage2", *opts)]
    with pytest.raises(ValueError, match=words):
        check_transfer_stages(transfer_stages(*paths, output=tmp_path / "out"))
    with pytest.raises(ValueError, match=words):
        check_config(load(paths[2]))


def load(path):
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def test_imagenet_weights_are_for_the_encoder_alone(make_transfer_cfg, downloads):
    on = ("MODEL.BACKBONE.NAME", "MaskXTimm", "MODEL.MASKX.BACKBONE.PRETRAINED", True)
    build_model(make_transfer_cfg(*on, "MODEL.MASKX.BACKBONE.NAME", "resnet18"))
    assert downloads == ["resnet18"]


def test_a_checkpoint_knows_its_classes(make_transfer_cfg, tiny_sparse, sparse_scenes, tmp_path):
    content = json.loads(Path(sparse_scenes[0]).read_text())
    split = tmp_path / "split.txt"
    split.write_text("\n".join(c["name"] for c in content["categories"][::2]))
    opts = ("DATASETS.MASKX.SPLIT", str(split), "SOLVER.MAX_ITER", 1)
    cfg = make_transfer_cfg(*TRAINED, *opts)
    train(cfg)
    first, second = content["categories"][:2]
    first["id"], second["id"] = second["id"], first["id"]
    path = Path(sparse_scenes[1]) / "renamed.json"
    path.write_text(json.dumps(content))
    register_coco("renamed", path, sparse_scenes[1])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("renamed",)
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    with pytest.raises(ValueError, match=r"Class 0 is '.*' in the checkpoint, but '.*' by the d"):
        evaluate(cfg)


# --- the chain of stages


def test_the_tool_trains_the_stages_and_none_twice(write_config, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    configs = {name: str(write_config(name)) for name in FILES}
    command = ["--output", str(output)]
    for name in ("stage0", "stage1", "stage2"):
        command += [f"--{name}", configs[name]]

    def run_here(*args):
        monkeypatch.setattr(sys, "argv", [TOOL, *args])
        runpy.run_path(TOOL, run_name="__main__")
        return capsys.readouterr().out

    run_here(*command, "--stage2-opts", "SOLVER.MAX_ITER", "1")
    assert read_run(output / "stage1").settings["SOLVER"]["MAX_ITER"] == 2
    assert read_run(output / "stage2").settings["SOLVER"]["MAX_ITER"] == 1
    command += ["--stage2-opts", "SOLVER.MAX_ITER", "1"]
    assert "image_labels/mAP" in read_run(output / "stage0").results
    assert read_run(output / "stage1").results == {}
    assert "sem_seg/mIoU_B" in read_run(output / "stage2").results
    states = [weights_of(output / name)["model"] for name in ("stage0", "stage1", "stage2")]
    del states[0]["_extra_state"]  # what else is said of it is not what is said of the others
    for state in states[1:]:
        assert state["has_classifier"]
        for name, value in states[0].items():
            kept = name.removeprefix("classifier.backbone.")
            assert torch.equal(state[name], value)
            if f"network.encoder.{kept}" in state:
                assert torch.equal(state[f"network.encoder.{kept}"], value)
    moved = [n for n, v in states[1].items() if not torch.equal(v, states[2][n])]
    assert {n.split(".")[1] for n in moved} == {
        "attention",
        "classifier",
        "decoder",
        "decoder_norm",
    }

    assert run_here(*command).count("finished before, not run again") == 3
    baseline = ["--stage0-weights", str(output / "stage0" / "model_final.pth")]
    baseline += ["--stage1", configs["source"], "--stage2", configs["target"]]
    run_here(*baseline, "--output", str(tmp_path / "other"))
    states = [weights_of(tmp_path / "other" / name)["model"] for name in ("stage1", "stage2")]
    moved = {n for n, v in states[0].items() if not torch.equal(v, states[1][n])}
    assert {n.split(".")[1] for n in moved} == {"encoder", "classifier"}
    with pytest.raises(SystemExit, match=r"^error: SEED is 7, but the run in"):
        run_here(*command, "SEED", "7")
    final = output / "stage0" / "model_final.pth"
    content = final.read_bytes()
    key = "MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS"
    assert read_run(output / "stage1").started_from[key].sha256 == sha256_of(final)
    torch.save(weights_of(output / "stage0") | {"iteration": 77}, final)
    words = r"CLASSIFIER_WEIGHTS '.*' is not what the run in '.*stage1' was started from"
    with pytest.raises(SystemExit, match=words):
        run_here(*command)
    final.write_bytes(content)
    shutil.copytree(output, tmp_path / "moved")
    moved_to = [str(tmp_path / "moved") if word == str(output) else word for word in command]
    assert run_here(*moved_to).count("finished before, not run again") == 3
    write_run(output / "stage0", replace(read_run(output / "stage0"), results=None))
    with pytest.raises(SystemExit, match=r"^error: '.*stage1' is finished, but the stage before"):
        run_here(*command)


@pytest.mark.parametrize(
    ("names", "opts", "error", "words"),
    [
        (("stage1", "stage1", "stage2"), (), ValueError, r"config of stage0.*MaskXTransferClassif"),
        (("stage0", "stage2", "stage2"), (), ValueError, r"STAGE is 'joint'.*stage1\. It must be"),
        (
            ("stage0", "stage1", "stage0"),
            (),
            ValueError,
            r"of stage2\. It must be MaskXTransferN",
        ),
        (
            ("stage0", "stage1", "target"),
            (),
            ValueError,
            r"METHOD is 'baseline' in .*the stage",
        ),
        (
            ("stage0", "stage1", "stage2"),
            ("MODEL.WEIGHTS", "x.pth"),
            ValueError,
            r"MODEL\.WEIGHTS is given as an option.*--stage1-weights take trained stages",
        ),
        (
            ("gone.pth", "stage1", "stage2"),
            (),
            FileNotFoundError,
            r"stage0-weights '.*gone\.pth'",
        ),
    ],
)
def test_stages_that_do_not_fit_are_named_before_any_runs(
    write_config, tmp_path, names, opts, error, words
):
    paths = [name and (write_config(name) if name in FILES else Path(name)) for name in names]
    with pytest.raises(error, match=words):
        check_transfer_stages(transfer_stages(*paths, output=tmp_path / "out", opts=opts))


@pytest.mark.parametrize(
    ("both", "second", "words"),
    [
        ((), ("MODEL.MASKX.BACKBONE.OUTPUT_STRIDE", 4), r"OUTPUT_STRIDE is 4 in .*but 8 in"),
        ((), (KEYS + "NUM_FACTORS", 16), r"NUM_FACTORS is 16 in .*stage2.*but 8 in .*stage1"),
        (
            (KEYS + "ATTENTION", "fc"),
            ("INPUT.MASKX.SIZE", 48),
            r"SIZE is 48 in .*stage2.*but 32 in .*stage1",
        ),
    ],
)
def test_stages_with_other_networks_are_named(write_config, tmp_path, both, second, words):
    paths = [write_config("stage0"), write_config("stage1", *both)]
    paths.append(write_config("stage2", *both, *second))
    with pytest.raises(ValueError, match=words):
        check_transfer_stages(transfer_stages(*paths, output=tmp_path / "out"))


def test_two_processes_train_together(run_two_processes):
    run_two_processes(Path(__file__).with_name("two_transfer_processes.py"))
