import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.systems.class_patterns.patterns import load_patterns
from maskx.systems.class_patterns.pipeline import TagSettings, learn_from_tags
from maskx.systems.class_patterns.steps import PATTERNS_NAME

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished quick start; ``scenes`` in it are its training images."""
    folder = tmp_path_factory.mktemp("run")
    json_file = generate_scenes(
        folder / "scenes", count=6, size=64, num_categories=4, style="sparse", seed=0
    )
    data = load_coco(json_file, folder / "scenes")
    learn_from_tags(
        data,
        data,
        TagSettings(image_size=64, iterations=1, segmenter_iterations=1),
        image_root=folder / "scenes",
        output=folder,
        device=torch.device("cpu"),
        report=lambda line: None,
    )
    return folder


@pytest.fixture
def run_tool(monkeypatch, capsys):
    def run(name, *arguments):
        """Run a tool in this process; returns what it printed and how it ended."""
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        ended = None
        try:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        except SystemExit as error:
            ended = error.code
        return capsys.readouterr().out, ended

    return run


def inputs(folder):
    data = (folder / "scenes" / "annotations.json", folder / "scenes")
    return ("--model", folder / "classifier", "--coco", *data)


def test_from_a_classifier_to_masks_in_two_commands(run_folder, run_tool, tmp_path):
    patterns = tmp_path / "patterns"
    printed, ended = run_tool("discover_class_patterns", *inputs(run_folder), "--output", patterns)
    assert ended is None
    assert "| class | layer | images |" in printed
    expected = load_patterns(
        run_folder / "patterns" / PATTERNS_NAME, network=None, class_names=None
    )
    found = load_patterns(
        patterns / PATTERNS_NAME, network=expected.network, class_names=expected.class_names
    )
    for layer, of_layer in expected.layers.items():
        assert torch.equal(of_layer.direction, found.layers[layer].direction)

    arguments = (*inputs(run_folder), "--patterns", patterns / PATTERNS_NAME)
    arguments += ("--output", tmp_path / "proxy")
    printed, ended = run_tool("make_proxy_masks", *arguments, "--layers", "C41", "C43")
    assert ended is None
    lines = printed.splitlines()
    assert [line[:7] for line in lines if line.startswith("| C4")] == ["| C41 |", "| C43 |"]
    name = "C41-zero-ignore"
    assert str(tmp_path / "proxy" / f"{name}.json") in lines[-1]
    for mask in (run_folder / "proxy" / "masks" / name).glob("*.png"):
        made = tmp_path / "proxy" / "masks" / name / mask.name
        assert made.read_bytes() == mask.read_bytes()
    # Other settings use the same projections.
    printed, _ = run_tool("make_proxy_masks", *arguments, "--layers", "C41", "--threshold", "otsu")
    assert "6 images: 0 written (0 of them were there, but damaged), 6 kept" in printed


def test_shards_then_merge(run_folder, run_tool, tmp_path):
    arguments = (*inputs(run_folder), "--output", tmp_path, "--layers", "C41")
    for shard in ("0/2", "1/2"):
        printed, ended = run_tool("discover_class_patterns", *arguments, "--shard", shard)
        assert ended is None
        assert f"Wrote shard {shard[0]} of 2, 3 images." in printed
    _, ended = run_tool("discover_class_patterns", *arguments, "--merge")
    assert ended is None
    assert [path.name for path in tmp_path.iterdir()] == [PATTERNS_NAME]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layers", "C41", "conv9"), "error: SmallResNet has no layer 'conv9'; it has C41, C42"),
        (("--shard", "2/2"), "error: Shard 2 of 2 does not exist"),
        (("--max-images-per-class", "0"), "error: max_images_per_class must be at least 1"),
        (("--merge",), "holds shards of no runs"),
        (("--draw", "dodo"), "error: --draw names 'dodo'. The classifier knows "),
        (("--batch-size", "0"), "error: batch_size must be at least 1 image, got 0"),
    ],
)
def test_what_cannot_be_found_is_said_in_a_line(run_folder, run_tool, tmp_path, arguments, words):
    _, ended = run_tool(
        "discover_class_patterns", *inputs(run_folder), "--output", tmp_path / "out", *arguments
    )
    assert words in ended


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--layers", "layer3"),
            "has no class patterns of layer 'layer3'. Layers in the file: C41",
        ),
        (("--threshold", "mean"), "error: threshold must be one of 'zero', 'otsu'"),
        (("--patterns", "none.safetensors"), "error: There is no file 'none.safetensors'"),
    ],
)
def test_masks_that_cannot_be_made_are_said_in_a_line(
    run_folder, run_tool, tmp_path, arguments, words
):
    given = ("--patterns", run_folder / "patterns" / PATTERNS_NAME, "--output", tmp_path / "out")
    _, ended = run_tool("make_proxy_masks", *inputs(run_folder), *given, *arguments)
    assert words in ended


def test_the_missing_crf_is_said_before_the_network_runs(
    run_folder, run_tool, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    given = ("--patterns", run_folder / "patterns" / PATTERNS_NAME, "--output", tmp_path / "out")
    _, ended = run_tool("make_proxy_masks", *inputs(run_folder), *given, "--crf")
    assert ended.startswith("error: The dense CRF needs pydensecrf2")
    assert not (tmp_path / "out").exists()


def test_other_classes_are_named(run_folder, run_tool, tmp_path):
    content = json.loads((run_folder / "scenes" / "annotations.json").read_text())
    for image in content["images"]:
        del image["stuff_file_name"]
    content["categories"].append({"id": 99, "name": "teapot"})
    (tmp_path / "tags.json").write_text(json.dumps(content))
    data = (tmp_path / "tags.json", run_folder / "scenes")
    arguments = ("--model", run_folder / "classifier", "--coco", *data, "--output", tmp_path)
    _, ended = run_tool("discover_class_patterns", *arguments)
    assert "Not among them: ['teapot']; missing: none" in ended


def test_arguments_that_belong_together(run_folder, run_tool, tmp_path, capsys):
    for arguments in (
        ("--model", run_folder / "classifier"),
        ("--config-file", "x.yaml"),
        (*inputs(run_folder), "--merge", "--workers", "2"),
        (*inputs(run_folder), "--shard", "0/2", "--workers", "2"),
    ):
        _, ended = run_tool("discover_class_patterns", *arguments, "--output", tmp_path)
        assert ended == 2


@pytest.mark.parametrize("text", ["1", "1/", "a/2", "-1/2"])
def test_shards_that_are_none_are_said(text):
    read_shard = runpy.run_path(str(TOOLS / "discover_class_patterns.py"))["_read_shard"]
    assert read_shard("1/4") == (1, 4)
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not I/N, such as 0/4"):
        read_shard(text)


def test_the_commands_run_as_they_are_typed():
    for name in ("discover_class_patterns", "make_proxy_masks"):
        command = [sys.executable, str(TOOLS / f"{name}.py"), "--help"]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        assert "--model FOLDER" in finished.stdout
