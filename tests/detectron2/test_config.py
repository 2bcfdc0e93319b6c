import argparse
import functools
import importlib
import itertools
import json
import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from omegaconf import ListConfig

import maskx
import maskx.systems
from maskx.cli.main import VERBS
from maskx.core.word_table import WordTable, save_word_table
from maskx.data.large_vocabularies import ade20k_150_classes
from maskx.data.prepare.coco_stuff import coco_stuff_names
from maskx.data.splits import split_names
from maskx.data.vocabularies import VOC_CLASSES
from maskx.detectron2 import (
    MaskXCOCOEvaluator,
    MaskXDatasetMapper,
    MaskXDeepLab,
    MaskXTransferNet,
    Trainer,
    add_maskx_config,
    get_cfg,
    register_all,
)
from maskx.detectron2.datasets import class_names_of, split_from_config
from maskx.engine.photos import photo_options
from maskx.systems.concept_mask.concept_sets import ConceptSplit, write_concept_split
from maskx.systems.maskx_rcnn.detectron2.model import MaskXROIHeadsMixin
from maskx.systems.maskx_rcnn.mask_head import PREDICTORS
from maskx.systems.maskx_rcnn.weight_transfer import ACTIVATIONS, TRANSFER_INPUTS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "MaskX"
RECIPE = "Base-MaskX-RCNN-FPN.yaml"
# Two of the Base files are a part that is merged over a recipe; alone they make no model.
PARTS = ("Base-1x8.yaml", "Base-R_101.yaml")
YAMLS = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
MODELS = [name for name in YAMLS if name not in PARTS]
EXPERIMENTS = [name for name in YAMLS if name.endswith("_1x.yaml")]
FULL = "voc2nonvoc/e2e/clsbox_2_layer_mlp_R_50_FPN_1x.yaml"
CLASS_PATTERNS = ROOT / "configs" / "ClassPatterns"
IMAGE_YAMLS = sorted(
    path.relative_to(CLASS_PATTERNS).as_posix() for path in CLASS_PATTERNS.rglob("*.yaml")
)
IMAGE_EXPERIMENTS = [name for name in IMAGE_YAMLS if name.endswith(("_voc.yaml", "_coco.yaml"))]
TRANSFERNET = ROOT / "configs" / "TransferNet"
TRANSFER_YAMLS = sorted(
    path.relative_to(TRANSFERNET).as_posix() for path in TRANSFERNET.rglob("*.yaml")
)
TRANSFER_EXPERIMENTS = [name for name in TRANSFER_YAMLS if "scenes" not in name]
LARVSEG = ROOT / "configs" / "LarvSeg"
LARVSEG_YAMLS = sorted(path.relative_to(LARVSEG).as_posix() for path in LARVSEG.rglob("*.yaml"))
LARVSEG_START = "quick_schedules/classifier_scenes_cpu.yaml"
LARVSEG_EXPERIMENTS = [n for n in LARVSEG_YAMLS if "scenes" not in n and not n.startswith("Base-")]
CONCEPT_MASK = ROOT / "configs" / "ConceptMask"
CONCEPT_YAMLS = sorted(
    path.relative_to(CONCEPT_MASK).as_posix() for path in CONCEPT_MASK.rglob("*.yaml")
)
CONCEPT_EXPERIMENTS = [name for name in CONCEPT_YAMLS if name.startswith("stage")]
LAZY = str(CONFIGS / "lazy" / "maskx_rcnn_R_50_FPN_1x.py")


def load(name, folder=CONFIGS):
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / name))
    return cfg


def without_maskx(cfg):
    for node in (cfg.MODEL, cfg.INPUT, cfg.DATASETS, cfg.SOLVER, cfg.TEST):
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


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *((CONFIGS, name) for name in YAMLS),
        *((CLASS_PATTERNS, name) for name in IMAGE_YAMLS),
        *((TRANSFERNET, name) for name in TRANSFER_YAMLS),
        *((LARVSEG, name) for name in LARVSEG_YAMLS),
        *((CONCEPT_MASK, name) for name in CONCEPT_YAMLS),
    ],
)
def test_every_file_loads_dumps_and_reloads(folder, name, tmp_path):
    cfg = load(name, folder)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(str(dumped))
    # Compared as YAML: of nested tuples, which upstream has, yacs restores the outer one only.
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


@pytest.fixture
def tiny_opts(tmp_path, scenes):
    """Options that the tiny size of a file needs beyond those of all files."""

    def opts(name):
        opts = ["DATASETS.MASKX.REGISTER", []]
        for word, key in (("/glove_", "TRANSFER"), ("/text_", "TEXT_CLASSIFIER")):
            if word not in name:
                continue
            # Its file is downloaded by users.
            names = [c["name"] for c in json.loads(scenes[0].read_text())["categories"]]
            vectors = tmp_path / "vectors.txt"
            lines = [f"{name.replace(' ', '_')} {i} 1.5 -2" for i, name in enumerate(names)]
            vectors.write_text("\n".join(lines))
            opts += [f"MODEL.MASKX.{key}.VECTORS", str(vectors)]
        if "photos" in name:  # the tiny images are normalised otherwise
            opts += ["MODEL.MASKX.BACKBONE.PRETRAINED", False]
        if "maskx_plus" in name or "deepmac" in name:
            # Their convolutions come in pairs, their RoIs are halved twice.
            opts += ["MODEL.ROI_MASK_HEAD.NUM_CONV", 2, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 8]
        return opts

    return opts


