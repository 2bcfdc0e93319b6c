"""Training, resuming, evaluation and prediction of LarvSeg."""

import json
import logging
import multiprocessing
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer
from exported import run_program, some_images

import maskx
from maskx.data.coco import load_coco
from maskx.data.images import read_image_sample
from maskx.data.scenes.generator import generate_scenes
from maskx.detectron2 import Trainer, evaluate
from maskx.detectron2.adapters import in_format
from maskx.detectron2.datasets import class_names_of
from maskx.engine.model_export import export_model
from maskx.systems.larvseg.detectron2 import model_class_names
from maskx.systems.larvseg.evaluation import evaluate_grouping
from maskx.systems.larvseg.samples import labelled_images

TOOL = str(Path(__file__).parents[4] / "tools" / "train_net.py")
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
    assert not torch.equal(bank.means, before["network.bank.means"])
    resumed.train()
    assert resumed.iter == 8
    assert_equal(state_of(resumed), state_of(whole))
    assert not multiprocessing.active_children()  # that read images


def test_it_trains_and_evaluates_base_and_novel_classes(make_joint_cfg, caplog):
    cfg = make_joint_cfg("SOLVER.MAX_ITER", 4)
    seen = []

    def record(model, inputs, losses):
        if model.training:
            seen.append(inputs[0])

    with caplog.at_level(logging.INFO, logger="maskx"):
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.model.register_forward_hook(record)
        trainer.train()
    assert [samples[0]["data_set"] for samples in seen] == [*cfg.DATASETS.TRAIN] * 2
    latest = trainer.storage.latest()
    for name in ("mIoU", "mIoU_base", "mIoU_novel"):
        assert 0 <= latest[f"sem_seg/{name}"][0] <= 100
    assert "9 classes, 7 base and 2 novel (split scenes_half)" in caplog.text
    for result in (evaluate(cfg, resume=True), trainer.test(cfg, trainer.model.eval())):
        assert result["sem_seg"]["mIoU"] == pytest.approx(latest["sem_seg/mIoU"][0], nan_ok=True)


@pytest.mark.parametrize("ratios", [(1, 1), (1, 3)])
def test_losses_are_logged_over_the_steps_that_have_them(make_joint_cfg, ratios):
    """The median over all steps would be zero where most steps lack a loss."""
    cfg = make_joint_cfg("SOLVER.MAX_ITER", 8, "DATASETS.MASKX.JOINT.RATIOS", ratios)
    cfg.merge_from_list(["DATASETS.TEST", ()])
    trainer = train(cfg)
    storage, num_pixels = trainer.storage, 8 * ratios[0] // sum(ratios)
    for name, count in (("loss_pixels", num_pixels), ("loss_labels", 8 - num_pixels)):
        values = [value for value, _ in storage.history(name).values()]
        assert len(values) == count
        assert min(values) > 0
    with_hint = storage.latest_with_smoothing_hint(20)
    assert with_hint["loss_pixels"][0] > 0
    totals = [value for value, _ in storage.history("total_loss").values()]
    assert len(totals) == 8
    assert min(totals) > 0


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
    names = model_class_names(cfg)
    trained = trainer.model.network.classifier.trained
    assert names[-1] == "unicorn"
    assert [names[i] for i in trained.nonzero()[:, 0].tolist()] == [*things[:2], things[3]]
    samples = next(iter(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    output = trainer.model.eval()(samples)[0]
    assert trained[output["class_indices"][output["sem_seg"] - 1]].all()


def test_the_model_predicts_where_its_data_are_not(make_joint_cfg):
    """DefaultPredictor needs the class lists alone; ADE20K is not there."""
    cfg = make_joint_cfg("DATASETS.TEST", ())
    train(cfg)
    image = cv2.imread(DatasetCatalog.get("maskx_scenes_sparse_stuff_val")[0]["file_name"])
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    cfg.TEST.MASKX.CLASSES_OF = "maskx_scenes_sparse_train"
    output = DefaultPredictor(cfg)(image)
    assert output["sem_seg"].shape == image.shape[:2]
    assert 1 <= output["sem_seg"].min() <= output["sem_seg"].max() <= 4
    ade = make_joint_cfg(KEYS + "CLASSES_OF", ("maskx_ade20k_150_train",), "DATASETS.TRAIN", ())
    ade.DATASETS.TEST = ()
    assert DefaultPredictor(ade).model.network.num_classes == 150


def test_the_model_predicts_from_its_checkpoint_alone(make_joint_cfg):
    """Without any data set: the checkpoint names the classes."""
    cfg = make_joint_cfg("DATASETS.TEST", (), "INPUT.MIN_SIZE_TEST", 0)
    trainer = train(cfg)
    names = model_class_names(cfg)
    image = cv2.imread(DatasetCatalog.get("maskx_scenes_sparse_stuff_val")[0]["file_name"])
    for name in [name for name in DatasetCatalog.list() if name.startswith("maskx_")]:
        DatasetCatalog.remove(name)
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    cfg.DATASETS.TRAIN = ()
    predictor = DefaultPredictor(cfg)
    assert predictor.model.class_names == names
    rgb = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)
    (expected,) = trainer.model.eval()([{"image": rgb}])
    assert torch.equal(predictor(image)["sem_seg"], expected["sem_seg"])
    # The labels are those of a Visualizer with a name for each, and one for the background.
    metadata = Metadata().set(stuff_classes=["background", *names])
    drawn = Visualizer(image[:, :, ::-1], metadata).draw_sem_seg(expected["sem_seg"].cpu())
    assert drawn.get_image().shape == image.shape
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match=r"so the model has no classes.* MODEL\.WEIGHTS"):
        DefaultPredictor(cfg)


