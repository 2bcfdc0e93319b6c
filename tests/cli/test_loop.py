"""From half-labelled data to a finished data set: the page's own commands, one after another."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskx.cli.main import main
from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.engine.runs import read_run

PAGE = Path(__file__).parents[2] / "docs" / "half_labelled.md"
# What makes a command of the page short; the last of an option counts.
SMALL = ["--image-size", "64", "--iterations", "2", "--batch-size", "2", "--device", "cpu"]


def section(title):
    return PAGE.read_text(encoding="utf-8").partition(title)[2].partition("\n## ")[0]


def blocks(text, language):
    return "".join(re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL))


def commands(text):
    """Words of the commands of a section, without `maskx`."""
    lines = blocks(text, "bash").replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as the page has it, with ``truth.json``; half of the categories have no masks."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("train", "val")):
        path = generate_scenes(tmp_path / name, count=10, size=64, num_categories=4, seed=seed)
        content = json.loads(path.read_text())
        for image in content["images"]:
            del image["stuff_file_name"]
            image["file_name"] = Path(image["file_name"]).name
        path.unlink()
        for file in (tmp_path / name / "images").iterdir():
            file.rename(tmp_path / name / file.name)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "truth.json").write_bytes((tmp_path / "train.json").read_bytes())
    content = json.loads((tmp_path / "train.json").read_text())
    for annotation in content["annotations"]:
        if annotation["category_id"] > 2:
            del annotation["segmentation"], annotation["area"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path


def by_id(name):
    return {a["id"]: a for a in json.loads(Path(name).read_text())["annotations"]}


def correct_the_worst():
    """Do what a person does, in a tool that drops what it does not know; return the id."""
    content = json.loads(Path("completed.json").read_text())
    made = [a for a in content["annotations"] if "segmentation_source" in a]
    worst = min(made, key=lambda a: a["segmentation_quality"])
    worst["segmentation"] = by_id("truth.json")[worst["id"]]["segmentation"]
    del worst["segmentation_source"], worst["segmentation_quality"]
    Path("corrected.json").write_text(json.dumps(content))
    return worst["id"]


def test_label_few_check_train_complete_correct_train_again(folder, capsys):
    check, train, complete, train_again, complete_again, predict = commands(
        section("# From half-labelled data")
    )
    assert main(check) == 0
    names = [c["name"] for c in json.loads(Path("train.json").read_text())["categories"]]
    assert set(Path("with_masks.txt").read_text().splitlines()) >= set(names[:2])
    assert main([*train, *SMALL]) == 0

    # As the console does it, in a process that has imported nothing before.
    words = [sys.executable, "-m", "maskx", *complete, "--device", "cpu"]
    path = {"PYTHONPATH": str(PAGE.parents[1])}
    subprocess.run(words, check=True, capture_output=True, env=os.environ | path)
    made = {i for i, a in by_id("completed.json").items() if "segmentation_source" in a}
    assert made == {i for i, a in by_id("train.json").items() if "segmentation" not in a}
    assert "The worst first" in Path("completed.html").read_text()

    worst = correct_the_worst()
    assert main([*train_again, *SMALL]) == 0
    assert read_run("output/second").split.without_masks == ()
    assert main([*complete_again, "--device", "cpu"]) == 0
    final = by_id("finished.json")
    assert final[worst] == by_id("corrected.json")[worst]
    drawn = {i for i, a in final.items() if "segmentation_source" not in a}
    assert drawn == final.keys() - made | {worst}
    again = {a["segmentation_source"] for a in final.values() if "segmentation_source" in a}
    assert again <= {"maskx:second+grabcut", "grabcut"}
    data = load_coco("finished.json", "train")
    assert all("segmentation" in a for r in data.records for a in r["annotations"])

    assert main([*predict, "--device", "cpu"]) == 0
    assert len(list(Path("output/predict").glob("*.png"))) == 10


def test_options_in_a_file(folder):
    text = section("\n## Options in a file\n")
    Path("first.yaml").write_text(blocks(text, "yaml"))
    val = json.loads(Path("val.json").read_text())
    val["images"] = val["images"][:2]
    ids = {image["id"] for image in val["images"]}
    val["annotations"] = [a for a in val["annotations"] if a["image_id"] in ids]
    Path("val.json").write_text(json.dumps(val))
    Path("with_masks.txt").write_text(val["categories"][0]["name"])
    train, again = commands(text)
    assert main([*train, *SMALL]) == 0
    assert main(again) == 0
    first, repeated = (read_run(f"output/{name}") for name in ("first", "repeated"))
    assert first.settings == repeated.settings
    assert first.split.with_masks == repeated.split.with_masks
    assert len(first.split.with_masks) == 1
    weights = [torch.load(r.weights_file, weights_only=True)["model"] for r in (first, repeated)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