@pytest.mark.parametrize("name", MODELS)
def test_every_file_builds_trains_and_predicts(name, make_cfg, make_sample, tiny_train, tiny_opts):
    cfg = make_cfg(*tiny_opts(name), file=name)
    model = build_model(cfg).train()
    mask_on = cfg.MODEL.MASK_ON
    assert isinstance(model.roi_heads, MaskXROIHeadsMixin) == mask_on
    with EventStorage():
        losses = model([make_sample([True, False]), make_sample([True, True])])
    assert ("loss_mask" in losses) == mask_on
    assert ("loss_rpn_cls" in losses) != cfg.MODEL.MASKX.FREEZE_DETECTOR
    optimizer = build_optimizer(cfg, model)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    with torch.no_grad():
        (result,) = model.eval()([make_sample([])])
    draws = cfg.MODEL.META_ARCHITECTURE == "MaskXGrabCutRCNN"
    assert result["instances"].has("pred_masks") == (mask_on or draws)


@functools.cache
def page_tables():
    """What each word of a path sets, by the tables of configs/MaskX/README.md.

    A row is ``| `word` | explanation | `KEY value`, `word`, ... |``: keys, and words whose keys are
    taken over.
    """
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \|[^|]*\|([^|]*)\|$", page.split("### Commands")[0], re.M)
    assert len(rows) == len(dict(rows)), "a word stands twice"
    return {word: re.findall("`([^`]+)`", cell) for word, cell in rows}


def keys_of(word, backbone):
    """The keys, and their values as text, that one word of a path sets."""
    keys = {}
    for item in page_tables()[word]:
        key, _, value = item.partition(" ")
        keys |= {key: value.replace("BACKBONE", backbone)} if value else keys_of(key, backbone)
    return keys


def decode(name):
    """Spell out a file name: the keys that it sets beyond the recipe, and their values."""
    path = name.removesuffix(".yaml")
    folder, file = path.rsplit("/", 1)
    known = "|".join(sorted(page_tables(), key=len, reverse=True))
    assert re.fullmatch(rf"(({known})_)+FPN_1x", file), f"no table decodes '{file}'"
    *method, backbone = re.findall(rf"({known})_", file)
    keys = {"OUTPUT_DIR": f"output/MaskX/{path}"}
    for word in (backbone, folder, *method):
        keys |= keys_of(word, backbone)
    return keys


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_file_is_the_recipe_and_what_its_name_says(name):
    expected = load(RECIPE)
    expected.merge_from_list([part for pair in decode(name).items() for part in pair])
    assert flat(load(name)) == flat(expected)


def test_names_say_all_that_differs():
    """No two experiments are one, and every value of the recipe's own ablations occurs."""
    contents = [flat(load(name)) for name in EXPERIMENTS]
    for content in contents:
        del content["OUTPUT_DIR"]
    assert all(a != b for a, b in itertools.combinations(contents, 2))
    tried = {key: {str(content[key]) for content in contents} for key in contents[0]}
    assert tried["MODEL.MASKX.PREDICTOR"] == set(PREDICTORS)
    assert tried["MODEL.MASKX.TRANSFER.INPUTS"] == set(TRANSFER_INPUTS)
    assert tried["MODEL.MASKX.TRANSFER.LAYERS"] == {"1", "2", "3"}
    assert tried["MODEL.MASKX.TRANSFER.ACTIVATION"] == set(ACTIVATIONS)
    assert tried["MODEL.MASKX.TRANSFER.STOP_GRADIENT"] == {"True", "False"}


def test_the_settings_for_photographs_are_those_of_pip():
    cfg, options = (
        load("quick_schedules/maskx_photos_cpu.yaml"),
        photo_options("maskx", {"output": Path("out")}),
    )
    backbone = cfg.MODEL.MASKX.BACKBONE
    assert (options.backbone, options.pretrained) == (backbone.NAME, backbone.PRETRAINED)
    backbone.PRETRAINED = False
    network = build_backbone(cfg).bottom_up
    assert options.frozen
    assert not any(weight.requires_grad for weight in network.parameters())
    assert options.iterations == cfg.SOLVER.MAX_ITER
    assert options.batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert (options.image_size,) == cfg.INPUT.MIN_SIZE_TRAIN
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (256, 512)
    assert options.box_loss == cfg.MODEL.MASKX.BOX_LOSS.WEIGHT
    assert tuple(cfg.MODEL.PIXEL_MEAN) == network.pixel_mean


def test_both_directions_have_the_same_experiments():
    """But for the cascade, of which there is one example."""
    files = {
        side: {name.removeprefix(side) for name in EXPERIMENTS if name.startswith(side)}
        for side in ("voc2nonvoc", "nonvoc2voc")
    }
    assert files["voc2nonvoc"] - files["nonvoc2voc"] == {
        "/e2e/cls_2_layer_cascade_R_50_FPN_1x.yaml"
    }
    assert files["nonvoc2voc"] < files["voc2nonvoc"]


