"""Training, resuming, evaluation and prediction of LarvSeg."""

import logging
import runpy
import sys
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor

from maskx.detectron2 import Trainer, evaluate
from maskx.detectron2.datasets import class_names_of
from maskx.systems.larvseg.detectron2.data import model_class_table

TOOL = str(Path(__file__).parents[2] / "tools" / "train_net.py")
KEYS = "MODEL.MASKX.LARVSEG."


def train(cfg, *, resume=False, kind=Trainer):
    torch.manual_seed(0)
    trainer = kind(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def state_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Interrupted(Trainer):
    def before_step(self):
        super().before_step()
        if self.iter == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make_joint_cfg, tmp_path, num_workers):
    opts = ("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 5, "DATASETS.TEST", ())
    opts = (*opts, "DATALOADER.NUM_WORKERS", num_workers, "DATASETS.MASKX.JOINT.MIN_CROP", 0.5)
    whole = train(make_joint_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "whole")))
    cfg = make_joint_cfg(*opts)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, kind=Interrupted)
    resumed = Trainer(cfg)
    before = state_of(resumed)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 5
    bank = resumed.model.network.bank
    assert bank.counts.sum() > 0  # of the checkpoint
    assert not torch.equal(bank.means, before[next(n for n in before if "bank.means" in n)])
    resumed.train()
    assert resumed.iter == 8
    assert_equal(state_of(resumed), state_of(whole))


def test_it_trains_and_evaluates_base_and_novel_classes(make_joint_cfg, caplog):
    cfg = make_joint_cfg("SOLVER.MAX_ITER", 4)
    seen = []

    def record(model, inputs, losses):
        if model.training:
            seen.append((inputs[0], losses))

    with caplog.at_level(logging.INFO, logger="maskx"):
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.model.register_forward_hook(record)
        trainer.train()
    for samples, losses in seen:
        is_mask = samples[0]["data_set"] == "maskx_scenes_sparse_stuff_train"
        assert (losses["loss_pixels"] > 0) == is_mask
        assert (losses["loss_labels"] > 0) == (not is_mask)
    assert [samples[0]["data_set"] for samples, _ in seen] == [*cfg.DATASETS.TRAIN] * 2
    latest = trainer.storage.latest()
    for name in ("mIoU", "mIoU_base", "mIoU_novel"):
        assert 0 <= latest[f"sem_seg/{name}"][0] <= 100
    assert "9 classes, 7 base and 2 novel (split scenes_half)" in caplog.text
    for result in (evaluate(cfg, resume=True), trainer.test(cfg, trainer.model.eval())):
        assert result["sem_seg"]["mIoU"] == pytest.approx(latest["sem_seg/mIoU"][0], nan_ok=True)


def test_classes_that_no_image_shows_are_never_predicted(make_joint_cfg):
    """Those are known from the records, not from the class lists."""
    things = class_names_of("maskx_scenes_sparse_train")
    records = [
        {**record, "image_labels": [label + 1 for label in labels], "annotations": []}
        for record in DatasetCatalog.get("maskx_scenes_sparse_train")
        if (labels := [label for label in record["image_labels"] if label != 2])
    ]
    DatasetCatalog.register("few", lambda: records)
    MetadataCatalog.get("few").thing_classes = ["unicorn", *things]
    # The table of the model has another order than that of the training data.
    table = ("maskx_scenes_sparse_stuff_val", "few")
    cfg = make_joint_cfg("DATASETS.TRAIN", ("few",), KEYS + "CLASSES_OF", table)
    cfg.DATASETS.MASKX.JOINT.SUPERVISION = ("image",)
    trainer = train(cfg)
    names = model_class_table(cfg).names
    trained = trainer.model.network.classifier.trained
    assert names[-1] == "unicorn"
    assert [names[i] for i in trained.nonzero()[:, 0].tolist()] == [*things[:2], things[3]]
    samples = next(iter(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    output = trainer.model.eval()(samples)[0]
    assert trained[output["class_indices"][output["sem_seg"]]].all()


def test_the_model_predicts_where_its_data_are_not(make_joint_cfg):
    """DefaultPredictor needs the class lists alone; ADE20K is not there."""
    cfg = make_joint_cfg("DATASETS.TEST", ())
    train(cfg)
    image = cv2.imread(DatasetCatalog.get("maskx_scenes_sparse_stuff_val")[0]["file_name"])
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    cfg.TEST.MASKX.CLASSES_OF = "maskx_scenes_sparse_train"
    output = DefaultPredictor(cfg)(image)
    assert output["sem_seg"].shape == image.shape[:2]
    assert output["sem_seg"].max() < 4
    ade = make_joint_cfg(KEYS + "CLASSES_OF", ("maskx_ade20k_150_train",), "DATASETS.TRAIN", ())
    ade.DATASETS.TEST = ()
    ade.DATASETS.MASKX.JOINT.SUPERVISION = ()
    assert DefaultPredictor(ade).model.network.num_classes == 150


def test_the_tool_trains_resumes_and_evaluates(make_joint_cfg, monkeypatch, tmp_path):
    path = tmp_path / "config.yaml"
    cfg = make_joint_cfg("SOLVER.CHECKPOINT_PERIOD", 2)
    path.write_text(cfg.dump())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL, "--config-file", str(path), *arguments])
        runpy.run_path(TOOL, run_name="__main__")

    run()
    last = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    assert last.read_text() == "model_final.pth"
    first = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    assert first["iteration"] == 1
    run("--resume", "SOLVER.MAX_ITER", "4")
    second = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    assert second["iteration"] == 3
    counts = [
        sum(value.sum() for name, value in content["model"].items() if "bank.counts" in name)
        for content in (first, second)
    ]
    assert 0 < counts[0] <= counts[1]
    run("--eval-only", "MODEL.WEIGHTS", str(Path(cfg.OUTPUT_DIR) / "model_final.pth"))
    with pytest.raises(SystemExit, match=r"^error: DATASETS\.MASKX\.JOINT\.RATIOS has 1 entries"):
        run("DATASETS.MASKX.JOINT.RATIOS", "(4,)")


def test_a_training_from_other_classes_takes_rows_by_name(make_joint_cfg, tmp_path):
    one = ("DATASETS.TRAIN", ("maskx_scenes_sparse_train",), "DATASETS.TEST", ())
    first = train(make_joint_cfg(*one, "DATASETS.MASKX.JOINT.SUPERVISION", ("image",)))
    weights = str(Path(first.cfg.OUTPUT_DIR) / "model_final.pth")
    opts = ("DATASETS.TEST", (), "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path / "second"))
    second = Trainer(make_joint_cfg(*opts))
    second.resume_or_load(resume=False)
    rows = [t.model.network.classifier.class_embeddings for t in (first, second)]
    names = [model_class_table(t.cfg).names for t in (first, second)]
    place = [names[1].index(name) for name in names[0]]
    assert torch.equal(rows[1][place], rows[0])
    # To go on with the first training, its classes are needed.
    with pytest.raises(ValueError, match=r"has 4 classes, which are not the 9 of the model"):
        Trainer(make_joint_cfg("DATASETS.TEST", ())).resume_or_load(resume=True)
