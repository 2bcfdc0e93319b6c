import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from omegaconf import ListConfig

import maskx
from maskx.detectron2 import (
    MaskXCOCOEvaluator,
    MaskXDatasetMapper,
    MaskXROIHeads,
    add_maskx_config,
    get_cfg,
)
from maskx.detectron2.data import split_from_config

CONFIGS = Path(__file__).parents[2] / "configs" / "MaskX"
YAMLS = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
EXPERIMENTS = [name for name in YAMLS if name.endswith("_1x.yaml")]
LAZY = str(CONFIGS / "lazy" / "maskx_rcnn_R_50_FPN_1x.py")


def load(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def without_maskx(cfg):
    for node in (cfg.MODEL, cfg.DATASETS):
        node.pop("MASKX", None)
    return cfg.dump()


def test_upstream_defaults_stay_and_calling_twice_changes_nothing():
    cfg = get_detectron2_cfg()
    before = cfg.dump()
    add_maskx_config(cfg)
    assert without_maskx(cfg.clone()) == before
    cfg.MODEL.MASKX.TRANSFER.LAYERS = 3
    once = cfg.dump()
    add_maskx_config(cfg)
    add_maskx_config(cfg)
    assert cfg.dump() == once
    cfg.freeze()
    add_maskx_config(cfg)
    assert "MASKX" not in get_detectron2_cfg().MODEL


def test_keys_of_others_under_our_nodes_stay():
    cfg = get_detectron2_cfg()
    cfg.MODEL.MASKX = CfgNode({"OTHER": 1, "TRANSFER": {"LAYERS": 3}})
    add_maskx_config(cfg)
    assert cfg.MODEL.MASKX.OTHER == 1
    assert cfg.MODEL.MASKX.TRANSFER.LAYERS == 3
    assert cfg.MODEL.MASKX.TRANSFER.INPUTS == "cls+box"


def test_the_conveniences_are_found_at_the_top():
    assert maskx.get_cfg().dump() == get_cfg().dump()
    assert maskx.add_maskx_config is add_maskx_config


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("MODEL.MASKX.PREDICTER", "transfer", AssertionError, "Non-existent key"),
        ("MODEL.MASKX.TRANSFER.LAYERS", 2.5, ValueError, "Type mismatch"),
    ],
)
def test_misspelt_keys_and_wrong_types_fail(key, value, error, words):
    with pytest.raises(error, match=words):
        get_cfg().merge_from_list([key, value])


@pytest.mark.parametrize("name", YAMLS)
def test_every_file_loads_dumps_and_reloads(name, tmp_path):
    cfg = load(name)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(str(dumped))
    # Compared as YAML: of nested tuples, which upstream has, yacs restores the outer one only.
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize("name", YAMLS)
def test_every_file_builds_trains_and_predicts(name, make_cfg, make_sample):
    cfg = make_cfg(file=name)
    model = build_model(cfg).train()
    assert isinstance(model.roi_heads, MaskXROIHeads)
    with EventStorage():
        losses = model([make_sample([True, False]), make_sample([True, True])])
    optimizer = build_optimizer(cfg, model)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    optimizer.step()
    with torch.no_grad():
        (result,) = model.eval()([make_sample([])])
    assert result["instances"].has("pred_masks")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_file_names_agree_with_their_content(name):
    cfg = load(name)
    folder, file = name.split("/")
    maskx_cfg = cfg.MODEL.MASKX
    split = {"voc2nonvoc": "coco_voc", "nonvoc2voc": "coco_nonvoc", "oracle": "all"}[folder]
    assert split == cfg.DATASETS.MASKX.SPLIT
    method, depth = re.fullmatch(r"(\w+)_R_(\d+)_FPN_1x\.yaml", file).groups()
    if method == "baseline":
        assert (maskx_cfg.PREDICTOR, maskx_cfg.MLP) == ("class_agnostic", "none")
    elif method == "mask_rcnn":
        assert (maskx_cfg.PREDICTOR, maskx_cfg.MLP) == ("class_specific", "none")
    else:
        inputs, layers, mlp = re.fullmatch(r"(\w+?)_(\d)_layer(_mlp)?", method).groups()
        assert maskx_cfg.PREDICTOR == "transfer"
        assert {"clsbox": "cls+box"}.get(inputs, inputs) == maskx_cfg.TRANSFER.INPUTS
        assert int(layers) == maskx_cfg.TRANSFER.LAYERS
        assert maskx_cfg.TRANSFER.STOP_GRADIENT
        assert ("single_fc" if mlp else "none") == maskx_cfg.MLP
    assert int(depth) == cfg.MODEL.RESNETS.DEPTH
    assert cfg.MODEL.WEIGHTS.endswith(f"/R-{depth}.pkl")
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"
    # 1x: images seen, steps and learning rate in proportion
    solver = cfg.SOLVER
    assert solver.IMS_PER_BATCH * solver.MAX_ITER == 16 * 90000
    assert [s / solver.MAX_ITER for s in solver.STEPS] == [60 / 90, 80 / 90]
    assert solver.BASE_LR / solver.IMS_PER_BATCH == 0.02 / 16