def test_stage_2_starts_from_what_stage_1_writes():
    outputs = {f"{load(name).OUTPUT_DIR}/model_final.pth": name for name in MODELS}
    seen = set()
    for name in MODELS:
        cfg = load(name)
        if not cfg.MODEL.WEIGHTS.startswith("output/"):
            assert not cfg.MODEL.MASKX.FREEZE_DETECTOR, name
            continue
        stage1 = load(outputs[cfg.MODEL.WEIGHTS])
        seen.add(outputs[cfg.MODEL.WEIGHTS])
        assert not stage1.MODEL.MASK_ON
        for node in ("BACKBONE", "RESNETS", "FPN", "ANCHOR_GENERATOR", "ROI_BOX_HEAD"):
            assert stage1.MODEL[node] == cfg.MODEL[node], (name, node)
        assert stage1.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert seen == {name for name in MODELS if "stage1" in name}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_splits_are_known(name):
    split = load(name).DATASETS.MASKX.SPLIT
    assert split in split_names()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_schedules_see_the_same_images_at_the_same_rate(name):
    solver = load(name).SOLVER
    assert solver.IMS_PER_BATCH * solver.MAX_ITER == 16 * 90000
    assert [s / solver.MAX_ITER for s in solver.STEPS] == [60 / 90, 80 / 90]
    assert solver.BASE_LR / solver.IMS_PER_BATCH == 0.02 / 16


def test_every_config_that_the_texts_name_exists():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("datasets/*.md"), *ROOT.glob("tools/*.py")]
    texts += [*ROOT.glob("configs/**/*.md"), *ROOT.glob("maskx/**/*.py")]
    named = {
        path
        for text in texts
        for path in re.findall(r"configs/\w+/[\w/.-]+\.(?:yaml|py)\b", text.read_text("utf-8"))
    }
    assert len(named) > 3
    assert sorted(path for path in named if not (ROOT / path).is_file()) == []


def commands_of_page():
    """The commands in the code blocks of the page, split into words; with $S once for each side."""
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    # Blocks with a language, and what tools print (text), are no commands of experiments.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)
    blocks = "".join(text for language, text in blocks if not language).replace("\\\n", "")
    for line in filter(None, (line.partition("#")[0] for line in blocks.splitlines())):
        for side in ("voc2nonvoc", "nonvoc2voc") if "$S" in line else ("",):
            yield shlex.split(line.replace("$S", side))


def parse(tool, words, monkeypatch):
    """Arguments of a command, as the tool itself reads them."""
    if tool == "tools/train_net.py":
        return default_argument_parser().parse_args(words)
    if tool in VERBS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"maskx.cli.{tool}").add_arguments(parser)
        return parser.parse_args(words)
    monkeypatch.setattr(sys, "argv", [tool, *words])
    return runpy.run_path(str(ROOT / tool))["parse_arguments"]()


def test_every_experiment_has_a_command_and_every_command_can_be_given(monkeypatch):
    outputs = {f"{load(name).OUTPUT_DIR}/model_final.pth" for name in EXPERIMENTS}
    trained, evaluated = set(), set()
    for program, tool, *words in commands_of_page():
        assert program == ("maskx" if tool in VERBS else "python")
        arguments = parse(tool, words, monkeypatch)
        for path in re.findall(r"configs/\S+", " ".join(words)):
            assert [*ROOT.glob(path)], path
        if tool != "tools/train_net.py":
            continue
        name = arguments.config_file.removeprefix("configs/MaskX/")
        cfg = load(name)
        cfg.merge_from_list(arguments.opts)
        if arguments.eval_only:
            assert cfg.MODEL.WEIGHTS in outputs
            evaluated.add((name, cfg.DATASETS.MASKX.SPLIT))
        else:
            trained.add(name)
    without_training = {name for name in EXPERIMENTS if name.startswith("grabcut/")}
    by_another_tool = {name for name in EXPERIMENTS if name.startswith("random_splits/")}
    assert trained == set(EXPERIMENTS) - without_training - by_another_tool
    both = {(n, s) for n in EXPERIMENTS if "oracle/" in n for s in ("coco_voc", "coco_nonvoc")}
    both |= {(n, s) for n in without_training for s in ("coco_voc", "coco_nonvoc")}
    assert evaluated == both | {
        (n, "coco_" + n.split("2")[0]) for n in EXPERIMENTS if "voc/grabcut/" in n
    }


def test_every_tool_that_the_texts_name_exists():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("d*/*.md"), *ROOT.glob("configs/**/*.md")]
    named = {
        path
        for text in texts
        for path in re.findall(r"python ((?:tools|datasets)/\w+\.py)", text.read_text("utf-8"))
    }
    assert len(named) > 3
    assert sorted(path for path in named if not (ROOT / path).is_file()) == []


def test_the_page_and_the_files_know_no_more_than_each_other():
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    paths = [name.removesuffix(".yaml") for name in EXPERIMENTS]
    shown = {path: re.sub("^(voc2nonvoc|nonvoc2voc)/", "S/", path) for path in paths}
    assert [
        p for p, short in shown.items() if f"`{p}`" not in page and f"`{short}`" not in page
    ] == []
    named = set(re.findall(r"`((?!output/)\w+/[\w/]+_1x)`", page))
    assert named <= {*paths, *shown.values()}
    words = [word for word in page_tables() if not any(word in path for path in paths)]
    assert words == ["1x8"]  # a schedule, of which no file speaks


