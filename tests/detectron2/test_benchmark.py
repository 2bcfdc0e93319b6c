import re
from pathlib import Path

import pytest
import torch
from benchmarks import tiny_detectron2
from benchmarks.whole_model import benchmark_cfg, make_batch, model_cases
from detectron2.utils.events import EventStorage

from maskx.detectron2.config import read_config
from maskx.detectron2.datasets import records_of, register_from_config

CONFIG = Path(__file__).parents[2] / "configs" / "MaskX" / "Base-MaskX-RCNN-FPN.yaml"


def test_both_models_sample_the_same_rois(make_cfg):
    reference, ours = model_cases(make_cfg("MODEL.MASKX.MLP", "none"), image_size=96)
    expected, losses = reference.step(), ours.step()

    assert losses.pop("loss_mask") > 0
    assert expected.pop("loss_mask") > 0
    assert losses == pytest.approx(expected)
    assert {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"} <= losses.keys()
    # Our predictor is T, 15 * 24 -> 8 -> 8 for 24 channels of the box head and 8 of the mask head;
    # theirs is a 1x1 convolution to 4 classes.
    transfer, convolution = (5 * 24 + 1) * 8 + (8 + 1) * 8, (8 + 1) * 4
    assert ours.parameters - reference.parameters == transfer - convolution


def test_with_the_same_predictor_the_models_are_the_same(make_cfg):
    options = ("MODEL.MASKX.PREDICTOR", "class_specific", "MODEL.MASKX.MLP", "none")
    reference, ours = model_cases(make_cfg(*options), image_size=96)
    assert ours.step() == pytest.approx(reference.step())


def test_every_step_does_the_same_work(make_cfg):
    for case in model_cases(make_cfg(), image_size=96):
        assert case.step() == pytest.approx(case.step())


def test_the_image_fills_the_places_for_foreground_rois(make_model):
    model = make_model("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512)
    with EventStorage() as storage:
        model(make_batch(96, num_classes=4))
    assert storage.latest()["maskx/num_mask_rois"][0] == 128


def test_objects_of_the_batch_lie_in_the_image_and_have_all_classes():
    (record,) = make_batch(96, num_classes=80)
    instances = record["instances"]
    boxes = instances.gt_boxes.tensor
    assert boxes.min() >= 0
    assert boxes.max() <= 96
    assert set(instances.gt_classes.tolist()) == set(range(80))
    # The mask of an object touches its box on every side and is half of its area.
    torch.testing.assert_close(instances.gt_masks.get_bounding_boxes().tensor, boxes)
    torch.testing.assert_close(
        torch.as_tensor(instances.gt_masks.area()).float(), instances.gt_boxes.area() / 2
    )


def test_the_recipe_of_the_paper_is_what_is_measured():
    cfg = benchmark_cfg(CONFIG, num_classes=1203, device=torch.device("cpu"))
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.MASKX.PREDICTOR) == (50, "transfer")
    assert (cfg.MODEL.MASKX.MLP, cfg.MODEL.MASKX.TRANSFER.INPUTS) == ("none", "cls+box")
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.WEIGHTS) == (1203, "")
    assert cfg.MODEL.DEVICE == "cpu"


@pytest.mark.parametrize("system", tiny_detectron2.RUNS)
def test_configs_of_a_system_take_the_pairs_of_its_tiny_training(system, tmp_path):
    tool, *arguments = tiny_detectron2.command(system, tmp_path, iterations=10, period=5)
    assert Path(tool).is_file()
    start = next(i for i, text in enumerate(arguments) if re.fullmatch(r"[A-Z]+\.[A-Z_.]+", text))
    configs = [text for text in arguments if text.endswith(".yaml")]
    for config in configs:
        cfg = read_config(Path(config), arguments[start:])
        assert cfg.SOLVER.MAX_ITER == 10
        register_from_config(cfg)
        assert all(records_of(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
