"""The sixth system of tests/support/toy_system.py on Detectron2."""

from pathlib import Path

import pytest
import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY
from toy_system import SYSTEM, ColourModel

from maskx.data.scenes.generator import generate_scenes
from maskx.detectron2 import Trainer, evaluate, get_cfg, register_coco
from maskx.detectron2.adapters import hooks_of_system
from maskx.detectron2.trainer import check_config
from maskx.engine.system import find_system, system_names


@META_ARCH_REGISTRY.register()
class MaskXToyColours(ColourModel):
    maskx_hooks = hooks_of_system(SYSTEM, lambda cfg: {"image_size": cfg.INPUT.MASKX.SIZE})

    @configurable
    def __init__(self, **arguments):
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg):
        return {
            "size": cfg.INPUT.MASKX.SIZE,
            "num_classes": cfg.MODEL.MASKX.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }


@pytest.fixture
def make_toy_cfg(tmp_path):
    json_file = generate_scenes(tmp_path / "toy", count=16, size=64, num_categories=4, seed=0)
    register_coco("toy", json_file, tmp_path / "toy")

    def make(output, *opts):
        cfg = get_cfg()
        cfg.MODEL.META_ARCHITECTURE = "MaskXToyColours"
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        cfg.MODEL.MASKX.NUM_CLASSES, cfg.INPUT.MASKX.SIZE = 4, 64
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_STD = "RGB", [58.0, 57.0, 57.0]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("toy",)
        cfg.DATASETS.MASKX.SPLIT = "scenes_half"
        cfg.DATALOADER.NUM_WORKERS, cfg.SEED = 0, 3
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 4, 4
        cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 2, 0
        cfg.OUTPUT_DIR = str(tmp_path / output)
        cfg.merge_from_list(list(opts))
        return cfg

    return make


def train(cfg, max_iter, resume=False):
    torch.manual_seed(0)  # as default_setup does
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.max_iter = max_iter
    trainer.train()
    return trainer


def test_it_trains_resumes_evaluates_and_predicts(make_toy_cfg):
    whole = train(make_toy_cfg("whole"), 4)
    train(make_toy_cfg("parts"), 2)
    resumed = train(make_toy_cfg("parts"), 4, resume=True)
    weights, others = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(others[name], value) for name, value in weights.items())

    cfg = make_toy_cfg("whole", "MODEL.WEIGHTS", str(Path(whole.cfg.OUTPUT_DIR, "model_final.pth")))
    results = evaluate(cfg)
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    predicted = DefaultPredictor(cfg)(torch.zeros(40, 50, 3, dtype=torch.uint8).numpy())
    assert predicted["sem_seg"].shape[-2:].numel() > 0


def test_test_data_in_another_order_of_classes_are_refused(make_toy_cfg, tmp_path):
    toy = MetadataCatalog.get("toy")
    turned = toy.thing_classes[::-1]
    register_coco("turned", toy.json_file, tmp_path / "toy", class_names=turned)
    with pytest.raises(ValueError, match="'turned' has the classes of 'toy' in another order"):
        check_config(make_toy_cfg("turned", "DATASETS.TEST", ("turned",)))


def test_the_host_asks_the_system_that_is_registered():
    assert "colours" in system_names()
    assert find_system("colours").name == MaskXToyColours.maskx_hooks.system