def test_the_full_method_is_the_papers():
    """One file in full, from the paper: the tables of the page could be wrong with the files."""
    keys = decode(FULL)
    assert keys == {
        "OUTPUT_DIR": "output/MaskX/voc2nonvoc/e2e/clsbox_2_layer_mlp_R_50_FPN_1x",
        "DATASETS.MASKX.SPLIT": "coco_voc",
        "MODEL.MASKX.PREDICTOR": "transfer",
        "MODEL.MASKX.TRANSFER.INPUTS": "cls+box",
        "MODEL.MASKX.TRANSFER.LAYERS": "2",
        "MODEL.MASKX.MLP": "single_fc",
    }
    maskx = load(RECIPE).MODEL.MASKX
    assert (maskx.TRANSFER.ACTIVATION, maskx.TRANSFER.STOP_GRADIENT) == ("leaky_relu", True)
    assert (maskx.TRUNK, maskx.GT_BOXES_ONLY, maskx.LOSS_WEIGHT) == ("conv", False, 1.0)


def flat(node, prefix=""):
    """All values of a configuration, by dotted key."""
    values = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


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
    scheduler = build_lr_scheduler(load(FULL), optimizer)
    assert scheduler.get_last_lr()[0] == pytest.approx(
        optimizer.param_groups[0]["initial_lr"] / 3, rel=1e-5
    )


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return LazyConfig.load(LAZY)


def test_the_lazy_config_with_box_loss_and_teacher_is_the_yaml_experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    lazy = LazyConfig.load(str(Path(LAZY).with_name("maskx_box_loss_ema_teacher_R_50_FPN_1x.py")))
    cfg = load("voc2nonvoc/e2e/clsbox_2_layer_mlp_box_loss_ema_teacher_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        models = [instantiate(lazy.model), build_model(cfg)]
    assert str(models[0]) == str(models[1])
    for name in ("roi_heads.box_loss", "roi_heads.ema_teacher"):
        plain = [plain_attributes(m.get_submodule(name)) for m in models]
        assert plain[0] == plain[1], name


def test_the_lazy_config_is_the_yaml_experiment(lazy):
    """Same arguments in every module that has any, same optimiser and schedule."""
    cfg = load(FULL)
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
    assert mapper.classes_with_masks == set(split_from_config(load(FULL)).indices_with_masks)
    evaluator = instantiate(lazy.dataloader.evaluator)
    assert isinstance(evaluator, MaskXCOCOEvaluator)


@pytest.mark.parametrize("name", [*IMAGE_YAMLS, f"../LarvSeg/{LARVSEG_START}"])
def test_every_file_of_class_patterns_builds_trains_and_predicts(name, make_image_cfg, tiny_train):
    cfg = make_image_cfg(file=name)
    model = Trainer.build_model(cfg).train()
    (loss,) = model(next(iter(Trainer.build_train_loader(cfg)))).values()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters())
    Trainer.build_optimizer(cfg, model).step()
    sample = next(iter(Trainer.build_test_loader(cfg, tiny_train)))
    with torch.no_grad():
        (result,) = model.eval()(sample)
    if isinstance(model, MaskXDeepLab):
        assert result["sem_seg"].shape == (64, 64)
    else:
        assert result["image_labels_prob"].shape == (4,)


@pytest.mark.parametrize("name", IMAGE_EXPERIMENTS)
def test_experiments_of_class_patterns_have_the_papers_settings(name):
    """Adam, 5e-6 and 1e-4, 16 images of 328 x 328, 20 epochs; scales and CRF of the test."""
    cfg = load(name, CLASS_PATTERNS)
    method, backbone, data = re.fullmatch(
        r"(classifier|deeplab)_(R_101|VGG_16)_(voc|coco)\.yaml", name
    ).groups()
    num_images, num_classes = {"voc": (10582, 20), "coco": (118287, 80)}[data]
    assert math.ceil(20 * num_images / 16) == cfg.SOLVER.MAX_ITER
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    assert (cfg.SOLVER.MASKX.OPTIMIZER, cfg.SOLVER.WEIGHT_DECAY) == ("adam", 0)
    assert cfg.SOLVER.BASE_LR == 1e-4
    assert pytest.approx(5e-6) == cfg.SOLVER.MASKX.BACKBONE_LR_FACTOR * cfg.SOLVER.BASE_LR
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == ((), 0)
    assert cfg.INPUT.MASKX.SIZE == 328
    assert num_classes == cfg.MODEL.MASKX.NUM_CLASSES
    assert cfg.MODEL.MASKX.BACKBONE.OUTPUT_STRIDE == 8
    assert cfg.MODEL.MASKX.BACKBONE.PRETRAINED
    assert {"R_101": "MaskXTimm", "VGG_16": "MaskXVGG16"}[backbone] == cfg.MODEL.BACKBONE.NAME
    assert cfg.MODEL.MASKX.BACKBONE.NAME == "resnet101.tv2_in1k"
    assert f"output/ClassPatterns/{name.removesuffix('.yaml')}" == cfg.OUTPUT_DIR
    (train,), (test,) = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    assert test == {"voc": "maskx_voc_2012_val", "coco": "maskx_coco_2017_val"}[data]
    if method == "deeplab":
        assert cfg.MODEL.META_ARCHITECTURE == "MaskXDeepLab"
        assert (cfg.TEST.MASKX.SIZES, cfg.TEST.MASKX.CRF) == ((241, 328, 401), True)
        assert cfg.MODEL.MASKX.LARGE_FOV == {
            "HIDDEN_CHANNELS": 1024,
            "DILATION": 12,
            "DROPOUT": 0.5,
        }
        assert train == "maskx_proxy_train"
    else:
        assert cfg.MODEL.META_ARCHITECTURE == "MaskXImageClassifier"
        tags = "maskx_voc_2012_trainaug_tags"
        assert train == {"voc": tags, "coco": "maskx_coco_2017_train"}[data]


