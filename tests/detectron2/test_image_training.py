"""Training, resuming, evaluation and prediction of image classifiers and segmentation networks."""

import json
import os
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from settings import pairs

from maskx.data.label_maps import label_map_of_instances, write_label_map
from maskx.detectron2 import (
    MaskXImageLabelEvaluator,
    MaskXSemSegEvaluator,
    Trainer,
    evaluate,
    register_coco,
)

TOOL = str(Path(__file__).parents[2] / "tools" / "train_net.py")


@pytest.fixture
def register_opt(scenes):
    return ("DATASETS.MASKX.REGISTER", [["tiny_train", str(scenes[0]), str(scenes[1])]])


@pytest.fixture(params=["classifier", "deeplab"])
def kind(request, make_classifier_cfg, make_deeplab_cfg):
    """Function that makes a configuration, and the result that is looked at."""
    if request.param == "classifier":
        return make_classifier_cfg, "image_labels/mAP"
    return make_deeplab_cfg, "sem_seg/mIoU"


def test_the_script_trains_resumes_and_evaluates(
    make_deeplab_cfg, register_opt, monkeypatch, tmp_path
):
    output, config_file = tmp_path / "output", tmp_path / "tiny.yaml"
    config_file.write_text(make_deeplab_cfg(*register_opt).dump())

    def run(*args):
        monkeypatch.setattr(sys, "argv", [TOOL, *args])
        runpy.run_path(TOOL, run_name="__main__")

    run("--config-file", str(config_file))
    run("--resume", "--config-file", str(config_file), "SOLVER.MAX_ITER", "3")
    assert "Starting training from iteration 2" in (output / "log.txt").read_text()
    weights = ("MODEL.WEIGHTS", str(output / "model_final.pth"))
    run("--eval-only", "--config-file", str(config_file), *weights)
    log = (output / "evaluation" / "log.txt").read_text()
    assert "copypaste: mIoU,mIoU_A,mIoU_B,background,pixel_accuracy" in log


def test_it_trains_evaluates_and_predicts(kind, register_opt):
    make_cfg, result = kind
    cfg = make_cfg(*register_opt)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    latest = trainer.storage.latest()  # with the evaluation at the end of the training
    assert latest["total_loss"][0] > 0  # Detectron2 logs a single loss under this name only
    assert latest[result][0] >= 0

    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    task, metric = result.split("/")
    assert evaluate(cfg)[task][metric] == pytest.approx(latest[result][0])
    assert evaluate(make_cfg(*register_opt), resume=True)[task][metric] == latest[result][0]
    image = cv2.imread(DatasetCatalog.get("tiny_train")[0]["file_name"])
    output = DefaultPredictor(cfg)(image)
    if task == "sem_seg":
        assert output["sem_seg"].shape == image.shape[:2]
    else:
        assert output["image_labels_prob"].shape == (4,)


