"""The classifier for the tools of class patterns, and the chain from image labels to a network."""

import inspect
import json
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from settings import pairs

import maskx.systems.class_patterns.detectron2.chain
from maskx.core.digests import network_hash, sha256_of
from maskx.data.coco import load_coco
from maskx.data.images import ImageMapper
from maskx.data.label_maps import read_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.detectron2 import Trainer, register_coco
from maskx.engine.runs import read_run
from maskx.systems.class_patterns.detectron2.chain import TagChain, format_results, open_classifier
from maskx.systems.class_patterns.patterns import load_patterns
from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings, mask_path
from maskx.systems.class_patterns.steps import PATTERNS_NAME, discover, project

ROOT = Path(__file__).parents[2]
QUICK = ROOT / "configs" / "ClassPatterns" / "quick_schedules"
CLASSIFIER, SEGMENTER = QUICK / "classifier_scenes_cpu.yaml", QUICK / "deeplab_scenes_cpu.yaml"
TOOLS = ROOT / "tools"
FOLDERS = {"classifier", "patterns", "proxy", "segmenter", "retraining", "retrained"}
OTSU = ProxyMaskSettings(threshold="otsu", resolve="standardised", crf=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Annotation file and image root of six scenes with four classes."""
    root = tmp_path_factory.mktemp("scenes")
    return generate_scenes(root, count=6, size=64, num_categories=4, seed=0, style="sparse"), root


@pytest.fixture(scope="module")
def opts(data):
    """KEY VALUE pairs that make both networks tiny."""
    return pairs(
        {
            "DATASETS.MASKX.REGISTER": [["tiny_scenes", *map(str, data)]],
            "DATASETS.TRAIN": ("tiny_scenes",),
            "DATASETS.TEST": ("tiny_scenes",),
            "MODEL.MASKX.NUM_CLASSES": 4,
            "MODEL.MASKX.LARGE_FOV.HIDDEN_CHANNELS": 8,
            "INPUT.MASKX.SIZE": 48,
            "TEST.MASKX.SIZES": (32, 48),
            "SEED": 1,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.MAX_ITER": 2,
            "SOLVER.STEPS": (),
            "SOLVER.CHECKPOINT_PERIOD": 1,
        }
    )


def make_chain(output, opts, *more, **kwargs):
    options = {"masks": OTSU} | kwargs
    given = {f"{name}_opts": (*opts, *more) for name in ("classifier", "segmenter")}
    return TagChain(CLASSIFIER, SEGMENTER, output, **(given | options))


@pytest.fixture(scope="module")
def finished(opts, tmp_path_factory):
    """A chain that was run without a stop: its folder, results and what it said."""
    lines = []
    output = tmp_path_factory.mktemp("finished") / "out"
    results = make_chain(output, opts).run(report=lines.append)
    return output, results, lines


def weights_of(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --- the chain


def test_the_steps_leave_their_results(finished, data):
    output, results, lines = finished
    files = {"results.json", "predictions.png"}
    assert {path.name for path in output.iterdir()} == FOLDERS | files
    assert cv2.imread(str(output / "predictions.png")).shape[1] == 5 * 256
    assert json.loads((output / "results.json").read_text()) == results
    assert results["classifier"]["image_labels/mAP"] >= 0
    assert results["proxy"].keys() == {"mIoU", "mIoU_decided_only", "undecided"}
    for name in ("segmenter", "retrained"):
        assert results[name] == read_run(output / name).results
        assert results[name]["sem_seg/mIoU"] > 0
    assert any("| class | layer | images |" in line for line in lines)
    table = format_results(results).splitlines()
    assert len(table) == 2 + 4
    assert table[3] == f"| proxy | mIoU | {results['proxy']['mIoU']:.1f} | training images |"
    assert not [name for name in DatasetCatalog.list() if "tag_chain" in name]


def test_training_sees_image_labels_and_made_masks_alone(finished, data):
    output, _, _ = finished
    trained_on = {
        "segmenter": output / "proxy" / "C41-otsu-standardised.json",
        "retrained": output / "retraining" / "masks.json",
    }
    for name, json_file in trained_on.items():
        config = read_run(output / name).settings
        assert config["DATASETS"]["TRAIN"] != ["tiny_scenes"]
        assert str(json_file) in (output / name / "config.yaml").read_text()
        assert json.loads(json_file.read_text())["annotations"] == []
    records = load_coco(*data).records
    for record in records:
        label_map = read_label_map(
            mask_path(output / "retraining" / "label_maps", record["image_id"]),
            64,
            64,
            num_classes=4,
            image_id=record["image_id"],
        )
        allowed = {0, *(label + 1 for label in record["image_labels"])}
        assert set(label_map.ravel().tolist()) <= allowed


def test_both_segmentation_networks_start_alike(finished, opts, tmp_path):
    """With learning rate 0 the parameters stay as they start: the backbone as the classifier's."""
    parameters = []
    make_chain(tmp_path / "out", opts, "SOLVER.BASE_LR", 0.0, "SOLVER.MAX_ITER", 1).run(
        report=parameters.append
    )
    one, other = (weights_of(tmp_path / "out" / name) for name in ("segmenter", "retrained"))
    names = [name for name in one if "running_" not in name]
    assert all(torch.equal(one[name], other[name]) for name in names)
    backbone = [name for name in names if name.startswith("network.backbone.")]
    backbone = [name for name in backbone if "num_batches" not in name]
    assert len(backbone) > 10
    classifier = weights_of(tmp_path / "out" / "classifier")
    for name in backbone:
        assert torch.equal(one[name], classifier[name.replace("network", "classifier", 1)])
    run = read_run(tmp_path / "out" / "retrained")
    final = tmp_path / "out" / "classifier" / "model_final.pth"
    assert run.started_from["MODEL.WEIGHTS"].sha256 == sha256_of(final)
    one, other = (weights_of(finished[0] / name) for name in ("segmenter", "retrained"))
    assert not same_weights(one, other)


def test_nothing_finished_is_run_again(finished, opts, monkeypatch):
    output, results, _ = finished
    before = files_of(output)
    monkeypatch.setattr(Trainer, "train", None)
    monkeypatch.setattr(maskx.systems.class_patterns.detectron2.chain, "_load_trained", None)
    lines = []
    assert make_chain(output, opts).run(report=lines.append) == results
    assert len(lines) == 5
    assert all("finished before, not run again" in line for line in lines)
    after = files_of(output)
    assert {path for path in before if after[path] != before[path]} == {output / "results.json"}


def stop_at(monkeypatch, target, call):
    """Let a call of a function, counted from 1, end with a KeyboardInterrupt."""
    owner, _, name = target.rpartition(".")
    classes = {"Trainer": Trainer, "ImageMapper": ImageMapper}
    owner = classes.get(owner) or sys.modules[owner]
    original, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    is_bound = inspect.ismethod(original)  # a class method
    monkeypatch.setattr(owner, name, staticmethod(stopping) if is_bound else stopping)


def copy_steps(output, target, steps):
    """Copy a chain as if it had come no further than these steps."""
    target.mkdir()
    for name in steps:
        shutil.copytree(output / name, target / name)


MASKS = ("classifier",)
FIRST = (*MASKS, "patterns", "proxy")
PREDICTIONS = (*FIRST, "segmenter")
SECOND = (*PREDICTIONS, "retraining")
HERE, PIPELINE = (
    "maskx.systems.class_patterns.detectron2.chain",
    "maskx.systems.class_patterns.steps",
)


@pytest.mark.parametrize(
    ("done", "target", "call", "asks"),
    [
        ((), "Trainer.before_step", 1, False),  # nothing to lose
        ((), "Trainer.before_step", 2, True),
        ((), "Trainer.test", 1, True),
        (MASKS, "ImageMapper.read_image", 3, False),  # images are read before any is written
        (MASKS, f"{PIPELINE}.write_projections", 3, True),
        (MASKS, "maskx.systems.class_patterns.proxy_masks.write_label_map", 3, True),
        (MASKS, f"{PIPELINE}.write_proxy_json", 1, True),
        (FIRST, "Trainer.before_step", 2, True),
        (PREDICTIONS, f"{PIPELINE}.write_label_map", 3, True),
        (PREDICTIONS, f"{HERE}.write_proxy_json", 1, True),
        (SECOND, "Trainer.before_step", 2, True),
        ((*SECOND, "retrained"), f"{HERE}.write_json", 1, False),
    ],
)
def test_an_interrupted_chain_goes_on(
    finished, opts, tmp_path, monkeypatch, done, target, call, asks
):
    output, quiet = tmp_path / "out", {"report": str}
    if done:
        copy_steps(finished[0], output, done)
    before = files_of(output)
    with monkeypatch.context() as patch:
        stop_at(patch, target, call)
        with pytest.raises(KeyboardInterrupt):
            make_chain(output, opts).run(**quiet)
    assert not (output / "results.json").exists()
    if asks:
        with pytest.raises(ValueError, match=r"holds an interrupted (run|step)\. Add --resume"):
            make_chain(output, opts).run(**quiet)
    results = make_chain(output, opts).run(resume=asks, **quiet)
    after = files_of(output)
    assert {path for path in before if after[path] != before[path]} == set()
    assert results == finished[1]
    for name in ("classifier", "segmenter", "retrained"):
        assert same_weights(weights_of(output / name), weights_of(finished[0] / name))


def test_images_that_are_predicted_are_kept_and_damaged_ones_made_again(
    finished, opts, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    copy_steps(finished[0], output, PREDICTIONS)
    with monkeypatch.context() as patch:
        stop_at(patch, f"{HERE}.write_proxy_json", 1)
        with pytest.raises(KeyboardInterrupt):
            make_chain(output, opts).run(report=print)
    damaged, *kept = sorted((output / "retraining" / "label_maps").glob("*.png"))
    damaged.write_bytes(b"")
    before = files_of(output / "retraining")
    results = make_chain(output, opts).run(resume=True, report=print)
    after = files_of(output / "retraining")
    assert len(kept) == 5
    assert [after[path] for path in kept] == [before[path] for path in kept]
    assert results == finished[1]


def test_a_finished_folder_may_move(finished, opts, tmp_path):
    output, results, _ = finished
    shutil.copytree(output, tmp_path / "moved")
    lines = []
    assert make_chain(tmp_path / "moved", opts).run(report=lines.append) == results
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("more", "kwargs", "words"),
    [
        ((), {"layer": "C42"}, r"layer is 'C42', but the run in '.*proxy' was .* with 'C41'"),
        (
            (),
            {"masks": ProxyMaskSettings(crf=False)},
            r"masks is 'zero-ignore', but the run in '.*proxy' was .* with 'otsu-standardised'",
        ),
        ((), {"max_images_per_class": 3}, r"max_images_per_class is 3, but .*proxy' was .*800"),
        (("INPUT.MASKX.SIZE", 64), {}, r"SIZE is 64, but the run in '.*classifier' was .* with 48"),
        (
            ("TEST.MASKX.SIZES", (48,)),
            {},
            r"TEST\.MASKX\.SIZES is \[48\], but the run in '.*classifier' was started with \[32",
        ),
        (
            ("MODEL.MASKX.LARGE_FOV.DILATION", 3),
            {"classifier_opts": None},
            r"DILATION is 3, but the run in '.*segmenter' was started with 4",
        ),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(finished, opts, more, kwargs, words):
    output = finished[0]
    if "classifier_opts" in kwargs:
        kwargs = {"classifier_opts": opts}
    before = files_of(output)
    with pytest.raises(ValueError, match=words):
        make_chain(output, opts, *more, **kwargs).run(resume=True)
    assert files_of(output) == before


def test_steps_of_another_classifier_are_refused(finished, opts, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    path = output / "classifier" / "model_final.pth"
    state = torch.load(path, weights_only=True)
    state["model"]["classifier.backbone.layer4.0.conv1.weight"] *= -1
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"classifier '.*' is not what the run in '.*proxy' was"):
        make_chain(output, opts).run(resume=True)
    # So are those that would be left when this one is removed.
    for gone, error, words in (
        ("proxy", FileNotFoundError, r"segmenter' trained on '.*json', which is gone\. Restore it"),
        ("segmenter", ValueError, r"MODEL\.WEIGHTS .* is not what .*retrained' was started from"),
        ("retrained", ValueError, r"patterns\.safetensors.*network"),
        ("patterns", ValueError, r"segmenter '.*' is not what the run in '.*retraining' was"),
    ):
        shutil.rmtree(output / gone)
        with pytest.raises(error, match=f"(?s){words}"):
            make_chain(output, opts).run(resume=True, report=print)
    shutil.rmtree(output / "retraining")
    make_chain(output, opts).run(report=print)


def test_other_masks_behind_the_same_names_are_refused(finished, opts, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    path = tmp_path / "out" / "retraining" / "masks.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"json_file '.*masks\.json' is not what .*retrained' was"):
        make_chain(tmp_path / "out", opts).run()


def test_other_masks_on_the_same_classifier(finished, opts, tmp_path):
    copy_steps(finished[0], tmp_path / "out", MASKS)
    before = files_of(tmp_path / "out")
    results = make_chain(tmp_path / "out", opts, layer="C43").run(report=str)
    assert results["classifier"] == finished[1]["classifier"]
    after = files_of(tmp_path / "out")
    assert {path: after[path] for path in before} == before
    assert (tmp_path / "out" / "proxy" / "C43-otsu-standardised.json").is_file()


def test_folders_of_something_else_are_refused(opts, tmp_path):
    path = tmp_path / "classifier" / "model_final.pth"
    path.parent.mkdir()
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"holds checkpoints without run\.json"):
        make_chain(tmp_path, opts).run()
    assert [path.name for path in tmp_path.iterdir()] == ["classifier"]


@pytest.mark.parametrize(
    ("more", "kwargs", "words"),
    [
        ((), {"layer": "conv9"}, r"has no layer 'conv9'; it has C41, C42, C43"),
        ((), {"max_images_per_class": 0}, r"max_images_per_class is 0\. Allowed: 1 or more"),
        (("MODEL.MASKX.NUM_CLASSES", 5), {}, r"NUM_CLASSES is 5, but data set 'tiny_scenes' has 4"),
        (("DATASETS.TRAIN", ("none",)), {}, r"There is no data set 'none'"),
        (("SOLVER.MASKX.OPTIMIZER", "lamb"), {}, r"OPTIMIZER is 'lamb'"),
        (("SOLVER.MAX_ITERS", 1), {}, r"Non-existent key: SOLVER\.MAX_ITERS"),
        (("OUTPUT_DIR", "x"), {}, r"Use --output instead"),
        (("TEST.MASKX.SIZES", (0,)), {}, r"test_sizes \(TEST\.MASKX\.SIZES\) is \(0,\)"),
        (
            ("MODEL.META_ARCHITECTURE", "MaskXDeepLab"),
            {},
            r"is MaskXDeepLab, but the config of an image classifier .* Set MaskXImageClassifier",
        ),
        (
            ("MODEL.META_ARCHITECTURE", "MaskXImageClassifier"),
            {},
            r"is MaskXImageClassifier, but the config of a segmentation network .*MaskXDeepLab",
        ),
        (("MODEL.META_ARCHITECTURE", "MaskY"), {}, r"META_ARCHITECTURE is MaskY, but the config"),
        (("MODEL.BACKBONE.NAME", "MaskYNet"), {}, r"'MaskYNet', which .* Allowed: .*MaskXSmallRes"),
        (("MODEL.MASKX.IN_FEATURE", "layer3"), {}, r"has no layer 'C41'; it has conv1"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(opts, tmp_path, more, kwargs, words):
    with pytest.raises(ValueError, match=words):
        make_chain(tmp_path / "out", opts, *more, **kwargs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ("MODEL.BACKBONE.NAME", "MaskXVGG16"),
            r"lacks 26 of the weights of its backbone MaskXVGG16.*PRETRAINED True",
        ),
        (
            ("INPUT.FORMAT", "BGR"),
            r"FORMAT is 'BGR' in .*deeplab_scenes_cpu\.yaml, but 'RGB' in .*classifier_scenes_cpu",
        ),
    ],
)
def test_another_backbone_is_not_started_from_the_classifier(opts, tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        make_chain(tmp_path, opts, segmenter_opts=(*opts, *more))
    weights = tmp_path / "own.pth"
    torch.save({"model": {}}, weights)
    own = ("MODEL.WEIGHTS", str(weights))
    chain = make_chain(tmp_path, opts, segmenter_opts=(*opts, *more, *own))
    assert {str(weights)} == {s.cfg.MODEL.WEIGHTS for s in (chain.segmenter, chain.retrained)}


def test_imagenet_weights_go_before_the_classifier(opts, tmp_path, downloads):
    more = ("MODEL.BACKBONE.NAME", "MaskXTimm", "MODEL.MASKX.BACKBONE.NAME", "resnet18")
    more += ("MODEL.MASKX.BACKBONE.PRETRAINED", True)
    chain = make_chain(tmp_path, opts, *more)
    assert {s.cfg.MODEL.WEIGHTS for s in (chain.segmenter, chain.retrained)} == {""}


def test_the_missing_crf_is_said_first(opts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match="pydensecrf2"):
        make_chain(tmp_path / "out", opts, masks=ProxyMaskSettings())
    with pytest.raises(ImportError, match="pydensecrf2"):
        make_chain(tmp_path / "out", opts, "TEST.MASKX.CRF", True)


def test_a_missing_config_is_named(opts, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'none\.yaml': there is no such config file"):
        TagChain(Path("none.yaml"), SEGMENTER, tmp_path / "out", masks=OTSU)


def test_the_test_data_need_the_same_classes(data, opts, tmp_path):
    content = json.loads(data[0].read_text())
    content["categories"][1]["name"] = "teapot"
    path = data[0].with_name("renamed.json")
    path.write_text(json.dumps(content))
    register_coco("renamed", path, data[1])
    given = (*opts, "DATASETS.TEST", ("renamed",))
    with pytest.raises(ValueError, match="'teapot' of data set 'renamed' is not in 'tiny_"):
        make_chain(tmp_path / "out", opts, segmenter_opts=given)


def test_true_masks_are_not_needed(data, opts, tmp_path):
    """With tags alone nothing is said of the proxy masks."""
    content = json.loads(data[0].read_text())
    labels = {record["image_id"]: record["image_labels"] for record in load_coco(*data).records}
    ids = [category["id"] for category in content["categories"]]
    for image in content["images"]:
        image.pop("stuff_file_name", None)
        image["image_labels"] = [ids[label] for label in labels[image["id"]]]
    path = tmp_path / "tags.json"
    path.write_text(json.dumps(content | {"annotations": []}))
    register_coco("tags", path, data[1])
    chain = make_chain(tmp_path / "out", opts, "DATASETS.TRAIN", ("tags",), "SOLVER.MAX_ITER", 1)
    results = chain.run(report=str)
    assert results["proxy"] == {}
    assert results["retrained"]["sem_seg/mIoU"] > 0


def test_the_crf_of_masks_and_predictions(opts, tmp_path):
    pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
    more = ("TEST.MASKX.CRF", True, "SOLVER.MAX_ITER", 1)
    results = make_chain(tmp_path / "out", opts, *more, masks=ProxyMaskSettings()).run(report=str)
    assert (tmp_path / "out" / "proxy" / "C41-zero-ignore-crf.json").is_file()
    assert results["retrained"]["sem_seg/mIoU"] > 0


# --- the command line


def as_arguments(opts):
    pairs = zip(opts[::2], opts[1::2], strict=True)
    return [text for key, value in pairs for text in (key, str(value))]


def test_the_tool_runs_the_chain_and_says_errors_in_a_line(
    finished, opts, tmp_path, monkeypatch, capsys
):
    tool = str(TOOLS / "train_class_patterns.py")
    command = ["--classifier", str(CLASSIFIER), "--segmenter", str(SEGMENTER)]
    command += ["--threshold", "otsu", "--resolve", "standardised", "--output"]

    def run_here(*args):
        monkeypatch.setattr(sys, "argv", [tool, *args])
        runpy.run_path(tool, run_name="__main__")
        return capsys.readouterr().out

    printed = run_here(*command, str(tmp_path), *as_arguments(opts))
    assert f"\n\n{format_results(finished[1])}\n" in printed
    printed = run_here(*command, str(tmp_path), *as_arguments(opts))
    assert printed.count("finished before, not run again") == 5
    other = ("--layer", "C43", *as_arguments(opts))
    with pytest.raises(SystemExit, match=r"^error: .*layer is 'C43', but .* 'C41'"):
        run_here(*command, str(tmp_path), *other)
    with pytest.raises(SystemExit, match=r"^error: threshold must be one of 'zero', 'otsu'"):
        run_here(*command, str(tmp_path / "new"), "--threshold", "mean")
    with pytest.raises(SystemExit, match=r"^error: --num-gpus 99 asks for more GPUs"):
        run_here(*command, str(tmp_path / "new"), "--num-gpus", "99")
    stop_at(monkeypatch, "Trainer.before_step", 1)
    with pytest.raises(SystemExit, match=r"^interrupted; .* --resume goes on"):
        run_here(*command, str(tmp_path / "new"), *as_arguments(opts))


# --- the classifier


@pytest.fixture
def weights(finished):
    return finished[0] / "classifier" / "model_final.pth"


def test_the_classifier_is_opened_as_it_was_trained(finished, weights, opts, data):
    source, records, class_names = open_classifier(CLASSIFIER, weights, opts)
    expected = load_coco(*data)
    assert class_names == expected.class_names
    for record, like in zip(records, expected.records, strict=True):
        for key in ("image_id", "file_name", "height", "width", "image_labels", "supervision"):
            assert record[key] == like[key]
    state = weights_of(weights.parent)
    for name, value in source.classifier.state_dict().items():
        assert torch.equal(value, state[f"classifier.{name}"])
    assert not source.classifier.training
    samples = [source.read_image(record) for record in expected.records[:2]]
    assert source.model.preprocess(samples).shape == (2, 3, 48, 48)
    assert source.settings["INPUT.MASKX.SIZE"] == 48
    json.dumps(source.settings)
    # What processes take along.
    copied = pickle.loads(pickle.dumps(source))
    assert torch.equal(
        copied.model.preprocess([copied.read_image(records[0])])[0],
        source.model.preprocess(samples)[0],
    )
    patterns = load_patterns(
        finished[0] / "patterns" / PATTERNS_NAME,
        network=network_hash(source.classifier),
        class_names=class_names,
    )
    assert list(patterns.layers) == ["C41"]


def test_the_two_tools_work_with_it(weights, opts, data, tmp_path, monkeypatch, capsys):
    given = ["--config-file", str(CLASSIFIER), "--weights", str(weights), "--output", str(tmp_path)]
    given += ["--layers", "C41", "C43", "--opts", *as_arguments(opts)]

    def run_tool(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *args, *given])
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    name = load_coco(*data).class_names[0]
    printed = run_tool("discover_class_patterns", "--draw", name)
    assert "Components explain" in printed
    assert len(list(tmp_path.glob("components_*_C4[13].png"))) == 2
    printed = run_tool("make_proxy_masks", "--patterns", str(tmp_path / PATTERNS_NAME))
    assert [line[:7] for line in printed.splitlines() if line[:3] == "| C"] == [
        "| C41 |",
        "| C43 |",
    ]
    # Images go by their common folder.
    images = Path(load_coco(*data).records[0]["file_name"]).parent
    assert len(load_coco(tmp_path / "C41-zero-ignore.json", images).records) == 6


def test_layers_of_detectron2s_own_resnet_go_by_their_modules(opts, tmp_path):
    given = (
        *opts,
        "MODEL.BACKBONE.NAME",
        "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH",
        18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        64,
        "MODEL.RESNETS.OUT_FEATURES",
        ["res5"],
    )
    with pytest.raises(ValueError, match=r"has no layer 'C41'; it has"):
        make_chain(tmp_path / "out", given)
    chain = make_chain(tmp_path / "out", given, layer="res5.0")
    model = Trainer.build_model(chain.classifier.cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    source, records, class_names = open_classifier(CLASSIFIER, tmp_path / "model.pth", given)
    patterns = discover(source, records, class_names, ["res5.0"], output=tmp_path, report=str)
    assert patterns.layers["res5.0"].direction.shape == (4, 512)


def test_patterns_of_another_network_are_refused(finished, weights, opts, tmp_path):
    source, records, class_names = open_classifier(CLASSIFIER, weights, opts)
    patterns = discover(source, records, class_names, ["C41"], output=tmp_path, report=str)
    resized, _, _ = open_classifier(CLASSIFIER, weights, (*opts, "INPUT.MASKX.SIZE", 64))
    with pytest.raises(ValueError, match=r"with INPUT\.MASKX\.SIZE 48, but .* has .* 64"):
        project(resized, records, patterns, ["C41"], tmp_path)
    # The same weights at another stride give other features.
    dilated, _, _ = open_classifier(
        CLASSIFIER, weights, (*opts, "MODEL.MASKX.BACKBONE.OUTPUT_STRIDE", 4)
    )
    assert network_hash(dilated.classifier) == patterns.network
    with pytest.raises(ValueError, match=r"OUTPUT_STRIDE 8, but .* has .*OUTPUT_STRIDE 4"):
        project(dilated, records, patterns, ["C41"], tmp_path)
    with torch.no_grad():
        source.classifier.classifier.bias += 1
    with pytest.raises(ValueError, match=r"patterns was made with network .*, but .* has network"):
        project(source, records, patterns, ["C41"], tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"nothing", r"model\.pth' is no checkpoint, or is damaged"),
        (b"", r"model\.pth' is no checkpoint, or is damaged"),
        ([1, 2], r"model\.pth' holds a list, so it is no checkpoint"),
        (
            {"model": {}},
            r"lacks 107 of the model's weights.*: 'classifier\.backbone\.conv1\.weight",
        ),
    ],
)
def test_weights_that_are_none_are_refused(opts, tmp_path, content, words):
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        open_classifier(CLASSIFIER, path, opts)


def test_weights_of_a_deeper_network_are_refused(opts, tmp_path):
    given = (*opts, "MODEL.BACKBONE.NAME", "MaskXTimm", "MODEL.MASKX.BACKBONE.NAME")
    model = Trainer.build_model(make_chain(tmp_path / "out", (*given, "resnet34")).classifier.cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    with pytest.raises(
        ValueError, match=r"holds \d+ weights that .*Classifier does not have: .*lay"
    ):
        open_classifier(CLASSIFIER, tmp_path / "model.pth", (*given, "resnet18"))


def test_what_does_not_belong_together_is_refused(weights, opts, tmp_path):
    with pytest.raises(ValueError, match="but the config of an image classifier is asked for"):
        open_classifier(SEGMENTER, weights, opts)
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS '.*none\.pth': there is no such"):
        open_classifier(CLASSIFIER, tmp_path / "none.pth", opts)
    with pytest.raises(FileNotFoundError, match="there is no such config file"):
        open_classifier("none.yaml", weights, opts)


def test_images_without_known_labels_are_left_out_and_counted(weights, opts, data, caplog):
    records = load_coco(*data).records
    plain = [
        {key: record[key] for key in ("file_name", "image_id", "height", "width")}
        for record in records
    ]
    for record, like in zip(plain[:2], records[:2], strict=True):
        record["image_labels"] = like["image_labels"]
    register_as(plain, "partly", load_coco(*data).class_names)
    given = (*opts, "DATASETS.TRAIN", ("partly", "tiny_scenes"))
    _, found, _ = open_classifier(CLASSIFIER, weights, given)
    assert [record["image_id"] for record in found] == [r["image_id"] for r in records[:2]]
    assert {record["supervision"] for record in found} == {"image"}
    assert "4 of the 6 images of 'partly' are left out" in caplog.text
    assert "made of 'partly' alone, the first of DATASETS.TRAIN; not of tiny_scenes" in caplog.text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("file_name", "image_id"), r"None of the 6 images of 'bad' .* has image labels"),
        (("file_name", "image_labels"), r"has a record \(.*\.(png|jpg)\) without image_id"),
    ],
)
def test_records_that_cannot_be_used_are_named(weights, opts, data, keys, words):
    loaded = load_coco(*data)
    plain = [{key: record[key] for key in keys} for record in loaded.records]
    register_as(plain, "bad", loaded.class_names)
    with pytest.raises(ValueError, match=words):
        open_classifier(CLASSIFIER, weights, (*opts, "DATASETS.TRAIN", ("bad",)))


def register_as(records, name, class_names):
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = list(class_names)
