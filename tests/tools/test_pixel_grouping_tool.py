import json
import runpy
import sys
from pathlib import Path

import pytest

from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.systems.larvseg.pipeline import LarvSegChain, LarvSegMethod, LarvSegSettings
from maskx.systems.larvseg.samples import sets_of_one_file

TOOL = Path(__file__).parents[2] / "tools" / "pixel_grouping.py"


@pytest.fixture
def run_tool(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--device", "cpu", *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    json_file = generate_scenes(folder, count=8, size=64, num_categories=8, seed=1, style="sparse")
    data = load_coco(json_file, folder)
    split = resolve_split("scenes_half", data.class_names)
    settings = LarvSegSettings(image_size=32, start_iterations=0, iterations=1, batch_size=2)
    chain = LarvSegChain(sets_of_one_file(data, split, image_size=32), settings, output=folder)
    chain.train_method(LarvSegMethod("baseline"))
    return folder


def test_groups_of_a_split_are_measured_apart(trained, tmp_path, run_tool, capsys):
    run_tool(
        "--model",
        trained / "baseline",
        "--masks-for",
        "scenes_half",
        "--coco",
        trained / "annotations.json",
        trained,
        "--output",
        tmp_path / "found.json",
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["mIoU"]) == {"all", "base", "novel"}
    assert all(0 < value <= 100 for value in found["mIoU"].values())
    assert len(found["per_class"]) == 13
    printed = capsys.readouterr().out.split()
    assert printed[printed.index("novel") + 1] == f"{found['mIoU']['novel']:.2f}"


def test_a_folder_without_a_model_is_named(trained, tmp_path, run_tool):
    with pytest.raises(SystemExit, match=r"^error: .*run\.json"):
        run_tool("--model", tmp_path, "--coco", trained / "annotations.json", trained)