@pytest.mark.parametrize("name", IMAGE_EXPERIMENTS)
def test_imagenet_weights_fit_the_images_of_class_patterns(name, downloads):
    """Nothing is downloaded, and R-101 and VGG-16 are built without their memory."""
    with torch.device("meta"):
        build_backbone(load(name, CLASS_PATTERNS))
    assert downloads == ["vgg16" if "VGG" in name else "resnet101.tv2_in1k"]


@pytest.mark.parametrize("name", TRANSFER_YAMLS)
def test_every_file_of_transfernet_builds_trains_and_predicts(name, make_transfer_cfg, tiny_sparse):
    cfg = make_transfer_cfg(file=name)
    model = Trainer.build_model(cfg).train()
    with EventStorage():
        losses = model(next(iter(Trainer.build_train_loader(cfg))))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    Trainer.build_optimizer(cfg, model).step()
    sample = next(iter(Trainer.build_test_loader(cfg, tiny_sparse)))
    is_network = isinstance(model, MaskXTransferNet)
    assert is_network == ("classifier" not in name)
    if is_network:
        model.has_classifier.fill_(True)
    with torch.no_grad():
        (result,) = model.eval()(sample)
    assert result["image_labels_prob"].shape == (4,)
    stage = cfg.MODEL.MASKX.TRANSFERNET.STAGE
    assert ("attention" in name) == (is_network and stage == "attention")
    if is_network:
        assert (stage in ("joint", "source")) == ("loss_masks" in losses)
        assert ("sem_seg" in result) == (stage != "attention")


@pytest.mark.parametrize("name", TRANSFER_EXPERIMENTS)
def test_experiments_of_transfernet_have_the_papers_settings(name):
    """Input 320, Adam with 0.001 and then 0.0005, 15,000 iterations of 64 images, lambda 2."""
    cfg = load(name, TRANSFERNET)
    keys, solver = cfg.MODEL.MASKX.TRANSFERNET, cfg.SOLVER
    assert cfg.INPUT.MASKX.SIZE == 320
    assert cfg.DATASETS.TRAIN == ("maskx_coco60_train2014", "maskx_voc_2012_trainaug_tags")
    assert (solver.MASKX.OPTIMIZER, solver.WEIGHT_DECAY, solver.STEPS) == ("adam", 0, ())
    assert 60 + len(VOC_CLASSES) == cfg.MODEL.MASKX.NUM_CLASSES
    assert (keys.MASK_WEIGHT, keys.NUM_FACTORS) == (2.0, 1024)
    assert (keys.METHOD == "transfernet") == keys.FREEZE_ENCODER
    is_vgg = cfg.MODEL.BACKBONE.NAME == "MaskXVGG16"
    assert is_vgg == ("R_101" not in name)
    assert "stage0" in name or (keys.DECODER == "unpooling") == is_vgg
    assert (keys.ATTENTION == "fc") == ("_fc_" in name)
    # 0.004 of the reference is for pixels that are not divided by a deviation.
    deviation = sum(cfg.MODEL.PIXEL_STD) / 3
    scale = round(0.004 * deviation, 2) if "_fc_" in name and keys.METHOD == "transfernet" else 0
    assert scale == keys.FEATURE_SCALE
    if name.startswith("Base-"):
        return
    assert f"output/TransferNet/{name.removesuffix('.yaml')}" == cfg.OUTPUT_DIR
    fraction = re.search(r"fraction_(\d+)", name)
    expected = int(fraction[1]) / 100 if fraction else 1
    assert expected == cfg.DATASETS.MASKX.SOURCE_FRACTION
    if name.startswith("stage0"):
        assert math.ceil(20 * (17443 + 10582) / 16) == solver.MAX_ITER
        assert cfg.MODEL.MASKX.BACKBONE.PRETRAINED
        return
    assert solver.IMS_PER_BATCH == 64
    rates = {"attention": 0.001, "joint": 0.0005, "source": 0.0005, "target": 0.0001}
    assert rates[keys.STAGE] == solver.BASE_LR
    assert solver.MAX_ITER == 15000
    if not keys.FREEZE_ENCODER:
        assert pytest.approx(5e-6) == solver.BASE_LR * solver.MASKX.BACKBONE_LR_FACTOR
        assert (keys.STAGE == "source") == cfg.MODEL.MASKX.BACKBONE.PRETRAINED
    assert (() if name.startswith("stage1") else ("maskx_voc_2012_val",)) == cfg.DATASETS.TEST


