"""Run folders of Detectron2: what they say, what may go on with them, and predictors of them."""

import json
import os
import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from full_disk import full_disk

import maskx
from maskx.core.archives import find_damage, read_archive
from maskx.core.digests import sha256_of
from maskx.detectron2 import Trainer, evaluate, get_cfg, setup
from maskx.detectron2.checkpointer import FINAL_NAME
from maskx.detectron2.runs import as_dict, to_instances
from maskx.engine.checkpoints import locked
from maskx.engine.completion import CompletionOptions, complete
from maskx.engine.model_export import export_model
from maskx.engine.runs import read_run

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write_config(make_cfg, scenes, tmp_path):
    """Write a tiny config file of Mask^X: ``write_config(*opts)``."""

    def write(*opts):
        register = ("DATASETS.MASKX.REGISTER", [["tiny_train", str(scenes[0]), str(scenes[1])]])
        cfg = make_cfg(*register, "OUTPUT_DIR", str(tmp_path / "out"), *opts)
        path = tmp_path / f"config_{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(cfg.dump())
        return path

    return write


def train(config, *opts, resume=False):
    arguments = Namespace(config_file=str(config), opts=list(opts), resume=resume)
    trainer = Trainer(setup(arguments))
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def test_a_run_says_what_it_is_and_becomes_a_predictor_anywhere(write_config, scenes, tmp_path):
    config = write_config()
    trainer = train(config)
    folder = tmp_path / "out"
    run = read_run(folder)
    assert (run.system, run.host, run.weights) == ("maskx", "detectron2", FINAL_NAME)
    assert run.settings["SOLVER"]["MAX_ITER"] == 2
    assert run.started_from["tiny_train.json_file"].sha256 == sha256_of(scenes[0])
    assert run.results.keys() >= {"segm_A/AP", "segm_B/AP", "bbox/AP"}
    assert run.seconds > 0
    names = [category["name"] for category in json.loads(scenes[0].read_text())["categories"]]
    assert list(run.class_names) == names
    assert set(run.split.with_masks) < set(names)
    saved = read_archive(folder / FINAL_NAME)
    assert saved["maskx_run"]["split"]["with_masks"] == list(run.split.with_masks)

    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(folder / FINAL_NAME)
    file = next(scenes[1].rglob("*.png"))
    pixels = cv2.imread(str(file))
    expected = DefaultPredictor(cfg)(pixels)["instances"]
    moved = shutil.move(folder, tmp_path / "moved")
    predictor = maskx.open_run(moved, device="cpu")
    found = predictor(pixels, order="BGR")
    assert len(found.names) == len(expected) > 0
    assert np.allclose(found.boxes, expected.pred_boxes.tensor.numpy(), atol=1e-3)
    assert np.allclose(found.scores, expected.scores.numpy(), atol=1e-5)
    assert found.masks.shape == (len(expected), *pixels.shape[:2])
    assert np.array_equal(predictor(file).boxes, found.boxes)
    instances = to_instances(found)
    assert torch.equal(instances.pred_classes, expected.pred_classes)
    assert torch.allclose(instances.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3)
    assert instances.pred_masks.shape == found.masks.shape
    assert found.to_coco(1)[0].keys() >= {"image_id", "category_id", "bbox", "segmentation"}

    with pytest.raises(ValueError, match="cannot be exported: it is a detector of Detectron2"):
        export_model(predictor, tmp_path / "model.pt2")

    masks = predictor.masks_of_boxes(pixels, found.boxes, found.names, order="BGR").numpy()
    assert (masks ^ found.masks).mean() < 1e-3  # boxes go to the image of the network and back
    completed = complete(
        CompletionOptions(
            data=tuple(map(str, scenes)),
            output=tmp_path / "completed.json",
            run=moved,
            withhold="scenes_half",
            device="cpu",
        )
    )
    assert completed.masks
    assert {each.source for each in completed.masks} == {"maskx:moved"}
    assert {each.class_name for each in completed.masks} <= set(run.split.without_masks)
    assert completed.known == []  # A of its own training file


def test_an_evaluation_writes_nothing_into_the_configuration_of_a_run(
    write_config, scenes, tmp_path, caplog
):
    train(write_config())
    folder = tmp_path / "out"
    run, config = read_run(folder), (folder / "config.yaml").read_bytes()
    other = [name for name in run.class_names if name not in run.split.with_masks]
    split = tmp_path / "other.txt"
    split.write_text("\n".join(other))
    opts = ["DATASETS.MASKX.SPLIT", str(split), "MODEL.WEIGHTS", str(folder / FINAL_NAME)]
    arguments = Namespace(config_file=str(write_config()), opts=opts, eval_only=True)
    caplog.set_level("WARNING", "maskx")
    evaluate(setup(arguments))
    assert (folder / "config.yaml").read_bytes() == config
    assert read_run(folder) == run
    assert "other.txt" in (folder / "evaluation" / "config.yaml").read_text()
    warned = (folder / "evaluation" / "log.txt").read_text()
    assert f"The model learned masks of '{run.split.with_masks[0]}'" in warned


