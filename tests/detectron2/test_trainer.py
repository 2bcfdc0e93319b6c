import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer, default_argument_parser
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from settings import pairs

import maskx.detectron2
from maskx.cli.main import main
from maskx.detectron2 import Trainer, check_num_gpus, evaluate, get_cfg, setup

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "train_net.py")


@pytest.fixture
def register_opt(scenes):
    return ("DATASETS.MASKX.REGISTER", [["tiny_train", str(scenes[0]), str(scenes[1])]])


@pytest.fixture
def config_file(make_cfg, register_opt, tmp_path):
    """A YAML file of a tiny training run, data included."""
    path = tmp_path / "tiny.yaml"
    path.write_text(make_cfg(*register_opt, file="quick_schedules/maskx_scenes_cpu.yaml").dump())
    return path


@pytest.fixture
def run_tool(monkeypatch):
    """Run the script in this process: what it logs is in the files that it writes."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, args)])
        runpy.run_path(TOOL, run_name="__main__")

    return run


def run_python(*args):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_script_trains_and_evaluates_in_a_process_of_its_own(config_file, tmp_path):
    output = tmp_path / "output"
    log = run_python(TOOL, "--config-file", config_file)
    assert "A     " in log.split("Evaluation on A (with masks) and B (without)")[1]
    assert {p.name for p in output.iterdir()} >= {"config.yaml", "model_final.pth", "log.txt"}
    results = output / "inference" / "tiny_train" / "coco_instances_results.json"
    assert json.loads(results.read_text())[0].keys() >= {"bbox", "segmentation"}


def test_the_script_resumes_and_evaluates(config_file, run_tool, scenes, tmp_path):
    output = tmp_path / "output"
    run_tool("--config-file", config_file)
    run_tool("--resume", "--config-file", config_file, "SOLVER.MAX_ITER", 3)
    assert "Starting training from iteration 2" in (output / "log.txt").read_text()
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"loss_mask", "maskx/num_mask_rois", "segm_A/AP", "segm_B/APs"} <= logged

    words = ["report", output, *scenes, "--device", "cpu"]
    assert main(list(map(str, words))) == 0
    page = (output / "report.html").read_text()
    assert all(word in page for word in ("loss mask: ", "masks B", "The best images"))

    run_tool("--eval-only", "--config-file", config_file, *weights_of(output))
    assert "copypaste: Task: segm_B" in (output / "evaluation" / "log.txt").read_text()


def test_another_process_predicts_with_what_the_script_trained(config_file, run_tool, tmp_path):
    output = tmp_path / "output"
    run_tool("--config-file", config_file, "DATASETS.TEST", "()")
    predict = (
        "import sys, cv2, detectron2.engine, maskx.detectron2\n"
        "cfg = maskx.detectron2.get_cfg()\n"
        "cfg.merge_from_file(sys.argv[1])\n"
        "cfg.MODEL.WEIGHTS = sys.argv[2]\n"
        "predict = detectron2.engine.DefaultPredictor(cfg)\n"
        "instances = predict(cv2.imread(sys.argv[3]))['instances']\n"
        "print(len(instances), tuple(instances.pred_masks.shape))\n"
    )
    image = next(Path(get_registered_root(config_file)).glob("images/*.png"))
    _, weights = weights_of(output)
    printed = run_python("-c", predict, output / "config.yaml", weights, image)
    assert printed.strip() == "5 (5, 64, 64)"


def weights_of(output):
    return "MODEL.WEIGHTS", output / "model_final.pth"


def test_the_script_says_how_to_install_detectron2():
    code = (
        "import runpy, sys; sys.modules['detectron2'] = None\n"
        f"runpy.run_path({TOOL!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "error: maskx.detectron2 needs Detectron2" in done.stderr


def first_images(source, target, count):
    """Write the part of an annotation file that belongs to its first images."""
    content = json.loads(source.read_text())
    content["images"] = content["images"][:count]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    target.write_text(json.dumps(content))
    return target


def test_real_photographs(shared_data, make_cfg, tmp_path):
    """COCO images with masks for the VOC categories only: train, evaluate, predict."""
    coco, sources = shared_data / "coco_mini", []
    for part in ("train", "val"):
        name, images = f"instances_{part}2017.json", coco / f"{part}2017"
        path = first_images(coco / "annotations" / name, tmp_path / name, 40)
        sources.append([f"real_{part}", str(path), str(images)])
    cfg = make_cfg(
        *pairs(
            {
                "DATASETS.MASKX.REGISTER": sources,
                "DATASETS.MASKX.SPLIT": "coco_voc",
                "DATASETS.TRAIN": ("real_train",),
                "DATASETS.TEST": ("real_val",),
                "MODEL.ROI_HEADS.NUM_CLASSES": 80,
                "INPUT.MAX_SIZE_TEST": 96,
            }
        )
    )
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert all(p.grad is None for p in trainer.model.parameters())
    latest = trainer.storage.latest()  # with the evaluation at the end of the training
    assert latest["loss_mask"][0] > 0
    assert latest["segm_A/AP"][0] >= 0
    assert latest["segm_B/AP"][0] >= 0

    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    photo = cv2.imread(str(next((coco / "val2017").glob("*.jpg"))))
    instances = DefaultPredictor(cfg)(photo)["instances"]
    assert instances.pred_masks.shape[1:] == photo.shape[:2]


def get_registered_root(config_file):
    cfg = get_cfg()
    cfg.merge_from_file(str(config_file))
    return cfg.DATASETS.MASKX.REGISTER[0][2]


def test_an_interrupted_run_goes_on_where_it_stopped(make_cfg, register_opt):
    cfg = make_cfg(*register_opt, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 4)

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
    assert trainer.model.training
    assert all(torch.equal(p, stopped[n]) for n, p in trainer.model.state_dict().items())
    momentum = next(iter(trainer.optimizer.state.values()))["momentum_buffer"]
    assert momentum.abs().sum() > 0
    trainer.train()
    assert trainer.iter == 4


@pytest.mark.parametrize("amp", [False, True] if torch.cuda.is_available() else [False])
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
def test_it_builds_with_and_without_mixed_precision(make_cfg, register_opt, amp, freeze):
    cfg = make_cfg(
        *register_opt,
        "SOLVER.AMP.ENABLED",
        amp,
        "MODEL.META_ARCHITECTURE",
        "MaskXRCNN",
        "MODEL.MASKX.FREEZE_DETECTOR",
        freeze,
        "MODEL.DEVICE",
        "cuda" if amp else "cpu",
    )
    state = Trainer(cfg).state_dict()
    assert ("grad_scaler" in state["_trainer"]) == amp


def test_a_path_may_carry_the_query_of_detectron2(make_cfg, tiny_train, tmp_path):
    torch.save({"model": build_model(make_cfg()).state_dict()}, tmp_path / "model.pth")
    weights = f"{tmp_path / 'model.pth'}?matching_heuristics=True"
    cfg = make_cfg("MODEL.WEIGHTS", weights, "MODEL.MASKX.MLP", "none")
    with pytest.raises(ValueError, match="made by another mask head"):  # so it was read
        Trainer(cfg).resume_or_load(resume=False)


def test_fine_tuning_takes_what_fits_and_resuming_takes_all_or_nothing(make_cfg, register_opt):
    """For both, the checkpoint is of 3 classes and the data have 4."""
    cfg = make_cfg(*register_opt)
    other = make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    checkpointer = DetectionCheckpointer(build_model(other), cfg.OUTPUT_DIR)
    os.makedirs(cfg.OUTPUT_DIR)
    checkpointer.save("other")
    with pytest.raises(ValueError, match=r"made by another mask head(.|\n)*num_classes 3"):
        Trainer(cfg).resume_or_load(resume=True)
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "other.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.model.training
    loaded = trainer.model.roi_heads.mask_head.predictor.layers[0].weight
    assert torch.equal(loaded, checkpointer.model.roi_heads.mask_head.predictor.layers[0].weight)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("MODEL.MASKX.TRANSFER.LAYERS", 1), r"made by another mask head(.|\n)*transfer_layers 1"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 5), r"made by another mask head(.|\n)*num_classes 5"),
        (("MODEL.FPN.OUT_CHANNELS", 8), r"lacks \d+ of the model's weights.*backbone\.fpn"),
        (("MODEL.RESNETS.DEPTH", 101), r"lacks \d+ of the model's weights.*res"),
    ],
)
def test_weights_of_another_model_are_not_evaluated(make_cfg, tiny_train, tmp_path, opts, words):
    DetectionCheckpointer(build_model(make_cfg()), str(tmp_path)).save("model")
    cfg = make_cfg(*opts, "MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    with pytest.raises(ValueError, match=words):
        evaluate(cfg)
    if "mask head" in words:
        with pytest.raises(ValueError, match="made by another mask head"):
            DefaultPredictor(cfg)


def test_nothing_is_evaluated_without_weights(make_cfg, tiny_train):
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        evaluate(make_cfg())
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        evaluate(make_cfg(), resume=True)


def test_evaluation_sees_changed_weights(make_cfg, tiny_train, tmp_path):
    model = build_model(make_cfg())
    opts = ("MODEL.WEIGHTS", str(tmp_path / "model.pth"), "OUTPUT_DIR", str(tmp_path))
    cfg = make_cfg(*opts)
    seen = []
    for _ in range(2):
        DetectionCheckpointer(model, str(tmp_path)).save("model")
        evaluate(cfg)
        results = tmp_path / "inference" / "tiny_train" / "coco_instances_results.json"
        seen.append([r["segmentation"]["counts"] for r in json.loads(results.read_text())])
        with torch.no_grad():
            model.roi_heads.mask_head.mlp.fc.bias += torch.randn(64)
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("opts", "error", "words"),
    [
        (
            ("MODEL.ROI_HEADS.NUM_CLASSES", 80),
            ValueError,
            r"NUM_CLASSES is 80, but data set 'tiny_train' has 4 classes",
        ),
        (
            ("DATASETS.TEST", ("tiny_tranes",)),
            ValueError,
            r"no data set 'tiny_tranes'.*'tiny_train'.*DATASETS\.MASKX\.REGISTER",
        ),
        (("DATASETS.TRAIN", ()), ValueError, r"DATASETS\.TRAIN is empty"),
        (("DATASETS.MASKX.SPLIT", "coco_vox"), FileNotFoundError, r"Did you mean 'coco_voc'"),
        (("DATASETS.MASKX.SPLIT", "coco_voc"), ValueError, r"'person', which is not among the 4"),
        (("MODEL.DEVICE", "cuda"), ValueError, r"MODEL\.DEVICE is 'cuda'.*Set MODEL\.DEVICE cpu"),
        (("TEST.AUG.ENABLED", True), ValueError, "Set TEST.AUG.ENABLED False"),
        (("MODEL.WEIGHTS", "none.pth"), FileNotFoundError, r"MODEL\.WEIGHTS 'none\.pth'"),
        (
            (
                "MODEL.MASKX.TEXT_CLASSIFIER.VECTORS",
                "clip.npy",
                "MODEL.ROI_HEADS.NAME",
                "StandardROIHeads",
            ),
            ValueError,
            r"VECTORS is 'clip\.npy', but MODEL\.ROI_HEADS\.NAME StandardROIHeads do not read it",
        ),
        (("INPUT.MASK_FORMAT", "masks"), ValueError, r"MASK_FORMAT must be .*'bitmask', got 'mas"),
        (("MODEL.RESNETS.DEPTH", 51), ValueError, r"RESNETS\.DEPTH must be one of 18, .*got 51"),
        (("INPUT.MIN_SIZE_TRAIN", ()), ValueError, r"MIN_SIZE_TRAIN is empty"),
        (("MODEL.PIXEL_MEAN", [1.0]), ValueError, r"PIXEL_MEAN is \[1\.0\] and .*three numbers"),
        (("MODEL.PIXEL_STD", [0.0] * 3), ValueError, r"those of PIXEL_STD above 0"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_built(
    make_cfg, register_opt, opts, error, words, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Trainer, "build_model", None)
    with pytest.raises(error, match=words):
        Trainer(make_cfg(*register_opt, *opts))


def test_a_split_that_leaves_no_masks_is_named(make_cfg, register_opt, tmp_path):
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="leaves no category with masks"):
        Trainer(make_cfg(*register_opt, "DATASETS.MASKX.SPLIT", str(tmp_path / "none.txt")))


def test_too_many_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_num_gpus(1)
    with pytest.raises(ValueError, match=r"--num-gpus 2 .* \(0\). Use --num-gpus 1 MODEL.DEVICE"):
        check_num_gpus(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_num_gpus(4)
    with pytest.raises(ValueError, match=r"Use --num-gpus 4\.$"):
        check_num_gpus(8)


def test_a_missing_config_file_is_named():
    args = default_argument_parser().parse_args(["--config-file", "none.yaml"])
    with pytest.raises(FileNotFoundError, match=r"--config-file 'none\.yaml'"):
        setup(args)


def test_three_lines_plug_it_into_a_project(make_cfg, tiny_train, tmp_path):
    """The lines (1) to (3) are those of the README; all others are the project's own."""

    class ProjectTrainer(DefaultTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            mapper = maskx.detectron2.MaskXDatasetMapper(cfg)  # (3)
            return build_detection_train_loader(cfg, mapper=mapper)

    project = make_cfg()
    project.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    project.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    nodes = (project.MODEL, project.INPUT, project.DATASETS, project.SOLVER, project.TEST)
    for node in nodes:
        node.pop("MASKX")
    (tmp_path / "project.yaml").write_text(project.dump())

    cfg = get_detectron2_cfg()
    cfg.merge_from_file(str(tmp_path / "project.yaml"))
    maskx.detectron2.add_maskx_config(cfg)  # (1)
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskXROIHeads", "MaskXMaskHead"  # (2)
    cfg.DATASETS.MASKX.SPLIT = "scenes_half"  # only where masks are to be withheld

    trainer = ProjectTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.storage.latest()["loss_mask"][0] > 0


@pytest.mark.parametrize(("limit", "is_found"), [(1, False), (2, True)])
def test_as_many_detections_are_scored_as_the_model_may_give(
    make_cfg, tiny_train, caplog, limit, is_found
):
    """Two of one category in each image: a wrong one that is surer, and a right one."""
    evaluator = Trainer.build_evaluator(make_cfg("TEST.DETECTIONS_PER_IMAGE", limit), tiny_train)
    evaluator.reset()
    records = DatasetCatalog.get(tiny_train)
    category = records[0]["annotations"][0]["category_id"]
    for record in records:
        size = (record["height"], record["width"])
        right = [a["bbox"] for a in record["annotations"] if a["category_id"] == category][:1]
        boxes = [[0, 0, 1, 1], *right]
        found = Instances(size)
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        found.scores = torch.tensor([0.9, 0.5][: len(boxes)])
        found.pred_classes = torch.full((len(boxes),), category)
        found.pred_masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": found}])
    with caplog.at_level("INFO"):
        results = evaluator.evaluate()
    name = MetadataCatalog.get(tiny_train).thing_classes[category]
    value = results["bbox"][f"AP-{name}"]
    assert (value > 0) == is_found
    line = next(row for row in caplog.text.splitlines() if row.startswith(name))
    assert line.split()[-2] == f"{value:.2f}"