def test_stages_of_transfernet_start_from_one_another():
    written = {
        f"{load(name, TRANSFERNET).OUTPUT_DIR}/model_final.pth": name
        for name in TRANSFER_YAMLS
        if not name.startswith("Base-")
    }
    for name in written.values():
        cfg = load(name, TRANSFERNET)
        keys = cfg.MODEL.MASKX.TRANSFERNET
        if "stage0" in name:
            assert (cfg.MODEL.WEIGHTS, keys.CLASSIFIER_WEIGHTS) == ("", "")
            continue
        first = load(written[keys.CLASSIFIER_WEIGHTS], TRANSFERNET)
        assert first.MODEL.META_ARCHITECTURE == "MaskXTransferClassifier"
        before = [first]
        assert bool(cfg.MODEL.WEIGHTS) == ("stage2" in name)
        if cfg.MODEL.WEIGHTS:
            before.append(load(written[cfg.MODEL.WEIGHTS], TRANSFERNET))
            for key in ("METHOD", "ATTENTION", "FEATURE_SCALE", "NUM_FACTORS", "DECODER"):
                assert before[1].MODEL.MASKX.TRANSFERNET[key] == keys[key]
        for other in before:
            for key in ("BACKBONE", "RESNETS", "PIXEL_MEAN", "PIXEL_STD"):
                assert other.MODEL[key] == cfg.MODEL[key]
            assert other.INPUT.MASKX.SIZE == cfg.INPUT.MASKX.SIZE
            assert other.DATASETS.TRAIN == cfg.DATASETS.TRAIN


def test_full_transfernet_has_the_papers_layers():
    """VGG-16, attention of 211 M weights for 20 x 20 positions, decoder of 7.7 M."""
    cfg = load("stage2_joint_fc_VGG_16.yaml", TRANSFERNET)
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.WEIGHTS = "stage1.pth"  # not read here
    cfg.TEST.MASKX.CRF = False
    with torch.device("meta"):
        network = build_model(cfg).network
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in network.named_children()}
    assert network.attention.feature_embed.weight.shape == (1024, 512 * 20 * 20)
    assert network.attention.attend.weight.shape == (400, 1024)
    assert sizes["classifier"] == 512 * 512 + 512 + 512 * 80 + 80
    assert 7.6e6 < sizes["decoder"] < 7.8e6
    assert sizes["encoder"] == 14_714_688


def test_the_quick_schedules_of_larvseg_start_from_their_classifier(tmp_path):
    register_all(tmp_path)
    start = load(LARVSEG_START, LARVSEG)
    classifier = build_model(start)
    backbone = classifier.classifier.backbone.state_dict()
    assert len(class_names_of(start.DATASETS.TRAIN[0])) == start.MODEL.MASKX.NUM_CLASSES
    for name in ("larvseg", "baseline"):
        cfg = load(f"quick_schedules/{name}_scenes_cpu.yaml", LARVSEG)
        assert f"{start.OUTPUT_DIR}/model_final.pth" == cfg.MODEL.WEIGHTS
        model = build_model(cfg)
        model.load_state_dict(classifier.state_dict(), strict=False)
        found = model.network.backbone.state_dict()
        assert found.keys() == backbone.keys()
        assert all(torch.equal(found[key], value) for key, value in backbone.items())
        # The tags are of the scenes that the classifier saw; the masks are of others.
        assert cfg.DATASETS.TRAIN[1:] == start.DATASETS.TRAIN
        assert cfg.DATASETS.TEST == start.DATASETS.TEST