def test_an_interrupted_run_goes_on_where_it_stopped(kind, register_opt):
    cfg = kind[0](*register_opt, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 4)

    class Interrupted(Trainer):
        def before_step(self):
            super().before_step()
            if self.iter == 2:
                raise KeyboardInterrupt

    torch.manual_seed(7)  # of the initial weights
    trainer = Interrupted(cfg)
    trainer.resume_or_load(resume=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stopped = {n: p.clone() for n, p in trainer.model.state_dict().items()}

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert all(torch.equal(p, stopped[n]) for n, p in trainer.model.state_dict().items())
    moments = next(iter(trainer.optimizer.state.values()))  # of Adam
    assert (moments["step"], moments["exp_avg"].abs().sum() > 0) == (2, True)
    trainer.train()
    assert trainer.iter == 4
    resumed = trainer.model.state_dict()
    torch.manual_seed(7)
    whole = Trainer(
        kind[0](*register_opt, "SOLVER.MAX_ITER", 4, "OUTPUT_DIR", cfg.OUTPUT_DIR + "2")
    )
    whole.resume_or_load(resume=False)
    whole.train()
    assert all(torch.equal(p, resumed[n]) for n, p in whole.model.state_dict().items())


def test_an_image_classifier_learns_its_images(make_classifier_cfg, register_opt):
    schedule = ("SOLVER.MAX_ITER", 40, "SOLVER.BASE_LR", 0.005, "SOLVER.IMS_PER_BATCH", 6)
    trainer = Trainer(make_classifier_cfg(*register_opt, *schedule, "SOLVER.STEPS", (30,)))
    trainer.train()
    assert trainer.storage.latest()["image_labels/mAP"][0] > 95


def test_a_segmentation_network_learns_proxy_masks_and_is_scored_on_true_ones(
    make_deeplab_cfg, scenes, tmp_path
):
    """The proxy masks are in a file of their own, under the name that the configurations have."""
    content = json.loads(scenes[0].read_text())
    register_coco("tiny_train", *scenes)
    for record, image in zip(DatasetCatalog.get("tiny_train"), content["images"], strict=True):
        del image["stuff_file_name"]  # in the folder of the scenes
        image["label_map_file_name"] = f"{record['image_id']}.png"
        label_map = label_map_of_instances(record, 4)
        label_map[:4] = 255
        path = tmp_path / image["label_map_file_name"]
        write_label_map(path, label_map, num_classes=4)
    (tmp_path / "proxy.json").write_text(json.dumps(content | {"annotations": []}))
    cfg = make_deeplab_cfg(
        "DATASETS.MASKX.REGISTER",
        [["maskx_proxy_train", str(tmp_path / "proxy.json"), str(scenes[1])]],
        *pairs(
            {
                "DATASETS.TRAIN": ("maskx_proxy_train",),
                "MODEL.MASKX.LARGE_FOV.HIDDEN_CHANNELS": 32,
                "SOLVER.MAX_ITER": 60,
                "SOLVER.BASE_LR": 0.005,
                "SOLVER.IMS_PER_BATCH": 6,
                "SOLVER.STEPS": (50,),
                "INPUT.MASKX.SIZE": 64,
                "TEST.MASKX.SIZES": (64,),
            }
        ),
    )
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer.storage.latest()["sem_seg/mIoU"][0] > 25  # background alone: 18


def test_the_architecture_chooses_the_evaluator(
    make_classifier_cfg, make_deeplab_cfg, register_opt, tiny_train
):
    half = ("DATASETS.MASKX.SPLIT", "scenes_half")
    for make_cfg, evaluator in (
        (make_classifier_cfg, MaskXImageLabelEvaluator),
        (make_deeplab_cfg, MaskXSemSegEvaluator),
    ):
        built = Trainer.build_evaluator(make_cfg(*register_opt, *half), tiny_train)
        assert type(built) is evaluator
        assert built._groups == {"all": (0, 1, 2, 3), "A": (0, 2), "B": (1, 3)}


def test_evaluation_loads_no_imagenet_weights(
    make_classifier_cfg, register_opt, downloads, tmp_path
):
    on = ("MODEL.BACKBONE.NAME", "MaskXTimm", "MODEL.MASKX.BACKBONE.PRETRAINED", True)
    on += ("MODEL.MASKX.BACKBONE.NAME", "resnet18")
    cfg = make_classifier_cfg(*register_opt, *on, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 9)
    trainer = Trainer(cfg)
    assert downloads == ["resnet18"]
    trainer.checkpointer.save("model_final")
    evaluate(cfg, resume=True)  # MODEL.WEIGHTS is empty
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    evaluate(cfg)
    DefaultPredictor(cfg)(np.zeros((8, 8, 3), np.uint8))
    assert downloads == ["resnet18"]
    assert cfg.MODEL.MASKX.BACKBONE.PRETRAINED


@pytest.mark.parametrize(
    ("opts", "error", "words"),
    [
        (
            ("MODEL.MASKX.NUM_CLASSES", 20),
            ValueError,
            r"^MODEL\.MASKX\.NUM_CLASSES is 20, but data set 'tiny_train' has 4 classes\. Set MO",
        ),
        (("SOLVER.MASKX.OPTIMIZER", "lamb"), ValueError, r"OPTIMIZER is 'lamb'"),
        (
            ("DATASETS.TRAIN", ("maskx_proxy_train",)),
            ValueError,
            r"no data set 'maskx_proxy_train'.*DATASETS\.MASKX\.REGISTER",
        ),
        (
            ("MODEL.MASKX.FREEZE_DETECTOR", True),
            ValueError,
            r"FREEZE_DETECTOR is True, but MaskX",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_built(
    kind, register_opt, opts, error, words, monkeypatch
):
    monkeypatch.setattr(Trainer, "build_model", None)
    with pytest.raises(error, match=words):
        Trainer(kind[0](*register_opt, *opts))


def test_an_image_classifier_needs_labels_of_all_classes(
    make_classifier_cfg, make_deeplab_cfg, scenes
):
    """A segmentation network does not: where something may be, nothing is background."""
    names = [c["name"] for c in json.loads(scenes[0].read_text())["categories"]]
    register_coco("partly", *scenes, class_names=[*names, "zebra"])
    opts = ("MODEL.MASKX.NUM_CLASSES", 5, "DATASETS.TRAIN", ("partly",), "DATASETS.TEST", ())
    with pytest.raises(ValueError, match=r"'partly' annotates 4 of 5 classes.*taken for absent"):
        Trainer(make_classifier_cfg(*opts))
    batch = next(iter(Trainer.build_train_loader(make_deeplab_cfg(*opts))))
    assert all((sample["sem_seg"] != 0).all() for sample in batch)


def test_weights_of_another_number_of_classes_are_not_evaluated(kind, register_opt, tmp_path):
    path = str(tmp_path / "model.pth")
    model = build_model(kind[0]("MODEL.MASKX.NUM_CLASSES", 3))
    torch.save({"model": model.state_dict()}, path)
    with pytest.raises(ValueError, match=r"lacks 2 of the model's weights.*bias"):
        evaluate(kind[0](*register_opt, "MODEL.WEIGHTS", path))


def test_two_processes_train_and_evaluate_together(run_two_processes):
    run_two_processes("two_image_processes.py")