def test_a_run_goes_on_with_its_own_data_classes_and_masks_alone(write_config, scenes, tmp_path):
    config = write_config("SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0)
    train(config)
    folder = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    run = read_run(folder)
    split = tmp_path / "other.txt"
    split.write_text("\n".join(run.class_names[:1]))
    with pytest.raises(ValueError, match=r"The split '.*other\.txt' has other categories with"):
        train(config, "DATASETS.MASKX.SPLIT", str(split), resume=True)
    content = json.loads(scenes[0].read_text())
    content["annotations"].pop()
    changed = tmp_path / "train.json"
    changed.write_text(json.dumps(content))
    DatasetCatalog.remove("tiny_train")
    MetadataCatalog.remove("tiny_train")
    register = [["tiny_train", str(changed), str(scenes[1])]]
    with pytest.raises(ValueError, match=r"tiny_train\.json_file '.*' is not what the run in"):
        train(config, "DATASETS.MASKX.REGISTER", str(register), resume=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    DatasetCatalog.remove("tiny_train")
    MetadataCatalog.remove("tiny_train")
    trainer = train(config, "SOLVER.MAX_ITER", "3", resume=True)  # Detectron2 allows it
    assert trainer.start_iter == 2
    assert read_run(folder).settings["SOLVER"]["MAX_ITER"] == 3


@pytest.mark.parametrize("harm", ["empty", "cut", "flipped", "gone", "untagged"])
def test_a_final_checkpoint_that_is_damaged_is_made_again(write_config, tmp_path, harm):
    """The period divides the number of steps, as by default."""
    config = write_config("SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", ())
    train(config)
    folder = tmp_path / "out"
    final = folder / FINAL_NAME
    expected = read_archive(final)["model"]
    content = bytearray(final.read_bytes())
    if harm == "empty":
        final.write_bytes(b"")
    elif harm == "cut":
        final.write_bytes(content[: len(content) // 3])
    elif harm == "flipped":
        content[len(content) // 2] ^= 4
        final.write_bytes(content)
    elif harm == "gone":
        final.unlink()
    else:
        (folder / "last_checkpoint").write_bytes(b"")
    trainer = train(config, resume=True)
    assert trainer.start_iter == 2
    assert find_damage(final) is None
    found = read_archive(final)["model"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (folder / "last_checkpoint").read_text() == FINAL_NAME


def test_a_full_disk_loses_nothing(write_config, tmp_path):
    config = write_config("SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", ())
    message = r"model_0000000\.pth' could not be written"
    with full_disk(1_000_000), pytest.raises(OSError, match=message):
        train(config)
    assert not list((tmp_path / "out").glob("*.p*"))
    assert train(config, resume=True).start_iter == 0
    assert find_damage(tmp_path / "out" / FINAL_NAME) is None


def test_weights_that_are_not_finite_name_step_and_images(write_config, tmp_path, monkeypatch):
    run_step = Trainer.run_step

    def broken(self):
        run_step(self)
        if self.iter == 1:
            with torch.no_grad():
                self.model.roi_heads.box_predictor.bbox_pred.bias[0] = float("nan")

    monkeypatch.setattr(Trainer, "run_step", broken)
    config = write_config("SOLVER.CHECKPOINT_PERIOD", 1)
    message = r"1 of \d+ weights are not finite after iteration 1, .*bbox_pred.bias.*\.png'"
    with pytest.raises(FloatingPointError, match=message):
        train(config)
    folder = tmp_path / "out"
    assert (folder / "last_checkpoint").read_text() == "model_0000000.pth"
    assert not (folder / FINAL_NAME).exists()
    assert read_run(folder).results is None


def test_two_trainings_do_not_share_an_output_folder(write_config, tmp_path):
    config, folder = write_config(), tmp_path / "out"
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:  # holds the folder until it is killed
        with locked(folder):
            os.write(writer, b"held")
            time.sleep(60)
        os._exit(0)
    try:
        os.read(reader, 4)
        with pytest.raises(ValueError, match=r"Another process is at work in '.*out'"):
            train(config)
        assert not list(folder.glob("*.pth"))
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)


def test_a_run_of_other_keys_is_named(write_config, tmp_path):
    train(write_config("DATASETS.TEST", ()))
    path = tmp_path / "out" / "run.json"
    content = json.loads(path.read_text())
    content["settings"]["MODEL"]["MASKX"]["GONE"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"do not fit this version of maskx \(.*GONE"):
        maskx.open_run(tmp_path / "out")


@pytest.mark.parametrize(
    "system", ["ClassPatterns", "ConceptMask", "LarvSeg", "MaskX", "TransferNet"]
)
def test_the_settings_of_a_run_are_those_that_its_file_holds(system):
    """Two runs are compared by them, of which one may come from its config.yaml."""
    files = sorted((CONFIGS / system / "quick_schedules").glob("*.yaml"))
    assert files
    for file in files:
        cfg = get_cfg()
        cfg.merge_from_file(str(file))
        assert as_dict(cfg) == yaml.safe_load(cfg.dump())