@pytest.mark.parametrize("name", [name for name in LARVSEG_YAMLS if name != LARVSEG_START])
def test_every_file_of_larvseg_builds_trains_and_predicts(name, make_larvseg_cfg, tiny_sparse):
    cfg = make_larvseg_cfg(file=name)
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    is_attentive = cfg.MODEL.MASKX.LARVSEG.MEMORY != "none"
    batches = iter(Trainer.build_train_loader(cfg))
    seen = set()
    for _ in range(sum(cfg.DATASETS.MASKX.JOINT.RATIOS) or len(cfg.DATASETS.TRAIN)):
        batch = next(batches)
        if batch[0]["data_set"] in seen:
            continue
        seen.add(batch[0]["data_set"])
        losses = model(batch)
        assert ("loss_attention" in losses) == is_attentive
        if not batch[0]["attention"] and is_attentive:
            assert losses["loss_attention"] == 0
        assert all(torch.isfinite(loss) for loss in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert seen == set(cfg.DATASETS.TRAIN)
    sample = next(iter(Trainer.build_test_loader(cfg, tiny_sparse)))
    (result,) = model.eval()(sample)
    assert result["sem_seg"].shape == (64, 64)
    assert result["top_scores"].shape == (1, 64, 64)


@pytest.mark.parametrize("name", LARVSEG_EXPERIMENTS)
def test_experiments_of_larvseg_have_the_papers_settings(name):
    """SGD from 1e-3 to 1e-5, poly 0.9, 16 images, 512 and 320 pixels, M = K_top = 20, 3:3:2."""
    cfg = load(name, LARVSEG)
    keys, joint, solver = cfg.MODEL.MASKX.LARVSEG, cfg.DATASETS.MASKX.JOINT, cfg.SOLVER
    pattern = r"(larvseg|baseline|supervised)_(?:(\w+)_)?(ViT_B_16|R_50_FPN)_((?:W?A|C171).*)\.yaml"
    method, form, backbone, data = re.fullmatch(pattern, name).groups()
    data = data.split("_")
    assert f"output/LarvSeg/{name.removesuffix('.yaml')}" == cfg.OUTPUT_DIR
    assert (solver.MASKX.OPTIMIZER, solver.MOMENTUM, solver.WEIGHT_DECAY) == ("sgd", 0.9, 0)
    assert (solver.BASE_LR, solver.BASE_LR_END, solver.MASKX.POLY_POWER) == (1e-3, 1e-5, 0.9)
    assert (solver.LR_SCHEDULER_NAME, solver.WARMUP_ITERS) == ("WarmupPolyLR", 0)
    assert solver.IMS_PER_BATCH == 16
    assert (1280000 if "I21K" in data else 320000) == solver.MAX_ITER
    assert (cfg.INPUT.MASKX.SIZE, cfg.TEST.MASKX.WINDOW, cfg.TEST.MASKX.STRIDE) == (512, 512, 512)
    assert (keys.BANK_SIZE, keys.WARM_UP, keys.ATTENTIVE_WEIGHT) == (20, 0, 0.1)
    assert (1 if form == "single_image" else 20) == keys.TOP_TOKENS
    memory = form if form in ("single_image", "score_map") else "cross_image"
    assert (memory if method == "larvseg" else "none") == keys.MEMORY
    assert (form if form == "layernorm" else "temperature") == keys.LOGIT_FORM
    assert (form if form == "normalised" else "weighted") == keys.POOLING
    assert (0.2 if {"I124", "WA847", "I585", "I21K"} & set(data) else 0.1) == keys.IMAGE_WEIGHT
    assert (100 if {"A847", "WA847", "I21K"} & set(data) else 0) == keys.SAMPLE_CLASSES
    sets = {
        "C171": ("maskx_coco_stuff_train", "mask", 512, False),
        "A150": ("maskx_ade20k_150_train", "mask", 512, False),
        "A847": ("maskx_ade20k_847_train", "mask", 512, False),
        "WA150": ("maskx_ade20k_150_train_tags", "image", 512, False),
        "WA847": ("maskx_ade20k_847_train_tags", "image", 512, False),
        "I124": ("maskx_imagenet_ade150", "image", 320, True),
        "I585": ("maskx_imagenet_ade847", "image", 320, True),
        "I21K": ("maskx_imagenet_all", "image", 320, True),
    }
    names, supervision, sizes, is_single = zip(*(sets[part] for part in data), strict=True)
    assert names == cfg.DATASETS.TRAIN
    assert (joint.SUPERVISION or ("mask",)) == supervision
    assert (joint.SIZES or (512,) * len(data)) == sizes
    assert (joint.SINGLE_LABEL or (False,) * len(data)) == is_single
    assert {1: (), 2: (4, 4), 3: (3, 3, 2)}[len(data)] == joint.RATIOS
    only = form.removeprefix("attention_") if form and form.startswith("attention_") else None
    attention = tuple(part == "C171" or part == only for part in data) if only else ()
    assert attention == joint.ATTENTION
    assert not joint.CROP_LEVEL_LABELS
    ade = next((part.strip("WA") for part in data if part.strip("WA") in ("150", "847")), None)
    assert (f"maskx_ade20k_{ade}_val" if ade else "maskx_coco_stuff_val",) == cfg.DATASETS.TEST
    is_split = method != "supervised" and ade
    assert (f"ade{ade}_raw" if is_split else "all") == cfg.DATASETS.MASKX.SPLIT
    if backbone == "ViT_B_16":
        assert cfg.MODEL.BACKBONE.NAME == "MaskXTimm"
        assert cfg.MODEL.MASKX.BACKBONE.NAME == "vit_base_patch16_384.augreg_in21k_ft_in1k"
        assert cfg.MODEL.MASKX.BACKBONE.DROP_PATH == 0.1
        assert cfg.MODEL.MASKX.BACKBONE.PRETRAINED
    else:
        assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.FPN.OUT_CHANNELS) == (50, 512)


def test_full_larvseg_has_the_papers_layers(downloads):
    """A base transformer of 16-pixel patches, and a table of 160 + 92 classes in 768 channels."""
    register_all()
    cfg = load("larvseg_ViT_B_16_C171_WA150.yaml", LARVSEG)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        network = build_model(cfg).network
    assert downloads == ["vit_base_patch16_384.augreg_in21k_ft_in1k"]
    assert 85e6 < sum(p.numel() for p in network.backbone.parameters()) < 87e6
    union = {*coco_stuff_names(), *(entry.name for entry in ade20k_150_classes())}
    assert network.classifier.class_embeddings.shape == (len(union), 768)
    assert network.bank.means.shape == (len(union), 20, 768)


STAGE_OF = {"MaskXConceptEmbedding": 1, "MaskXConceptRefinement": 2, "MaskXConceptSegmentation": 3}