def test_the_recipe_is_that_of_detectron1(make_cfg):
    cfg = make_cfg("SOLVER.BASE_LR", 0.02)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    names = {id(p): name for name, p in model.named_parameters()}
    doubled = [g for g in optimizer.param_groups if g["lr"] == 0.04]
    assert all(g["weight_decay"] == 0 for g in doubled)
    biases = {names[id(p)] for g in doubled for p in g["params"]}
    assert biases == {name for name in names.values() if name.endswith(".bias")}
    assert "roi_heads.mask_head.predictor.layers.2.bias" in biases
    scheduler = build_lr_scheduler(load(EXPERIMENTS[0]), optimizer)
    assert scheduler.get_last_lr()[0] == pytest.approx(
        optimizer.param_groups[0]["initial_lr"] / 3, rel=1e-5
    )


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return LazyConfig.load(LAZY)


def test_the_lazy_config_is_the_yaml_experiment(lazy):
    """Same arguments in every module that has any, same optimiser and schedule."""
    cfg = load("voc2nonvoc/clsbox_2_layer_mlp_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "meta"  # the full size, without its 0.8 GB
    with torch.device("meta"):
        models = [instantiate(lazy.model), build_model(cfg)]
    assert str(models[0]) == str(models[1])
    shapes = [{n: p.shape for n, p in m.state_dict().items()} for m in models]
    assert shapes[0] == shapes[1]
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in models]
    assert trained[0] == trained[1]
    for name in ("proposal_generator", "roi_heads", "roi_heads.box_predictor"):
        plain = [plain_attributes(m.get_submodule(name)) for m in models]
        assert plain[0] == plain[1], name

    lazy.optimizer.params.model = models[0]
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        for optimizer in (instantiate(lazy.optimizer), build_optimizer(cfg, models[1]))
    ]
    for lazy_group, group in zip(*groups, strict=True):
        assert (lazy_group["lr"], lazy_group["weight_decay"]) == (
            group["lr"],
            group["weight_decay"],
        )
    multiplier = instantiate(lazy.lr_multiplier)
    for where, expected in [(0, 1 / 3), (0.5, 1), (0.7, 0.1), (0.9, 0.01)]:
        assert multiplier(where) == pytest.approx(expected)
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER


def test_the_lazy_config_can_be_saved(lazy, tmp_path):
    """Detectron2 falls back to a pickle for what YAML cannot hold."""
    LazyConfig.save(lazy, str(tmp_path / "saved.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"]


def plain_attributes(module):
    # No dicts: Detectron2 writes a loss weight of 1 in two ways.
    allowed = (bool, int, float, str, list, tuple, ListConfig)
    return {
        key: list(value) if isinstance(value, ListConfig) else value
        for key, value in vars(module).items()
        if isinstance(value, allowed) and not key.startswith("_")
    }


def test_the_lazy_config_trains_at_tiny_size(lazy, make_sample):
    model = lazy.model
    model.pixel_std = [58.0, 58.0, 58.0]
    stages = model.backbone.bottom_up.stages
    stages.depth, stages.norm = 18, "GN"
    stages.pop("stride_in_1x1")
    model.roi_heads.num_classes = 4
    model.roi_heads.mask_head.update(channels=8, num_convs=1, mlp="bottleneck")
    built = instantiate(model).train()
    with EventStorage():
        losses = built([make_sample([True, False])])
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0


def test_the_lazy_config_makes_its_mapper_and_its_evaluator(lazy, tmp_path):
    mapper = instantiate(lazy.dataloader.train.mapper)
    assert isinstance(mapper, MaskXDatasetMapper)
    assert mapper.classes_with_masks == set(
        split_from_config(load(EXPERIMENTS[-1])).indices_with_masks
    )
    evaluator = instantiate(lazy.dataloader.evaluator)
    assert isinstance(evaluator, MaskXCOCOEvaluator)