def test_a_visualizer_draws_results_with_the_metadata_of_the_data_set(make_joint_cfg):
    cfg = make_joint_cfg()
    name = cfg.DATASETS.TEST[0]
    (sample,) = next(iter(Trainer.build_test_loader(cfg, name)))
    (result,) = Trainer.build_model(cfg).eval()([sample])
    label_map, metadata = result["sem_seg"], MetadataCatalog.get(name)
    assert metadata.stuff_classes[1:] == class_names_of(name)
    colors = {tuple(color) for color in metadata.stuff_colors}
    assert len(colors) == len(metadata.stuff_colors) == 1 + len(class_names_of(name))
    image = np.zeros((64, 64, 3), np.uint8)
    visualizer = Visualizer(image, metadata)
    drawn, texts = visualizer.draw_sem_seg(label_map, alpha=1).get_image(), set()
    for text in visualizer.output.ax.texts:
        texts.add(text.get_text())
    shown = {metadata.stuff_classes[label] for label in label_map.unique().tolist()}
    assert texts == shown
    largest = label_map.flatten().mode().values.item()
    inside = drawn[label_map == largest].tolist()
    assert metadata.stuff_colors[largest] in inside


def test_a_copied_run_folder_opens_without_its_data_sets(make_joint_cfg, tmp_path):
    """The checkpoint names the classes; results are of all of them, whatever a test chose from."""
    choose = ("TEST.MASKX.CLASSES_OF", "maskx_scenes_sparse_train")
    choose = (*choose, "DATASETS.MASKX.SPLIT", "all")
    source = DatasetCatalog.get("maskx_scenes_sparse_stuff_train")
    names = class_names_of("maskx_scenes_sparse_stuff_train")
    DatasetCatalog.register("mine", lambda: source)
    MetadataCatalog.get("mine").thing_classes = names
    cfg = make_joint_cfg(*choose, "DATASETS.TRAIN", ("mine", "maskx_scenes_sparse_train"))
    cfg.DATASETS.TEST = ()
    model = train(cfg).model.eval()
    copy = tmp_path / "elsewhere"
    shutil.move(cfg.OUTPUT_DIR, copy)
    for name in ("mine", *(n for n in DatasetCatalog.list() if n.startswith("maskx_"))):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    image = cv2.imread(source[0]["file_name"])[:, :, ::-1].copy()
    prediction = maskx.open_run(copy, device="cpu")(image)
    sample = {"image": torch.from_numpy(image.copy()).permute(2, 0, 1)}
    (expected,) = model([sample | {"class_indices": range(len(names))}])
    assert np.array_equal(prediction.label_map, expected["sem_seg"].numpy())
    assert prediction.class_names == model.class_names == tuple(names)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_a_run_becomes_a_program_of_rgb_images(make_joint_cfg, tmp_path, order):
    cfg = make_joint_cfg("INPUT.FORMAT", order)
    cfg.DATASETS.TEST = ()
    train(cfg)
    predictor = maskx.open_run(cfg.OUTPUT_DIR, device="cpu")
    export_model(predictor, tmp_path / "model.pt2")
    program, said = run_program(tmp_path / "model.pt2")
    assert said["about"]["image"] == "RGB from 0 to 255"
    for image, pixels in some_images():
        label_map, scores = program(image)
        with torch.inference_mode():
            (expected,) = predictor.model([predictor.prepare(pixels)])
        torch.testing.assert_close(scores, expected["top_scores"][0], atol=1e-4, rtol=1e-4)
        assert label_map.shape == scores.shape


def test_the_tools_of_its_figures_take_a_run_of_detectron2(
    make_joint_cfg, monkeypatch, tmp_path, capsys
):
    """Table 1 and figure 2, of a model that takes BGR."""
    cfg = make_joint_cfg("INPUT.FORMAT", "BGR")
    cfg.DATASETS.TEST = ()
    model = train(cfg).model.eval()
    json_file = generate_scenes(tmp_path, count=4, size=64, num_categories=4, seed=1)
    data = load_coco(json_file, tmp_path)

    def run_tool(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words), "--device", "cpu"])
        runpy.run_path(str(Path(TOOL).with_name(f"{name}.py")), run_name="__main__")

    found = tmp_path / "found.json"
    words = ("--model", cfg.OUTPUT_DIR, "--coco", json_file, tmp_path, "--output", found)
    run_tool("pixel_grouping", *words)
    measured = json.loads(found.read_text())["mIoU"]["all"]
    expected = evaluate_grouping(
        model, labelled_images(data), read=in_format(read_image_sample, "BGR")
    )
    assert measured == pytest.approx(expected["mIoU"]["all"], abs=1e-3)
    picture = tmp_path / "similar.png"
    photo = data.records[0]["file_name"]
    run_tool(
        "draw_similarity", cfg.OUTPUT_DIR, photo, "--at", 3, 60, "--at", 40, 0, "--output", picture
    )
    assert cv2.imread(str(picture)).shape[1] == 3 * 400
    with pytest.raises(SystemExit, match=r"The point \(64, 0\) is outside the image"):
        run_tool("draw_similarity", cfg.OUTPUT_DIR, photo, "--at", 64, 0, "--output", picture)


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
    names = [model_class_names(t.cfg) for t in (first, second)]
    place = [names[1].index(name) for name in names[0]]
    assert torch.equal(rows[1][place], rows[0])
    # To go on with the first training, its classes are needed.
    with pytest.raises(ValueError, match=r"has 4 classes, which are not the 9 of the model"):
        Trainer(make_joint_cfg("DATASETS.TEST", ())).resume_or_load(resume=True)