@pytest.mark.parametrize("name", CONCEPT_YAMLS)
def test_every_file_of_concept_mask_builds_trains_and_predicts(name, make_concept_cfg):
    cfg = make_concept_cfg(file=name)
    Trainer(cfg)  # checks the configuration with its data
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = next(iter(Trainer.build_train_loader(cfg)))
    losses = model(batch)
    assert losses.keys() == {
        1: {"loss_embedding"},
        2: {"loss_boxes", "loss_matching", "loss_discrimination"},
        3: {"loss_masks"},
    }[STAGE_OF[cfg.MODEL.META_ARCHITECTURE]] - (
        {"loss_discrimination"} if "no_negatives" in name else set()
    )
    assert all(torch.isfinite(loss) for loss in losses.values())
    optimizer = Trainer.build_optimizer(cfg, model)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    test = next(iter(Trainer.build_test_loader(cfg, "tiny_concepts")))
    (result,) = model.eval()(test)
    assert result["masks"].shape == (len(test[0]["query"]), 64, 64)
    assert model.embedding.layers.norm3.weight.shape == (12,)
    assert hasattr(model.embedding.layers, "relu3") == ("final_relu" in name)


@pytest.mark.parametrize("name", CONCEPT_EXPERIMENTS)
def test_experiments_of_concept_mask_have_the_papers_settings(name):
    """Section 3 and 4 of the paper; rates, batches and iterations are in its supplement."""
    cfg = load(name, CONCEPT_MASK)
    keys, own = cfg.MODEL.MASKX.CONCEPT_MASK, STAGE_OF[cfg.MODEL.META_ARCHITECTURE]
    stage, what = re.match(r"stage(\d)_(\w+?)_(?:\w+_)?R_50\.yaml", name).groups()
    assert int(stage) == own
    assert what == {1: "embedding", 2: "refinement", 3: "segmentation"}[own]
    assert cfg.MODEL.BACKBONE.NAME == "MaskXTimm"
    assert cfg.MODEL.MASKX.BACKBONE.NAME == "resnet50.tv2_in1k"
    assert cfg.MODEL.MASKX.BACKBONE.OUTPUT_STRIDE in (0, 32)
    assert ((300,) if "one_size" in name else (300, 700)) == keys.ATTENTION_SIZES
    assert (keys.NUM_MATCHED, keys.MATCHING_WEIGHT) == (800, 1e-6)
    assert (keys.EMBEDDING_CHANNELS, keys.HIDDEN_CHANNELS) == ((2048, 2048), 1024)
    assert ("resnet50", own == 3) == (keys.ENCODER, keys.ENCODER_PRETRAINED)
    assert ("final_relu" in name) == keys.FINAL_RELU
    assert (0.0 if "no_negatives" in name else 0.1) == keys.DISCRIMINATION_WEIGHT
    assert (own == 1) == cfg.MODEL.MASKX.BACKBONE.PRETRAINED
    assert f"output/ConceptMask/{name.removesuffix('.yaml')}" == cfg.OUTPUT_DIR


def test_stages_of_concept_mask_start_from_one_another():
    names = [name for name in CONCEPT_YAMLS if not name.startswith("Base-")]
    written = {f"{load(name, CONCEPT_MASK).OUTPUT_DIR}/model_final.pth": name for name in names}
    shared = ("EMBEDDING_CHANNELS", "FINAL_RELU", "SPLIT", "WORD_TABLE", "HIDDEN_CHANNELS")
    for name in names:
        cfg = load(name, CONCEPT_MASK)
        stage = STAGE_OF[cfg.MODEL.META_ARCHITECTURE]
        if stage == 1:
            assert cfg.MODEL.WEIGHTS == ""
            continue
        before = load(written[cfg.MODEL.WEIGHTS], CONCEPT_MASK)
        assert STAGE_OF[before.MODEL.META_ARCHITECTURE] == stage - 1
        for key in shared:
            assert before.MODEL.MASKX.CONCEPT_MASK[key] == cfg.MODEL.MASKX.CONCEPT_MASK[key]
        for key in ("BACKBONE", "RESNETS", "PIXEL_MEAN", "PIXEL_STD"):
            assert before.MODEL[key] == cfg.MODEL[key]


def test_full_concept_mask_has_the_papers_size(tmp_path):
    """18K concepts of 512 numbers: 37 M weights of the refinement, as few maps as are asked for."""
    count, dim = 18000, 512
    names = tuple(f"concept {index}" for index in range(count))
    vectors = np.random.default_rng(0).standard_normal((count, dim), np.float32)
    save_word_table(tmp_path / "words", WordTable(names, vectors, np.ones(count)))
    split = ConceptSplit(names, names[:750], names[:80])
    write_concept_split(tmp_path / "split.json", split)
    cfg = load("stage2_refinement_R_50.yaml", CONCEPT_MASK)
    cfg.MODEL.DEVICE = "cpu"
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    keys.WORD_TABLE, keys.OVERLAP = str(tmp_path / "words"), ""
    keys.SPLIT = str(tmp_path / "split.json")
    network = build_model(cfg)
    assert network.refinement.conv1.weight.shape[:2] == (1024, count)
    assert network.refinement.conv2.weight.shape[:2] == (count, 1024)
    assert len(network.split.boxed) == 750
    assert network.embedding.stride == 32
    widths = [network.embedding.layers[i].out_features for i in (0, 3, 6)]
    assert widths == [2048, 2048, 512]
